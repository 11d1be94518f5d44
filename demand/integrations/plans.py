"""A plan whose units begin as soon as those they wait for are over: what is ready, what is left."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final, get_args

import numpy as np

from demand.arguments import check_callable, instance_of, instances_of
from demand.dependencies import After, check_after, parents, read_after
from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.seconds import Floats
from demand.simulation.engine.waits import Waits
from demand.units import Execution, ParallelCalls, Unit

DRAWS = 1000


@final
@dataclass(frozen=True)
class Planned:
    """One unit of a plan that an adapter executes.

    Args:
        unit: what it is; units of kind "llm" are calls to the model, all others the adapter runs.
        make: is handed what the units that it waits for gave, in the order of the plan, when the
            last of them is over. For a call it gives the request, for any other unit what that
            unit gives; the adapter says in which form.
        after: positions in the plan of the units that it waits for, all before its own. `None`:
            of the one before it; `()`: none.
        seconds: what is known of its demand, in seconds of service; `None` if nothing is.

    Raises:
        DemandError: an argument of the wrong kind.
    """

    unit: Unit
    make: Callable[..., Any]
    after: After = None
    seconds: Distribution | None = None

    def __post_init__(self) -> None:
        name = instance_of("unit of a plan", self.unit, Unit).name
        check_callable(f"make of {name!r}", self.make, "a function of what it waits for")
        if self.after is not None:
            object.__setattr__(self, "after", read_after(name, self.after))
        if self.seconds is not None:
            instance_of(f"seconds of {name!r}", self.seconds, Distribution)


@final
class PlanError(DemandError):
    """Units of a plan failed; those that did not wait for them were executed all the same.

    Attributes:
        values: what the units gave that are over, by position in the plan.
        failed: the error of each that failed.
        never_begun: of each that was not begun, the failed ones that it would have waited for,
            directly or not.
    """

    def __init__(
        self,
        units: Sequence[str],
        values: dict[int, Any],
        failed: dict[int, Exception],
        never_begun: dict[int, tuple[int, ...]],
    ) -> None:
        self.values, self.failed, self.never_begun = values, failed, never_begun
        said = [f"unit {at} ({units[at]!r}) failed: {error}" for at, error in failed.items()]
        said += [f"unit {at} ({units[at]!r}) was not begun" for at in never_begun]
        super().__init__(
            f"{len(values)} of {len(units)} units of the plan are over; {'; '.join(said)}"
        )


@final
class OpenPlan:
    """Where the execution of a plan stands. An adapter begins what is ready, and says what ended.

    Units become ready in the order in which those of `simulate_engine` do, whose rule it is
    (`Waits`).

    Args:
        plan: at least one unit, each after those it waits for.
        parallel_calls: what `remaining` is: the "sum" of all that is left, or the longest path
            through it ("critical_path").

    Raises:
        DemandError: no units, what is no unit of a plan, one that waits for itself, a later one or
            none there is, seconds that some have and others lack, or another word.
    """

    def __init__(self, plan: Sequence[Planned], parallel_calls: ParallelCalls = "sum") -> None:
        self.plan = instances_of("the plan", plan, Planned)
        if not self.plan:
            raise DemandError("the plan has no units; expected at least one")
        if parallel_calls not in get_args(ParallelCalls):
            raise DemandError(
                f"parallel_calls is {parallel_calls!r}; expected one of {get_args(ParallelCalls)}"
            )
        afters = [one.after for one in self.plan]
        check_after("the plan", afters)
        told = sum(one.seconds is not None for one in self.plan)
        if told not in (0, len(self.plan)):
            raise DemandError(
                f"{told} of the {len(self.plan)} units of the plan say their seconds; what is left "
                "of it can be told only if all do: give seconds to all, or to none"
            )
        self._told = bool(told)
        self._before = parents(afters)
        self._by_path = parallel_calls == "critical_path"
        self._waits = Waits(
            [Execution(one.unit, seconds=0.0, after=one.after) for one in self.plan]
        )
        self._ready = self._waits.first()
        self._values: dict[int, Any] = {}
        self._failed: dict[int, Exception] = {}
        self._lost: set[int] = set()  # failed, or waiting for one that did
        # The same draws for every question: answers differ by what was seen, not by chance.
        self._uniform = np.random.default_rng(0).random((len(self.plan), DRAWS))

    def take_ready(self) -> list[int]:
        """Positions of the units to begin now, in order; each is given once."""
        ready, self._ready = self._ready, []
        return ready

    def begin(self, position: int) -> Any:
        """A unit begins: what its `make` gives for what it waited for. Whatever that raises is its
        failure, which is to be told by `fail`."""
        self._waits.begin(position)
        return self.plan[position].make(*(self._values[at] for at in self._before[position]))

    def end(self, position: int, value: Any) -> None:
        """A unit that had begun is over, and gave `value`."""
        self._values[position] = value
        self._ready += self._waits.end(position)

    def fail(self, position: int, error: Exception) -> None:
        """A unit that had begun failed: what waits for it will never be ready."""
        self._failed[position] = error
        self._lost.add(position)
        for at in range(position + 1, len(self.plan)):
            if not self._lost.isdisjoint(self._before[at]):
                self._lost.add(at)

    def remaining(self, received: Callable[[int], float]) -> Distribution | None:
        """Seconds that the plan still needs, or `None` if its units do not say theirs.

        Units are taken to be independent. What failed, and what waited for that, needs nothing
        any more.

        Args:
            received: seconds of service that a unit has had by now which has begun and is not over.
        """
        left = [
            at for at in range(len(self.plan)) if at not in self._values and at not in self._lost
        ]
        if not self._told or not left:
            return None
        underway = set(self._waits.underway)
        ends: dict[int, Floats] = {}
        total = np.zeros(DRAWS)
        for at in left:
            seconds = self.plan[at].seconds
            assert seconds is not None
            if at in underway:
                seconds = seconds.condition(received(at))
            shares = np.cumsum(seconds.weights)
            drawn = seconds.values[np.searchsorted(shares[:-1], self._uniform[at] * shares[-1])]
            if self._by_path:
                begins = [ends[before] for before in self._before[at] if before in ends]
                ends[at] = drawn + np.maximum.reduce([np.zeros(DRAWS), *begins])
                total = np.maximum(total, ends[at])
            else:
                total = total + drawn
        return Distribution(total)

    def outcome(self) -> list[Any]:
        """What every unit gave, in the order of the plan, once nothing is underway any more.

        Raises:
            PlanError: units failed.
        """
        if self._failed:
            raise PlanError(
                [one.unit.name for one in self.plan],
                {at: self._values[at] for at in sorted(self._values)},
                {at: self._failed[at] for at in sorted(self._failed)},
                {at: self._causes(at) for at in sorted(self._lost - self._failed.keys())},
            ) from next(iter(self._failed.values()))
        return [self._values[at] for at in range(len(self.plan))]

    def _causes(self, position: int) -> tuple[int, ...]:
        """The failed units that a unit would have waited for, directly or not."""
        above = {position}
        for at in range(position, -1, -1):
            if at in above:
                above.update(self._before[at])
        return tuple(sorted(above & self._failed.keys()))
