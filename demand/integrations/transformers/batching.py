"""Continuous batching of a model in the order of a policy: submit requests, read their tokens."""

import math
import reprlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from queue import Full
from threading import Lock
from typing import Any, Unpack, final

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, GenerationMixin
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import GenerationOutput

from demand.arguments import check_instance, whole_number
from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.graph.pdgraph import PDGraph
from demand.integrations.job_ledger import JobDetails
from demand.integrations.learning import CALL
from demand.integrations.plans import Planned
from demand.integrations.transformers.attention import check_attention
from demand.integrations.transformers.batched_plan import BatchedPlan
from demand.integrations.transformers.install import check_installed, install
from demand.integrations.transformers.jobs import CHILD, JobTable, base_id
from demand.policies.base import Policy
from demand.policies.job import Job
from demand.refine.estimator import DemandEstimator
from demand.refine.predictor import Predictor
from demand.units import CostModel, ParallelCalls

_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@contextmanager
def continuous_batching(
    model: GenerationMixin,
    policy: Policy,
    *,
    distributions: Mapping[str, Distribution] | None = None,
    graphs: Mapping[str, PDGraph] | None = None,
    cost: CostModel | None = None,
    config: ContinuousBatchingConfig | None = None,
    generation_config: GenerationConfig | None = None,
    clock: Callable[[], float] = time.monotonic,
    seed: int = 0,
    estimator: DemandEstimator | None = None,
    predictor: Predictor | None = None,
) -> Iterator["Batching"]:
    """Serve requests to `model` in the order of `policy` while the context is open.

    A thread of its own runs the engine. In the meantime use the model elsewhere only inside
    `batching.manager.pause()`: transformers is not safe with forwards in two threads at once.

    Leaving the context waits for the requests that have not ended, or fails them if it is left by
    an error; afterwards the model, its generation config and transformers are as they were.

    Args:
        model: a causal language model that transformers can batch continuously; on a CPU its
            attention must be "sdpa" or "eager".
        policy: ranks the jobs, which are runs of applications.
        distributions: of total demand in seconds, by name of the application.
        graphs: demand graphs by name of the application; its distribution is `graph.remaining()`.
        cost: seconds of service that a token stands for; `None` takes that of the graphs, or
            `CostModel()` without graphs.
        config: of the engine; `max_requests_per_batch` bounds how many requests run at a time.
            Its `scheduler_type` is replaced, and batching is synchronous.
        generation_config: `None` takes the model's.
        clock: gives seconds.
        seed: of the random numbers that jobs draw, and of the graphs' walks.
        estimator: in place of distributions and graphs, as for `JobTable`: it learns from the jobs
            as they end. Save it afterwards (`DemandEstimator.save`).
        predictor: asked before the first token of a request, as for `JobTable`.

    Raises:
        DemandError: something that is no model, a model whose attention function the engine
            cannot run (that of a SparseCache: `sparsity.detach(model)` first), a batch of no
            requests or of no tokens, and what `JobTable` and `check_installed` refuse; on leaving,
            an engine that failed, for instance in the policy, unless the block is left by another
            error.
    """
    _check_model(model)
    config = _checked(ContinuousBatchingConfig() if config is None else config)
    if generation_config is not None:
        check_instance(
            "generation_config",
            generation_config,
            GenerationConfig,
            "a GenerationConfig of transformers, or None for the model's",
        )
    jobs = JobTable(
        policy,
        distributions,
        graphs,
        cost,
        clock,
        seed,
        estimator=estimator,
        predictor=predictor,
    )
    generation_config = deepcopy(generation_config or model.generation_config)
    with install(jobs, f"demand-{id(jobs):x}") as name:
        config = replace(config, scheduler_type=name)
        if config.use_async_batching is None:
            config.use_async_batching = False  # check_installed refuses it
        manager = model.init_continuous_batching(generation_config, config)
        try:
            if not manager.warmed_up:
                manager.warmup()
            manager.start()
            check_installed(manager, jobs)
            yield Batching(manager, jobs)
        except BaseException:
            manager.stop(hard_stop=True)
            raise
        else:
            manager.stop()
            if (cause := manager.background_thread_status.fatal_error) is not None:
                raise DemandError(
                    f"the engine failed ({cause}), and with it the requests that it had; mend what "
                    "raised that and submit them to another"
                ) from cause
        finally:
            manager.destroy()


def _check_model(model: object) -> None:
    if not isinstance(model, GenerationMixin):
        raise DemandError(
            f"model is {reprlib.repr(model)}; expected a model of transformers that generates, "
            "such as AutoModelForCausalLM gives: load it first, and of a wrapper give what it wraps"
        )
    check_attention(model)


def _checked(config: ContinuousBatchingConfig) -> ContinuousBatchingConfig:
    """`config` with its counts as whole numbers; `None` lets transformers choose, and stays."""
    check_instance(
        "config", config, ContinuousBatchingConfig, "a ContinuousBatchingConfig, or None"
    )
    config = replace(config)
    for name in ("max_requests_per_batch", "max_batch_tokens"):
        if (value := getattr(config, name)) is not None:
            setattr(config, name, whole_number(name, value, least=1))
    return config


@final
class Batching:
    """Submits requests to a manager of transformers, and reads the tokens it generates.

    Safe to use from several threads.

    Args:
        manager: started, and checked by `check_installed`. Only this object may read its results.
        jobs: the table that its scheduler ranks by. Use its `open`, `close`, `expect`, `serve` and
            `record` for jobs that make several requests.

    Attributes:
        manager: as given.
        jobs: as given.

    Raises:
        DemandError: a manager or a table of another kind.
    """

    def __init__(self, manager: ContinuousBatchingManager, jobs: JobTable) -> None:
        check_instance(
            "manager",
            manager,
            ContinuousBatchingManager,
            "a started manager of "
            "continuous batching, such as model.init_continuous_batching gives",
        )
        check_instance("jobs", jobs, JobTable, "a JobTable")
        self.manager = manager
        self.jobs = jobs
        self._lock = Lock()  # of what follows
        self._reading = Lock()  # of the manager's results
        self._outputs: dict[str, deque[GenerationOutput]] = {}  # of requests not read to their end
        self._submitted = 0

    def submit(
        self,
        input_ids: Sequence[int] | Tensor,
        application: str,
        *,
        max_new_tokens: int,
        streaming: bool = False,
        unit: str = CALL,
        **details: Unpack[JobDetails],
    ) -> str:
        """Submit a job that makes one request; give the id of the request.

        Args:
            input_ids: token ids of the prompt, a list or `[tokens]`.
            application: name of the application that the job is a run of.
            max_new_tokens: number of tokens to generate, if no end-of-sequence token comes first.
            streaming: whether `stream` is to give its tokens as they are generated.
            unit: name of the unit that it is a call of, as for `JobTable.announce`.
            details: of the job, as for `JobTable.open`.

        Raises:
            DemandError: a prompt that is no list of the model's tokens, more tokens than the KV
                cache can hold, a full queue, an engine that has stopped, and what `JobTable.open`
                refuses.
        """
        max_new_tokens = whole_number("max_new_tokens", max_new_tokens, least=1)
        tokens = self._check(input_ids, max_new_tokens)
        job = self.jobs.open(application, **details)
        try:
            return self._submit(job, tokens, max_new_tokens, streaming, unit)
        finally:
            self.jobs.close(job)

    def request(
        self,
        job: Job,
        input_ids: Sequence[int] | Tensor,
        *,
        max_new_tokens: int,
        streaming: bool = False,
        unit: str = CALL,
    ) -> str:
        """Submit a request of a job that `jobs.open` gave; give the id of the request.

        Args:
            job: open, and of this table.
            input_ids: token ids of the prompt, a list or `[tokens]`.
            max_new_tokens: number of tokens to generate, if no end-of-sequence token comes first.
            streaming: whether `stream` is to give its tokens as they are generated.
            unit: name of the unit that it is a call of, as for `JobTable.announce`.

        Raises:
            DemandError: as for `submit`, or a job that is closed or not in the table.
        """
        max_new_tokens = whole_number("max_new_tokens", max_new_tokens, least=1)
        tokens = self._check(input_ids, max_new_tokens)
        return self._submit(job, tokens, max_new_tokens, streaming, unit)

    def result(self, request_id: str, timeout_seconds: float = math.inf) -> GenerationOutput:
        """Wait for a request to end, and take its output once: `.generated_tokens` are its tokens.

        Sequences that transformers forked off it (`num_return_sequences`) have ids of their own,
        `{request_id}__child#0` and so on.

        Args:
            request_id: as `submit` or `request` gave it.
            timeout_seconds: how long to wait at most.

        Raises:
            DemandError: the request failed, or is unknown, cancelled or taken already.
            TimeoutError: it has not ended in time.
        """
        give_up = time.monotonic() + timeout_seconds
        while not (output := self._next(request_id, give_up)).is_finished():
            pass
        return output

    def stream(self, request_id: str, timeout_seconds: float = math.inf) -> Iterator[int]:
        """Give the tokens of a request submitted with `streaming=True` as they are generated.

        Args:
            request_id: as `submit` or `request` gave it.
            timeout_seconds: how long to wait at most, for all of them.

        Raises:
            DemandError: as for `result`.
            TimeoutError: it has not ended in time.
        """
        give_up = time.monotonic() + timeout_seconds
        given, finished = 0, False
        while not finished:
            output = self._next(request_id, give_up)
            yield from output.generated_tokens[given:]
            given, finished = len(output.generated_tokens), output.is_finished()

    def execute(
        self, job: Job, plan: Sequence[Planned], *, parallel_calls: ParallelCalls = "sum"
    ) -> list[Any]:
        """Execute a plan as part of `job`: each unit begins as soon as those it waits for are over.

        For a request (a unit of kind "llm") `Planned.make` gives what `request` takes, such as
        {"input_ids": ids, "max_new_tokens": 64}, and the request gives the list of its tokens. For
        any other unit it gives a function of no arguments, which runs in a thread of its own and
        gives what the unit does; its seconds are counted as service and recorded, as by
        `jobs.record`. Where the units say their seconds, the job is told what is left as it begins
        and at the end of each of them, as by `jobs.expect`.

        A unit that fails takes with it those that wait for it, which are not begun; the others go
        on. Left by any other error, it cancels its requests.

        Args:
            job: open, and of this table.
            plan: at least one unit, each after those it waits for.
            parallel_calls: what is told to be left, the "sum" or the "critical_path".

        Returns:
            What each unit gave, in the order of the plan.

        Raises:
            PlanError: units failed, or what they were to submit was refused; raised when nothing
                is underway any more.
            DemandError: a plan that is none, seconds beside an estimator, which tells them, or
                requests that give several sequences.
        """
        plan = self.jobs.check_plan(plan)
        if self.manager.num_return_sequences > 1:
            raise DemandError(
                f"requests give {self.manager.num_return_sequences} sequences each, and a plan "
                "goes on with one; set num_return_sequences to 1"
            )
        return BatchedPlan(
            plan,
            parallel_calls,
            submit=lambda unit, request: self.request(job, **request, unit=unit),
            result=lambda request_id: self.result(request_id).generated_tokens,
            cancel=self.cancel,
            record=partial(self.jobs.record, job),
            over=partial(self.jobs.over, job),
            received=partial(self.jobs.received, job),
            expect=partial(self.jobs.expect, job),
        ).executed()

    def cancel(self, request_id: str) -> None:
        """Cancel a request and the sequences forked off it; their KV is freed before the next step.

        Raises:
            DemandError: the request is unknown, cancelled or taken already.
        """
        with self._lock:
            self._check_open(request_id)
            for one in [one for one in self._outputs if base_id(one) == base_id(request_id)]:
                del self._outputs[one]
                self.manager.cancel_request(one)

    def _check(self, input_ids: Sequence[int] | Tensor, max_new_tokens: int) -> list[int]:
        try:
            tokens = torch.as_tensor(input_ids)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise DemandError(
                f"input_ids are {reprlib.repr(input_ids)}; expected [tokens] whole numbers: encode "
                "a text first, and submit the rows of a batch one by one"
            ) from error
        if tokens.dim() != 1 or not tokens.numel() or tokens.dtype not in _WHOLE:
            raise DemandError(
                f"input_ids has shape {tuple(tokens.shape)} and type {tokens.dtype}; expected "
                "[tokens] whole numbers, at least one: submit the rows of a batch one by one"
            )
        vocabulary = self.manager.model.config.get_text_config().vocab_size
        if tokens.min() < 0 or tokens.max() >= vocabulary:
            raise DemandError(
                f"input_ids go from {tokens.min()} to {tokens.max()}; the model knows the tokens "
                f"from 0 to {vocabulary - 1}, and another would stop the engine for everyone"
            )
        config = self.manager.continuous_batching_config
        assert config.num_blocks is not None  # the manager is up
        room = config.num_blocks * config.page_size
        if len(tokens) + max_new_tokens - 1 > room:  # the last token never has KV
            raise DemandError(
                f"{len(tokens)} tokens and {max_new_tokens} new ones do not fit into the KV cache "
                f"of {room} tokens, and would stop the engine for everyone; ask for fewer, or give "
                "the engine more num_blocks"
            )
        return tokens.tolist()

    def _submit(
        self, job: Job, tokens: list[int], max_new_tokens: int, streaming: bool, unit: str
    ) -> str:
        with self._lock:
            request_id = f"{job.application}/{job.index}/{self._submitted}"
            self._submitted += 1
            self.jobs.announce(job, request_id, unit, tokens)
            forked = range(self.manager.num_return_sequences - 1)
            ids = [request_id, *(f"{request_id}{CHILD}{number}" for number in forked)]
            self._outputs |= {one: deque() for one in ids}
        try:
            taken = self.manager.add_request(
                tokens, request_id, max_new_tokens=max_new_tokens, streaming=streaming
            )
            if taken is None:
                cause = self.manager.background_thread_status.fatal_error
                raise DemandError(
                    f"the engine takes no more requests, it has stopped ({cause}); start another"
                ) from cause
        except (Full, DemandError) as error:
            with self._lock:
                for one in ids:
                    self._outputs.pop(one, None)
            self.jobs.ended(request_id)
            if isinstance(error, Full):
                raise DemandError(
                    f"the queue of the engine is full at {self.manager.input_queue.maxsize} "
                    "requests; submit again later, or raise max_queue_size"
                ) from error
            raise
        return request_id

    def _check_open(self, request_id: str) -> None:
        if request_id not in self._outputs:
            raise DemandError(
                f"request {request_id!r} has no result to wait for: it is unknown, was cancelled, "
                "or its result was taken; use the id that submit gave, once"
            )

    def _next(self, request_id: str, give_up: float) -> GenerationOutput:
        """The next output of a request; those of other requests are kept for their readers."""
        while True:
            running = self.manager.is_running()
            with self._reading:
                if (output := self._kept(request_id)) is not None:
                    break
                if (read := self.manager.get_result(timeout=0.02)) is not None:
                    self._keep(read)
            if read is None and not running:
                raise DemandError(f"the engine stopped before request {request_id!r} ended")
            if time.monotonic() > give_up:
                raise TimeoutError(f"request {request_id!r} has not ended in time")
        if output.error is not None:
            self.jobs.ended(base_id(request_id))
            raise DemandError(f"request {request_id!r} failed in the engine: {output.error}")
        return output

    def _keep(self, output: GenerationOutput) -> None:
        with self._lock:
            if output.request_id in self._outputs:
                self._outputs[output.request_id].append(output)

    def _kept(self, request_id: str) -> GenerationOutput | None:
        with self._lock:
            self._check_open(request_id)
            if not self._outputs[request_id]:
                return None
            output = self._outputs[request_id].popleft()
            if output.is_finished():
                del self._outputs[request_id]
            return output
