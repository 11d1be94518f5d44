"""Forms the batch of a step, and carries it out for as many steps as it stays the same."""

from collections.abc import Callable
from typing import final

from demand.engine.blocks import Blocks
from demand.engine.model import Engine
from demand.engine.order import RankOrder
from demand.engine.tasks import Request, Task
from demand.policies.base import Policy


@final
class Batcher:
    """The engine at work: rules 1 to 4 of `Engine`.

    Attributes:
        order: the tasks with requests.
        blocks: the KV blocks.
        decoding: requests of the step formed that decode.
        prefilling: those that prefill, with the tokens of their chunks.
        size: how many they are.
        kv_tokens: KV of the batch at the end of that step.
        decodes: whether the next step can be the same: each request decodes, nothing is copied.
        partial: a task that is served with some of its requests only; `None` if there is none.
        requests: sum of batch sizes over all steps.
        preemptions: times that a request was left out of the step after one it was in.
    """

    def __init__(self, engine: Engine, policy: Policy) -> None:
        self.engine = engine
        self.policy = policy
        self.order = RankOrder(policy, engine.preemption != "none")
        self.blocks = Blocks(engine)
        self.decoding: list[Request] = []
        self.prefilling: list[tuple[Request, int]] = []
        self.size = 0
        self.kv_tokens = 0
        self.seconds = 0.0
        self.decodes = True
        self.partial: Task | None = None
        self.requests = 0
        self.preemptions = 0
        self._formed = 0
        self._unfinished = 0

    def form(self, now: float, warm: Callable[[Task, float], bool]) -> None:
        """Choose the requests of the step that starts at second `now`.

        When the turn of a task comes that is `cold`, `warm` is asked whether its backend is warm.
        If not it is taken out of the order; the batch may be empty then.
        """
        engine, blocks = self.engine, self.blocks
        width, budget, block_tokens = engine.max_requests, engine.token_budget, engine.block_tokens
        decoding: list[Request] = []
        prefilling: list[tuple[Request, int]] = []
        served: list[Task] = []
        passed_over: list[Task] = []
        size = kept = kv_tokens = 0
        complete = True
        before, self._formed = self._formed, self._formed + 1
        for task in self.order.best_first(now):
            if task.cold:
                task.cold = False
                if not warm(task, now):
                    continue
            task.width = 0
            for request in task.requests:
                pending = request.input_tokens + request.generated - request.computed
                n = pending if pending < budget else budget
                short = request.computed + n > request.blocks * block_tokens
                if (short or request.swapped) and not blocks.hold(request, n):
                    complete = False
                    break
                if request.step == before:
                    kept += 1
                request.step = self._formed
                if pending == 1 and request.generated:
                    decoding.append(request)
                else:
                    prefilling.append((request, n))
                budget -= n
                kv_tokens += request.computed + n
                task.width += 1
                size += 1
                if not budget or size == width:
                    complete = False
                    break
            (served if task.width else passed_over).append(task)
            if not complete:
                break
        blocks.trim()
        self.order.settle(served, passed_over, now)
        last = served[-1] if served else None
        self.partial = last if last is not None and last.width < len(last.requests) else None
        self.preemptions += self._unfinished - kept
        self.decoding, self.prefilling = decoding, prefilling
        self.size, self.kv_tokens = size, kv_tokens
        moved = blocks.take_moved()
        self.decodes = size > 0 and not prefilling and not moved
        prefilled = engine.token_budget - budget - len(decoding)
        self.seconds = engine.step_seconds(prefilled, len(decoding), kv_tokens, moved)

    def seconds_of(self, steps: int) -> float:
        """Seconds of the step formed, or of `steps` of it where it `decodes`."""
        if steps == 1:
            return self.seconds
        return self.engine.decode_seconds(self.size, self.kv_tokens, steps)

    def advance(self, steps: int, now: float) -> list[Task]:
        """Carry out the step formed, `steps` times over, so that it ends at second `now`.

        Returns:
            The tasks whose present unit ended with it.
        """
        finished: list[Request] = []
        for request in self.decoding:
            request.computed += steps
            request.generated += steps
            request.task.generated += steps
            if request.generated == request.output_tokens:
                finished.append(request)
        for request, tokens in self.prefilling:
            _compute(request, tokens)
            if request.generated == request.output_tokens:
                finished.append(request)
        if steps > 1:
            self.blocks.grow(self.decoding)
        self.blocks.count()
        self.requests += steps * self.size
        self._unfinished = self.size - len(finished)
        for task in self.order.running:
            self._credit(task, now)
        return self._finish(finished)

    def _credit(self, task: Task, now: float) -> None:
        job = task.job
        attained = task.attained()
        seconds = attained - job.attained_service
        job.attained_service = attained
        if seconds > 0.0:
            self.policy.served(job, seconds, now)

    def _finish(self, finished: list[Request]) -> list[Task]:
        over = []
        for request in finished:
            self.blocks.release(request)
            task = request.task
            task.requests.remove(request)
            if not task.requests:
                self.order.leave(task)
                over.append(task)
        return over


def _compute(request: Request, tokens: int) -> None:
    """Rule 4: the scheduled tokens get KV, and with none pending one more is produced."""
    task = request.task
    request.computed += tokens
    new = min(request.computed, request.input_tokens) - request.prefilled
    if new > 0:
        request.prefilled += new
        task.prefilled += new
    if request.pending == 0:
        request.generated += 1
        task.generated += 1
