"""The requests of a step, and what becomes of their tokens and blocks."""

from typing import final

from demand.simulation.engine.blocks import Blocks
from demand.simulation.engine.engine import Engine
from demand.simulation.engine.job_on_engine import Calls, JobOnEngine
from demand.simulation.engine.request_log import RequestLog


@final
class Batch:
    """The requests of the coming step, and what the step does to their tokens and blocks.

    This is rule 4 of `Engine`. Requests that decode stay from step to step until they are taken
    out, and nothing of them is written meanwhile: each makes one token a step, so that their
    tokens and blocks follow from the number of steps carried out. Requests that still compute
    their prompt are added anew for each step.

    Attributes:
        engine: its limits and times.
        blocks: the KV blocks.
        step: steps carried out.
        formed: how many batches have been formed, this one included.
        decoding: requests that decode.
        prefilling: calls that do not decode yet, with the tokens that each computes in this step.
        room: how many requests can still be added.
        budget: how many tokens they can have.
        size: requests in the step.
        kv_tokens: tokens whose KV they have at the end of the step.
        steady: whether the next step can be the same: each request decodes, nothing is copied.
        requests: sum of the sizes of all steps carried out.
        over: requests that are over.
        prompt_tokens: computed so far, those that were found included; none counts twice.
        log: the requests that are over.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.blocks = Blocks(engine)
        self.step = 0
        self.formed = 0
        self.decoding = 0
        self.prefilling: list[tuple[Calls, int]] = []
        self.room = 0
        self.budget = 0
        self.size = 0
        self.kv_tokens = 0
        self.steady = True
        self.requests = 0
        self.over = 0
        self.prompt_tokens = 0
        self.log = RequestLog()
        self._context = 0  # tokens with KV of the requests that decode
        self._seconds = 0.0

    def open(self) -> None:
        """Start the next batch with the calls that decode; the blocks they need must be free."""
        self.blocks.take(self.blocks.growth(self.step, 1))
        self.room = self.engine.max_requests - self.decoding
        self.budget = self.engine.token_budget - self.decoding
        self.prefilling = []

    def add(self, calls: Calls, tokens: int) -> None:
        """Schedule `tokens` tokens of each of `calls`, which hold the blocks for them."""
        self.room -= calls.count
        self.budget -= calls.count * tokens
        step, history, computed = self.step, calls.history, calls.computed
        generated = calls.generated
        pending = calls.input_tokens + generated - computed
        if pending > 1 or not generated:
            calls.formed = self.formed
            history += (step if tokens == pending else ~step, computed + tokens)
            self.prefilling.append((calls, tokens))
            return
        job = calls.job
        calls.over = step + calls.output_tokens - generated
        if job.since_step != step:
            job.generated, job.since_step = job.produced(step), step
        job.decoding += calls.count
        job.check_step = 0
        self.blocks.enter(calls, step)
        if history[-1] != computed or history[-2] != step - 1:  # it made none in the last step
            history += (step, computed + 1)
        self.decoding += calls.count
        self._context += computed * calls.count

    def stop(self, job: JobOnEngine) -> None:
        """Take out the calls of `job` that decode, before the batch is open."""
        self._stop(job, ahead=False)

    def displace(self, job: JobOnEngine) -> None:
        """Take out the calls of `job` that decode, to make room for others."""
        self.room += job.decoding
        self.budget += job.decoding
        self._stop(job, ahead=True)

    def close(self) -> None:
        """The batch is complete: count what its step takes."""
        moved = self.blocks.take_moved()
        self.size = self.engine.max_requests - self.room
        self.kv_tokens = self._context + self.decoding
        prefill_tokens = 0
        for calls, tokens in self.prefilling:
            prefill_tokens += calls.count * tokens
            self.kv_tokens += calls.count * (calls.computed + tokens)
        self.steady = self.size > 0 and not self.prefilling and not moved
        if not self.steady:
            self._seconds = self.engine.step_seconds(
                prefill_tokens, self.decoding, self.kv_tokens, moved
            )

    def seconds(self, steps: int) -> float:
        """Seconds of the step; if it is `steady`, of `steps` such steps."""
        if self.steady:
            return self.engine.decode_seconds(self.size, self.kv_tokens, steps)
        return self._seconds

    def free_after(self, steps: int) -> int:
        """Blocks that nobody holds once the step has been carried out, `steps` times over."""
        more = self.blocks.growth(self.step + 1, steps - 1) if steps > 1 else 0
        return self.blocks.free - more

    def advance(self, steps: int) -> None:
        """Carry out the step, `steps` times over. Ask `finish` afterwards which calls are over."""
        if steps > 1:
            self.blocks.take(self.blocks.growth(self.step + 1, steps - 1))
        self.blocks.count()
        self.step += steps
        self.requests += steps * self.size
        self._context += steps * self.decoding
        for calls, tokens in self.prefilling:
            self.prompt_tokens += _compute(calls, tokens)

    def finish(self, job: JobOnEngine) -> bool:
        """Take out the calls of `job` that are over.

        Returns:
            Whether those were the last of its unit.
        """
        step, blocks = self.step, self.blocks
        over = [
            calls
            for calls in job.calls
            if calls.over == step or calls.generated == calls.output_tokens
        ]
        if not over:
            return False
        job.generated, job.since_step = job.produced(step), step
        job.check_step = 0
        for calls in over:
            if calls.over:
                self._leave(calls, ahead=False)
                job.decoding -= calls.count
            self.log.add(calls, step)
            self.over += calls.count
            blocks.release(calls)
            job.calls.remove(calls)
            job.requests -= calls.count
        if job.calls:
            return False
        blocks.forget(job)
        return True

    def _stop(self, job: JobOnEngine, ahead: bool) -> None:
        for calls in job.calls:
            if calls.over:
                self._leave(calls, ahead)
                calls.formed = self.formed - 1
        job.generated, job.since_step, job.decoding = job.produced(self.step), self.step, 0

    def _leave(self, calls: Calls, ahead: bool) -> None:
        """Take out calls that decode, once their tokens and KV are written down."""
        calls.generated = calls.output_tokens - (calls.over - self.step)
        calls.computed = calls.input_tokens + calls.generated - 1
        calls.over = 0
        self.blocks.leave(calls, self.step, ahead)
        self.decoding -= calls.count
        self._context -= calls.computed * calls.count


def _compute(calls: Calls, tokens: int) -> int:
    """Carry out rule 4 of `Engine` for one step: `tokens` get KV; with none left, one is made.

    Returns:
        Prompt tokens that got KV for the first time.
    """
    job, count = calls.job, calls.count
    calls.computed += tokens
    new = min(calls.computed, calls.input_tokens) - calls.prefilled
    if new > 0:
        calls.prefilled += new
        job.prefilled += new * count
    else:
        new = 0
    if calls.pending == 0:
        calls.generated += 1
        job.generated += count
    return new * count
