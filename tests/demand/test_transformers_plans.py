"""Plans executed in the continuous batching of transformers, on a tiny model."""

import threading
import time
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
    for at in ends:
        give_up = time.monotonic() + 20.0
        while len(begun) < len(expected) and time.monotonic() < give_up:
            time.sleep(0.001)
        assert begun == expected
        gates[at].set()
        for ready in waits.end(at):
            waits.begin(ready)
            expected.append(ready)
    thread.join(20.0)
    batching.jobs.close(job)
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
    assert job.attained_service == pytest.approx(
        (6 + 8 + 3) * cost.prefill_seconds_per_token + 12 * cost.decode_seconds_per_token
    )
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
    with serve(model, FCFS(), distributions=None, estimator=estimator) as batching:
        job = batching.jobs.open("short")
        mixed = Watched().plan()
        mixed[2] = Planned(MATH, lambda _: lambda: time.sleep(0.2) or [7], (0,))
        batching.execute(job, mixed)
        told = [Planned(MATH, lambda: 1, (), Distribution([1.0]))]
        with pytest.raises(DemandError, match="beside an estimator"):
            batching.execute(job, told)
        batching.jobs.close(job)
    graph = estimator.graphs["short"]
    assert sum(len(run) for run in graph.runs) == len(WAITS)
    assert graph.branches("ask 0") == {"ask 1 + ask 3 + math": 1.0}
