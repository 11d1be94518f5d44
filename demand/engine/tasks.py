"""A job inside the engine: where it stands in its run, and the requests of its present unit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from demand.engine.agenda import Action
from demand.engine.model import Engine
from demand.errors import DemandError
from demand.policies.base import Job, Rank
from demand.units import CostModel, Execution

Place = tuple[int, Rank, int]
"""0 and the rank, or with preemption "none" 0 for units that have started and 1 for the rest,
then when it started or the rank; last the index of the job."""


@dataclass(slots=True, eq=False)
class Request:
    """One call of an llm unit.

    Attributes:
        generated: output tokens produced.
        computed: tokens with KV, on the device or swapped out.
        prefilled: input tokens ever computed; what is prefilled again does not count.
        blocks: held on the device.
        swapped: blocks held on the host.
        step: the last step it was scheduled in.
    """

    task: "Task"
    number: int
    input_tokens: int
    output_tokens: int
    generated: int = 0
    computed: int = 0
    prefilled: int = 0
    blocks: int = 0
    swapped: int = 0
    step: int = -1

    @property
    def pending(self) -> int:
        """Tokens known and without KV; 1 while decoding."""
        return self.input_tokens + self.generated - self.computed

    @property
    def place(self) -> tuple[Place, int]:
        """What requests are ordered by."""
        return (self.task.place, self.number)


@dataclass(slots=True, eq=False)
class Task:
    """A job that is being executed.

    Attributes:
        job: the job.
        entry: its position in the workload.
        run: what it executes.
        cost: seconds of service.
        at: position in `run` of the present unit.
        requests: unfinished requests of the present unit, by number.
        settled_seconds: service of the units that are over, by the cost model.
        prefilled: input tokens computed for the present unit, over its calls.
        generated: output tokens produced for the present unit, over its calls.
        place: what tasks are ordered by, as of the last ranking.
        started: how many units had been served before the present one first was; -1 before.
        width: how many of its requests are in the batch.
        cold: whether the backend of an llm unit is to be warmed when its turn comes.
        alarms: (output tokens produced for the present unit, what to do then), latest first.
        arrived_step: steps that had begun when it arrived.
    """

    job: Job
    entry: int
    run: Sequence[Execution]
    cost: CostModel
    at: int = -1
    requests: list[Request] = field(default_factory=list)
    settled_seconds: float = 0.0
    prefilled: int = 0
    generated: int = 0
    place: Place = (0, math.nan, 0)
    started: int = -1
    width: int = 0
    cold: bool = False
    alarms: list[tuple[int, Action]] = field(default_factory=list)
    arrived_step: int = 0

    @property
    def execution(self) -> Execution:
        """The present execution."""
        return self.run[self.at]

    def attained(self, tokens: int = 0) -> float:
        """Seconds of service so far, or when `tokens` more are produced."""
        return (
            self.settled_seconds
            + self.prefilled * self.cost.prefill_seconds_per_token
            + (self.generated + tokens) * self.cost.decode_seconds_per_token
        )


def call_tokens(execution: Execution) -> list[tuple[int, int]]:
    """(input, output) tokens of each call of an llm execution, whole and at least 1.

    All calls are alike, unless the longest is known: it is then the first, and the others share
    the rest evenly.

    Raises:
        DemandError: an execution measured in seconds alone.
    """
    calls = execution.parallelism
    if not execution.input_tokens and not execution.output_tokens:
        raise DemandError(
            f"unit {execution.unit.name!r} is an llm known by its seconds alone; an engine needs "
            'input_tokens and output_tokens: give them, or make the unit of kind "model"'
        )
    each = (_whole(execution.input_tokens), _whole(execution.output_tokens))
    longest = execution.longest_output_tokens
    if longest is None or calls == 1:
        return [each] * calls
    others = (calls * execution.output_tokens - longest) / (calls - 1)
    return [(each[0], _whole(longest))] + [(each[0], _whole(others))] * (calls - 1)


def execution_seconds(execution: Execution, cost: CostModel) -> float:
    """Seconds of service of an execution as the engine counts it: tokens whole, for an llm."""
    if execution.unit.kind != "llm":
        return cost.seconds(execution)
    tokens = call_tokens(execution)
    return (
        sum(given for given, _ in tokens) * cost.prefill_seconds_per_token
        + sum(made for _, made in tokens) * cost.decode_seconds_per_token
    )


def check_run(index: int, run: Sequence[Execution], engine: Engine) -> None:
    """Raise `DemandError` for an empty run, or one with a request the engine can never hold."""
    if not run:
        raise DemandError(f"the run of job {index} is empty; give the units it executes")
    for execution in run:
        if execution.unit.kind != "llm":
            continue
        for given, made in set(call_tokens(execution)):
            needed = engine.blocks_for(given + made - 1)
            if needed > engine.blocks:
                raise DemandError(
                    f"unit {execution.unit.name!r} of job {index} has a request of {given} input "
                    f"and {made} output tokens, whose KV takes {needed} blocks of "
                    f"{engine.block_tokens} tokens; the engine has {engine.blocks}: give it more "
                    "blocks or leave the job out"
                )


def _whole(tokens: float) -> int:
    return max(1, math.floor(tokens + 0.5))
