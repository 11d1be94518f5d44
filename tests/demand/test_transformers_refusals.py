"""What the transformers adapter refuses, and that failures inside the engine are told."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers import AttentionInterface
from transformers.generation import continuous_batching as engine
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from demand import (
    FCFS,
    CostModel,
    DemandError,
    Distribution,
    Execution,
    Oracle,
    PDGraph,
    Unit,
)
from demand.integrations.transformers import (
    Batching,
    JobTable,
    check_installed,
    install,
)
from demand.integrations.transformers.compat import check_features, check_version
from demand.policies import LAS, Job, Policy
from sparsity import RaaS, SparseCache, detach
from tests.demand.continuous import KNOWN, config, manager_of, prompt
from tests.demand.serving import SECONDS, generated, serve
from tests.helpers import tiny_model


@pytest.mark.parametrize("version", ["4.57.6", "5.17.0", "5.19.0", "6.0.0", "nonsense"])
def test_other_versions(version):
    with pytest.raises(DemandError, match=r"fits 5\.20 up to below 6"):
        check_version(version)


@pytest.mark.parametrize("version", ["5.20.0", "5.23.0", "5.24.0.dev0", "5.99.1"])
def test_supported_versions(version):
    check_version(version)


def test_an_engine_with_other_parts():
    check_features(engine)

    class Renamed(engine.scheduler.Scheduler):
        def _process_candidates(self, candidates, token_budget):
            pass

    scheduler = SimpleNamespace(Scheduler=Renamed, SCHEDULER_MAPPING={})
    parts = SimpleNamespace(
        scheduler=scheduler,
        offloading_manager=engine.offloading_manager,
        cache=engine.cache,
        cache_allocators=engine.cache_allocators,
        requests=SimpleNamespace(),
    )
    with pytest.raises(DemandError) as error:
        check_features(parts)
    for name in (
        "_process_candidates(self candidates",
        "SCHEDULER_MAPPING",
        "RequestState.request_id",
    ):
        assert name.replace("self candidates", "self, candidates") in str(error.value)
    assert "offload_requests" not in str(error.value)


def test_a_name_that_is_taken():
    before = dict(SCHEDULER_MAPPING)
    jobs = JobTable(FCFS())
    with pytest.raises(DemandError, match="installed already"), install(jobs, "fifo"):
        pass
    with install(jobs), pytest.raises(DemandError, match="installed already"), install(jobs):
        pass
    assert before == SCHEDULER_MAPPING


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"config": config(width=0)},
            "max_requests_per_batch is 0; expected a whole number of at least 1",
        ),
        ({"config": config(width=-1)}, "max_requests_per_batch is -1; expected"),
        ({"config": config(width=1.5)}, r"max_requests_per_batch is 1\.5; expected"),
        ({"config": config(max_batch_tokens=0)}, "max_batch_tokens is 0; expected"),
        ({"config": {"page_size": 16}}, "config is .*; expected a ContinuousBatchingConfig"),
        ({"generation_config": {"do_sample": False}}, "expected a GenerationConfig"),
        ({"distributions": {"a": [1.0]}}, r"distribution of 'a' is \[1\.0\]; expected a distr"),
        ({"distributions": Distribution([1.0])}, "distributions is .*; expected a mapping"),
        ({"graphs": {"a": PDGraph}}, "graph of 'a' is the class PDGraph; expected a graph"),
        ({"cost": 0.05}, r"cost is 0\.05; expected a CostModel"),
        ({"clock": 5.0}, r"clock is 5\.0; expected a function that gives seconds"),
        ({"seed": "x"}, "seed is 'x'; expected a whole number"),
        ({"policy": "fcfs"}, r"policy is 'fcfs'; expected a policy, such as Gittins\(\)"),
        ({"policy": FCFS}, "policy is the class FCFS; expected a policy"),
        ({"model": "llama"}, "model is 'llama'; expected a model of transformers .* load it first"),
        ({"model": torch.nn.Linear(2, 2)}, r"model is Linear\(.*expected a model .* wrapper"),
    ],
)
def test_what_no_engine_can_be_made_of(model, given, says):
    before = dict(SCHEDULER_MAPPING)
    with pytest.raises(DemandError, match=says), serve(**{"model": model} | given):
        pass
    assert before == SCHEDULER_MAPPING


def test_an_engine_is_made_of_whole_numbers_of_any_kind(model):
    engine = config(width=np.int64(2), max_batch_tokens=128.0)
    with serve(model, config=engine, seed=np.int64(0)) as batching:
        for new in (np.int64(4), 4.0, torch.tensor(4)):
            one = batching.submit(prompt(9), "short", max_new_tokens=new)
            assert batching.result(one, SECONDS).generated_tokens == generated(prompt(9), 4)


@pytest.mark.parametrize(
    ("jobs", "seen"),
    [("demand", "'demand'"), (JobTable, "the class JobTable"), (FCFS(), r"FCFS\(\)")],
)
def test_what_is_no_table_is_not_installed(jobs, seen):
    before = dict(SCHEDULER_MAPPING)
    said = f"jobs is {seen}; expected a JobTable"
    with pytest.raises(DemandError, match=said), install(jobs):
        pass
    with pytest.raises(DemandError, match=said):
        check_installed(None, jobs)
    with pytest.raises(DemandError, match="manager is 'engine'; expected a started manager"):
        Batching("engine", JobTable(FCFS()))
    assert before == SCHEDULER_MAPPING


# Attention that the engine cannot page.


def attend_otherwise(module, query, key, value, mask, **settings):
    raise AssertionError("never asked")


def test_a_model_with_a_sparse_cache_is_to_be_detached():
    model = tiny_model("llama", num_hidden_layers=2)
    SparseCache(model, RaaS(64))
    with (
        pytest.raises(
            DemandError,
            match=r"attends by 'kv_retention', the .* first .*sparsity\.detach\(model\)",
        ),
        serve(model),
    ):
        pass
    detach(model)
    with serve(model) as batching:
        one = batching.submit(prompt(9), "short", max_new_tokens=4)
        assert len(batching.result(one, SECONDS).generated_tokens) == 4


def test_an_attention_function_of_another_name_is_refused():
    model = tiny_model("llama", num_hidden_layers=2)
    AttentionInterface.register("otherwise", attend_otherwise)
    try:
        model.set_attn_implementation("otherwise")
        said = r"attends by 'otherwise', .*: model\.set_attn_implementation\(\"sdpa\"\)"
        with pytest.raises(DemandError, match=said), serve(model):
            pass
    finally:
        del AttentionInterface._global_mapping["otherwise"]


def test_an_attention_function_that_was_replaced_is_refused(model, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", attend_otherwise)
    said = r"'sdpa' was replaced by .*\.attend_otherwise"
    with pytest.raises(DemandError, match=said), serve(model):
        pass


def test_a_manager_that_fell_back_to_fifo(model):
    """transformers only warns of an unknown scheduler."""
    jobs = JobTable(FCFS())
    manager = manager_of(model, scheduler_type="demand")
    with pytest.raises(DemandError, match="not running"):
        check_installed(manager, jobs)
    manager.start()
    with pytest.raises(DemandError, match="runs FIFOScheduler"):
        check_installed(manager, jobs)
    manager.stop()


def test_a_manager_kept_from_before(model):
    with model.continuous_batching_context_manager(
        transformers.GenerationConfig(eos_token_id=-1),
        continuous_batching_config=config(),
        persistent_manager=True,
    ):
        pass
    with (
        pytest.raises(DemandError, match="destroy_cached_continuous_batching_manager"),
        serve(model),
    ):
        pass
    model.destroy_cached_continuous_batching_manager()


def test_the_scheduler_of_another_table(model):
    with serve(model) as batching, pytest.raises(DemandError, match="runs RankScheduler"):
        check_installed(batching.manager, JobTable(FCFS()))


def test_a_manager_that_does_not_come_up(model):
    hanging = SimpleNamespace(batch_processor=None, is_running=lambda: True)
    with pytest.raises(DemandError, match="not up after"):
        check_installed(hanging, JobTable(FCFS()), timeout_seconds=0.01)


@pytest.mark.parametrize(
    ("asynchronous", "processes", "message"),
    [(True, 1, "batches asynchronously"), (False, 2, "split over 2 processes")],
)
def test_managers_that_were_never_run(shared, asynchronous, processes, message):
    other = SimpleNamespace(
        batch_processor=SimpleNamespace(
            scheduler=shared.manager.batch_processor.scheduler, use_async_batching=asynchronous
        ),
        distributed_helper=SimpleNamespace(tp_size=processes),
    )
    with pytest.raises(DemandError, match=message):
        check_installed(other, shared.jobs)


@pytest.mark.parametrize(
    ("ids", "new", "message"),
    [
        ([], 5, r"shape \(0,\)"),
        ([[1, 2], [3, 4]], 5, r"shape \(2, 2\)"),
        ([0.5, 1.5], 5, "float"),
        ([1, 128], 5, "from 0 to 127"),
        ([-1, 5], 5, "from -1 to 5"),
        ([[1, 2], [3]], 5, r"input_ids are \[\[1, 2\], \[3\]\]"),
        (["a"], 5, r"input_ids are \['a'\]"),
        ("hello", 5, "input_ids are 'hello'"),
        (None, 5, "input_ids are None"),
        ([10**30], 5, "input_ids are"),
        ([True, False], 5, r"torch\.bool"),
        ([5], 0, "max_new_tokens is 0"),
        ([5], "3", "max_new_tokens is '3'; expected a whole number"),
        ([5], True, "max_new_tokens is True"),
        ([5], 1.5, r"max_new_tokens is 1\.5"),
        ([5], None, "max_new_tokens is None"),
        ([5] * 500, 600, "do not fit into the KV cache of 1024 tokens"),
    ],
)
def test_requests_that_make_no_sense(shared, ids, new, message):
    with pytest.raises(DemandError, match=message):
        shared.submit(ids, "short", max_new_tokens=new)
    job = shared.jobs.open("short")
    with pytest.raises(DemandError, match=message):
        shared.request(job, ids, max_new_tokens=new)
    shared.jobs.close(job)


def test_the_largest_request_that_fits(model):
    with serve(model, config=config(blocks=4)) as batching:
        one = batching.submit(prompt(40), "short", max_new_tokens=25)
        assert batching.result(one, SECONDS).generated_tokens == generated(prompt(40), 25)


def test_results_that_nobody_can_have(shared):
    for act in (shared.result, shared.cancel, lambda one: next(shared.stream(one))):
        with pytest.raises(DemandError, match="has no result to wait for"):
            act("nobody")
    one = shared.submit(prompt(5), "short", max_new_tokens=2)
    shared.result(one, SECONDS)
    with pytest.raises(DemandError, match="was taken"):
        shared.result(one)


def test_a_result_that_takes_too_long(shared):
    one = shared.submit(prompt(5), "long", max_new_tokens=900)
    with pytest.raises(TimeoutError, match="not ended in time"):
        shared.result(one, timeout_seconds=0.0)
    shared.cancel(one)


def test_a_policy_that_ranks_nan_is_refused_on_arrival(model):
    with serve(model, Oracle()) as batching:
        with pytest.raises(DemandError, match="demand of job 0 is nan"):
            batching.submit(prompt(5), "short", max_new_tokens=3)
        one = batching.submit(prompt(5), "short", max_new_tokens=3, demand_seconds=3.0)
        assert len(batching.result(one, SECONDS).generated_tokens) == 3


@dataclass(frozen=True)
class Breaks(Policy):
    """Ranks NaN once a job had half a second of service."""

    def rank(self, job: Job, now: float) -> float:
        return 0.0 if job.attained_service < 0.5 else math.nan


@dataclass(frozen=True)
class Speechless(Policy):
    """Forgets to give a rank once a job had half a second of service."""

    def rank(self, job: Job, now: float) -> float:
        return 0.0 if job.attained_service < 0.5 else None


def test_a_rank_that_is_no_number_stops_the_engine_by_the_policys_name(model):
    def serve_to_the_end():
        with serve(model, Speechless()) as batching:
            one = batching.submit(prompt(5), "long", max_new_tokens=900)
            batching.result(one, SECONDS)

    said = r"failed in the engine: .*Speechless\(\) ranked job 0 None; expected a number"
    with pytest.raises(DemandError, match=said):
        serve_to_the_end()


def test_an_engine_that_fails_says_so(model):
    """transformers logs what stops its loop, and would go on as if nothing were."""
    batching_ended = pytest.raises(DemandError, match="takes no more requests")

    def watched():
        with serve(model, Breaks()) as batching:
            job = batching.jobs.open("long")
            first = batching.request(job, prompt(5), max_new_tokens=900)
            waiting = batching.submit(prompt(6), "long", max_new_tokens=900)
            for one in (first, waiting):
                with pytest.raises(DemandError, match=r"failed in the engine: .* ranked job 0 NaN"):
                    batching.result(one, SECONDS)
            with batching_ended:
                batching.submit(prompt(5), "short", max_new_tokens=3)
            with batching_ended:
                batching.request(batching.jobs.open("short"), prompt(5), max_new_tokens=3)

    with pytest.raises(DemandError, match=r"the engine failed .* ranked job 0 NaN"):
        watched()


def test_an_engine_that_fails_unwatched_says_so_on_leaving(model):
    def unwatched(error=None):
        with serve(model, Breaks()) as batching:
            batching.submit(prompt(5), "long", max_new_tokens=900)
            if error:
                raise error

    with pytest.raises(DemandError, match=r"the engine failed .* ranked job 0 NaN") as failed:
        unwatched()
    assert isinstance(failed.value.__cause__, DemandError)
    with pytest.raises(KeyError, match="of the user"):
        unwatched(KeyError("of the user"))


def test_an_engine_that_stopped(model):
    with serve(model) as batching:
        one = batching.submit(prompt(5), "short", max_new_tokens=3)
        lost = batching.submit(prompt(5), "long", max_new_tokens=900)
        batching.manager.cancel_request(lost)  # behind the back of batching
        batching.manager.stop()
        assert len(batching.result(one, SECONDS).generated_tokens) == 3
        with pytest.raises(DemandError, match="stopped before"):
            batching.result(lost, SECONDS)


def test_a_full_queue(model, monkeypatch):
    with serve(model, config=config(max_queue_size=1)) as batching:
        put = batching.manager.input_queue.put
        impatient = lambda item, block, timeout: put(item, block, 0.01)  # noqa: E731
        monkeypatch.setattr(batching.manager.input_queue, "put", impatient)
        with batching.manager.pause():
            kept = batching.submit(prompt(5), "short", max_new_tokens=3)
            with pytest.raises(DemandError, match="queue of the engine is full at 1"):
                batching.submit(prompt(5), "short", max_new_tokens=3)
        assert batching.result(kept, SECONDS).generated_tokens == generated(prompt(5), 3)


# The table on its own.


def test_tables_that_contradict_themselves():
    runs = [[Execution(Unit("answer", "llm"), 10.0, 4.0)]]
    graph = PDGraph.fit(runs)
    with pytest.raises(DemandError, match="a distribution and a graph"):
        JobTable(FCFS(), {"a": Distribution([1.0])}, {"a": graph})
    with pytest.raises(DemandError, match="cost models differ"):
        JobTable(FCFS(), graphs={"a": graph}, cost=CostModel(1.0, 1.0))
    with pytest.raises(DemandError, match="cost models differ"):
        JobTable(FCFS(), graphs={"a": graph, "b": PDGraph.fit(runs, cost=CostModel(1.0, 1.0))})


def test_jobs_that_make_no_sense():
    table = JobTable(FCFS(), KNOWN)
    with pytest.raises(DemandError, match="deadline_seconds"):
        table.open("short", deadline_seconds=0.0)
    for weight in (0.0, math.inf):
        with pytest.raises(DemandError, match="weight"):
            table.open("short", weight=weight)
    job = table.open("short")
    table.announce(job, "one")
    with pytest.raises(DemandError, match="in use"):
        table.announce(job, "one")
    with pytest.raises(DemandError, match="forked"):
        table.announce(job, "one__child#0")
    for seconds in (-1.0, float("nan"), float("inf")):
        with pytest.raises(DemandError, match="service is"):
            table.serve(job, seconds)
    with pytest.raises(DemandError, match="not in this table"):
        table.close(JobTable(FCFS(), KNOWN).open("short"))
    with pytest.raises(DemandError, match="job is the class Job; expected a job that `open` gave"):
        table.close(Job)
    with pytest.raises(DemandError, match="remaining is 3; expected a distribution"):
        table.expect(job, 3)
    with pytest.raises(DemandError, match="service holds text"):
        table.serve(job, "1")
    table.close(job)
    assert len(table) == 1
    table.ended("one")
    table.ended("one")
    assert len(table) == 0
    with pytest.raises(DemandError, match="has departed"):
        table.expect(job, Distribution([1.0]))


def test_counts_of_tokens_never_fall():
    table = JobTable(LAS(), KNOWN)
    job = table.open("short")
    table.announce(job, "one")
    table.progressed("one", 10, 5)
    table.progressed("one", 0, 5)  # evicted
    table.progressed("one", 10, 6)
    table.progressed("one__child#0", 10, 1)
    assert job.attained_service == 20 * 1e-4 + 7 * 0.06


def test_a_clock_that_goes_backwards_stands_still():
    times = iter([0.0, 5.0, 1.0, 7.0])
    table = JobTable(FCFS(), KNOWN, clock=lambda: next(times))
    assert [table.open("short").arrival for _ in range(3)] == [5.0, 5.0, 7.0]
