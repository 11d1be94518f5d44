"""A job inside the engine: where it stands in its run, and the calls of its present unit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

from demand.policies.base import Job, Rank
from demand.simulation.engine.agenda import Action
from demand.units import Execution

Place = tuple[int, Rank, int]
"""0 and the rank, or with preemption "none" 0 for units that have started and 1 for the rest,
then when it started or the rank; last the index of the job."""

# Before all places; then beyond all of them, each before the next.
FIRST: Place = (-1, 0.0, 0)
ANY: Place = (2, 0.0, 0)
"""Bound of a task whose place matters to nobody, since nobody waits."""
NOBODY: Place = (3, 0.0, 0)
"""Stands for the best that waits, where nobody does."""
UNKNOWN: Place = (4, 0.0, 0)
"""Bound of a task that is to be ranked anew."""
NEVER = 1 << 62
"""A step that does not come."""


@final
@dataclass(slots=True, eq=False)
class Calls:
    """Requests of an llm unit that stand alike, neighbours in order.

    They split when they part, and do not join again.

    While they decode, tokens and blocks are those of the step from which on they do: the rest
    follows from `over`.

    Attributes:
        number: of the first of them within the unit.
        count: how many they are; all other numbers are for each.
        generated: output tokens produced.
        computed: tokens with KV, on the device or swapped out.
        prefilled: input tokens ever computed; what is prefilled again does not count.
        blocks: held on the device.
        swapped: blocks held on the host.
        formed: number of the last batch in which they did not decode, or after which they
            stopped: those of the last batch are preempted unless they are in the next.
        over: while they decode, how many steps the engine will have carried out when they are
            over if they stay; 0 while they do not.
    """

    task: "Task"
    number: int
    count: int
    input_tokens: int
    output_tokens: int
    generated: int = 0
    computed: int = 0
    prefilled: int = 0
    blocks: int = 0
    swapped: int = 0
    formed: int = -1
    over: int = 0

    @property
    def pending(self) -> int:
        """Tokens known and without KV; 1 for those that have prefilled."""
        return self.input_tokens + self.generated - self.computed

    @property
    def place(self) -> tuple[Place, int]:
        """What calls are ordered by."""
        return (self.task.place, self.number)


@final
@dataclass(slots=True, eq=False)
class Task:
    """A job that is being executed.

    Attributes:
        job: the job.
        entry: its position in the workload.
        run: what it executes.
        prefill_seconds_per_token: service of a token of a prompt.
        decode_seconds_per_token: service of a token produced.
        unit_seconds: seconds of service of each unit of `run`.
        at: position in `run` of the present unit.
        calls: unfinished calls of the present unit, by number.
        requests: how many they are.
        settled_seconds: service of the units that are over, by the cost model.
        prefilled: input tokens computed for the present unit, over its calls.
        generated: output tokens produced for the present unit by step `since`, over its calls.
        since: steps carried out by then.
        decoding: calls that decode, a token in each step from then on.
        place: what tasks are ordered by, as of the last ranking.
        bound: what its place stays within while it is served. From a ranking until the batch is
            settled it is the very object `place` (with preemption "none" for good).
        bound_holds_until: attained service up to which it surely does.
        look: steps carried out when it is to be looked at.
        started: how many units had been served before the present one first was; -1 before.
        cold: whether the backend of an llm unit is to be warmed when its turn comes.
        alarms: (output tokens produced for the present unit, what to do then), latest first.
        arrived_step: steps that had begun when it arrived.
    """

    job: Job
    entry: int
    run: Sequence[Execution]
    prefill_seconds_per_token: float
    decode_seconds_per_token: float
    unit_seconds: Sequence[float]
    at: int = -1
    calls: list[Calls] = field(default_factory=list)
    requests: int = 0
    settled_seconds: float = 0.0
    prefilled: int = 0
    generated: int = 0
    since: int = 0
    decoding: int = 0
    place: Place = (0, math.nan, 0)
    bound: Place = UNKNOWN
    bound_holds_until: float = math.inf
    look: int = NEVER
    started: int = -1
    cold: bool = False
    alarms: list[tuple[int, Action]] = field(default_factory=list)
    arrived_step: int = 0

    @property
    def execution(self) -> Execution:
        """The present execution."""
        return self.run[self.at]

    @property
    def steady(self) -> bool:
        """Whether all of its calls decode."""
        return self.decoding == self.requests

    def produced(self, step: int) -> int:
        """Output tokens of the present unit when `step` steps have been carried out."""
        return self.generated + self.decoding * (step - self.since)

    def attained(self, step: int) -> float:
        """Seconds of service when `step` steps have been carried out."""
        return (
            self.settled_seconds
            + self.prefilled * self.prefill_seconds_per_token
            + (self.generated + self.decoding * (step - self.since))  # `produced`, a call less
            * self.decode_seconds_per_token
        )

    def next_look(self, step: int) -> int:
        """Steps carried out when a call is over, an alarm is due or the bound may not hold."""
        look = NEVER
        for calls in self.calls:
            if calls.over and calls.over < look:
                look = calls.over
        if not self.decoding:
            return look
        if self.alarms:
            tokens = self.alarms[-1][0] - self.produced(step)
            look = min(look, step + max(1, -(-tokens // self.decoding)))
        attained = self.bound_holds_until
        if self.attained(look) >= attained:
            per_step = self.decoding * self.decode_seconds_per_token
            look = step + max(1, math.ceil((attained - self.attained(step)) / per_step))
            while look > step + 1 and self.attained(look - 1) >= attained:
                look -= 1
            while self.attained(look) < attained:
                look += 1
        return look

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
            calls.generated,
            calls.computed,
            calls.prefilled,
            calls.blocks,
            calls.swapped,
            calls.formed,
        )
        calls.count = count
        self.calls.insert(self.calls.index(calls) + 1, rest)
