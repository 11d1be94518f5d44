"""Plans executed in the continuous batching of transformers, on a tiny model."""

import threading
import time
from dataclasses import replace
from functools import partial

import pytest

from demand import FCFS, DemandError, DemandEstimator, Distribution, Execution, Unit
from demand.integrations.transformers import PlanError, Planned
from demand.simulation.engine.waits import Waits
from tests.demand.continuous import prompt
from tests.demand.plans import waiting
from tests.demand.serving import generated, serve

MATH = Unit("math", "tool")
WAITS = [(), (0,), (0,), (0,), (1, 2), (3, 4)]
NEW = [3, 2, 9, 1, 2, 2]


@pytest.fixture(scope="module")
def batching(model):
    with serve(model, FCFS()) as served:
        yield served


class Watched:
    """Asks for tokens that depend on what was given, and notes the order of what happens."""

    def __init__(self):
        self.begun = []
        self.ended = []  # what had given something as a unit began

    def ask(self, number, *given):
        self.begun.append(number)
        # `generate` takes token 0, which pads, for padding.
        ids = prompt(6 + number, number) + [token or 1 for tokens in given for token in tokens]
        return {"input_ids": ids, "max_new_tokens": NEW[number]}

    def plan(self, **seconds):
        return [
            Planned(Unit(f"ask {at}", "llm"), partial(self.ask, at), after, **seconds)
            for at, after in enumerate(WAITS)
        ]


def wanted():
    """The same requests by `generate`, one after another."""
    watched, values = Watched(), []
    for at, after in enumerate(WAITS):
        request = watched.ask(at, *(values[before] for before in after))
        values.append(generated(request["input_ids"], request["max_new_tokens"]))
    return values


def test_a_plan_gives_the_tokens_of_generate_and_counts_each_once(batching):
    job = batching.jobs.open("short")
    values = batching.execute(job, Watched().plan())
    cost = batching.jobs.cost
    served = job.attained_service
    batching.jobs.close(job)
    assert len(batching.jobs) == 0
    assert values == wanted()
    reads = [
        6 + at + sum(len(values[before]) for before in after) for at, after in enumerate(WAITS)
    ]
    assert served == pytest.approx(
        sum(reads) * cost.prefill_seconds_per_token + sum(NEW) * cost.decode_seconds_per_token
    )


def test_requests_are_made_in_the_order_of_the_simulator(batching):
    """Units end when the test says so; what that makes ready begins in the order of `Waits`."""
    ends = [0, 3, 2, 1, 4, 5]
    gates = [threading.Event() for _ in WAITS]
    watched, begun = Watched(), []

    def gated(number, *_):
        begun.append(number)
        return gates[number].wait

    plan = [Planned(MATH, partial(gated, at), after) for at, after in enumerate(WAITS)]
    plan[4] = Planned(Unit("ask", "llm"), lambda *_: gated(4) and watched.ask(4), WAITS[4])
    waits = Waits(waiting([Execution(MATH, seconds=1.0)] * len(WAITS), WAITS))
    expected = waits.first()
    for at in expected:
        waits.begin(at)
    job = batching.jobs.open("short")
    values = []
    thread = threading.Thread(target=lambda: values.extend(batching.execute(job, plan)))
    thread.start()
    try:
        for at in ends:
            give_up = time.monotonic() + 20.0
            while len(begun) < len(expected) and time.monotonic() < give_up:
                time.sleep(0.001)
            # Unit 4 is a request and ends by itself: what waits for it may have begun.
            assert (begun[: len(expected)] if at == 4 else begun) == expected
            gates[at].set()
            for ready in waits.end(at):
                waits.begin(ready)
                expected.append(ready)
    finally:
        for gate in gates:
            gate.set()
        thread.join(20.0)
        batching.jobs.close(job)
    assert begun == expected
    assert values == [True] * 4 + [generated(prompt(10, 4), NEW[4]), True]


def test_what_fails_takes_with_it_what_waits_for_it_and_nothing_else(batching):
    watched = Watched()
    plan = watched.plan()
    plan[1] = Planned(MATH, lambda _: partial(int, "none"), (0,))
    plan[3] = Planned(Unit("too long", "llm"), lambda _: {"input_ids": [1], "max_new_tokens": 9999})
    job = batching.jobs.open("short")
    with pytest.raises(PlanError, match=r"unit 1 \('math'\) failed: invalid literal") as raised:
        batching.execute(job, plan)
    cost = batching.jobs.cost
    of_tokens = (6 + 8 + 3) * cost.prefill_seconds_per_token + 12 * cost.decode_seconds_per_token
    in_the_tool = job.attained_service - of_tokens
    assert 0.0 < in_the_tool < cost.decode_seconds_per_token
    batching.jobs.close(job)
    assert len(batching.jobs) == 0
    error = raised.value
    assert list(error.values) == [0, 2]
    assert {at: type(one) for at, one in error.failed.items()} == {1: ValueError, 3: DemandError}
    assert error.never_begun == {4: (1,), 5: (1, 3)}
    assert watched.begun == [0, 2]


def test_the_job_is_told_what_is_left(batching):
    told = []
    watched = Watched()

    def noted(number, *given):
        told.append(job.distribution.mean())
        return watched.ask(number, *given)

    plan = [
        Planned(Unit(f"ask {at}", "llm"), partial(noted, at), after, Distribution([float(new)]))
        for at, (after, new) in enumerate(zip(WAITS[:3], NEW, strict=False))
    ]
    job = batching.jobs.open("short")
    batching.execute(job, plan, parallel_calls="critical_path")
    assert told == [12.0, 9.0, 9.0]
    batching.jobs.close(job)


def test_an_estimator_learns_the_stages(model):
    estimator = DemandEstimator({})
    asked, answered = [], set()
    all_asked, all_answered = threading.Event(), threading.Event()

    def math():
        all_answered.wait(20.0)  # what begins beside it: ask 1 and ask 3
        return [7]

    with serve(model, FCFS(), distributions=None, estimator=estimator) as batching:
        manager = batching.manager
        router, add_request = manager.output_router, manager.add_request
        deliver = router.deliver_batch

        def add(*given, **named):
            asked.append(add_request(*given, **named))
            if len(asked) == 3:  # ask 0, 1 and 3
                all_asked.set()
            return asked[-1]

        def deliver_late(outputs):
            """None of those that go side by side is over before all of them have begun."""
            if answered:
                all_asked.wait(20.0)
            deliver(outputs)
            answered.update(one.request_id for one in outputs if one.is_finished())
            if len(answered) == 3:
                all_answered.set()

        router.deliver_batch, manager.add_request = deliver_late, add
        job = batching.jobs.open("short")
        mixed = Watched().plan()
        mixed[2] = Planned(MATH, lambda _: math, (0,))
        batching.execute(job, mixed)
        told = [Planned(MATH, lambda: 1, (), Distribution([1.0]))]
        with pytest.raises(DemandError, match="beside an estimator"):
            batching.execute(job, told)
        batching.jobs.close(job)
    assert all_asked.is_set()
    assert all_answered.is_set()
    graph = estimator.graphs["short"]
    assert sum(len(run) for run in graph.runs) == len(WAITS)
    assert graph.branches("ask 0") == {"ask 1 + ask 3 + math": 1.0}


def test_a_chain_is_learned_as_one_though_the_engine_pauses_between_its_requests(model):
    """A request is over when its output is handed over, not when the engine takes its next step."""
    estimator = DemandEstimator({})
    with serve(model, FCFS(), distributions=None, estimator=estimator) as batching:
        manager, goes_on = batching.manager, threading.Event()
        router, add_request = manager.output_router, manager.add_request
        deliver = router.deliver_batch

        def pause():
            with manager.pause():
                goes_on.wait(5.0)

        def deliver_and_pause(outputs):
            goes_on.clear()
            threading.Thread(target=pause, daemon=True).start()
            while not manager.background_thread_status.is_pause_requested():
                time.sleep(0.0001)
            deliver(outputs)

        def add_and_go_on(*given, **named):
            request_id = add_request(*given, **named)
            goes_on.set()
            return request_id

        def ask(number, *_):
            return {"input_ids": prompt(6, number), "max_new_tokens": 1}

        router.deliver_batch, manager.add_request = deliver_and_pause, add_and_go_on
        chain = [Planned(Unit(f"ask {at}", "llm"), partial(ask, at)) for at in range(10)]
        job = batching.jobs.open("short")
        try:
            batching.execute(job, chain)
            batching.jobs.close(job)
            assert len(batching.jobs) == 0
        finally:
            goes_on.set()
    (run,) = estimator.graphs["short"].runs
    assert [one.unit.name for one in run] == [f"ask {at}" for at in range(10)]
    assert [one.after for one in run] == [None] * 10


def test_a_plan_left_by_an_error_cancels_its_requests_and_is_not_learned(model):
    """A tool raises what Ctrl-C does while a request is underway."""
    estimator = DemandEstimator({})
    new = 900

    def interrupt():
        give_up = time.monotonic() + 20.0
        while not job.attained_service and time.monotonic() < give_up:
            time.sleep(0.001)
        raise KeyboardInterrupt

    with serve(model, FCFS(), distributions=None, estimator=estimator) as batching:
        job = batching.jobs.open("short")
        plan = [
            Planned(Unit("ask", "llm"), lambda: {"input_ids": prompt(6), "max_new_tokens": new}),
            Planned(MATH, lambda: interrupt, ()),
            Planned(MATH, lambda *_: None, (0, 1)),
        ]
        with pytest.raises(KeyboardInterrupt):
            batching.execute(job, plan)
        batching.jobs.close(job)
    assert len(batching.jobs) == 0
    assert 0.0 < job.attained_service < new * batching.jobs.cost.decode_seconds_per_token
    assert not estimator.graphs


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_plan_that_failed_is_learned_from_only_if_its_job_goes_on(model, goes_on):
    estimator = DemandEstimator({})

    def fails():
        time.sleep(0.05)
        raise OSError("no calculator")

    with serve(model, FCFS(), distributions=None, estimator=estimator) as batching:
        job = batching.jobs.open("short")
        with pytest.raises(PlanError, match="no calculator"):
            batching.execute(job, [Planned(MATH, lambda: fails)])
        assert 0.04 < job.attained_service < 5.0  # its seconds are service all the same
        ask = Planned(Unit("ask", "llm"), lambda: {"input_ids": prompt(6), "max_new_tokens": 1})
        with pytest.raises(PlanError):
            batching.execute(job, [Planned(MATH, lambda: fails), replace(ask, after=())])
        if goes_on:
            batching.execute(job, [replace(ask, unit=Unit("again", "llm"))])
        batching.jobs.close(job)
    learned = [[one.unit.name for one in run] for g in estimator.graphs.values() for run in g.runs]
    assert learned == [["ask", "again"]] * goes_on
