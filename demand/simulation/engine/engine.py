"""What a continuous-batching engine can hold, and how long its steps take."""

from dataclasses import dataclass
from typing import Literal, final, get_args

from demand.arguments import check_instance, set_whole_numbers
from demand.errors import DemandError
from demand.seconds import check_seconds
from demand.simulation.engine.retention import Retention

Preemption = Literal["none", "pause", "recompute", "swap"]
PREEMPTIONS: tuple[Preemption, ...] = get_args(Preemption)

Scheduling = Literal["running_first", "by_rank"]
SCHEDULINGS: tuple[Scheduling, ...] = get_args(Scheduling)


@final
@dataclass(frozen=True)
class Engine:
    """An engine that serves a batch of requests step by step, with paged KV.

    The rules, in full. A request of I input and O output tokens is over when O tokens are
    produced. Its pending tokens are those known (input, and output so far) without KV. The order
    of requests is: rank of their job, then order of arrival of the job, then number of the call
    within its unit. KV takes ceil(tokens / `block_tokens`) blocks, which are allocated as the
    tokens are scheduled and freed when the request is over.

    With `scheduling="running_first"`, the rules of vLLM v1 (its `Scheduler.schedule`, read in
    0.32.0), at the start of a step:

    1. Displacement, under `preemption="recompute"` alone, as `make_scheduler` adds it to vLLM. At
       most `max_requests` requests run. Those that wait count in order, the first of them for the
       places that are free; for each one after those the running request that is last in the
       order gives way, if the rank of its job is strictly larger: it loses its KV, and waits.
    2. Running requests get min(pending, what is left of `token_budget`) tokens, in the order in
       which they were admitted. While one lacks blocks, the running request that is last in the
       order loses its KV, and waits. If that is the very one that lacks them, those admitted
       after it get nothing in this step, and keep what they have.
    3. If nobody lost KV under 2, those that wait are admitted in order, while places and budget
       are left, up to the first whose known tokens do not all fit into the free blocks. Each gets
       min(pending, what is left of the budget) tokens.

    What was lost is prefilled again, input and output so far. A job runs while a request of it
    does. If no request gets tokens, there is no step and the rules start anew.

    With `scheduling="by_rank"`, where a better rank goes before at every step:

    1. At the start of a step all requests present are put in order. With `preemption="none"` the
       units that were served before go first, in the order in which they were first served.
    2. In that order each gets min(pending, what is left of `token_budget`) tokens, until the step
       has `max_requests` requests, the budget is spent, or one cannot get its blocks: then nobody
       after it is served in this step.
    3. When blocks run out, requests that come later in the order lose theirs, the last one first,
       if that frees enough; else none does.

    What becomes of a request that is left out of a step by rank is said by `preemption`:

    - "none": nobody is left out for a better rank, only for want of budget or blocks, and keeps
      its KV;
    - "pause": it keeps its KV, on the device, whatever its place in the order;
    - "recompute": at most `max_requests` requests hold KV; the last in the order lose it and
      prefill their input and what they have produced again;
    - "swap": the same, but the blocks are copied to the host and back.

    There a request that loses its blocks under rule 3 swaps under "swap" and recomputes under the
    rest.

    In both, the step takes `step_seconds`. At its end the scheduled tokens have KV, and each
    request with none pending has produced one more token: so a prompt that fits the budget
    produces its first token in the step that prefills it, a lone request takes O steps, and the
    last token of a request never has KV. The prefill of a prompt is cut into chunks by the budget,
    and decoding takes one token a step. Units that end with one step do so in order of arrival of
    their jobs.

    A policy that changes its mind often pays for it under "recompute": ranks that move as a job is
    served (SERPT, Gittins on raw samples, LAS) can recompute more than they serve. Wrap such a
    policy in `TimeSlice`, or choose "none".

    Args:
        max_requests: requests in one step, the width of the batch.
        token_budget: tokens computed in one step, prefill and decoding together. Of fewer than
            `max_requests`, which vLLM refuses, no more requests run than there are tokens.
        blocks: KV blocks on the device.
        block_tokens: tokens in a block.
        preemption: see above; with "running_first" either "none", which is vLLM's own, or
            "recompute".
        base_seconds: of every step.
        prefill_seconds_per_token: added for each token of a chunk of prefill.
        decode_seconds_per_request: added for each decoding request. The defaults make 0.06 s a
            step at 32 requests, the profile of the Hermes artifact (arXiv 2506.14851).
        kv_seconds_per_token: added for each token of KV that a scheduled request has at the end
            of the step: what attention reads.
        swap_seconds_per_block: added for each block copied to or from the host.
        scheduling: "running_first" or "by_rank", see above. Up to the last release all engines
            scheduled by rank, and paused by default.
        retention: which of the KV that a run's call leaves behind stays for its next one, whose
            prompt begins alike (`Execution.shared_tokens`), and for a request that lost its place:
            `LRU`, as vLLM's prefix caching, `KeepAll` or `NextUse`. What is found is not computed
            again; under 3, all known tokens count all the same. `None`: nothing stays. Of
            "running_first" alone.

    Raises:
        DemandError: a limit below 1, a time that is negative or not finite, decoding in no time,
            an unknown preemption or scheduling, or one that the scheduling does not have.
    """

    max_requests: int = 64
    token_budget: int = 2048
    blocks: int = 4096
    block_tokens: int = 16
    preemption: Preemption = "recompute"
    base_seconds: float = 0.044
    prefill_seconds_per_token: float = 1e-4
    decode_seconds_per_request: float = 5e-4
    kv_seconds_per_token: float = 0.0
    swap_seconds_per_block: float = 2e-4
    scheduling: Scheduling = "running_first"
    retention: Retention | None = None

    def __post_init__(self) -> None:
        set_whole_numbers(self, "max_requests", "token_budget", "blocks", "block_tokens", least=1)
        for name in (
            "base_seconds",
            "prefill_seconds_per_token",
            "decode_seconds_per_request",
            "kv_seconds_per_token",
            "swap_seconds_per_block",
        ):
            object.__setattr__(self, name, check_seconds(name, getattr(self, name)))
        if self.base_seconds + self.decode_seconds_per_request == 0.0:
            raise DemandError(
                "base_seconds and decode_seconds_per_request are both 0, so that decoding takes "
                "no time; give one of them, such as base_seconds=1 to count steps"
            )
        if self.preemption not in PREEMPTIONS:
            raise DemandError(
                f"preemption is {self.preemption!r}; expected one of {', '.join(PREEMPTIONS)}"
            )
        if self.scheduling not in SCHEDULINGS:
            raise DemandError(
                f"scheduling is {self.scheduling!r}; expected one of {', '.join(SCHEDULINGS)}"
            )
        if self.scheduling == "running_first" and self.preemption not in ("none", "recompute"):
            raise DemandError(
                f"preemption is {self.preemption!r}, which an engine that serves running requests "
                'first, as vLLM does, does not have; expected "none" or "recompute", or give '
                'scheduling="by_rank" as well, the rules of this library up to its last release'
            )

        if self.retention is not None:
            expected = "a retention, such as LRU(), or None to drop what is left"
            check_instance("retention", self.retention, Retention, expected)
            if self.scheduling == "by_rank":
                raise DemandError(
                    f'retention is {self.retention!r} under scheduling="by_rank", which does not '
                    'find prefixes again; give scheduling="running_first", or no retention'
                )

    @classmethod
    def counting_steps(
        cls,
        max_requests: int,
        token_budget: int = 1 << 20,
        blocks: int = 1 << 20,
        block_tokens: int = 16,
        preemption: Preemption = "pause",
        scheduling: Scheduling = "by_rank",
    ) -> "Engine":
        """An engine whose every step takes one second: all times are then numbers of steps.

        As it stands this is transformers' continuous batching seen from its scheduler: its FIFO is
        request FCFS here, and a rank scheduler that leaves active requests out of a batch, their
        KV kept, is `preemption="pause"`. vLLM is `scheduling="running_first"` with "none" (its
        own priorities) or "recompute" (`make_scheduler`).
        """
        limits = (max_requests, token_budget, blocks, block_tokens, preemption)
        return cls(*limits, 1.0, 0.0, 0.0, 0.0, 0.0, scheduling)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that the KV of `tokens` tokens takes."""
        return -(-tokens // self.block_tokens)

    def step_seconds(
        self, prefill_tokens: int, decoding: int, kv_tokens: int, swapped_blocks: int = 0
    ) -> float:
        """Seconds of one step."""
        return (
            self.base_seconds
            + self.prefill_seconds_per_token * prefill_tokens
            + self.decode_seconds_per_request * decoding
            + self.kv_seconds_per_token * kv_tokens
            + self.swap_seconds_per_block * swapped_blocks
        )

    def decode_seconds(self, decoding: int, kv_tokens: int, steps: int) -> float:
        """Seconds of `steps` steps that decode the same requests.

        `kv_tokens` is as of the first step; each step adds one token a request.
        """
        read = steps * kv_tokens + decoding * (steps * (steps - 1) // 2)
        return (
            self.base_seconds + self.decode_seconds_per_request * decoding
        ) * steps + self.kv_seconds_per_token * read
