"""What one run of an application has executed so far, as its calls begin and end."""

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import final

from demand.dependencies import check_unit_after
from demand.stages import Underway, check_names, progress_in_stages
from demand.units import CostModel, Execution, Progress, Unit

Tokens = tuple[int, int]
"""Of a call: those of its prompt that were read, and those generated."""


@dataclass(slots=True)
class _Open:
    """A unit with calls that have not ended.

    Attributes:
        unit: what they are calls of.
        after: positions in the run of the units that were over when it began.
        live: those that have not ended.
        counts: tokens so far of each sequence of each call.
    """

    unit: Unit
    after: tuple[int, ...]
    live: set[Hashable] = field(default_factory=set)
    counts: dict[Hashable, dict[Hashable, Tokens]] = field(default_factory=dict)

    def calls(self) -> list[Tokens]:
        """Tokens of all sequences of all calls."""
        return [tokens for call in self.counts.values() for tokens in call.values() if any(tokens)]


@final
class RunRecord:
    """The executions of one run, put together from its calls.

    Calls of one unit that overlap in time are one execution of it, with as many parallel calls; it
    is over when the last of them has ended. Units are recorded in the order in which they end.
    Those that overlap went side by side (`Execution.after`): a unit is taken to have waited for all
    that were over when it began, which is all that a client lets see, and more than it did wait for
    if it was begun late. A call that did not finish leaves nothing behind.

    Args:
        cost: seconds of service that a token stands for.

    Attributes:
        executed: units that are over, in order.
        cut_off: whether the last call did not finish.
    """

    def __init__(self, cost: CostModel) -> None:
        self.executed: list[Execution] = []
        self.cut_off = False
        self._cost = cost
        self._last: tuple[int, ...] = ()  # units over for which none that is over has waited
        self._open: dict[str, _Open] = {}
        self._of_call: dict[Hashable, _Open] = {}

    @property
    def over(self) -> tuple[int, ...]:
        """What a unit that begins now is taken to have waited for: the units that are over.

        Those for which another has waited that is over are left out.
        """
        return self._last

    @property
    def busy(self) -> bool:
        """Whether a call is in progress."""
        return bool(self._open)

    def begin(self, call: Hashable, unit: Unit) -> None:
        """Note that `call`, of `unit`, is submitted."""
        entry = self._open.setdefault(unit.name, _Open(unit, self._last))
        entry.live.add(call)
        entry.counts[call] = {}
        self._of_call[call] = entry

    def count(
        self, call: Hashable, input_tokens: int, output_tokens: int, sequence: Hashable = None
    ) -> None:
        """Note how many tokens `call` has read and generated so far.

        Args:
            call: that has begun and not ended.
            input_tokens: of the prompt.
            output_tokens: generated.
            sequence: which of the sequences that the call generates, where there are several.
        """
        self._of_call[call].counts[call][sequence] = (input_tokens, output_tokens)

    def end(self, call: Hashable, finished: bool = True) -> None:
        """Note that `call` is over."""
        entry = self._of_call.pop(call)
        entry.live.discard(call)
        self.cut_off = not finished
        if not finished:
            del entry.counts[call]
        if entry.live:
            return
        del self._open[entry.unit.name]
        calls = entry.calls()
        if calls:
            read, made = zip(*calls, strict=True)
            executed = Execution.of_calls(entry.unit, input_tokens=read, output_tokens=made)
            self._append(executed, entry.after)

    def check(self, execution: Execution) -> None:
        """Raise `DemandError` if `execution` waited for what is not over, or as `check_name`."""
        self.check_name(execution.unit)
        if execution.after is not None:
            at = len(self.executed)
            check_unit_after("the run so far", at, execution.after, at + 1)
            check_names({execution.unit.name, *(one.unit.name for one in self.executed)})

    def check_name(self, unit: Unit) -> None:
        """Raise `DemandError` if `unit`, with what is open, could be no stage by their names."""
        check_names({unit.name, *self._open})

    def add(self, execution: Execution) -> None:
        """Note an execution that took place elsewhere, such as that of a tool.

        Unless it says what it waited for, that is taken to be all that are over by now.
        """
        self._append(execution, self._last if execution.after is None else execution.after)
        self.cut_off = False

    def _append(self, execution: Execution, after: tuple[int, ...]) -> None:
        """Record a unit that is over; one that waited for the last one alone does not say so."""
        at = len(self.executed)
        told = None if after == ((at - 1,) if at else ()) else after
        same = execution.after == told
        self.executed.append(execution if same else replace(execution, after=told))
        self._last = (*(before for before in self._last if before not in after), at)

    @property
    def whole(self) -> bool:
        """Whether it is a run that came to its end by itself, from which may be learned."""
        return bool(self.executed) and not self._open and not self.cut_off

    def progress(self) -> Progress:
        """Where the run stands, by the calls that have been counted."""
        prefill, decode = self._cost.prefill_seconds_per_token, self._cost.decode_seconds_per_token
        underway = []
        for entry in self._open.values():
            seconds = [read * prefill + made * decode for read, made in entry.calls()]
            received = sum(seconds), max(seconds, default=0.0)
            underway.append(Underway(entry.unit, entry.after, *received))
        return progress_in_stages(self.executed, underway, self._cost)
