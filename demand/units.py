"""What an application is made of: units, executed units, progress, and what tokens cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from demand.errors import DemandError

Kind = Literal["llm", "tool", "container", "model", "search", "human"]
KINDS: tuple[str, ...] = get_args(Kind)

START = "start"
END = "end"


@dataclass(frozen=True, slots=True)
class Unit:
    """A functional unit of an application, a node of its demand graph (arXiv 2506.14851).

    Args:
        name: unique within the application; "start" and "end" are taken by the graph.
        kind: "llm" (costed by tokens) or "tool", "container", "model", "search", "human"
            (costed by seconds).

    Raises:
        DemandError: an empty or reserved name, or an unknown kind.
    """

    name: str
    kind: Kind

    def __post_init__(self) -> None:
        if not self.name or self.name in (START, END):
            raise DemandError(
                f"unit name is {self.name!r}; choose any name but the empty one, "
                f"{START!r} and {END!r}, which mark the ends of every graph"
            )
        if self.kind not in KINDS:
            raise DemandError(
                f"unit {self.name!r} has kind {self.kind!r}; expected one of {', '.join(KINDS)}"
            )


@dataclass(frozen=True, slots=True)
class Execution:
    """One execution of a unit: the attributes measured together, kept together.

    A unit that fans out makes `parallelism` calls; tokens and seconds are means per call.

    Args:
        unit: what was executed.
        input_tokens: prompt tokens per call; needed for "llm", optional otherwise.
        output_tokens: generated tokens per call; needed for "llm", optional otherwise.
        parallelism: number of calls made side by side.
        seconds: duration per call; needed unless the unit is "llm", where the cost model gives it.

    Raises:
        DemandError: a negative, NaN or infinite attribute, or one missing or not allowed for the
            kind of the unit.
    """

    unit: Unit
    input_tokens: float = 0.0
    output_tokens: float = 0.0
    parallelism: int = 1
    seconds: float | None = None

    def __post_init__(self) -> None:
        name = self.unit.name
        self._to_python_numbers()
        for attribute, value in (
            ("input_tokens", self.input_tokens),
            ("output_tokens", self.output_tokens),
            ("seconds", 0.0 if self.seconds is None else self.seconds),
        ):
            if not 0.0 <= value < math.inf:
                raise DemandError(
                    f"{attribute} of unit {name!r} is {value}; expected a finite number of at "
                    "least 0: drop or repair the broken measurement"
                )
        if self.parallelism < 1 or self.parallelism % 1:
            raise DemandError(
                f"parallelism of unit {name!r} is {self.parallelism}; expected a whole number of "
                "at least 1: leave out units that made no call"
            )
        if self.unit.kind == "llm":
            if self.seconds is not None:
                raise DemandError(
                    f"unit {name!r} is an llm and has seconds={self.seconds}; llm seconds come "
                    'from tokens by the cost model: drop seconds, or use kind "model"'
                )
            if self.input_tokens == 0.0 and self.output_tokens == 0.0:
                raise DemandError(
                    f"unit {name!r} is an llm without tokens; give input_tokens and output_tokens, "
                    'or use kind "model" with seconds'
                )
        elif self.seconds is None:
            raise DemandError(
                f"unit {name!r} of kind {self.unit.kind!r} has no seconds; give its duration"
            )
        object.__setattr__(self, "parallelism", int(self.parallelism))

    def _to_python_numbers(self) -> None:
        """Measurements often are numpy scalars, which JSON does not take."""
        object.__setattr__(self, "input_tokens", float(self.input_tokens))
        object.__setattr__(self, "output_tokens", float(self.output_tokens))
        if self.seconds is not None:
            object.__setattr__(self, "seconds", float(self.seconds))


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds of service of an execution, summed over its parallel calls.

    An llm call takes input_tokens * prefill + output_tokens * decode seconds, with the profiled
    defaults of the Hermes artifact; any other call takes the seconds measured.
    """

    prefill_seconds_per_token: float = 1e-4
    decode_seconds_per_token: float = 0.06

    def __post_init__(self) -> None:
        for rate in (self.prefill_seconds_per_token, self.decode_seconds_per_token):
            if not 0.0 <= rate < math.inf:
                raise DemandError(f"cost model has rate {rate}; expected finite seconds a token")

    def seconds(self, execution: Execution) -> float:
        """Total seconds of `execution` over its parallel calls."""
        if execution.seconds is not None:
            return execution.parallelism * execution.seconds
        return execution.parallelism * (
            execution.input_tokens * self.prefill_seconds_per_token
            + execution.output_tokens * self.decode_seconds_per_token
        )

    def run_seconds(self, run: Sequence[Execution]) -> float:
        """Total seconds of a run: its demand."""
        return sum(map(self.seconds, run))


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a running application has come.

    Args:
        executed: units finished so far, in order.
        current: name of the unit being executed; `None` between two units, and before the first.
        attained_seconds: service that the current unit has received, over its parallel calls.

    Raises:
        DemandError: `attained_seconds` negative, not finite, or given without a current unit.
    """

    executed: Sequence[Execution] = field(default=())
    current: str | None = None
    attained_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.attained_seconds < math.inf:
            raise DemandError(
                f"attained_seconds is {self.attained_seconds}; expected finite seconds of at "
                "least 0: pass the service received, not a clock difference"
            )
        if self.current is None and self.attained_seconds > 0.0:
            raise DemandError(
                f"attained_seconds is {self.attained_seconds} but no unit is current; "
                "name the unit being executed in `current`"
            )
