"""What a continuous-batching engine can hold, and how long its steps take."""

from dataclasses import dataclass
from typing import Literal, final, get_args

from demand.arguments import set_whole_numbers
from demand.errors import DemandError
from demand.seconds import check_seconds

Preemption = Literal["none", "pause", "recompute", "swap"]
PREEMPTIONS: tuple[Preemption, ...] = get_args(Preemption)


@final
@dataclass(frozen=True)
class Engine:
    """An engine that serves a batch of requests step by step, with paged KV.

    The rules, in full. A request of I input and O output tokens is over when O tokens are
    produced. Its pending tokens are those known (input, and output so far) without KV.

    1. At the start of a step all requests present are put in order: rank of their job, then order
       of arrival of the job, then number of the call within its unit. With `preemption="none"`
       the units that were served before go first, in the order in which they were first served.
    2. In that order each gets min(pending, what is left of `token_budget`) tokens, until the step
       has `max_requests` requests, the budget is spent, or one cannot get its blocks: then nobody
       after it is served in this step. The prefill of a prompt is thereby cut into chunks, and
       decoding takes one token a step.
    3. KV takes ceil(tokens / `block_tokens`) blocks, which are allocated as the tokens are
       scheduled and freed when the request is over. When they run out, requests that come later
       in the order lose theirs, the last one first, if that frees enough; else none does.
    4. The step takes `step_seconds`. At its end the scheduled tokens have KV, and each request
       with none pending has produced one more token: so a prompt that fits the budget produces
       its first token in the step that prefills it, a lone request takes O steps, and the last
       token of a request never has KV. Units that end with one step do so in order of arrival of
       their jobs.

    What becomes of a request that is left out of a step:

    - "none": nobody is left out for a better rank, only for want of budget or blocks, and keeps
      its KV;
    - "pause": it keeps its KV, on the device, whatever its place in the order;
    - "recompute": at most `max_requests` requests hold KV; the last in the order lose it and
      prefill their input and what they have produced again;
    - "swap": the same, but the blocks are copied to the host and back.

    A request that loses its blocks under rule 3 swaps under "swap" and recomputes under the rest.

    Args:
        max_requests: requests in one step, the width of the batch.
        token_budget: tokens computed in one step, prefill and decoding together.
        blocks: KV blocks on the device.
        block_tokens: tokens in a block.
        preemption: see above.
        base_seconds: of every step.
        prefill_seconds_per_token: added for each token of a chunk of prefill.
        decode_seconds_per_request: added for each decoding request. The defaults make 0.06 s a
            step at 32 requests, the profile of the Hermes artifact (arXiv 2506.14851).
        kv_seconds_per_token: added for each token of KV that a scheduled request has at the end
            of the step: what attention reads.
        swap_seconds_per_block: added for each block copied to or from the host.

    Raises:
        DemandError: a limit below 1, a time that is negative or not finite, decoding in no time,
            or an unknown preemption.
    """

    max_requests: int = 64
    token_budget: int = 2048
    blocks: int = 4096
    block_tokens: int = 16
    preemption: Preemption = "pause"
    base_seconds: float = 0.044
    prefill_seconds_per_token: float = 1e-4
    decode_seconds_per_request: float = 5e-4
    kv_seconds_per_token: float = 0.0
    swap_seconds_per_block: float = 2e-4

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

    @classmethod
    def counting_steps(
        cls,
        max_requests: int,
        token_budget: int = 1 << 20,
        blocks: int = 1 << 20,
        block_tokens: int = 16,
        preemption: Preemption = "pause",
    ) -> "Engine":
        """An engine whose every step takes one second: all times are then numbers of steps.

        This is transformers' continuous batching seen from its scheduler: its FIFO is request
        FCFS here, and a rank scheduler that leaves active requests out of a batch, their KV kept,
        is `preemption="pause"`.
        """
        return cls(
            max_requests, token_budget, blocks, block_tokens, preemption, 1.0, 0.0, 0.0, 0.0, 0.0
        )

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
