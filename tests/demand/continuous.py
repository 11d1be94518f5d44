"""What the tests of the transformers adapter share: an engine config, and runs step by step."""

from copy import deepcopy
from functools import lru_cache

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from demand import Distribution
from demand.integrations.transformers import JobTable, install
from tests.helpers import random_ids

KNOWN = {"short": Distribution([0.3, 0.6]), "long": Distribution([3.0, 6.0])}


def config(width: int = 2, blocks: int = 64, **overrides) -> ContinuousBatchingConfig:
    settings = dict(
        page_size=16,
        num_blocks=blocks,
        max_batch_tokens=128,
        max_requests_per_batch=width,
        use_cuda_graph=False,
        use_async_batching=False,
    )
    return ContinuousBatchingConfig(**(settings | overrides))


def prompt(length: int, seed: int = 0) -> list[int]:
    return random_ids(length, seed=seed).tolist()


def manager_of(model, **overrides):
    """A manager that is not started."""
    generation = GenerationConfig(eos_token_id=-1, pad_token_id=0)
    return model.init_continuous_batching(generation, config(**overrides))


def generated(model, prompt: list[int], new: int) -> list[int]:
    """What `generate` makes of one prompt alone."""
    return list(_generated(model, tuple(prompt), new))


@lru_cache
def _generated(model, prompt: tuple[int, ...], new: int) -> list[int]:
    out = model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False)
    return out[0, len(prompt) :].tolist()


class Stepped:
    """A manager whose loop is run step by step by the test, under a clock that counts steps."""

    def __init__(self, model, policy, engine, known=KNOWN, *, learning=None, **generation) -> None:
        self.manager = None
        told = dict(distributions=known) if learning is None else learning
        self.table = JobTable(policy, **told, clock=lambda: float(self.steps))
        generation_config = deepcopy(model.generation_config)
        generation_config.update(**generation)
        with install(self.table) as name:
            engine.scheduler_type = name
            self.manager = model.init_continuous_batching(generation_config, engine)
            self.manager.batch_processor = self.manager._create_batch_processor()
        self.manager.current_batch = 0
        self.scheduler = self.manager.batch_processor.scheduler
        self.outputs = {}
        self.ended_at = {}

    @property
    def steps(self) -> int:
        return 0 if self.manager is None else self.manager.current_batch

    def add(self, job, request_id: str, prompt: list[int], new: int, unit: str = "call") -> None:
        self.table.announce(job, request_id, unit, prompt)
        self.manager.add_request(prompt, request_id, max_new_tokens=new)

    def submit(self, application: str, request_id: str, prompt: list[int], new: int, **fields):
        job = self.table.open(application, **fields)
        self.add(job, request_id, prompt, new)
        self.table.close(job)
        return job

    def step(self, times: int = 1) -> None:
        """Up to `times` steps, fewer if there is nothing to do."""
        for _ in range(times):
            queues = self.manager.input_queue, self.manager.cancel_queue
            if not self.scheduler.has_pending_requests() and all(q.empty() for q in queues):
                self.scheduler.clear_cancelled_requests()  # as the loop does before it waits
                return
            self.manager._generation_loop_body(self.manager.batch_processor, bootstrapping=False)
            while (output := self.manager.get_result()) is not None:
                assert output.error is None, output.error
                self.outputs[output.request_id] = output.generated_tokens
                self.ended_at[output.request_id] = self.steps

    def finish(self, most: int = 2000) -> None:
        """Until everything submitted has ended."""
        self.step(most)
        assert not self.scheduler.has_pending_requests(), f"not finished after {most} steps"

    @property
    def batch(self) -> set[str]:
        """The requests of the last step."""
        return self.scheduler._in_batch
