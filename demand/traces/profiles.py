"""An application known by lists of samples alone, and runs drawn from them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from demand.errors import DemandError
from demand.flow import flow_fault, visits
from demand.seconds import as_numbers, as_seconds
from demand.traces.schema import Session, Span
from demand.units import END, Kind, Unit


@dataclass(frozen=True)
class StageProfile:
    """Samples of one stage, each list for itself: the artifact keeps marginals, no joint ones.

    Args:
        kind: of the unit.
        input_tokens: `[n]` prompt tokens per call, of an llm.
        output_tokens: `[n]` generated tokens per call, of an llm.
        seconds: `[n]` durations, of what is not an llm.
        parallelism: `[n]` calls made side by side; none is one call.
        successors: `[n]` names of what followed, "end" among them.
        chances: `[n]` probability of each successor; none for the same for all of them.
        rounds: `[n]` how often the stage ran in a row before something followed; none is once.
        gap_seconds: `[n]` seconds that a tool worked before each round, but not before the first
            of a run.

    Raises:
        DemandError: a sample that is negative or not finite, a parallelism or rounds that are no
            count, chances that do not go with the successors or do not sum to 1, or no samples of
            what a stage of its kind is costed by.
    """

    kind: Kind
    input_tokens: tuple[float, ...]
    output_tokens: tuple[float, ...]
    seconds: tuple[float, ...]
    parallelism: tuple[float, ...]
    successors: tuple[str, ...]
    chances: tuple[float, ...] = ()
    rounds: tuple[float, ...] = ()
    gap_seconds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        Unit("stage", self.kind)  # refuses an unknown kind
        for name in (
            *("input_tokens", "output_tokens", "seconds", "parallelism"),
            *("chances", "rounds", "gap_seconds"),
        ):
            durations = name in ("seconds", "gap_seconds")
            read = as_seconds if durations else as_numbers
            samples = read(f"{name} of a stage", getattr(self, name)).tolist()
            if durations:
                object.__setattr__(self, name, tuple(samples))
            for at, value in enumerate(samples):
                if not 0.0 <= value < math.inf:
                    raise DemandError(
                        f"{name}[{at}] of a stage is {value}; expected a finite number of at "
                        "least 0: drop or repair the broken measurement"
                    )
        for name, what in (("parallelism", "calls"), ("rounds", "rounds")):
            for at, count in enumerate(getattr(self, name)):
                if not is_count(count):
                    raise DemandError(
                        f"{name}[{at}] of a stage is {count}; expected a whole number of at "
                        f"least 1: count the {what}"
                    )
        if self.chances and len(self.chances) != len(self.successors):
            raise DemandError(
                f"a stage has {len(self.chances)} chances for {len(self.successors)} successors; "
                "give one for each, or none"
            )
        if self.chances and not math.isclose(math.fsum(self.chances), 1.0, rel_tol=1e-9):
            raise DemandError(
                f"the chances of a stage are {self.chances!r:.200}; expected a sum of 1"
            )
        costed = ("input_tokens", "output_tokens") if self.kind == "llm" else ("seconds",)
        for name in costed:
            if not getattr(self, name):
                raise DemandError(
                    f"{name} of a stage of kind {self.kind!r} has no samples; expected one or "
                    "more: an llm is costed by tokens, anything else by seconds"
                )

    @property
    def possible_successors(self) -> tuple[str, ...]:
        """Those of `successors` whose chance is not 0."""
        if not self.chances:
            return self.successors
        pairs = zip(self.successors, self.chances, strict=True)
        return tuple(name for name, chance in pairs if chance > 0.0)

    def draw_successor(self, rng: np.random.Generator) -> str:
        """What follows the last round."""
        return str(rng.choice(self.successors, p=self.chances or None))


@dataclass(frozen=True)
class ApplicationProfile:
    """The profile of one application; runs are drawn from it.

    Args:
        application: its name.
        entries: `[n]` names of stages that runs began with.
        stages: by name.

    Raises:
        DemandError: no stages, a stage named "start", "end" or nothing, what follows that is no
            stage, or a stage from which "end" cannot be reached.
    """

    application: str
    entries: tuple[str, ...]
    stages: Mapping[str, StageProfile]

    def __post_init__(self) -> None:
        for name, stage in self.stages.items():
            Unit(name, stage.kind)  # refuses an empty or reserved name
        after = {name: stage.possible_successors for name, stage in self.stages.items()}
        fault = flow_fault(self.entries, after)
        if fault:
            raise DemandError(
                f"application {self.application!r}, what follows {fault.unit!r}: "
                f"{fault.problem} ({fault.seen})"
            )

    def session(self, rng: np.random.Generator, name: str = "drawn") -> Session:
        """Draw a run as the artifact does: parallelism, then the lengths of each call on their
        own (their mean is kept), then what follows. The drawn run has no clock. What a tool does
        in a gap before stage "x" is the span "before x" of kind "tool".
        """
        spans: list[Span] = []
        rounds = 0

        def add(span: Span) -> None:
            spans.append(replace(span, parents=(len(spans) - 1,) if spans else ()))

        def following(name: str) -> str:
            return name if rounds else self.stages[name].draw_successor(rng)

        for at in visits(str(rng.choice(self.entries)), following, END):
            stage = self.stages[at]
            rounds = (rounds or (int(rng.choice(stage.rounds)) if stage.rounds else 1)) - 1
            if stage.gap_seconds and spans:
                add(Span(f"before {at}", "tool", seconds=float(rng.choice(stage.gap_seconds))))
            calls = int(rng.choice(stage.parallelism)) if stage.parallelism else 1
            add(
                Span(
                    at,
                    stage.kind,
                    seconds=_mean(rng, stage.seconds, calls) if stage.seconds else None,
                    input_tokens=_mean(rng, stage.input_tokens, calls),
                    output_tokens=_mean(rng, stage.output_tokens, calls),
                    parallelism=calls,
                )
            )
        return Session(name, self.application, tuple(spans))


def is_count(number: float) -> bool:
    """Whether it counts something: whole, and at least 1."""
    return number >= 1 and number % 1 == 0


def _mean(rng: np.random.Generator, samples: tuple[float, ...], calls: int) -> float:
    return float(rng.choice(samples, size=calls).mean()) if samples else 0.0
