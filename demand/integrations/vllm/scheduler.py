"""A scheduler class for vLLM's engine; the one file that uses its private interface (0.32.0)."""

import heapq
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from demand.arguments import file_to_write
from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.integrations.job_ledger import JobLedger, cost_of
from demand.integrations.vllm.displacement import displaced
from demand.integrations.vllm.ranking import Ranking
from demand.policies.base import Policy
from demand.refine.estimator import DemandEstimator
from demand.refine.predictor import Predictor
from demand.units import CostModel

if TYPE_CHECKING:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
else:
    AsyncScheduler = object

_VERIFIED_VERSIONS = ("0.32.0",)
_FINISHED = ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED", "FINISHED_REPETITION")
"""Names of the states of requests that came to an end by themselves."""


def make_scheduler(
    policy: Policy,
    distributions: Mapping[str, Distribution] | None = None,
    *,
    cost: CostModel | None = None,
    idle_runs: int = 10_000,
    seed: int = 0,
    estimator: DemandEstimator | None = None,
    predictor: Predictor | None = None,
    save_to: str | os.PathLike[str] | None = None,
) -> type[Any]:
    """A scheduler class for vLLM that serves by `policy`; start vLLM with priority scheduling.

    vLLM makes the instance itself, with arguments of its own, so whatever the policy needs has to
    be part of the class. Within one process hand the class over: `LLM(...,
    scheduler_cls=make_scheduler(...), scheduling_policy="priority")`. An engine in a process of
    its own, as with `vllm serve`, imports the class by name: assign it in a module, `Scheduler =
    make_scheduler(...)`, and pass `--scheduler-cls that_module.Scheduler --scheduling-policy
    priority`.

    Requests say which run they belong to by `annotation`. Every step the runs being served are
    ranked anew by the service they have attained, with all their requests. When `max_num_seqs`
    requests are running, one that waits and has a strictly smaller rank displaces the running one
    of largest rank: that one is preempted, keeps its tokens, and has its KV recomputed later. When
    KV blocks run out, vLLM's own rule preempts the running request of largest rank.

    Args:
        policy: ranks the runs.
        distributions: total demand in seconds, by name of the application. A run of any other
            application is ranked by attained service, and a warning names it.
        cost: seconds of service that a token stands for; `None` is that of the estimator, or
            `CostModel()`.
        idle_runs: how many runs are remembered that have no request in the engine.
        seed: of the random numbers that jobs draw.
        estimator: in place of distributions: says what is known of a run at its first request and
            what is left of it at the end of each, and learns from runs whose `last` request has
            finished, and from requests that are runs of their own.
        predictor: says what is left of a run as a request comes in, told the ids of its prompt.
        save_to: where the estimator is saved as the engine shuts down, since it may be in a process
            of its own; `None` for nowhere. An engine that is killed saves nothing.

    Raises:
        DemandError: vLLM is missing or of a version that this was not verified on, an argument
            of the wrong kind, such as the class of a policy, a place to save no estimator to, or
            one in a folder that is missing.
    """
    try:
        import vllm
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    except ImportError as error:
        raise DemandError(
            f"a scheduler inside vLLM needs vllm=={_VERIFIED_VERSIONS[-1]} in this environment"
        ) from error
    if vllm.__version__.split("+")[0] not in _VERIFIED_VERSIONS:
        raise DemandError(
            f"vLLM is {vllm.__version__}, and its scheduler interface changes between releases; "
            f"this adapter was verified on {', '.join(_VERIFIED_VERSIONS)}: install that, or put "
            "AdmissionController in front of the server, which works with any version"
        )

    if save_to is not None and estimator is None:
        raise DemandError(f"save_to is {save_to!r} and there is no estimator; give one, or drop it")
    saved = None if save_to is None else file_to_write("save_to", save_to)
    cost = cost_of(cost, estimator)
    known = {} if distributions is None else distributions

    def ranking() -> Ranking:
        ledger = JobLedger(policy, known, seed, estimator=estimator, predictor=predictor, cost=cost)
        return Ranking(ledger, cost, idle_runs)

    def save() -> None:
        if saved is not None and estimator is not None:
            estimator.save(saved)

    ranking()  # refuses wrong arguments here, not in the process of the engine
    body = {
        "__doc__": f"Serves by {policy!r}.",
        "__module__": __name__,
        "make_ranking": staticmethod(ranking),
        "save": staticmethod(save),
    }
    return type("DemandScheduler", (RankedScheduling, AsyncScheduler), body)


class RankedScheduling(AsyncScheduler):
    """Puts the key of `Ranking` into vLLM's priority queue, and preempts for better requests.

    `make_scheduler` derives from it and from vLLM's AsyncScheduler, which also schedules
    synchronously. `Request.priority` becomes the key of `Ranking`: vLLM does nothing but compare
    it.

    Attributes:
        displacements: how often a running request was preempted for a better one that waited.
    """

    make_ranking: ClassVar[Any]
    save: ClassVar[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        configured = self.scheduler_config.policy
        if configured != "priority":
            raise DemandError(
                f"vLLM schedules by {configured!r}; start it with scheduling_policy='priority' "
                "(--scheduling-policy priority), whose queue is sorted by the ranks"
            )
        self._ranking: Ranking = self.make_ranking()
        self.displacements = 0

    @override
    def add_request(self, request: Any) -> None:
        """Rank a request, then let vLLM queue it."""
        if request.request_id not in self.requests:  # else it continues a streaming session
            parameters = request.sampling_params
            fields = (parameters and parameters.extra_args) or {}
            now, prompt = time.monotonic(), request.prompt_token_ids
            request.priority = self._ranking.add(request.request_id, fields, now, prompt)
        super().add_request(request)

    @override
    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Rank anew, preempt for better requests, then let vLLM fill the step."""
        self._rank_anew(time.monotonic())
        self._displace()
        return super().schedule(*args, **kwargs)

    @override
    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """Forget a request; vLLM comes here with every one that finishes or is aborted."""
        whole = request.status.name in _FINISHED
        self._ranking.finish(*_progress(request), time.monotonic(), whole)
        return super()._free_request(request, *args, **kwargs)

    @override
    def shutdown(self) -> None:
        """Save what was learned, where that was asked for, and shut down in any case."""
        try:
            self.save()
        finally:
            super().shutdown()

    def _rank_anew(self, now: float) -> None:
        changed = self._ranking.serve(map(_progress, self.running), now)
        for request_id in changed:
            self.requests[request_id].priority = self._ranking.key(request_id, now)
        if len(changed) > len(self.running):  # else none of them waits
            for queue in (self.waiting, self.kv_holding_waiting):
                heapq.heapify(queue._heap)  # noqa: SLF001

    def _displace(self) -> None:
        """Preempt running requests for better ones that wait and could be served at once."""
        if self.pause_state.name != "UNPAUSED" or not self.waiting or not self.running:
            return
        worst_rank = max(r.priority for r in self.running)[0]
        if not self.waiting.peek_request().priority[0] < worst_rank:
            return
        could_run = filter(self._could_run, self.waiting._heap)  # noqa: SLF001
        best = heapq.nsmallest(self.max_num_active_reqs, (r.priority for r in could_run))
        slots = self.max_num_active_reqs - self.num_waiting_for_streaming_input
        running = list(self.running)
        for position in displaced([r.priority for r in running], best, slots):
            victim = running[position]
            if self._request_blocks_can_be_freed(victim):
                self.running.remove(victim)
                self._preempt_request(
                    victim, time.monotonic(), drop_stale_output=self.requires_kv_delivery
                )
                self.displacements += 1

    def _could_run(self, request: Any) -> bool:
        """Whether `request` is sure to be served once another is preempted for it.

        It is not if it waits for something else, still awaits output from before its own
        preemption, or needs a LoRA adapter, of which a step holds only so many. Otherwise the slot
        might go back to the very request that was preempted for it, step after step.
        """
        stale = request.num_stale_output_tokens and not request.drop_stale_output
        blocked = self._is_blocked_waiting_status(request.status)
        return not (blocked or stale or request.lora_request is not None)


def _progress(request: Any) -> tuple[str, int, int]:
    """Id, prompt tokens read and tokens generated, of which the former fall to 0 on preemption."""
    read = min(request.num_computed_tokens, request.num_prompt_tokens)
    return request.request_id, read, request.num_output_tokens
