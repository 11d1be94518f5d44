"""What an application is made of: units, executed units, progress, and what tokens cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from demand.arguments import (
    instance_of,
    instances_of,
    renamed_keyword,
    warn_renamed,
    whole_number,
)
from demand.dependencies import After, check_after, in_sequence, longest_path, read_after
from demand.errors import DemandError
from demand.seconds import as_numbers, as_seconds, one_number, one_of_seconds

Kind = Literal["llm", "tool", "container", "model", "search", "human"]
KINDS: tuple[str, ...] = get_args(Kind)

ParallelCalls = Literal["sum", "critical_path"]
PARALLEL_CALLS: tuple[ParallelCalls, ...] = get_args(ParallelCalls)
"""Two ways to count the seconds of calls that a unit makes in parallel: their sum, which is what a
server has to serve, and the longest, which is what a deadline sees if all are served side by side.
"""

START = "start"
END = "end"


@dataclass(frozen=True, slots=True)
class Unit:
    """A functional unit of an application: a node of its demand graph (arXiv 2506.14851).

    Args:
        name: unique within the application; "start" and "end" are taken by the graph.
        kind: "llm" (costed by tokens, or by seconds where they were measured) or "tool",
            "container", "model", "search", "human" (costed by seconds).

    Raises:
        DemandError: an empty or reserved name, or an unknown kind.
    """

    name: str
    kind: Kind

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise DemandError(f"unit name is {self.name!r}; expected a string")
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

    A unit that fans out makes `parallelism` calls; tokens and seconds are means per call, so that
    the sum over the calls is exact. `of_calls` makes one from the calls themselves.

    Args:
        unit: the unit that was executed.
        input_tokens: prompt tokens per call; needed for an "llm" without seconds.
        output_tokens: generated tokens per call; needed for an "llm" without seconds.
        parallelism: number of calls made side by side.
        seconds: duration per call; an "llm" may leave it to the cost model.
        longest_output_tokens: generated tokens of the longest call, for what the cost model
            costs; `None`: all calls are taken to be alike, which makes the critical path too
            short wherever they are not.
        longest_seconds: duration of the longest call, where seconds are given; `None` likewise.
        shared_tokens: prompt tokens per call that begin the prompt as the last execution of the
            same unit in the run left them, its prompt and then its output: what a prefix cache can
            have kept. `None`: nothing is known of it, and nothing is found.

    Raises:
        DemandError: a negative, NaN or infinite attribute, one missing or not allowed for the
            kind of the unit, a longest call below the mean or above the sum of the calls, or more
            shared than prompt tokens.
    """

    unit: Unit
    input_tokens: float = 0.0
    output_tokens: float = 0.0
    parallelism: int = 1
    seconds: float | None = None
    longest_output_tokens: float | None = None
    longest_seconds: float | None = None
    shared_tokens: float | None = None
    after: After = None

    @classmethod
    def of_calls(
        cls,
        unit: Unit,
        *,
        input_tokens: Sequence[float] = (),
        output_tokens: Sequence[float] = (),
        seconds: Sequence[float] = (),
        after: After = None,
    ) -> "Execution":
        """Execution of a unit from what each of its parallel calls took.

        Args:
            unit: what was executed.
            input_tokens: `[calls]`, or empty for none.
            output_tokens: `[calls]`, or empty for none.
            seconds: `[calls]`, or empty where the cost model gives them.
            after: positions in its run of the units that it waits for, as the class.

        Raises:
            DemandError: no calls, lists of different lengths, or as the class.
        """
        instance_of("unit of an execution", unit, Unit)
        what = f"of the calls of unit {unit.name!r}"
        input_tokens = as_numbers(f"input_tokens {what}", input_tokens).tolist()
        output_tokens = as_numbers(f"output_tokens {what}", output_tokens).tolist()
        seconds = as_seconds(f"seconds {what}", seconds).tolist()
        given = [calls for calls in (input_tokens, output_tokens, seconds) if len(calls)]
        lengths = {len(calls) for calls in given}
        if len(lengths) != 1:
            raise DemandError(
                f"the calls of unit {unit.name!r} have {sorted(lengths)} entries; give lists of "
                "one length, an entry for each call"
            )
        for name, calls in (("tokens", [*input_tokens, *output_tokens]), ("seconds", seconds)):
            for value in calls:
                if not 0.0 <= value < math.inf:
                    raise DemandError(
                        f"{name} of a call of unit {unit.name!r} are {value}; expected finite "
                        "numbers of at least 0: drop or repair the broken measurement"
                    )
        n = lengths.pop()
        return cls(
            unit,
            sum(input_tokens) / n,
            sum(output_tokens) / n,
            n,
            sum(seconds) / n if len(seconds) else None,
            max(output_tokens) if len(output_tokens) and not len(seconds) else None,
            max(seconds) if len(seconds) else None,
            after=after,
        )

    def __post_init__(self) -> None:
        if type(self.unit) is not Unit:
            instance_of("unit of an execution", self.unit, Unit)
        name = self.unit.name
        for attribute in _ATTRIBUTES:
            value = getattr(self, attribute)
            if type(value) is not float:
                if value is None and attribute not in _TOKENS:
                    continue
                value = self._read_number(attribute, value)
            if not 0.0 <= value < math.inf:
                raise DemandError(
                    f"{attribute} of unit {name!r} is {value}; expected a finite number of at "
                    "least 0: drop or repair the broken measurement"
                )
        if self.shared_tokens is not None and self.shared_tokens > self.input_tokens:
            raise DemandError(
                f"shared_tokens of unit {name!r} are {self.shared_tokens} of {self.input_tokens} "
                "prompt tokens; input_tokens counts all of the prompt, what is shared included"
            )
        if type(self.parallelism) is not int or self.parallelism < 1:
            calls = whole_number(f"parallelism of unit {name!r}", self.parallelism, least=1)
            object.__setattr__(self, "parallelism", calls)
        if self.after is not None:
            object.__setattr__(self, "after", read_after(name, self.after))
        if self.seconds is None:
            if self.unit.kind != "llm":
                raise DemandError(
                    f"unit {name!r} of kind {self.unit.kind!r} has no seconds; give its duration"
                )
            if self.input_tokens == 0.0 and self.output_tokens == 0.0:
                raise DemandError(
                    f"unit {name!r} is an llm without tokens; give input_tokens and "
                    "output_tokens, or the seconds measured"
                )
            self._check_longest("longest_output_tokens", self.output_tokens, "longest_seconds")
        else:
            self._check_longest("longest_seconds", self.seconds, "longest_output_tokens")

    def _check_longest(self, used: str, mean: float, unused: str) -> None:
        """Refuse a longest call that does not fit the mean, or one in units that do not count."""
        if getattr(self, unused) is not None:
            raise DemandError(
                f"{unused} of unit {self.unit.name!r} is given, but its calls are costed by "
                f"{used.removeprefix('longest_')}; give {used} instead"
            )
        longest = getattr(self, used)
        total = self.parallelism * mean
        slack = 1e-9 * total + 1e-12  # rounding of the mean
        if longest is not None and not mean - slack <= longest <= total + slack:
            raise DemandError(
                f"{used} of unit {self.unit.name!r} is {longest} for {self.parallelism} calls of "
                f"mean {mean}; the longest call lies between the mean and the sum"
            )

    def _read_number(self, attribute: str, value: object) -> float:
        """Measurements often are numpy scalars, which JSON does not take, or timedeltas."""
        if type(value) is int and value.bit_length() < 64:
            number = float(value)
        else:
            read = one_of_seconds if attribute in _SECONDS else one_number
            number = read(f"{attribute} of unit {self.unit.name!r}", value)
        object.__setattr__(self, attribute, number)
        return number


_TOKENS = ("input_tokens", "output_tokens")
_SECONDS = ("seconds", "longest_seconds")
_ATTRIBUTES = (*_TOKENS, *_SECONDS, "longest_output_tokens", "shared_tokens")


@dataclass(frozen=True, slots=True)
class CostModel:
    """What an execution costs in seconds.

    A call takes the seconds that were measured; an llm call without a measurement takes
    input_tokens * prefill + output_tokens * decode seconds, with the profiled defaults of the
    Hermes artifact.

    Args:
        prefill_seconds_per_token: seconds for each prompt token.
        decode_seconds_per_token: seconds for each generated token.

    Raises:
        DemandError: a rate that is negative or not finite.
    """

    prefill_seconds_per_token: float = 1e-4
    decode_seconds_per_token: float = 0.06

    def __post_init__(self) -> None:
        for name in ("prefill_seconds_per_token", "decode_seconds_per_token"):
            rate = one_of_seconds(name, getattr(self, name))
            object.__setattr__(self, name, rate)
            if not 0.0 <= rate < math.inf:
                raise DemandError(f"cost model has rate {rate}; expected finite seconds a token")

    def seconds(
        self,
        execution: Execution,
        parallel_calls: ParallelCalls = "sum",
        *,
        demand: ParallelCalls | None = None,
    ) -> float:
        """Seconds of `execution`: over all its calls, or of its longest ("critical_path").

        Of an llm that is costed by tokens, the longest call has the mean input and
        `longest_output_tokens`.

        Raises:
            DemandError: what is no execution, or an unknown `parallel_calls`.
        """
        if type(execution) is not Execution:
            instance_of("execution", execution, Execution)
        if demand is not None:  # not by the decorator, which would take as long as the rest
            if parallel_calls != "sum":
                raise DemandError("seconds is given parallel_calls= and its old name; drop demand=")
            warn_renamed("CostModel.seconds", "demand", "parallel_calls")
            parallel_calls = demand
        if parallel_calls == "sum":
            return execution.parallelism * self._call_seconds(
                execution, execution.seconds, execution.output_tokens
            )
        check_parallel_calls(parallel_calls)
        tokens, seconds = execution.longest_output_tokens, execution.longest_seconds
        return self._call_seconds(
            execution,
            execution.seconds if seconds is None else seconds,
            execution.output_tokens if tokens is None else tokens,
        )

    @renamed_keyword("demand", "parallel_calls")
    def run_seconds(self, run: Sequence[Execution], parallel_calls: ParallelCalls = "sum") -> float:
        """Total seconds of a run: its demand.

        The "sum" is over all units: the service that it needs of servers that are shared. The
        "critical_path" is the longest path through units that wait for each other
        (`Execution.after`), each counted by its longest call: the shortest that the run can take,
        with no end of servers. Of a sequence that is the sum of the longest calls.

        Raises:
            DemandError: what is no list of executions, units that wait for what is not before
                them, or an unknown `parallel_calls`.
        """
        run = check_run("run", run)
        if parallel_calls == "critical_path" and not is_sequence(run):
            check_waits("the run", run)
            seconds = [self.seconds(execution, parallel_calls) for execution in run]
            return longest_path([execution.after for execution in run], seconds)
        return sum(self.seconds(execution, parallel_calls) for execution in run)

    def _call_seconds(
        self, execution: Execution, seconds: float | None, output_tokens: float
    ) -> float:
        if seconds is not None:
            return seconds
        return (
            execution.input_tokens * self.prefill_seconds_per_token
            + output_tokens * self.decode_seconds_per_token
        )


def check_run(name: str, run: object) -> tuple[Execution, ...]:
    """`run` as a tuple of executions in the order in which they ran.

    Raises:
        DemandError: anything else, such as a single execution or a `Session` of a trace.
    """
    if isinstance(run, Execution):
        raise DemandError(
            f"{name} is a single execution, of {run.unit}; expected a list of executions"
        )
    if isinstance(run, list | tuple) and set(map(type, run)) <= {Execution}:
        return tuple(run)  # as it nearly always is, at no cost of a name for each
    return instances_of(name, run, Execution)


def check_waits(name: str, run: Sequence[Execution]) -> None:
    """Raise `DemandError` if a unit of `run` waits for one that is not before it."""
    if not is_sequence(run):
        check_after(name, [execution.after for execution in run])


def is_sequence(run: Sequence[Execution]) -> bool:
    """Whether each unit of `run` waits for the one before it, and for no other."""
    return says_nothing(run) or in_sequence([execution.after for execution in run])


def says_nothing(run: Sequence[Execution]) -> bool:
    """Whether no unit of `run` says what it waits for: a sequence as it nearly always is told."""
    for execution in run:  # noqa: SIM110  # faster than `all`, and asked of every run
        if execution.after is not None:
            return False
    return True


def check_parallel_calls(parallel_calls: str) -> None:
    """Raise `DemandError` for what is not a way to count parallel calls."""
    if parallel_calls not in PARALLEL_CALLS:
        raise DemandError(
            f"parallel_calls is {parallel_calls!r}; expected one of {', '.join(PARALLEL_CALLS)}"
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a running application has come.

    Args:
        executed: units finished so far, in order. Of a run with units side by side, its stages:
            `demand.stages.progress_in_stages` tells it so.
        current: name of the unit being executed; `None` between two units, and before the first.
        attained_seconds: service that the current unit has received, over its parallel calls.
        elapsed_seconds: service that the longest of its calls has received, which is what the
            critical path has advanced. The sum reads the first, the critical path the second.

    Raises:
        DemandError: seconds negative, not finite, or given without a current unit; executed units
            that are no sequence.
    """

    executed: Sequence[Execution] = field(default=())
    current: str | None = None
    attained_seconds: float = 0.0
    elapsed_seconds: float = 0.0

    def __post_init__(self) -> None:
        executed, attained, elapsed = self.executed, self.attained_seconds, self.elapsed_seconds
        if executed != () or type(executed) is not tuple:
            checked = check_run("executed", executed)
            object.__setattr__(self, "executed", checked)
            if not is_sequence(checked):
                raise DemandError(
                    "executed has units that went side by side (after=...), and a progress is told "
                    "by stages: give progress_in_stages(executed, underway, cost)"
                )
        if self.current is not None:
            if not isinstance(self.current, str):
                raise DemandError(
                    f"current is {self.current!r:.200}; expected the name of a unit, or None"
                )
        elif type(attained) is type(elapsed) is float and attained == elapsed == 0.0:
            return
        for name, value in (("attained_seconds", attained), ("elapsed_seconds", elapsed)):
            if type(value) is not float:
                value = one_of_seconds(name, value)
                object.__setattr__(self, name, value)
            if not 0.0 <= value < math.inf:
                raise DemandError(
                    f"{name} is {value}; expected finite seconds of at "
                    "least 0: pass the service received, not a clock difference"
                )
            if self.current is None and value > 0.0:
                raise DemandError(
                    f"{name} is {value} but no unit is current; "
                    "name the unit being executed in `current`"
                )

    @renamed_keyword("demand", "parallel_calls")
    def current_seconds(self, parallel_calls: ParallelCalls = "sum") -> float:
        """Seconds of service that the current unit has received, counted as `parallel_calls` says.

        Raises:
            DemandError: only the other count is given.
        """
        check_parallel_calls(parallel_calls)
        asked, other = "attained_seconds", "elapsed_seconds"
        if parallel_calls == "critical_path":
            asked, other = other, asked
        seconds: float = getattr(self, asked)
        if seconds == 0.0 and getattr(self, other) > 0.0:
            raise DemandError(
                f"the {parallel_calls} needs {asked}, which is 0 while {other} is "
                f"{getattr(self, other)}; give both"
            )
        return seconds
