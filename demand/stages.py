"""Runs whose units go side by side, told as sequences of stages: what demand graphs learn from.

A unit that waits for none is of stage 0, any other of the stage after the last one it waits for. So
units of one stage can go side by side, and a sequence has a stage for each unit: nothing of it
changes. A stage of several units counts as one execution with all their calls. Its name is made of
theirs, each once: three searches are a stage "search" with three calls, and a search beside a
calculation is "math + search".
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import final

from demand.arguments import instance_of, instances_of
from demand.dependencies import (
    After,
    check_after,
    longest_path,
    parents,
    read_after,
    stage_numbers,
)
from demand.errors import DemandError
from demand.seconds import check_seconds
from demand.units import (
    CostModel,
    Execution,
    ParallelCalls,
    Progress,
    Unit,
    check_run,
    check_waits,
    is_sequence,
    says_nothing,
)

BESIDE = " + "
"""Between the names of units in the name of their stage."""


@final
@dataclass(frozen=True, slots=True)
class Underway:
    """A unit of a run that is being executed, or could be: all that it waits for is over.

    Args:
        unit: what it is.
        after: positions, among the units that are over, of those it waited for; `None`: of the
            last one.
        attained_seconds: service that it has received, over its calls.
        elapsed_seconds: service that the longest of its calls has received.

    Raises:
        DemandError: what is no unit, no list of positions or no seconds.
    """

    unit: Unit
    after: After = None
    attained_seconds: float = 0.0
    elapsed_seconds: float = 0.0

    def __post_init__(self) -> None:
        name = instance_of("unit that is underway", self.unit, Unit).name
        if self.after is not None:
            object.__setattr__(self, "after", read_after(name, self.after))
        for what in ("attained_seconds", "elapsed_seconds"):
            object.__setattr__(self, what, check_seconds(what, getattr(self, what)))


def in_stages(run: Sequence[Execution], cost: CostModel | None = None) -> tuple[Execution, ...]:
    """`run` as the sequence of its stages; a sequence as it is.

    A stage of several units takes the sum of their seconds over its calls, and those of the longest
    of them on the critical path. So the sum over the stages is that of the run; their critical path
    is that of an application whose every stage waits for all of the last one, never shorter than
    that of the run and longer where a unit waits for some of a stage alone.

    Args:
        run: what was executed.
        cost: seconds of each execution; `None` for the default.

    Raises:
        DemandError: what is no run, units that wait for what is not before them, or one with " + "
            in its name beside others.
    """
    executed = check_run("run", run)
    if says_nothing(executed):
        return executed
    if is_sequence(executed):
        return tuple(_alone(execution) for execution in executed)
    cost = CostModel() if cost is None else instance_of("cost", cost, CostModel)
    return tuple(_stage(units, cost) for units in by_stage(executed))


def in_line(stages: Sequence[Sequence[Execution]]) -> list[Execution]:
    """The run of which these are the units of each stage, each waiting for all of the last one."""
    run: list[Execution] = []
    last: tuple[int, ...] = ()
    for units in stages:
        first = len(run)
        alone = len(units) == 1 and last in ((), (first - 1,))
        run += [_alone(units[0])] if alone else [replace(one, after=last) for one in units]
        last = tuple(range(first, len(run)))
    return run


def progress_in_stages(
    executed: Sequence[Execution], underway: Sequence[Underway] = (), cost: CostModel | None = None
) -> Progress:
    """How far a run has come whose units go side by side, told by its stages.

    The first stage of which a unit is underway is the current one. What its units have received,
    those that are over included, counts as received by it, and so does what units of later stages
    have received that did not wait for all of it: no service counts twice. On the critical path it
    has come as far as the longest path through all these.

    Args:
        executed: units that are over, in the order in which they ended, so that each comes after
            those it waited for; `after` are positions among them.
        underway: units that are not over and wait for none that is not.
        cost: seconds of each execution; `None` for the default.

    Raises:
        DemandError: what is no run, a unit that waits for what is not before it, seconds that are
            no number, or a unit with " + " in its name beside others.
    """
    executed = check_run("executed", executed)
    underway = instances_of("underway", underway, Underway)
    if not underway:
        return Progress(in_stages(executed, cost))
    last = (len(executed) - 1,) if executed else ()
    if len(underway) == 1 and underway[0].after in (None, last) and is_sequence(executed):
        one = underway[0]
        return Progress(
            in_stages(executed), one.unit.name, one.attained_seconds, one.elapsed_seconds
        )
    cost = CostModel() if cost is None else instance_of("cost", cost, CostModel)
    stages = by_stage(executed)
    afters = [execution.after for execution in executed]
    waits = [last if one.after is None else one.after for one in underway]
    numbers = [_number(afters, after) for after in waits]
    at = min(numbers)
    beside = [one.unit for one, number in zip(underway, numbers, strict=True) if number == at]
    own = [execution.unit for stage in stages[at : at + 1] for execution in stage]
    attained = [cost.seconds(execution) for stage in stages[at:] for execution in stage]
    elapsed = [
        0.0 if number < at else cost.seconds(execution, "critical_path")
        for execution, number in zip(executed, stage_numbers(afters), strict=True)
    ]
    return Progress(
        tuple(_stage(units, cost) for units in stages[:at]),
        _name([*own, *beside]),
        sum([*attained, *(one.attained_seconds for one in underway)]),
        longest_path([*afters, *waits], [*elapsed, *(one.elapsed_seconds for one in underway)]),
    )


def progress_at_end(
    executed: Sequence[Execution], underway: Sequence[Underway], cost: CostModel | None = None
) -> Progress:
    """`progress_in_stages` at the end of a unit, with those that could begin underway.

    Where nothing of the current stage has received anything, the run is between two stages.

    Raises:
        DemandError: as `progress_in_stages`.
    """
    progress = progress_in_stages(executed, underway, cost)
    return progress if progress.attained_seconds else Progress(progress.executed)


def progress_after(run: Sequence[Execution], finished: int, cost: CostModel | None) -> Progress:
    """How far `run` has come after its first `finished` units, told by its stages.

    Of the others, those that wait for these alone are underway, and have received nothing yet;
    where that is so of all of their stage, the run is between two stages.

    Raises:
        DemandError: as `progress_in_stages`.
    """
    if says_nothing(run):
        return Progress(run[:finished])
    if is_sequence(run):
        return Progress(in_stages(run[:finished]))
    waits = parents([execution.after for execution in run])
    ready = [
        Underway(execution.unit, after)
        for execution, after in zip(run[finished:], waits[finished:], strict=True)
        if all(before < finished for before in after)
    ]
    return progress_at_end(run[:finished], ready, cost)


def between_stages(run: Sequence[Execution], finished: int) -> bool:
    """Whether no unit after the first `finished` of `run` is of a stage of which one is over."""
    if is_sequence(run):
        return True
    numbers = stage_numbers([execution.after for execution in run])
    return not set(numbers[:finished]) & set(numbers[finished:])


def stage_ahead(
    run: Sequence[Execution], finished: int, cost: CostModel | None = None
) -> Execution | None:
    """The stage that follows the first `finished` units of `run`, as one execution.

    Returns:
        `None` where something of it is over; of a sequence, its next unit.

    Raises:
        DemandError: as `in_stages`.
    """
    if is_sequence(run):
        return _alone(run[finished])
    if not between_stages(run, finished):
        return None
    number = stage_numbers([execution.after for execution in run])[finished]
    return in_stages(run, cost)[number]


def seconds_after(
    run: Sequence[Execution], finished: int, cost: CostModel, parallel_calls: ParallelCalls
) -> float:
    """Seconds that `run` still needs after its first `finished` units.

    Raises:
        DemandError: as `CostModel.run_seconds`.
    """
    if parallel_calls == "sum" or is_sequence(run):
        return sum(cost.seconds(execution, parallel_calls) for execution in run[finished:])
    check_waits("the run", run)
    left = [cost.seconds(execution, parallel_calls) for execution in run[finished:]]
    return longest_path([execution.after for execution in run], [*[0.0] * finished, *left])


def by_stage(executed: Sequence[Execution]) -> list[list[Execution]]:
    """The units of each stage, in their order.

    Raises:
        DemandError: units that wait for what is not before them.
    """
    check_waits("the run", executed)
    afters = [execution.after for execution in executed]
    stages: list[list[Execution]] = []
    for execution, number in zip(executed, stage_numbers(afters), strict=True):
        if number == len(stages):
            stages.append([])
        stages[number].append(execution)
    return stages


def check_names(beside: Collection[str]) -> None:
    """Raise `DemandError` if of units side by side one has a name like that of a stage."""
    if len(beside) > 1:
        for name in beside:
            if BESIDE in name:
                raise DemandError(
                    f"unit {name!r} goes beside others, and {BESIDE!r} stands between the names of "
                    "a stage: with it one stage may be taken for another; choose another name"
                )


def _number(afters: Sequence[After], after: tuple[int, ...]) -> int:
    """The stage of a unit that waits for `after` among units that wait for `afters`."""
    check_after("the run", [*afters, after])
    return stage_numbers([*afters, after])[-1]


def _stage(units: Sequence[Execution], cost: CostModel) -> Execution:
    """The units of a stage as one execution with all their calls."""
    if len(units) == 1:
        return _alone(units[0])
    calls = sum(execution.parallelism for execution in units)
    kinds = {execution.unit.kind for execution in units}
    return Execution(
        Unit(
            _name([execution.unit for execution in units]),
            kinds.pop() if len(kinds) == 1 else "tool",
        ),
        sum(execution.parallelism * execution.input_tokens for execution in units) / calls,
        sum(execution.parallelism * execution.output_tokens for execution in units) / calls,
        calls,
        sum(cost.seconds(execution) for execution in units) / calls,
        longest_seconds=max(cost.seconds(execution, "critical_path") for execution in units),
    )


def _alone(execution: Execution) -> Execution:
    return execution if execution.after is None else replace(execution, after=None)


def _name(units: Sequence[Unit]) -> str:
    names = {unit.name for unit in units}
    check_names(names)
    return BESIDE.join(sorted(names))
