"""The scheduler of continuous batching that fills each batch in the order of a policy."""

from typing import final

from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.requests import (
    FutureRequestState,
    RequestState,
    RequestStatus,
)
from transformers.generation.continuous_batching.scheduler import Scheduler
from typing_extensions import override

from demand.integrations.transformers.jobs import JobTable, base_id

Batch = tuple[list[FutureRequestState] | None, bool, int, int]
"""What `schedule_batch` gives: the requests of the batch, or `None` if some must be evicted first;
whether all of them decode; how many query tokens; how many tokens of KV are read."""


@final
class RankScheduler(Scheduler):
    """Fills each batch with the requests whose jobs rank best.

    A request is active while it holds KV, and waiting while it holds none. The rules of each step:

    1. All requests are put in order: by the rank of their job, then by the arrival of the job,
       then by their own submission.
    2. In that order they enter the batch until it has `max_requests_per_batch` of them, the token
       budget is spent, or one lacks KV. No request after that one enters.
    3. An active request that is left out keeps its KV, and goes on later without computing
       anything again.
    4. For a request that lacks KV, active requests after it in the order lose theirs, the last one
       first, if that frees enough; they wait and are prefilled again (or copied back, with
       `cpu_offload_space`). A waiting request needs room for its whole prompt. Blocks that are
       kept only for sharing prefixes are freed before those of any request.

    Departures from the scheduler interface of transformers: its `block_new_requests`, set after an
    eviction, is not obeyed, since rule 4 keeps evicted requests out until they fit; and the default
    safety margin is 0, since a margin ends the batch at the first prefill. transformers never
    evicts its last active request: where only that one could give room, it goes on.

    Args:
        cache: the paged KV cache of the engine.
        safety_margin: share of free KV below which only decoding requests and one prefill enter.
        max_requests_per_batch: how many requests a batch holds at most.
        jobs: says which job each request belongs to, and ranks the jobs.

    Attributes:
        steps: number of batches so far.
        pauses: how often an active request was left out of a batch after being in the one before.
        evictions: how often a request lost its KV.
    """

    def __init__(
        self,
        cache: PagedAttentionCache,
        safety_margin: float | None,
        max_requests_per_batch: int,
        jobs: JobTable,
    ) -> None:
        self.jobs = jobs
        self._prompt_tokens: dict[str, int] = {}  # of the requests in the engine
        self._finished: set[str] = set()  # of those that have left it, before that is noted
        super().__init__(cache, safety_margin or 0.0, max_requests_per_batch)

    @override
    def reset(self) -> None:
        """Forget all requests and set the counters to 0."""
        super().reset()
        self.steps = self.pauses = self.evictions = 0
        self._in_batch: set[str] = set()
        self._forget_the_gone()

    @override
    def add_waiting_request(self, state: RequestState) -> None:
        """Let a request wait that is new, or that was evicted."""
        if state.request_id in self.waiting_requests:
            # It was offered for eviction while it waited, and so had no KV to lose.
            self.waiting_requests[state.request_id] = state
            return
        if state.request_id in self._prompt_tokens:
            self.evictions += 1
        else:
            self.jobs.entered(state.request_id)
            self._prompt_tokens[state.request_id] = len(state.initial_tokens)
        super().add_waiting_request(state)

    @override
    def finish_request(self, request_id: str) -> None:
        """Free the KV of a request that has ended or is being evicted."""
        if request_id in self.active_requests:
            state = self.active_requests[request_id]
            self._note_progress(state)
            if state.status == RequestStatus.FINISHED:
                self._finished.add(request_id)
        super().finish_request(request_id)

    @override
    def clear_cancelled_requests(self) -> list[RequestState]:
        """Forget cancelled requests; the engine calls this before every step."""
        cancelled = super().clear_cancelled_requests()
        self._forget_the_gone()
        return cancelled

    @override
    def schedule_batch(self, token_budget: int, cache_budget: int) -> Batch:
        """The next batch, by the rules above.

        Args:
            token_budget: how many tokens may be computed.
            cache_budget: how many tokens of KV may be read.
        """
        for request_id in self._in_batch & self.active_requests.keys():
            self._note_progress(self.active_requests[request_id])
        states = self.active_requests | self.waiting_requests
        ranked = [states[request_id] for request_id in self.jobs.ranked(states)]
        entering, offered = self._admit(ranked, token_budget)
        if offered:
            self.starved_requests = offered
            return None, False, 0, 0
        removed: set[str] = set()
        scheduled, failed, decode_fast_path, query_tokens, kv_tokens = self._process_candidates(
            entering, token_budget, cache_budget, removed
        )
        self._cleanup_waiting_queue(removed)
        in_batch = {future.state.request_id for future in scheduled}
        if self.starved_requests:
            lacking = {state.request_id: tokens for state, tokens in self.starved_requests}
            self.starved_requests = [
                (state, lacking.get(state.request_id, 0))
                for state in ranked
                if state.request_id in self.active_requests.keys() - in_batch
            ]
        if failed and not scheduled:
            return None, False, 0, 0
        self.steps += bool(scheduled)
        self.pauses += len((self._in_batch - in_batch) & self.active_requests.keys())
        self._in_batch = in_batch
        self.jobs.runs(in_batch)
        return scheduled, decode_fast_path, query_tokens, kv_tokens

    def _admit(
        self, ranked: list[RequestState], token_budget: int
    ) -> tuple[list[RequestState], list[tuple[RequestState, int]]]:
        """Which requests enter by rules 2 and 4; or, where eviction helps, which to offer for it.

        The engine evicts from the end of the requests it is offered, until those that are left can
        store the tokens given with them.

        Args:
            ranked: all requests, best first.
            token_budget: how many tokens may be computed.
        """
        wanted: list[tuple[RequestState, int]] = []
        taken, free = 0, self.cache.compute_free_capacity(relative=False)
        for position, state in enumerate(ranked):
            if token_budget <= 0 or len(wanted) == self.max_requests_per_batch:
                break
            decoding = state.status == RequestStatus.DECODING
            pending = len(state.tokens_to_process if decoding else state.remaining_prefill_tokens)
            granted = min(pending, token_budget)
            tokens = granted if state.request_id in self.active_requests else pending
            taken += self._bytes_needed(state, tokens)
            if taken > free and self.cache.evict_cached_blocks():
                free = self.cache.compute_free_capacity(relative=False)
            if taken > free:
                later = self._active(ranked[position + 1 :])
                if self._bytes_to_free(later) >= taken - free:
                    return [], [*wanted, (state, tokens), *((one, 0) for one in later)]
                if not wanted:
                    # Only the last active request could give room, and it is never evicted.
                    return self._active(ranked) or [state], []
                break
            wanted.append((state, tokens))
            token_budget -= granted
        return [state for state, _ in wanted], []

    def _active(self, states: list[RequestState]) -> list[RequestState]:
        return [state for state in states if state.request_id in self.active_requests]

    def _bytes_needed(self, state: RequestState, tokens: int) -> int:
        return sum(
            allocator.needs_new_blocks(state.request_id, state.current_len(), tokens)
            * allocator.bytes_per_block
            for allocator in self.cache.cache_allocators.values()
        )

    def _bytes_to_free(self, active: list[RequestState]) -> int:
        """Bytes of KV that evicting all of `active` would free, but for the last active request."""
        return sum(
            sum(block not in allocator.ledger.shared_ref_counts for block in blocks)
            * allocator.bytes_per_block
            for state in active[len(active) == len(self.active_requests) :]
            for allocator in self.cache.cache_allocators.values()
            if (blocks := allocator.block_table.get(state.request_id))
        )

    def _note_progress(self, state: RequestState) -> None:
        base = base_id(state.request_id)
        prompt = self._prompt_tokens.setdefault(state.request_id, self._prompt_tokens[base])
        # A request that was evicted comes back with what it had generated as part of its prompt.
        generated = len(state.initial_tokens) - prompt + len(state.generated_tokens)
        self.jobs.progressed(state.request_id, min(state.position_offset, prompt), generated)

    def _forget_the_gone(self) -> None:
        here = {
            base_id(request_id) for request_id in (*self.active_requests, *self.waiting_requests)
        }
        gone = {base_id(request_id) for request_id in self._prompt_tokens} - here
        if gone:
            self._prompt_tokens = {
                request_id: tokens
                for request_id, tokens in self._prompt_tokens.items()
                if base_id(request_id) not in gone
            }
        finished = {base_id(request_id) for request_id in self._finished}
        for base in gone:
            self.jobs.ended(base, base in finished)
        self._finished = {each for each in self._finished if base_id(each) not in gone}
