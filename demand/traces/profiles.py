"""An application known by lists of samples alone, and runs drawn from them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

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

    Raises:
        DemandError: a sample that is negative or not finite, a parallelism that is no count, or
            no samples of what a stage of its kind is costed by.
    """

    kind: Kind
    input_tokens: tuple[float, ...]
    output_tokens: tuple[float, ...]
    seconds: tuple[float, ...]
    parallelism: tuple[float, ...]
    successors: tuple[str, ...]

    def __post_init__(self) -> None:
        Unit("stage", self.kind)  # refuses an unknown kind
        for name in ("input_tokens", "output_tokens", "seconds", "parallelism"):
            read = as_seconds if name == "seconds" else as_numbers
            samples = read(f"{name} of a stage", getattr(self, name)).tolist()
            if name == "seconds":
                object.__setattr__(self, name, tuple(samples))
            for at, value in enumerate(samples):
                if not 0.0 <= value < math.inf:
                    raise DemandError(
                        f"{name}[{at}] of a stage is {value}; expected a finite number of at "
                        "least 0: drop or repair the broken measurement"
                    )
        for at, calls in enumerate(self.parallelism):
            if not is_count(calls):
                raise DemandError(
                    f"parallelism[{at}] of a stage is {calls}; expected a whole number of at "
                    "least 1: count the calls"
                )
        costed = ("input_tokens", "output_tokens") if self.kind == "llm" else ("seconds",)
        for name in costed:
            if not getattr(self, name):
                raise DemandError(
                    f"{name} of a stage of kind {self.kind!r} has no samples; expected one or "
                    "more: an llm is costed by tokens, anything else by seconds"
                )


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
        after = {name: stage.successors for name, stage in self.stages.items()}
        fault = flow_fault(self.entries, after)
        if fault:
            raise DemandError(
                f"application {self.application!r}, what follows {fault.unit!r}: "
                f"{fault.problem} ({fault.seen})"
            )

    def session(self, rng: np.random.Generator, name: str = "drawn") -> Session:
        """Draw a run as the artifact does: parallelism, then the lengths of each call on their
        own (their mean is kept), then what follows. The drawn run has no clock.
        """
        spans: list[Span] = []
        first = str(rng.choice(self.entries))
        for at in visits(first, lambda name: str(rng.choice(self.stages[name].successors)), END):
            stage = self.stages[at]
            calls = int(rng.choice(stage.parallelism)) if stage.parallelism else 1
            spans.append(
                Span(
                    at,
                    stage.kind,
                    seconds=_mean(rng, stage.seconds, calls) if stage.seconds else None,
                    input_tokens=_mean(rng, stage.input_tokens, calls),
                    output_tokens=_mean(rng, stage.output_tokens, calls),
                    parallelism=calls,
                    parents=(len(spans) - 1,) if spans else (),
                )
            )
        return Session(name, self.application, tuple(spans))


def is_count(calls: float) -> bool:
    """Whether it is a number of calls: whole, and at least 1."""
    return calls >= 1 and calls % 1 == 0


def _mean(rng: np.random.Generator, samples: tuple[float, ...], calls: int) -> float:
    return float(rng.choice(samples, size=calls).mean()) if samples else 0.0
