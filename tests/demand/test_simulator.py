import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demand import (
    FCFS,
    SERPT,
    Application,
    ClassMean,
    CostModel,
    DemandError,
    Distribution,
    Execution,
    Gittins,
    Job,
    Oracle,
    PDGraph,
    Policy,
    RandomOrder,
    RankTable,
    Unit,
    Workload,
    bimodal_mix,
    poisson_workload,
    simulate,
)
from demand.policies import NEVER_SEEN, Rank, RequestFCFS, TimeSlice
from demand.refine import CurrentUnit
from demand.refine.estimator import DemandEstimator
from tests.demand.twins import exhaustive, unit_step

POLICIES = [FCFS(), RandomOrder(), ClassMean(), SERPT(), Gittins(), Oracle()]
names = pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)


@st.composite
def whole_second_workloads(draw):
    whole = st.integers(1, 12)
    known = {
        name: Distribution(draw(st.lists(whole, min_size=1, max_size=5)))
        for name in ("a", "b", "c")
    }
    jobs = draw(
        st.lists(
            st.tuples(st.integers(0, 40), st.integers(1, 30), st.sampled_from("abc")),
            min_size=1,
            max_size=12,
        )
    )
    arrivals, demands, applications = zip(*sorted(jobs), strict=True)
    return Workload(arrivals, demands, applications, known)


def rank_by_table(workload, criterion):
    tables = {name: RankTable(d, criterion) for name, d in workload.distributions.items()}
    return lambda i, age: tables[workload.applications[i]].at(age)


def rank_by_definition(workload, policy):
    """Ranks without a table, from the distribution or the true demand."""
    known = [workload.distributions[name] for name in workload.applications]
    return {
        FCFS: lambda i, age: workload.arrivals[i],
        ClassMean: lambda i, age: known[i].mean(),
        SERPT: lambda i, age: known[i].mean(age),
        Gittins: lambda i, age: known[i].gittins(age),
        Oracle: lambda i, age: workload.demands[i] - age,
    }[type(policy)]


@settings(max_examples=150, deadline=None)
@given(whole_second_workloads(), st.sampled_from(["gittins", "mean"]), st.integers(1, 3))
def test_every_crossing_is_that_of_the_unit_step_twin(workload, criterion, servers):
    policy = Gittins() if criterion == "gittins" else SERPT()
    expected = unit_step(workload, rank_by_table(workload, criterion), servers)
    result = simulate(workload, policy, servers)
    np.testing.assert_allclose(result.completion_times, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("servers", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "policy", [FCFS(), ClassMean(), SERPT(), Gittins(), Oracle()], ids=lambda p: type(p).__name__
)
def test_every_policy_equals_the_exhaustive_twin(policy, seed, servers):
    rng = np.random.default_rng(seed)
    apps = [
        Application(
            name,
            Distribution(rng.lognormal(0.0, 1.5, 6), rng.random(6)),
            sample=lambda g, n: g.lognormal(0.0, 1.5, n),  # off the atoms, and beyond them
            mean_seconds=float(np.exp(1.125)),
        )
        for name in "abc"
    ]
    workload = poisson_workload(apps, 0.95, 60, seed, servers)
    expected = exhaustive(workload, rank_by_definition(workload, policy), servers)
    result = simulate(workload, policy, servers)
    np.testing.assert_allclose(result.completion_times, expected, rtol=1e-9, atol=1e-9)
    if type(policy) in (SERPT, Gittins) and servers == 1:
        assert result.events > 2 * len(workload)  # there were crossings to get right


def test_a_crossing_by_hand():
    """`a` is {1, 10}: past 1 s its rank is 9, over the 5 of `b`, which then goes first."""
    known = {"a": Distribution([1, 10]), "b": Distribution([5])}
    workload = Workload([0, 0.5], [10, 5], ["a", "b"], known)
    result = simulate(workload, Gittins())
    assert result.completion_times.tolist() == [15.0, 5.5]
    assert (result.events, result.preemptions) == (5, 1)


def test_equal_ranks_go_in_order_of_arrival():
    known = {"a": Distribution([2, 4])}
    workload = Workload([0, 1, 1], [4, 4, 2], ["a"] * 3, known)
    # G(0) = 3 and G(2) = 2: a job past its first atom keeps its lead over fresh ones.
    assert simulate(workload, Gittins()).completion_times.tolist() == [4.0, 7.0, 9.0]


def test_a_job_that_ends_on_an_atom_ends_there():
    known = {"a": Distribution([1, 10]), "b": Distribution([5])}
    workload = Workload([0, 0.5], [1, 5], ["a", "b"], known)
    result = simulate(workload, Gittins())
    assert result.completion_times.tolist() == [1.0, 5.5]
    assert result.preemptions == 0


@names
@pytest.mark.parametrize("servers", [1, 3])
def test_servers_never_idle_while_work_waits(policy, servers):
    """The work left, seen at any arrival, does not depend on the order of service."""
    workload = bimodal_mix(0.9, 300, seed=2, servers=servers)
    finish = workload.arrivals + simulate(workload, policy, servers).completion_times
    assert (finish >= workload.arrivals + workload.demands - 1e-9).all()
    if servers == 1:
        free, busy_until = 0.0, []
        for arrival, demand in zip(workload.arrivals, workload.demands, strict=True):
            free = max(free, arrival) + demand
            busy_until.append(free)
        # The last finish of each busy period is where the backlog runs out.
        idle_after = np.append(workload.arrivals[1:], np.inf) >= np.array(busy_until)
        ends = np.array(busy_until)[idle_after]
        assert len(ends) > 3
        assert all(np.isclose(finish, end, rtol=1e-12).any() for end in ends)
        period = np.searchsorted(ends, workload.arrivals, side="right")
        assert (finish <= ends[period] * (1 + 1e-12)).all()


@names
def test_as_many_servers_as_jobs_means_no_waiting(policy):
    workload = bimodal_mix(0.9, 50)
    result = simulate(workload, policy, servers=50)
    np.testing.assert_allclose(result.completion_times, workload.demands, rtol=1e-9)
    assert result.preemptions == 0


@names
def test_the_same_seed_gives_the_same_run(policy):
    first = simulate(bimodal_mix(0.8, 400, seed=5), policy, seed=1)
    again = simulate(bimodal_mix(0.8, 400, seed=5), policy, seed=1)
    np.testing.assert_array_equal(first.completion_times, again.completion_times)
    assert (first.events, first.preemptions) == (again.events, again.preemptions)


def test_the_seed_moves_only_the_random_order():
    workload = bimodal_mix(0.8, 400, seed=5)
    for policy in POLICIES:
        same = np.array_equal(
            simulate(workload, policy, seed=0).completion_times,
            simulate(workload, policy, seed=1).completion_times,
        )
        assert same == (policy != RandomOrder())


def test_fcfs_on_one_server_is_lindleys_recursion():
    workload = bimodal_mix(0.9, 500, seed=3)
    free, expected = 0.0, []
    for arrival, demand in zip(workload.arrivals, workload.demands, strict=True):
        free = max(free, arrival) + demand
        expected.append(free - arrival)
    result = simulate(workload, FCFS())
    np.testing.assert_allclose(result.completion_times, expected, rtol=1e-12)
    assert (result.events, result.preemptions) == (1000, 0)
    assert result.mean == pytest.approx(np.mean(expected))
    assert result.quantile(0.95) == pytest.approx(np.quantile(expected, 0.95))


def test_jobs_without_demand_take_no_time():
    workload = Workload([0, 0, 1], [3, 0, 0], ["a"] * 3, {"a": Distribution([0, 3])})
    assert simulate(workload, Oracle()).completion_times.tolist() == [3.0, 0.0, 0.0]


def test_what_happens_at_one_moment_happens_before_it_is_decided_who_is_served():
    """At 3 s one job ends and two arrive; the better of the three takes the server, once."""
    known = {name: Distribution([d]) for name, d in (("a", 3.0), ("b", 5.0), ("c", 1.0))}
    workload = Workload([0.0, 1.0, 3.0, 3.0], [3.0, 5.0, 5.0, 1.0], "abbc", known)
    result = simulate(workload, TimeSlice(ClassMean(), 100.0))
    assert result.completion_times.tolist() == [3.0, 8.0, 11.0, 1.0]
    assert (result.events, result.preemptions) == (8, 0)


TOOL = Unit("tool", "tool")


def unit_by_unit(arrivals, units, applications, known, **columns):
    runs = [[Execution(TOOL, seconds=s) for s in seconds] for seconds in units]
    return Workload(arrivals, [sum(s) for s in units], applications, known, runs=runs, **columns)


def test_request_fcfs_queues_every_unit_anew():
    known = {"a": Distribution([4.0])}
    workload = unit_by_unit([0.0, 1.0], [[2.0, 2.0], [3.0]], "aa", known)
    # The second unit of the first job is submitted at 2, behind the job that came at 1.
    assert simulate(workload, RequestFCFS()).completion_times.tolist() == [7.0, 4.0]
    assert simulate(workload, FCFS()).completion_times.tolist() == [4.0, 6.0]
    alone = replace(workload, runs=None)
    assert simulate(alone, RequestFCFS()).completion_times.tolist() == [4.0, 6.0]


def test_refinement_is_asked_at_the_end_of_every_unit_but_the_last():
    asked = []

    def refine(application, progress):
        asked.append((application, [e.seconds for e in progress.executed], progress.current))
        return Distribution([50.0])

    known = {"a": Distribution([4.0]), "b": Distribution([10.0])}
    workload = unit_by_unit([0.0, 0.0], [[1.0, 3.0], [10.0]], "ab", known)
    # After one second `a` is thought to need 50 more, and waits for `b`.
    result = simulate(workload, SERPT(), estimator=refine)
    assert asked == [("a", [1.0], None)]
    assert result.completion_times.tolist() == [14.0, 11.0]
    assert simulate(workload, SERPT()).completion_times.tolist() == [4.0, 14.0]


@pytest.mark.parametrize("seed", range(4))
def test_an_estimator_refines(seed):
    """Early units tell the long jobs from the short: what was one class is then two.

    By whatever walks: with the fifty of before, it hung on one seed whether a job that has planned
    came before the newcomers, who on average need half a second more.
    """
    rng = np.random.default_rng(0)
    names = {"short": (1.4, 1.6), "long": (29.0, 31.0)}

    def run():
        name = rng.choice(list(names))
        units = Unit("plan", "tool"), Unit(f"plan_{name}", "tool"), Unit(name, "tool")
        seconds = 0.5, 0.1, rng.uniform(*names[name])
        return [Execution(unit, seconds=s) for unit, s in zip(units, seconds, strict=True)]

    graph = PDGraph.fit([run() for _ in range(200)], name="a")
    runs = [run() for _ in range(400)]
    demands = [CostModel().run_seconds(r) for r in runs]
    workload = Workload(
        np.cumsum(rng.exponential(np.mean(demands) / 0.8, 400)),
        demands,
        ["a"] * 400,
        {"a": graph.remaining()},
        runs=runs,
        graphs={"a": graph},
    )
    estimator = DemandEstimator({"a": graph}, CurrentUnit(seed=seed))
    plain, refined = (simulate(workload, SERPT(), estimator=r) for r in (None, estimator))
    oracle = simulate(workload, Oracle())
    assert plain.mean - refined.mean > 0.3 * (plain.mean - oracle.mean) > 0.0
    assert refined.preemptions < plain.preemptions / 10


@pytest.mark.parametrize("policy", [SERPT(), Gittins()], ids=str)
@pytest.mark.parametrize("servers", [1, 2])
def test_applications_never_seen_equal_the_exhaustive_twin(policy, servers):
    rng = np.random.default_rng(3)
    known = {"a": Distribution(rng.lognormal(0.0, 1.5, 6)), "b": NEVER_SEEN}
    arrivals = np.cumsum(rng.exponential(1.5 / servers, 40))
    workload = Workload(arrivals, rng.lognormal(0.0, 1.0, 40), rng.choice(["a", "b"], 40), known)
    rank = rank_by_table(workload, "mean" if policy == SERPT() else "gittins")
    result = simulate(workload, policy, servers)
    np.testing.assert_allclose(
        result.completion_times, exhaustive(workload, rank, servers), rtol=1e-9, atol=1e-9
    )


@dataclass(frozen=True)
class Broken(Policy):
    """Ranks the running job last as soon as it has run, and does not say so in advance."""

    nan: str = ""

    def rank(self, job: Job, now: float) -> Rank:
        return {"": job.arrival, "number": math.nan, "tuple": (0, math.nan)}[self.nan]

    def next_above(self, job: Job, threshold: float) -> float:
        return job.attained_service


def test_bad_input_is_refused():
    workload = bimodal_mix(0.8, 20)
    for servers in (0, -1, 1.5, math.nan, math.inf):
        with pytest.raises(DemandError, match=f"servers is {servers}; expected a whole number"):
            simulate(workload, FCFS(), servers=servers)
    assert simulate(workload, FCFS(), servers=2.0).servers == 2
    for nan in ("number", "tuple"):
        with pytest.raises(DemandError, match=rf"Broken\(nan='{nan}'\) ranked job \d+ NaN"):
            simulate(workload, Broken(nan))
    with pytest.raises(DemandError, match="next_above gave"):
        simulate(workload, Broken())
    with pytest.raises(DemandError, match="has no table"):
        Gittins().rank(Job(0, "a", 0.0, Distribution([1.0])), 0.0)


def test_units_must_be_there_and_add_up():
    known = {"a": Distribution([4.0])}
    with pytest.raises(DemandError, match="the workload has no runs"):
        simulate(Workload([0.0], [4.0], "a", known), FCFS(), estimator=lambda *_: known["a"])
    short = replace(unit_by_unit([0.0], [[1.0, 2.0]], "a", known), demands=np.array([4.0]))
    with pytest.raises(DemandError, match=r"the units of job 0 take 3.0 s and its demand is 4.0 s"):
        simulate(short, RequestFCFS())


def test_repr_reads():
    workload = Workload([0], [2], ["a"], {"a": Distribution([2])})
    assert repr(simulate(workload, FCFS())) == (
        "SimulationResult(FCFS(), 1 jobs, 1 server, mean 2 s, p95 2 s, 2 events, 0 preemptions)"
    )
