"""The engine simulator beside a real vLLM, step by step; run by .ci/vllm in its own environment.

The same small workloads are served by vLLM on a CPU with the reference model, and by
`simulate_engine` with `scheduling="running_first"` and its twin: the same requests are in the batch
of every step, each with the same number of tokens, blocks run out and prompts are cut included.
"""

import gc
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demand import (
    FCFS,
    SERPT,
    CostModel,
    Distribution,
    Execution,
    Gittins,
    Policy,
    RequestFCFS,
    Unit,
    Workload,
)
from demand.integrations.vllm import annotation, make_scheduler
from demand.policies import LAS, PriorityClasses
from demand.simulation.engine import LRU, Engine, simulate_engine
from tests.demand.engine_twin import step_by_step

vllm = pytest.importorskip("vllm", reason="vLLM is not installed here; .ci/vllm installs and runs")

pytestmark = pytest.mark.vllm

MODEL = Path(__file__).parents[2] / "examples" / "reference_model"
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
KNOWN = {
    "short": Distribution([0.5]),
    "long": Distribution([3.0]),
    "mixed": Distribution([0.5, 6.0]),
}
THINK, TOOL = Unit("think", "llm"), Unit("tool", "tool")
BLOCK = 32
SEEDS = range(12)

WIDTHS = [(3, 24, 9), (6, 40, 12)]
"""Requests, tokens and blocks of the engines: both run out of each."""

Batches = list[dict[int, int]]
"""Of each step, the tokens that each request computes, by its number."""


@pytest.fixture(autouse=True, scope="module")
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


def workload_of(seed: int) -> Workload:
    """Requests of up to 200 tokens of KV that come in bursts."""
    rng = np.random.default_rng(seed)
    jobs = int(rng.integers(3, 14))
    arrivals = np.sort(rng.integers(0, 60, jobs) * rng.integers(0, 2, jobs)).astype(float)
    return Workload(
        arrivals,
        np.ones(jobs),
        list(rng.choice(list(KNOWN), jobs)),
        KNOWN,
        priorities=rng.integers(0, 3, jobs),
        runs=[
            [Execution(THINK, int(rng.integers(1, 120)), int(rng.integers(1, 80)))]
            for _ in range(jobs)
        ],
    )


class Served:
    """What a vLLM did with a workload: its batches and preemptions."""

    def __init__(self, engine: Any, workload: Workload) -> None:
        scheduler = engine.engine_core.engine_core.scheduler
        self.batches: Batches = []
        self.preemptions = 0
        scheduled, schedule, preempt = [], scheduler.schedule, scheduler._preempt_request

        def noted(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            tokens = output.num_scheduled_tokens
            scheduled.append({int(name.split("-")[0]): n for name, n in tokens.items()})
            return output

        def counted(*args: Any, **kwargs: Any) -> None:
            self.preemptions += 1
            preempt(*args, **kwargs)

        scheduler.schedule, scheduler._preempt_request = noted, counted
        step = 0
        assert workload.runs is not None
        # Second, number of the job, position in its run, and the tokens of the call before.
        due: list[tuple[float, int, int, list[int]]] = [
            (float(arrival), number, 0, []) for number, arrival in enumerate(workload.arrivals)
        ]
        prompts: dict[int, tuple[int, list[int]]] = {}
        while due or engine.has_unfinished_requests():
            due.sort()
            if not engine.has_unfinished_requests():
                step = max(step, int(due[0][0]))
            while due and due[0][0] <= step:
                _, number, position, before = due.pop(0)
                execution = workload.runs[number][position]
                if execution.unit.kind != "llm":
                    assert execution.seconds is not None
                    due.append((step + execution.seconds, number, position + 1, before))
                    due.sort()
                    continue
                fresh = int(execution.input_tokens) - len(before)
                ids = before + [
                    3 + (number * 31 + position * 97 + i * 7) % 500 for i in range(fresh)
                ]
                prompts[number] = (position, ids)
                self._add(engine, number, position, ids, workload)
            outputs = engine.step()
            if scheduled[-1]:  # a step without requests takes no time
                self.batches.append(scheduled[-1])
                step += 1
            for output in outputs:
                if output.finished:
                    number = int(output.request_id.split("-")[0])
                    position, ids = prompts[number]
                    if position + 1 < len(workload.runs[number]):
                        ids = ids + list(output.outputs[0].token_ids)
                        due.append((step, number, position + 1, ids))
        scheduler.schedule, scheduler._preempt_request = schedule, preempt

    def _add(
        self, engine: Any, number: int, position: int, ids: list[int], workload: Workload
    ) -> None:
        assert workload.runs is not None
        made = int(workload.runs[number][position].output_tokens)
        parameters = vllm.SamplingParams(
            temperature=0.0,
            max_tokens=made,
            ignore_eos=True,
            extra_args=annotation(workload.applications[number]),
        )
        engine.add_request(
            f"{number}-{position}",
            {"prompt_token_ids": ids},
            parameters,
            priority=int(workload.priorities[number]) if workload.priorities is not None else 0,
        )


def conversations_of(seed: int) -> Workload:
    """Runs of up to four calls, each of which begins with all that was said before."""
    rng = np.random.default_rng(seed)
    jobs = int(rng.integers(3, 9))
    runs = []
    for _ in range(jobs):
        run: list[Execution] = []
        said = 0
        for turn in range(int(rng.integers(2, 5))):
            if turn:
                run.append(Execution(TOOL, seconds=float(rng.integers(1, 30))))
            prompt, made = said + int(rng.integers(1, 40)), int(rng.integers(1, 20))
            run.append(Execution(THINK, prompt, made, shared_tokens=said))
            said = prompt + made
        runs.append(run)
    names = list(rng.choice(list(KNOWN), jobs))
    arrivals = np.sort(rng.integers(0, 60, jobs)).astype(float)
    return Workload(arrivals, np.ones(jobs), names, KNOWN, runs=runs)


def vllm_engine(
    shape: tuple[int, int, int], policy: str, scheduler: Any = None, caching: bool = False
) -> Any:
    """An engine of so many requests, tokens a step and blocks."""
    width, budget, blocks = shape
    given = {} if scheduler is None else {"scheduler_cls": scheduler}
    return vllm.LLM(
        str(MODEL),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        block_size=BLOCK,
        max_num_seqs=width,
        max_num_batched_tokens=budget,
        num_gpu_blocks_override=blocks + 1,  # vLLM keeps one for padding
        enable_prefix_caching=caching,
        enable_chunked_prefill=True,
        scheduling_policy=policy,
        **given,
    ).llm_engine


def assert_same_steps(engine: Any, shape: tuple[int, int, int], policy: Policy, mode: Any) -> None:
    """Serve every workload on both sides; some must preempt, or little is shown."""
    width, budget, blocks = shape
    simulated = Engine.counting_steps(width, budget, blocks, BLOCK, mode, "running_first")
    preemptions, cut = 0, 0
    for seed in SEEDS:
        workload = workload_of(seed)
        served = Served(engine, workload)
        twin = step_by_step(workload, policy, simulated, CostModel())
        batches = [{key[0]: n for key, n in batch.items()} for batch in twin.batches]
        for step, (ours, theirs) in enumerate(itertools.zip_longest(batches, served.batches)):
            assert ours == theirs, f"seed {seed}, step {step}"
        result = simulate_engine(workload, policy, simulated, cost=CostModel())
        assert result.steps == len(served.batches)
        assert result.preemptions == served.preemptions
        np.testing.assert_array_equal(result.completion_steps, twin.completion_steps)
        preemptions += served.preemptions
        cut += sum(n > 1 and sum(batch.values()) == budget for b in batches for batch in [b]
                   for n in b.values())  # fmt: skip
    print(f"\n{policy!r}, {shape}: {preemptions} preemptions, {cut} prompts met the budget")
    assert preemptions
    assert cut


@pytest.mark.parametrize("shape", WIDTHS, ids=str)
@pytest.mark.parametrize(
    ("name", "policy"),
    [("fcfs", RequestFCFS()), ("priority", PriorityClasses(FCFS()))],
    ids=["fcfs", "priority"],
)
def test_the_batches_are_those_of_vllm(
    name: str, policy: Policy, shape: tuple[int, int, int]
) -> None:
    engine = vllm_engine(shape, name)
    assert_same_steps(engine, shape, policy, "none")
    del engine
    gc.collect()


@pytest.mark.parametrize("policy", [SERPT(), Gittins(), LAS()], ids=lambda p: type(p).__name__)
def test_the_batches_are_those_of_the_scheduler_of_demand_in_vllm(policy: Policy) -> None:
    shape = WIDTHS[0]
    engine = vllm_engine(shape, "priority", make_scheduler(policy, KNOWN))
    assert_same_steps(engine, shape, policy, "recompute")
    del engine
    gc.collect()


def test_what_is_found_again_is_what_vllm_finds() -> None:
    """With so few blocks that what runs left is given up, and requests lose their places."""
    shape = (3, 40, 14)
    engine = vllm_engine(shape, "fcfs", caching=True)
    limits = (*shape, BLOCK)
    simulated = replace(Engine.counting_steps(*limits, "none", "running_first"), retention=LRU())
    found = findable = 0
    for seed in range(30):
        workload = conversations_of(seed)
        engine.reset_prefix_cache()
        served = Served(engine, workload)
        twin = step_by_step(workload, RequestFCFS(), simulated, CostModel())
        batches = [{key[0]: n for key, n in batch.items()} for batch in twin.batches]
        for step, (ours, theirs) in enumerate(itertools.zip_longest(batches, served.batches)):
            assert ours == theirs, f"seed {seed}, step {step}"
        result = simulate_engine(workload, RequestFCFS(), simulated, cost=CostModel())
        assert result.steps == len(served.batches)
        assert result.preemptions == served.preemptions
        assert result.prefixes.found == twin.found
        found += result.prefixes.found
        findable += result.prefixes.findable
    print(f"\n{shape}: {found} of {findable} tokens found")
    assert 0 < found < findable
    del engine
    gc.collect()
