"""What the simulators, policies and prewarmers are handed: refused by name, or read as meant."""

from dataclasses import dataclass, field
from datetime import timedelta
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from demand import (
    FCFS,
    LAS,
    VTC,
    Aging,
    CostModel,
    DeadlineMix,
    DemandError,
    DemandEstimator,
    Distribution,
    Engine,
    Execution,
    Gittins,
    Hysteresis,
    LeastSlack,
    Policy,
    Pool,
    PrewarmPlanner,
    PriorityClasses,
    TimeSlice,
    Unit,
    VirtualTime,
    Workload,
    bimodal_mix,
    bootstrap_interval,
    hermes_applications,
    poisson_workload,
    simulate,
    simulate_cluster,
    simulate_engine,
)
from demand.integrations.job_ledger import JobLedger
from demand.prewarm import CallbackBackend, NoPrewarm, Prewarming
from demand.refine import NoRefinement

KNOWN = {"a": Distribution([2.0, 5.0])}
THINK, ACT = Unit("think", "llm"), Unit("act", "container")
RUN = [Execution(THINK, 4, 3), Execution(ACT, seconds=2.0)]


def queue(n=4):
    return Workload([0.0] * n, [2.0] * n, ["a"] * n, KNOWN)


def runs(n=4):
    cost = CostModel()
    return Workload([0.0] * n, [cost.run_seconds(RUN)] * n, ["a"] * n, KNOWN, runs=[RUN] * n)


@dataclass(frozen=True)
class Says(Policy):
    """Ranks all jobs by what it is told."""

    answer: Any = field(default=None)

    def rank(self, job, now):
        return self.answer


HUGE = 10**400
NO_NUMBERS = [
    *(None, "3", [1.0], {}, (), HUGE, Fraction(HUGE, 3), 1j),
    *(np.array([1.0, 2.0]), np.timedelta64(3, "s")),
]
SCHEDULERS = {
    "queue": lambda policy: simulate(queue(), policy),
    "several servers": lambda policy: simulate(queue(), policy, servers=2),
    "engine": lambda policy: simulate_engine(runs(), policy, Engine(max_requests=2)),
    "adapters": lambda policy: JobLedger(policy, KNOWN).open("a", 0.0),
}
schedulers = pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)


@schedulers
@pytest.mark.parametrize("answer", NO_NUMBERS, ids=repr)
def test_a_rank_that_is_no_number_is_refused_by_the_name_of_the_policy(schedule, answer):
    """A policy that forgets to return ran as first come, first served."""
    for rank in (answer, (0, answer)):
        with pytest.raises(DemandError, match=r"Says\(answer=.* ranked job \d+ .* expected a numb"):
            schedule(Says(rank))


@schedulers
@pytest.mark.parametrize(
    "around",
    [
        lambda p: Aging(p, 5.0, 1.0),
        lambda p: Hysteresis(p, 1.0),
        lambda p: TimeSlice(p, 1.0),
        PriorityClasses,
        lambda p: DeadlineMix(FCFS(), p),
    ],
)
def test_a_rank_within_a_wrapper_that_is_no_number_is_refused(schedule, around):
    with pytest.raises(DemandError, match=r"Says\(answer=None\).*expected a number"):
        schedule(around(Says()))


def test_a_rank_that_orders_units_before_a_cold_backend_is_checked():
    @dataclass(frozen=True)
    class Forgets(Policy):
        def rank(self, job, now):
            return None if now > 0.0 else 1.0

    with pytest.raises(DemandError, match=r"Forgets\(\) ranked job \d None; expected a number"):
        simulate_engine(runs(), Forgets(), backends={"container": Pool.containers(1, 5.0)})


@schedulers
@pytest.mark.parametrize(
    "answer",
    [1, True, np.float64(2.0), np.int64(2), Fraction(1, 3), np.array(2.0), torch.tensor(2.0)],
    ids=repr,
)
def test_numbers_of_every_kind_are_ranks(schedule, answer):
    for rank in (answer, (0, answer)):
        result, plain = schedule(Says(rank)), schedule(Says(2.0))
        if hasattr(result, "completion_times"):
            assert result.completion_times.tolist() == plain.completion_times.tolist()


@pytest.mark.parametrize("wrong", [Gittins, None, "gittins", NoPrewarm()], ids=repr)
@pytest.mark.parametrize("simulator", [simulate, simulate_engine])
def test_what_is_no_policy_is_refused(simulator, wrong):
    with pytest.raises(DemandError, match=r"policy is .*; expected a policy, such as Gittins\(\)"):
        simulator(runs(), wrong)


def test_a_class_in_place_of_a_policy_is_told_to_be_called():
    with pytest.raises(DemandError, match=r"policy is the class LAS; .*; make one: LAS\(\.\.\.\)"):
        simulate(runs(), LAS)


@pytest.mark.parametrize(
    "wrong",
    [Workload, None, [RUN], RUN[0], bimodal_mix],
    ids=["class", "None", "list", "run", "function"],
)
@pytest.mark.parametrize("simulator", [simulate, simulate_engine])
def test_what_is_no_workload_is_refused(simulator, wrong):
    with pytest.raises(DemandError, match=r"workload is .*expected a Workload or a ClosedLoop"):
        simulator(wrong, FCFS())


@pytest.mark.parametrize("wrong", [DemandEstimator, NoRefinement(), NoRefinement, "x"], ids=repr)
@pytest.mark.parametrize("simulator", [simulate, simulate_engine])
def test_what_cannot_be_asked_for_the_rest_is_refused(simulator, wrong):
    with pytest.raises(DemandError, match=r"estimator is .*expected a DemandEstimator"):
        simulator(runs(), FCFS(), estimator=wrong)


@pytest.mark.parametrize("simulator", [simulate, simulate_engine])
def test_a_refinement_that_answers_with_no_distribution_is_refused(simulator):
    with pytest.raises(
        DemandError, match=r"what the estimator says of 'a' is 3.0; expected a Distributi"
    ):
        simulator(runs(), FCFS(), estimator=lambda application, progress: 3.0)


@pytest.mark.parametrize(
    ("argument", "wrong", "expected"),
    [
        ("engine", Engine, "engine is the class Engine; expected an engine, .*make one: Engine"),
        ("engine", 64, "engine is 64; expected an engine"),
        ("prewarm", PrewarmPlanner, "prewarm is the class PrewarmPlanner; expected a prewarmer"),
        ("prewarm", "lru", "prewarm is 'lru'; expected a prewarmer"),
        ("pace", 0.1, "pace is 0.1; expected a CostModel"),
        ("cost", CostModel, "cost is the class CostModel; expected a CostModel"),
        ("backends", [Pool(1, 1.0)], "backends is .*expected pools by name"),
        ("backends", {"container": Pool}, r"backends\['container'\] is the class Pool; expected"),
        ("backends", {ACT: Pool(1, 1.0)}, "a name in backends is .*expected the name of a unit"),
    ],
    ids=str,
)
def test_what_the_engine_simulator_cannot_use_is_refused(argument, wrong, expected):
    with pytest.raises(DemandError, match=expected):
        simulate_engine(runs(), FCFS(), **{argument: wrong})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((PrewarmPlanner, {}, {}), "prewarmer is the class PrewarmPlanner; expected a prewarmer"),
        ((PrewarmPlanner(), {"a": Distribution([1.0])}, {}), r"graphs\['a'\] is .*a PDGraph"),
        ((PrewarmPlanner(), {}, {"container": CallbackBackend}), "the class CallbackBackend; exp"),
        ((PrewarmPlanner(), {}, {"container": Pool(1, 1.0)}), r"expected a backend, with warm_sec"),
    ],
)
def test_what_prewarming_cannot_use_is_refused(arguments, expected):
    with pytest.raises(DemandError, match=expected):
        Prewarming(*arguments)


def test_a_callback_that_cannot_be_called_is_refused():
    for arguments in ((1.0, "warm"), (1.0, print, "release"), (1.0, None)):
        with pytest.raises(DemandError, match=r"expected a function of \(job, unit\)"):
            CallbackBackend(*arguments)


WHOLE = {
    "servers": lambda n: simulate(queue(), FCFS(), servers=n).servers,
    "max_requests": lambda n: Engine(max_requests=n).max_requests,
    "token_budget": lambda n: Engine(token_budget=n).token_budget,
    "blocks": lambda n: Engine(blocks=n).blocks,
    "block_tokens": lambda n: Engine(block_tokens=n).block_tokens,
    "slots": lambda n: Pool(n, 1.0).slots,
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(
    "three", [3, 3e0, np.int64(3), np.float32(3), np.array(3), torch.tensor(3)]
)
def test_a_whole_number_of_every_kind_is_taken(name, three):
    found = WHOLE[name](three)
    assert found == 3
    assert type(found) is int


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(
    "wrong", [0, 2.5, "3", None, True, np.array([3, 4]), float("nan"), float("inf")], ids=repr
)
def test_what_is_no_whole_number_is_refused(name, wrong):
    with pytest.raises(DemandError, match=f"{name} is .*expected a whole number of at least 1"):
        WHOLE[name](wrong)


def test_a_seed_is_a_whole_number():
    seeded = [simulate(queue(), FCFS(), seed=seed).mean for seed in (3, 3e0, np.int64(3))]
    assert len(set(seeded)) == 1
    for seed in (-1, 0.5, "x"):
        with pytest.raises(DemandError, match=r"seed is .*expected a whole number of at least 0"):
            simulate(queue(), FCFS(), seed=seed)
        with pytest.raises(DemandError, match=r"seed is .*expected a whole number of at least 0"):
            bootstrap_interval([1.0, 2.0], seed=seed)


SETTINGS = {
    "quantum": LAS,
    "quantum of VTC": VTC,
    "quantum of Gittins": lambda x: Gittins(quantum=x),
    "preemption_cost": lambda x: Gittins(preemption_cost=x),
    "quantum of LeastSlack": lambda x: LeastSlack(quantum=x),
    "seconds": lambda x: TimeSlice(FCFS(), x),
    "cap": lambda x: Aging(FCFS(), x, 1.0),
    "warm_seconds": lambda x: Pool(1, x),
    "warm_seconds of a callback": lambda x: CallbackBackend(x, print),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_durations_are_read_by_their_unit(setting):
    make = SETTINGS[setting]
    plain = make(90.0)
    for duration in (np.timedelta64(90_000, "ms"), timedelta(minutes=1.5), 90, np.float64(90)):
        assert make(duration) == plain
    for wrong in ("90", None, np.datetime64("2026-01-01"), [90.0, 1.0]):
        with pytest.raises(DemandError, match=setting.split()[0]):
            make(wrong)


@pytest.mark.parametrize("make", [VirtualTime, lambda x: Hysteresis(FCFS(), x), LeastSlack])
def test_plain_numbers_are_no_durations(make):
    assert make(np.float64(0.5)) == make(0.5)
    for wrong in ("1", np.timedelta64(1, "s"), [0.5, 0.5]):
        with pytest.raises(DemandError, match="expected"):
            make(wrong)


def test_the_old_names_of_cost_models_warn_and_still_work():
    workload, cost = poisson_workload(hermes_applications(), 5.0, 6), CostModel(0.0, 0.1)
    for serve in (simulate_engine, simulate_cluster):
        said = f"service_cost= of {serve.__name__} is now cost="
        with pytest.warns(DeprecationWarning, match=said):
            old = serve(workload, LAS(), service_cost=cost)
        new = serve(workload, LAS(), cost=cost)
        assert old.completion_times.tolist() == new.completion_times.tolist()
    with pytest.warns(DeprecationWarning, match=r"cost= of Prewarming.__init__ is now pace="):
        Prewarming(PrewarmPlanner(), {}, {}, cost=cost)
    with pytest.raises(DemandError, match="drop service_cost="):
        simulate_engine(workload, LAS(), cost=cost, service_cost=cost)
