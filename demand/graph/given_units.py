"""Demand graphs whose probabilities are given instead of learned, such as published profiles."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from demand.arguments import instance_of, instances_of, mapping_of
from demand.errors import DemandError
from demand.graph.walks import WalkArrays
from demand.seconds import one_number
from demand.units import END, START, CostModel, Execution, ParallelCalls, Unit, check_run


@dataclass(frozen=True)
class GivenUnit:
    """A unit of a published profile: executions of it, and how likely each unit is to follow.

    The two are drawn independently of each other, as from the stage lists of the Hermes artifact,
    which keep no joint samples.

    Args:
        unit: the unit that this is about.
        executions: possible executions of it, equally likely.
        successors: probability of each following unit, or "end", by name; of sum 1.

    Raises:
        DemandError: no executions, one of another unit or that says what it waited for, or
            successors that are no probabilities of sum 1.
    """

    unit: Unit
    executions: Sequence[Execution]
    successors: Mapping[str, float]

    def __post_init__(self) -> None:
        instance_of("unit", self.unit, Unit)
        object.__setattr__(self, "executions", check_run("executions", self.executions))
        name = self.unit.name
        expected = "the probability of each next unit, by name"
        successors = mapping_of(f"successors of unit {name!r}", self.successors, expected)
        object.__setattr__(self, "successors", successors)
        if not self.executions:
            raise DemandError(f"unit {name!r} has no executions; give at least one")
        for execution in self.executions:
            if execution.unit != self.unit:
                raise DemandError(
                    f"unit {name!r} is given an execution of {execution.unit}; "
                    f"expected executions of {self.unit}"
                )
            if execution.after is not None:
                raise DemandError(
                    f"unit {name!r} is given an execution that waited for units {execution.after}, "
                    "and a graph of given probabilities has units one after the other; give it "
                    "with after=None"
                )
        check_probabilities(f"successors of unit {name!r}", self.successors)


def check_probabilities(what: str, probabilities: Mapping[str, float]) -> None:
    """Raise `DemandError` unless all are in [0, 1] and their sum is 1 within 1e-6."""
    for name, probability in probabilities.items():
        probability = one_number(f"{what}: the probability of {name!r}", probability)
        if not 0.0 <= probability <= 1.0:
            raise DemandError(f"{what}: {name!r} has probability {probability}; expected 0 to 1")
    total = math.fsum(probabilities.values())
    if not abs(total - 1.0) <= 1e-6:
        raise DemandError(
            f"{what} have probabilities of sum {total:.9g}; expected 1: add what is missing "
            f'("end" included) or divide by the sum'
        )


def check_given(units: Sequence[GivenUnit], entries: Mapping[str, float]) -> None:
    """Raise `DemandError` unless `units` and `entries` make a graph.

    That is: distinct names, entries of sum 1, every successor a unit or "end".
    """
    names = [given.unit.name for given in instances_of("units", units, GivenUnit)]
    if len(set(names)) < len(names) or not names:
        raise DemandError(f"units are {names}; expected distinct names, at least one")
    check_probabilities("entries", entries)
    for what, successors in [("the start", entries)] + [
        (f"unit {given.unit.name!r}", given.successors) for given in units
    ]:
        strangers = sorted(set(successors) - {*names, *([] if what == "the start" else [END])})
        if strangers:
            raise DemandError(
                f"{what} is followed by {', '.join(map(repr, strangers))}, which is not a unit; "
                f"expected one of {', '.join(names)}"
            )


def given_arrays(
    units: Sequence[GivenUnit],
    entries: Mapping[str, float],
    cost: CostModel,
    parallel_calls: ParallelCalls,
) -> WalkArrays:
    """Walk arrays in which every execution of a unit meets every successor, by its probability.

    The samples of a node are its executions over and over, once for each successor.
    """
    number = {given.unit.name: at for at, given in enumerate(units, 2)} | {END: 0, START: 1}
    samples = [(1, 0.0, number[name], p) for name, p in entries.items() if p > 0.0]
    for given in units:
        node = number[given.unit.name]
        each = [cost.seconds(execution, parallel_calls) for execution in given.executions]
        samples += [
            (node, seconds, number[name], p)
            for name, p in given.successors.items()
            if p > 0.0
            for seconds in each
        ]
    names = {given.unit.name: given for given in units}
    return WalkArrays.of(names, *map(list, zip(*samples, strict=True)))
