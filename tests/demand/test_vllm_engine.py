"""Inside a real vLLM, on CPU with the reference model; run by .ci/vllm in its own environment."""

import asyncio
import gc
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from demand import FCFS, SERPT, DemandError, DemandEstimator, Distribution, Gittins, Policy
from demand.integrations.vllm import AdmissionController, Server, annotation, make_scheduler
from demand.policies.las import LAS

vllm = pytest.importorskip("vllm", reason="vLLM is not installed here; .ci/vllm installs and runs")

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "reference_model"
KNOWN = {"short": Distribution([0.5]), "long": Distribution([3.0]), "mixed": Distribution([0.5, 6])}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

Arrivals = dict[int, list[tuple[str, int]]]
"""By step: application and tokens to generate of the requests that arrive."""

ARRIVALS: Arrivals = {
    0: [("long", 48), ("long", 48), ("mixed", 8)],
    10: [("short", 8), ("short", 8)],
    20: [("mixed", 90), ("long", 48), ("short", 8), ("mixed", 8)],
}


@pytest.fixture(autouse=True, scope="module")
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


def engine_of(scheduler: type[Any] | None, **options: Any) -> Any:
    given = {} if scheduler is None else {"scheduler_cls": scheduler}
    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 2,
        "num_gpu_blocks_override": 64,
        "scheduling_policy": "priority",
        **options,
    }
    return vllm.LLM(str(MODEL), **settings, **given).llm_engine


def scheduler_of(engine: Any) -> Any:
    return engine.engine_core.engine_core.scheduler


def add(engine: Any, number: int, application: str, tokens: int, prompt: int = 4) -> None:
    parameters = vllm.SamplingParams(
        temperature=0.0,
        max_tokens=tokens,
        ignore_eos=True,
        extra_args=annotation(application),
    )
    ids = [3 + (number * 31 + i * 7) % 500 for i in range(prompt)]
    engine.add_request(str(number), {"prompt_token_ids": ids}, parameters)


class Served:
    """Serves `arrivals` to the end."""

    def __init__(self, scheduler: type[Any] | None, arrivals: Arrivals, **options: Any) -> None:
        prompt = options.pop("prompt", 4)
        engine = engine_of(scheduler, **options)
        self.tokens: dict[str, list[int]] = {}
        self.steps: dict[str, int] = {}  # from arrival to completion
        arrived: dict[str, int] = {}
        step = 0
        while len(arrived) < sum(map(len, arrivals.values())) or engine.has_unfinished_requests():
            for application, tokens in arrivals.get(step, ()):
                add(engine, len(arrived), application, tokens, prompt)
                arrived[str(len(arrived))] = step
            for output in engine.step():
                if output.finished:
                    self.tokens[output.request_id] = list(output.outputs[0].token_ids)
                    self.steps[output.request_id] = step + 1 - arrived[output.request_id]
            step += 1
        self.total_steps = step
        self.order = list(self.steps)
        self.mean_steps = sum(self.steps.values()) / len(self.steps)
        self.displacements = getattr(scheduler_of(engine), "displacements", 0)
        if scheduler is not None:
            ranking = scheduler_of(engine)._ranking
            assert not ranking._requests
            assert not ranking._runs
        del engine
        gc.collect()

    def __repr__(self) -> str:
        return (
            f"order {' '.join(self.order)}, mean {self.mean_steps:.1f} of {self.total_steps} "
            f"steps, {self.displacements} displacements"
        )


@pytest.fixture(scope="module")
def stock(environment: None) -> Served:
    """vLLM's own scheduler; all priorities are equal, so it serves first come, first served."""
    return Served(None, ARRIVALS)


@pytest.mark.parametrize(
    "policy", [FCFS(), SERPT(), Gittins(), LAS()], ids=lambda p: type(p).__name__
)
def test_tokens_are_those_of_the_stock_scheduler(policy: Policy, stock: Served) -> None:
    served = Served(make_scheduler(policy, KNOWN), ARRIVALS)
    print(f"\n{policy!r}: {served!r}; stock: {stock!r}")
    assert served.tokens == stock.tokens
    if isinstance(policy, FCFS):
        assert (served.order, served.displacements) == (stock.order, 0)
    else:
        assert served.displacements > 0
        assert served.mean_steps < 0.9 * stock.mean_steps


def test_the_order_is_the_policys() -> None:
    """One place; a token is 0.06 s and "long" expects 3 s: "short" passes it until near its end."""
    arrivals: Arrivals = {0: [("long", 48), ("long", 48)], 12: [("short", 8)], 52: [("short", 8)]}
    served = Served(make_scheduler(SERPT(), KNOWN), arrivals, max_num_seqs=1)
    # The first short one displaces the long one at its 12th token. The second comes when the long
    # one has 44 tokens, expects 0.36 s more, and keeps its place against 0.5 s.
    assert served.order == ["2", "0", "3", "1"]
    assert served.displacements == 1


def test_when_blocks_run_out_the_worst_gives_way_and_tokens_stay_the_same() -> None:
    """Three requests outgrow their first block of 128 tokens where only one more is free."""
    arrivals: Arrivals = {0: [("long", 40), ("long", 40), ("short", 40)]}
    options = {"max_num_seqs": 3, "prompt": 100, "enable_prefix_caching": False}
    ample = Served(None, arrivals, **options)
    tight = Served(make_scheduler(SERPT(), KNOWN), arrivals, num_gpu_blocks_override=5, **options)
    assert tight.tokens == ample.tokens
    assert tight.order[0] == "2"
    assert tight.total_steps > ample.total_steps


def test_requests_that_are_aborted_leave_nothing_behind() -> None:
    engine = engine_of(make_scheduler(SERPT(), KNOWN), max_num_seqs=1)
    for number in range(3):
        add(engine, number, "long", 20)
    for _ in range(3):
        engine.step()
    scheduler = scheduler_of(engine)
    assert (len(scheduler.running), len(scheduler.waiting)) == (1, 2)
    engine.abort_request(["0", "1"])
    while engine.has_unfinished_requests():
        engine.step()
    assert not scheduler._ranking._requests
    assert not scheduler._ranking._runs


def test_an_estimator_learns_inside_the_engine_and_is_saved_as_it_shuts_down(
    tmp_path: Path,
) -> None:
    """Requests are runs of their own: what the graph observes is what was read and generated."""
    estimator = DemandEstimator({}, lag=0.0)
    saved = tmp_path / "learned.json"
    engine = engine_of(make_scheduler(SERPT(), estimator=estimator, save_to=saved))
    tokens = [8, 30, 20, 12]
    for number, new in enumerate(tokens):
        add(engine, number, "learned", new)
    add(engine, len(tokens), "aborted", 50)
    while engine.has_unfinished_requests():
        engine.step()
        if not scheduler_of(engine).waiting:
            engine.abort_request([str(len(tokens))])
    assert list(estimator.graphs) == ["learned"]
    runs = estimator.graphs["learned"].runs
    assert sorted(run[0].output_tokens for run in runs) == sorted(map(float, tokens))
    assert {(run[0].input_tokens, run[0].unit.name) for run in runs} == {(4.0, "call")}
    scheduler_of(engine).shutdown()
    assert DemandEstimator.load(saved).graphs["learned"].runs == runs


def test_first_come_first_served_configuration_is_refused() -> None:
    with pytest.raises(DemandError, match="--scheduling-policy priority"):
        engine_of(make_scheduler(SERPT(), KNOWN), scheduling_policy="fcfs")


def test_asynchronous_scheduling_delivers_every_token_once() -> None:
    """The CPU build never schedules ahead; here a stand-in for the model lags a step behind."""
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    made = make_scheduler(SERPT(), KNOWN)
    stock = scheduler_of(engine_of(None))
    stock.cache_config.num_gpu_blocks = stock.kv_cache_config.num_blocks
    scheduler = made(
        vllm_config=stock.vllm_config,
        kv_cache_config=stock.kv_cache_config,
        structured_output_manager=stock.structured_output_manager,
        block_size=stock.block_size,
        hash_block_size=stock.block_size,
    )

    def token_at(request_id: str, position: int) -> int:
        return 3 + (int(request_id) * 101 + position) % 500

    lengths: dict[str, int] = {}

    def arrive(application: str, tokens: int) -> None:
        request_id = str(len(lengths))
        lengths[request_id] = tokens
        parameters = vllm.SamplingParams(
            max_tokens=tokens, ignore_eos=True, extra_args=annotation(application)
        )
        scheduler.add_request(Request(request_id, [5, 6, 7], parameters, None))

    ahead: deque[Any] = deque()
    delivered: dict[str, list[int]] = {}
    step = 0
    while step < 30 or scheduler.has_unfinished_requests() or ahead:
        for application, tokens in ARRIVALS.get(step, ()):
            arrive(application, tokens)
        output = scheduler.schedule()
        ids = list(output.num_scheduled_tokens)
        sampled = []
        for request_id in ids:
            request = scheduler.requests[request_id]
            position = request.num_computed_tokens
            sampled.append([] if request.is_prefill_chunk else [token_at(request_id, position)])
        ahead.append((output, ids, sampled))
        if len(ahead) > 1:
            output, ids, sampled = ahead.popleft()
            index = {request_id: i for i, request_id in enumerate(ids)}
            model = ModelRunnerOutput(ids, index, sampled_token_ids=sampled)
            for outputs in scheduler.update_from_output(output, model).values():
                for out in outputs.outputs:
                    delivered.setdefault(out.request_id, []).extend(out.new_token_ids)
        step += 1
        assert step < 1000
        if not scheduler.has_unfinished_requests() and step >= 30 and not ids:
            break
    assert delivered == {
        request_id: [token_at(request_id, 3 + i) for i in range(tokens)]
        for request_id, tokens in lengths.items()
    }
    assert scheduler.displacements > 0


@pytest.fixture
def served_over_http(tmp_path: Path) -> Iterator[str]:
    """vLLM's HTTP server with a scheduler that its engine process imports by name."""
    (tmp_path / "my_scheduler.py").write_text(
        "from demand import SERPT, Distribution\n"
        "from demand.integrations.vllm import make_scheduler\n"
        "known = {'short': Distribution([0.5]), 'long': Distribution([12.0])}\n"
        "Scheduler = make_scheduler(SERPT(), known)\n"
    )
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = (
        f"--model {MODEL} --served-model-name m --host 127.0.0.1 --port {port} "
        "--dtype float32 --enforce-eager "
        "--max-model-len 512 --max-num-seqs 1 --num-gpu-blocks-override 64 "
        "--scheduling-policy priority --scheduler-cls my_scheduler.Scheduler"
    )
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options.split()],
        env={
            **os.environ,
            "PYTHONPATH": f"{tmp_path}:{ROOT}",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        },
        stdout=log,
        stderr=log,
    )
    try:
        for _ in range(240):
            with closing(socket.socket()) as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(1.0)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def test_both_levels_over_http(served_over_http: str) -> None:
    """The controller sends all it has; the engine's own scheduler lets the short one pass."""

    async def serve() -> tuple[list[str], dict[str, str], dict[str, float]]:
        order: list[str] = []
        texts: dict[str, str] = {}
        attained: dict[str, float] = {}
        async with AdmissionController(
            Server(served_over_http), SERPT(), KNOWN, in_flight=4
        ) as controller:

            async def ask(name: str, application: str, tokens: int) -> None:
                with controller.start(application) as run:
                    call = await run.submit(
                        "completions",
                        {
                            "model": "m",
                            "prompt": "The mayor of",
                            "max_tokens": tokens,
                            "temperature": 0.0,
                            "ignore_eos": True,
                            "vllm_xargs": annotation(application),
                            "stream_options": {
                                "include_usage": True,
                                "continuous_usage_stats": True,
                            },
                        },
                    )
                    texts[name] = await call.text()
                    order.append(name)
                    attained[name] = run.job.attained_service

            long = asyncio.create_task(ask("long", "long", 400))
            while not controller.counts.in_flight:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            await ask("short", "short", 8)
            await long
            await ask("alone", "long", 400)
        return order, texts, attained

    order, texts, attained = asyncio.run(asyncio.wait_for(serve(), 300.0))
    assert order == ["short", "long", "alone"]
    assert texts["long"] == texts["alone"]  # displaced, recomputed, and streamed without a seam
    assert texts["long"].startswith(texts["short"])
    assert attained["long"] == attained["alone"] == pytest.approx(400 * 0.06, rel=0.01)
