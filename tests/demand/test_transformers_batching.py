"""`continuous_batching` as people use it: threads, streams, cancellations, and what is refused."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

from demand import (
    FCFS,
    ClassMean,
    CostModel,
    DemandError,
    Execution,
    Gittins,
    PDGraph,
    Unit,
)
from demand.integrations.transformers import (
    JobTable,
    RankScheduler,
    check_installed,
    continuous_batching,
    install,
)
from tests.demand.continuous import KNOWN, config, manager_of, prompt
from tests.demand.serving import SECONDS, generated, serve

# What it is for.


def test_outputs_equal_generate(model):
    with serve(model, Gittins(), config=config(width=2, blocks=8)) as batching:
        ids = [
            batching.submit(prompt(6 + n, n), "short" if n % 2 else "long", max_new_tokens=30 + n)
            for n in range(6)
        ]
        outputs = [batching.result(one, SECONDS).generated_tokens for one in ids]
    assert outputs == [generated(prompt(6 + n, n), 30 + n) for n in range(6)]


def test_tensors_are_taken(model, shared):
    one = shared.submit(torch.tensor(prompt(9)), "short", max_new_tokens=5)
    assert shared.result(one, SECONDS).generated_tokens == generated(prompt(9), 5)


def test_an_end_of_sequence_token_ends_a_request(model):
    wanted = generated(prompt(9), 12)
    stop = wanted[5]
    generation = transformers.GenerationConfig(eos_token_id=stop, pad_token_id=0)
    with serve(model, generation_config=generation) as batching:
        one = batching.submit(prompt(9), "short", max_new_tokens=12)
        got = batching.result(one, SECONDS).generated_tokens
    assert got == wanted[: wanted.index(stop) + 1]


def test_streams_give_tokens_as_they_come(model, shared):
    one = shared.submit(prompt(9), "long", max_new_tokens=40, streaming=True)
    other = shared.submit(prompt(5), "short", max_new_tokens=8)
    stream = shared.stream(one, SECONDS)
    first = next(stream)
    assert shared.result(other, SECONDS).generated_tokens == generated(prompt(5), 8)
    assert [first, *stream] == generated(prompt(9), 40)
    with pytest.raises(DemandError, match="has no result to wait for"):
        next(shared.stream(one))


def test_the_result_of_a_stream_is_its_end(model, shared):
    one = shared.submit(prompt(9), "long", max_new_tokens=12, streaming=True)
    assert shared.result(one, SECONDS).generated_tokens == generated(prompt(9), 12)


def test_a_job_of_several_requests(model, shared):
    job = shared.jobs.open("long", deadline_seconds=100.0, tenant="research")
    first = shared.request(job, prompt(8), max_new_tokens=6)
    plan = shared.result(first, SECONDS).generated_tokens
    shared.jobs.serve(job, 1.5)
    second = shared.request(job, prompt(8) + plan, max_new_tokens=4)
    shared.jobs.close(job)
    with pytest.raises(DemandError, match="is closed"):
        shared.request(job, prompt(8), max_new_tokens=4)
    assert shared.result(second, SECONDS).generated_tokens == generated(prompt(8) + plan, 4)
    assert job.attained_service == pytest.approx(1.5 + 22 * 1e-4 + 10 * 0.06)


def test_cancelling_frees_the_engine(model):
    with serve(model, config=config(width=1)) as batching:
        long = batching.submit(prompt(5), "long", max_new_tokens=900)
        short = batching.submit(prompt(6), "short", max_new_tokens=4)
        batching.cancel(long)
        assert batching.result(short, SECONDS).generated_tokens == generated(prompt(6), 4)
        with pytest.raises(DemandError, match="has no result to wait for"):
            batching.result(long)
        with pytest.raises(DemandError, match="has no result to wait for"):
            batching.cancel(long)


def test_forked_sequences_are_had_by_their_ids(model):
    generation = transformers.GenerationConfig(
        num_return_sequences=2, do_sample=True, top_k=1, eos_token_id=None, pad_token_id=0
    )
    with serve(model, generation_config=generation) as batching:
        one = batching.submit(prompt(9), "short", max_new_tokens=6)
        outputs = [batching.result(f"{one}{end}", SECONDS) for end in ("__child#0", "")]
    assert [out.generated_tokens for out in outputs] == [generated(prompt(9), 6)] * 2


def test_graphs_give_the_distributions(model):
    cost = CostModel(0.001, 0.5)
    runs = [[Execution(Unit("answer", "llm"), 10.0, float(n))] for n in (4, 8)]
    graph = PDGraph.fit(runs, cost=cost)
    with continuous_batching(model, Gittins(), graphs={"answer": graph}, config=config()) as served:
        job = served.jobs.open("answer")
        assert job.distribution == graph.remaining()
        assert served.jobs.cost == cost
        served.jobs.close(job)


def test_a_manager_of_ones_own(model):
    jobs = JobTable(ClassMean(), KNOWN)
    with install(jobs) as name:
        manager = manager_of(model, width=1, scheduler_type=name)
        for number, application in enumerate(("long", "short")):
            job = jobs.open(application)
            jobs.announce(job, application)
            jobs.close(job)
            manager.add_request(prompt(5, number), application, max_new_tokens=6)
        manager.start()
        assert isinstance(check_installed(manager, jobs), RankScheduler)
        ends = [manager.get_result(timeout=SECONDS).request_id for _ in range(2)]
        manager.stop()
    assert ends == ["short", "long"]


def test_a_manager_that_is_kept_starts_anew(model):
    """What was in it when it was stopped is over; the scheduler and the table go on."""
    jobs = JobTable(FCFS(), KNOWN)
    with install(jobs) as name:
        manager = manager_of(model, width=1, scheduler_type=name)
        manager.start()
        scheduler = check_installed(manager, jobs)
    old = jobs.open("long")
    jobs.announce(old, "old")
    jobs.close(old)
    manager.add_request(prompt(5), "old", max_new_tokens=900)
    while not scheduler.steps:
        time.sleep(0.001)
    manager.stop(keep_for_next_session=True, hard_stop=True)
    assert manager.get_result(timeout=SECONDS).error is not None
    manager.start()
    new = jobs.open("short")
    jobs.announce(new, "new")
    manager.add_request(prompt(6), "new", max_new_tokens=5)
    assert manager.get_result(timeout=SECONDS).generated_tokens == generated(prompt(6), 5)
    assert check_installed(manager, jobs) is scheduler
    jobs.close(new)
    manager.stop()
    model.destroy_cached_continuous_batching_manager()
    assert len(jobs) == 0


# It is attached and detached.


def test_the_model_and_transformers_are_as_before(model):
    before = dict(SCHEDULER_MAPPING), model.generation_config.to_dict(), model.config.to_dict()
    with serve(model) as batching:
        assert len(SCHEDULER_MAPPING) == len(before[0]) + 1
        one = batching.submit(prompt(5), "short", max_new_tokens=3)
        batching.result(one, SECONDS)
    after = dict(SCHEDULER_MAPPING), model.generation_config.to_dict(), model.config.to_dict()
    assert after == before


def test_leaving_waits_for_what_is_there(model):
    with serve(model) as batching:
        one = batching.submit(prompt(5), "long", max_new_tokens=30)
    assert batching.result(one, SECONDS).generated_tokens == generated(prompt(5), 30)


def test_leaving_by_an_error_does_not_wait(model):
    before = dict(SCHEDULER_MAPPING)
    context = serve(model)
    batching = context.__enter__()
    one = batching.submit(prompt(5), "long", max_new_tokens=900)
    error = KeyError("of the caller")
    assert not context.__exit__(KeyError, error, error.__traceback__)
    assert before == SCHEDULER_MAPPING
    with pytest.raises(DemandError, match=r"failed in the engine|stopped before"):
        batching.result(one)  # transformers drops what it had not yet taken from its queue


def test_importing_registers_nothing():
    check = (
        "import transformers.generation.continuous_batching.scheduler as s; "
        "before = dict(s.SCHEDULER_MAPPING); import demand.integrations.transformers; "
        "assert s.SCHEDULER_MAPPING == before"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_many_threads_that_wait_are_each_handed_their_own_output(model):
    """One of them reads for all."""
    threads, each = 16, 4
    with serve(model, config=config(width=threads, blocks=128)) as batching:

        def ask(number):
            asked = [
                batching.submit(prompt(5, number), "short", max_new_tokens=2) for _ in range(each)
            ]
            outputs = [batching.result(request_id, SECONDS) for request_id in asked[::-1]]
            assert [output.request_id for output in outputs[::-1]] == asked
            return [tuple(output.generated_tokens) for output in outputs]

        with ThreadPoolExecutor(threads) as pool:
            answers = list(pool.map(ask, range(threads)))
    assert all(len(set(own)) == 1 and len(own[0]) == 2 for own in answers)
    assert len({own[0] for own in answers}) > 1  # or nothing tells them apart
