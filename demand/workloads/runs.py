"""Random runs of an application that is described stage by stage, by means and probabilities."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from demand.errors import DemandError
from demand.flow import Ints, visits, visits_together, without_end
from demand.lazy_runs import ColumnRuns
from demand.seconds import Floats
from demand.units import END, CostModel, Execution, Kind, Unit


@dataclass(frozen=True)
class Stage:
    """One unit of a generated application, described by the means of what it takes.

    Args:
        kind: of the unit.
        then: probability of each next stage or "end", of sum 1.
        tokens: mean (input, output) per call, for an llm.
        calls: mean number of parallel calls.
        seconds: mean per call, for what is not an llm.
    """

    kind: Kind
    then: Mapping[str, float]
    tokens: tuple[float, float] = (0.0, 0.0)
    calls: float = 1.0
    seconds: float | None = None


@dataclass(frozen=True)
class RunGenerator:
    """Draws runs of an application that starts at its first stage.

    Tokens, seconds and calls are gamma variables around the means of a stage, each draw on its
    own; tokens and calls are rounded at random, so that rounding leaves the means alone. `run`
    draws one run step by step; `runs` draws many from the same law together, a step of all at a
    time, and of one seed others than `run`.

    Args:
        stages: by unit name.
        scale: multiplies all tokens and seconds.
        spread: coefficient of variation of tokens and of seconds per call.
        call_spread: coefficient of variation of the number of parallel calls.

    Raises:
        DemandError: no stages, next stages that are none, probabilities that are negative or do
            not sum to 1, or a stage from which the end cannot be reached.
    """

    stages: Mapping[str, Stage]
    scale: float = 1.0
    spread: float = 0.3
    call_spread: float = 0.1

    def __post_init__(self) -> None:
        if not self.stages:
            raise DemandError("there are no stages; expected at least one, that leads to 'end'")
        for name, stage in self.stages.items():
            strangers = sorted(set(stage.then) - {*self.stages, END})
            if strangers:
                raise DemandError(f"stage {name!r} leads to {strangers}, which are no stages")
            shares = stage.then.values()
            if not (all(share >= 0.0 for share in shares) and math.isclose(sum(shares), 1.0)):
                raise DemandError(
                    f"stage {name!r} goes on with probabilities {dict(stage.then)}; expected "
                    "numbers of at least 0 whose sum is 1"
                )
        endless = without_end(
            {
                name: [then for then, share in stage.then.items() if share > 0.0]
                for name, stage in self.stages.items()
            }
        )
        if endless:
            raise DemandError(
                f"from {', '.join(endless)} the end cannot be reached, so that runs would not "
                "end; give one of them a way to 'end'"
            )

    def run(self, rng: np.random.Generator) -> list[Execution]:
        """Draw one run, from the first stage to "end"."""
        executed = []
        for name in visits(next(iter(self.stages)), lambda name: self._following(name, rng), END):
            stage = self.stages[name]
            executed.append(self._execute(Unit(name, stage.kind), stage, rng))
        return executed

    def runs(self, rng: np.random.Generator, n: int) -> ColumnRuns:
        """Draw `n` runs, as columns that make their executions when asked."""
        names = list(self.stages)
        end = len(names)
        number = {name: at for at, name in enumerate([*names, END])}
        ways = max(len(stage.then) for stage in self.stages.values())
        bounds, targets = np.full((end, ways), np.inf), np.zeros((end, ways), np.int16)
        for at, stage in enumerate(self.stages.values()):
            bounds[at, : len(stage.then) - 1] = np.cumsum(list(stage.then.values()))[:-1]
            targets[at, : len(stage.then)] = [number[name] for name in stage.then]

        def following(_: Ints, at: Ints) -> Ints:
            taken = (rng.random(at.size)[:, None] >= bounds[at]).sum(axis=1)
            return targets[at, taken]

        unit, starts = visits_together(np.zeros(n, np.int16), following, end)
        read, written = np.zeros(unit.size), np.zeros(unit.size)
        calls, seconds = np.ones(unit.size, np.int32), np.full(unit.size, np.nan)
        for at, stage in enumerate(self.stages.values()):
            mine = np.flatnonzero(unit == at)
            if stage.calls > 1.0:
                drawn = _many_around(stage.calls, self.call_spread, rng, mine.size)
                calls[mine] = _many_rounded(drawn, rng)
            if stage.seconds is not None:
                mean = stage.seconds * self.scale
                seconds[mine] = _many_around(mean, self.spread, rng, mine.size)
                continue
            for column, mean in zip((read, written), stage.tokens, strict=True):
                tokens = _many_around(mean * self.scale, self.spread, rng, mine.size)
                column[mine] = _many_rounded(tokens, rng)
        units = tuple(Unit(name, stage.kind) for name, stage in self.stages.items())
        return ColumnRuns(units, unit, starts, read, written, calls, seconds)

    def demands(self, rng: np.random.Generator, n: int) -> Floats:
        """Draw `n` runs, and give their total seconds `[n]` under the default cost model."""
        return self.runs(rng, n).seconds(CostModel())

    def mean_seconds(self) -> float:
        """Expected total seconds of a run: expected visits of each stage times its mean."""
        names = list(self.stages)
        moves = np.array(
            [[stage.then.get(name, 0.0) for name in names] for stage in self.stages.values()]
        )
        first = np.eye(len(names))[0]
        visits = np.linalg.solve(np.eye(len(names)) - moves.T, first)
        cost = CostModel()
        each = [
            stage.calls
            * (
                stage.tokens[0] * cost.prefill_seconds_per_token
                + stage.tokens[1] * cost.decode_seconds_per_token
                if stage.seconds is None
                else stage.seconds
            )
            for stage in self.stages.values()
        ]
        return self.scale * float(visits @ each)

    def _following(self, name: str, rng: np.random.Generator) -> str:
        choices = iter(self.stages[name].then.items())
        name, at = next(choices)
        draw = rng.random()
        while draw >= at:
            name, more = next(choices, (name, math.inf))
            at += more
        return name

    def _execute(self, unit: Unit, stage: Stage, rng: np.random.Generator) -> Execution:
        calls = _around(stage.calls, self.call_spread, rng) if stage.calls > 1.0 else 1.0
        parallelism = max(1, _rounded(calls, rng))
        if stage.seconds is not None:
            seconds = _around(stage.seconds * self.scale, self.spread, rng)
            return Execution(unit, parallelism=parallelism, seconds=seconds)
        tokens = [
            max(1, _rounded(_around(mean * self.scale, self.spread, rng), rng))
            for mean in stage.tokens
        ]
        return Execution(unit, tokens[0], tokens[1], parallelism)


def _around(mean: float, spread: float, rng: np.random.Generator) -> float:
    if spread == 0.0:
        return mean
    shape = spread**-2
    return rng.gamma(shape, mean / shape)


def _rounded(number: float, rng: np.random.Generator) -> int:
    return math.floor(number + rng.random())


def _many_around(mean: float, spread: float, rng: np.random.Generator, n: int) -> Floats:
    if spread == 0.0:
        return np.full(n, mean)
    shape = spread**-2
    return rng.gamma(shape, mean / shape, n)


def _many_rounded(numbers: Floats, rng: np.random.Generator) -> Floats:
    """At random, at least 1."""
    return np.maximum(np.floor(numbers + rng.random(numbers.size)), 1.0)
