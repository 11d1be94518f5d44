"""A job on the engine: where it stands in its run, and the calls of its present unit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

from demand.policies.base import Rank
from demand.policies.job import Job
from demand.simulation.engine.agenda import Action
from demand.simulation.engine.waits import Waits
from demand.units import Execution

Place = tuple[int, Rank, int]
"""Where a job stands in the order of service: (0, rank, index of the job). With preemption "none"
units that have been served go first: (0, how many were before it, index), then (1, rank, index)."""

# They stand for places, and order like them: FIRST before all, then all places, ANY, NOBODY.
FIRST: Place = (-1, 0.0, 0)
ANY: Place = (2, 0.0, 0)
"""Bound of a job whose place matters to nobody, since nobody waits."""
NOBODY: Place = (3, 0.0, 0)
"""Place of the best job waiting, where nobody waits."""
NEVER = 1 << 62
"""A step that does not come."""


@final
@dataclass(slots=True, eq=False)
class Calls:
    """Requests of one llm unit that have come equally far, and follow each other in the order.

    They are kept as one. When only some of them are served they split (`JobOnEngine.split`), and
    do not join again. While they decode, the numbers below are those of the step at which they
    began to: what has become of them since follows from `over`.

    Attributes:
        job: whose unit it is.
        number: of the first of them within the unit.
        count: how many they are; all other numbers are for each.
        position: of the unit in the run of the job.
        requested: second at which the unit asked for them.
        turn: of the first of them among all calls of the job, in the order in which they were
            asked for.
        generated: output tokens produced.
        computed: tokens with KV, on the device or swapped out.
        prefilled: input tokens ever computed; what is prefilled again does not count.
        blocks: held on the device.
        swapped: blocks held on the host.
        formed: number of the last batch in which they did not decode, or after which they
            stopped: those of the last batch are preempted unless they are in the next.
        over: while they decode, how many steps the engine will have carried out when they are
            over if they stay; 0 while they do not.
        history: two numbers a change, one after the other (`RequestLog`).
        admitted: of those that run, how many were admitted to the engine before them; -1 while
            they wait. Under `scheduling="by_rank"` always -1.
        shared_tokens: input tokens with which the last call of the unit began too.
    """

    job: "JobOnEngine"
    number: int
    count: int
    input_tokens: int
    output_tokens: int
    position: int
    requested: float
    turn: int
    generated: int = 0
    computed: int = 0
    prefilled: int = 0
    blocks: int = 0
    swapped: int = 0
    formed: int = -1
    over: int = 0
    history: list[int] = field(default_factory=list)
    admitted: int = -1
    shared_tokens: int = 0

    @property
    def pending(self) -> int:
        """Tokens that are known and have no KV yet: 1 once the prompt is computed."""
        return self.input_tokens + self.generated - self.computed

    @property
    def place(self) -> tuple[Place, int]:
        """Where they stand in the order of service: the place of the job, then their turn."""
        return (self.job.place, self.turn)


@final
@dataclass(slots=True, eq=False)
class JobOnEngine(Job):
    """A job that is being executed: what its policy sees, and what the engine notes.

    Attributes:
        entry: its position in the workload.
        run: what it executes.
        prefill_seconds_per_token: service of a token of a prompt.
        decode_seconds_per_token: service of a token produced.
        unit_seconds: seconds of service of each unit of `run`.
        arrived_step: steps that had begun when it arrived.
        position: of the present unit in `run`, the one that began last.
        waits: what of `run` is over and underway, where units go side by side: "the present unit"
            is then all that are underway. `None` for a sequence.
        calls: unfinished calls of the present unit, by turn.
        submitted: calls ever asked for.
        requests: how many they are.
        finished_seconds: service of the units that are over, by the cost model.
        prefilled: input tokens computed for the present unit, over its calls.
        generated: output tokens produced for the present unit by step `since_step`, over its calls.
        since_step: steps carried out by then.
        decoding: calls that decode, a token in each step from then on.
        placed: calls that run, under `scheduling="running_first"`.
        place: where it stood in the order when it was last ranked.
        exact: whether it stands there still, `bound` being that very place (with preemption "none"
            for good, once it has been served).
        bound: the worst place it can have come to (`BoundedRanks`); `None` where that is not known.
        bound_until: attained service up to which `bound` surely holds.
        check_step: steps carried out when something of it may be due: a call over, an alarm, or
            the end of its bound.
        first_served: how many units had been served before the present one first was; -1 before.
        cold: whether the backend of an llm unit is to be warmed when its turn comes.
        alarms: (output tokens produced for the present unit, what to do then), latest first.
    """

    entry: int = 0
    run: Sequence[Execution] = ()
    prefill_seconds_per_token: float = 0.0
    decode_seconds_per_token: float = 0.0
    unit_seconds: Sequence[float] = ()
    arrived_step: int = 0
    position: int = -1
    waits: Waits | None = None
    submitted: int = 0
    calls: list[Calls] = field(default_factory=list)
    requests: int = 0
    finished_seconds: float = 0.0
    prefilled: int = 0
    generated: int = 0
    since_step: int = 0
    decoding: int = 0
    placed: int = 0
    place: Place = (0, math.nan, 0)
    exact: bool = False
    bound: Place | None = None
    bound_until: float = math.inf
    check_step: int = NEVER
    first_served: int = -1
    cold: bool = False
    alarms: list[tuple[int, Action]] = field(default_factory=list)

    @property
    def execution(self) -> Execution:
        """The unit that is being executed, with its calls."""
        return self.run[self.position]

    @property
    def steady(self) -> bool:
        """Whether all of its calls decode."""
        return self.decoding == self.requests

    def produced(self, step: int) -> int:
        """Output tokens of the present unit when `step` steps have been carried out."""
        return self.generated + self.decoding * (step - self.since_step)

    def attained(self, step: int) -> float:
        """Seconds of service when `step` steps have been carried out."""
        return (
            self.finished_seconds
            + self.prefilled * self.prefill_seconds_per_token
            + (self.generated + self.decoding * (step - self.since_step))  # `produced`, a call less
            * self.decode_seconds_per_token
        )

    def received(self, position: int, step: int) -> tuple[float, float]:
        """Seconds of service of a unit underway when `step` steps have been carried out.

        Over all its calls, and at least of the longest. A unit that is not an llm has received
        nothing until it is over.
        """
        execution = self.run[position]
        if execution.unit.kind != "llm":
            return 0.0, 0.0
        prefill, decode = self.prefill_seconds_per_token, self.decode_seconds_per_token
        attained, longest, there = self.unit_seconds[position], 0.0, 0
        for calls in self.calls:
            if calls.position == position:
                left = calls.over - step if calls.over else calls.output_tokens - calls.generated
                unread = calls.input_tokens - calls.prefilled
                attained -= calls.count * (unread * prefill + left * decode)
                made = calls.output_tokens - left
                longest = max(longest, calls.prefilled * prefill + made * decode)
                there += calls.count
        if there == execution.parallelism and not longest:  # the difference is but rounding
            return 0.0, 0.0
        attained = max(attained, 0.0)
        return attained, max(longest, attained / execution.parallelism)

    def next_check(self, step: int) -> int:
        """Steps carried out when a call is over, an alarm is due or the bound may not hold."""
        check = NEVER
        for calls in self.calls:
            if calls.over and calls.over < check:
                check = calls.over
        if not self.decoding:
            return check
        if self.alarms:
            tokens = self.alarms[-1][0] - self.produced(step)
            check = min(check, step + max(1, -(-tokens // self.decoding)))
        attained = self.bound_until
        if self.attained(check) >= attained:
            per_step = self.decoding * self.decode_seconds_per_token
            check = step + max(1, math.ceil((attained - self.attained(step)) / per_step))
            while check > step + 1 and self.attained(check - 1) >= attained:
                check -= 1
            while self.attained(check) < attained:
                check += 1
        return check

    def split(self, calls: Calls, count: int) -> None:
        """Part the first `count` of `calls`, which do not decode, from the rest."""
        if count == calls.count:
            return
        rest = Calls(
            self,
            calls.number + count,
            calls.count - count,
            calls.input_tokens,
            calls.output_tokens,
            calls.position,
            calls.requested,
            calls.turn + count,
            calls.generated,
            calls.computed,
            calls.prefilled,
            calls.blocks,
            calls.swapped,
            calls.formed,
            history=calls.history[:],
            admitted=calls.admitted,
            shared_tokens=calls.shared_tokens,
        )
        calls.count = count
        self.calls.insert(self.calls.index(calls) + 1, rest)
