"""Closed loops, refinement, and backends with cold starts on the engine."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demand import (
    FCFS,
    SERPT,
    CostModel,
    DemandError,
    Distribution,
    Execution,
    Oracle,
    PDGraph,
    Unit,
    Workload,
    hermes_applications,
    poisson_workload,
    simulate,
)
from demand.prewarm import (
    AlwaysAtStart,
    CostAwarePlanner,
    NoPrewarm,
    OraclePrewarm,
    PrewarmPlanner,
    WaitingQueue,
)
from demand.refine import CurrentUnit
from demand.refine.estimator import DemandEstimator
from demand.simulation.engine import Engine, Pool, simulate_engine
from demand.workloads.closed_loop import ClosedLoop, closed_loop

WRITE, READ, TEST = Unit("write", "llm"), Unit("read", "llm"), Unit("test", "container")
STEPS = Engine.counting_steps(8)
TOKEN_A_SECOND = CostModel(0.0, 1.0)


def of_runs(runs, arrivals=None, names=None, graph=True):
    names = names or ["a"] * len(runs)
    graphs = {
        name: PDGraph.fit([r for r, n in zip(runs, names, strict=True) if n == name])
        for name in set(names)
    }
    return Workload(
        arrivals or [0.0] * len(runs), [1.0] * len(runs), names,
        {name: Distribution([1.0]) for name in names}, runs=runs, graphs=graphs if graph else {},
    )  # fmt: skip


def write_and_test(tokens, seconds):
    return [Execution(WRITE, 1, tokens), Execution(TEST, seconds=seconds)]


def serve(workload, backends, prewarm=None, engine=STEPS, **more):
    return simulate_engine(
        workload,
        FCFS(),
        engine,
        backends=backends,
        prewarm=prewarm,
        cost=TOKEN_A_SECOND,
        **more,
    )


def test_a_cold_start_delays_its_unit():
    workload = of_runs([write_and_test(10, 5.0)])
    assert serve(workload, {}).mean == 15
    result = serve(workload, {"container": Pool.containers(1, 4.0)})
    assert result.mean == 19
    report = result.backends["container"]
    assert (report.uses, report.cold, report.wait_seconds, report.idle_seconds) == (1, 1, 4, 0)


@pytest.mark.parametrize("waiting", [0, 1])
def test_a_cold_start_begins_when_the_turn_has_come(waiting):
    """The slot is taken until second 40 (41), whatever the simulator knows of ranks by then."""
    short = [Execution(READ, 1, 1)] * waiting
    runs = [[Execution(READ, 1, 40)], *([one] for one in short), [Execution(WRITE, 1, 2)]]
    workload = of_runs(runs, [0.0, *[5.0] * waiting, 10.0])
    pool = {"write": Pool(1, 10.0, keep_seconds=0.0)}
    result = serve(workload, pool, engine=Engine.counting_steps(1))
    assert result.completion_times[-1] == 30 + waiting + 10 + 2


def test_a_plan_hides_the_cold_start_and_pays_by_idling():
    workload = of_runs([write_and_test(10, 5.0)])
    pool = {"container": Pool.containers(1, 4.0)}
    always = serve(workload, pool, AlwaysAtStart())
    assert (always.mean, always.backends["container"].idle_seconds) == (15, 6)
    for just_in_time in (PrewarmPlanner(0.5), OraclePrewarm(), CostAwarePlanner(0.1)):
        result = serve(workload, pool, just_in_time)
        assert (result.mean, result.backends["container"].idle_seconds) == (15, 0)
        assert result.backends["container"].warm == 1
    assert serve(workload, pool, CostAwarePlanner(1e6)).mean == 15  # just in time costs nothing


def test_a_warm_up_that_is_late_is_hidden_in_part():
    result = serve(of_runs([write_and_test(3, 5.0)]), {"test": Pool(1, 4.0)}, AlwaysAtStart())
    assert result.mean == 3 + 1 + 5
    assert (result.backends["test"].late, result.backends["test"].wait_seconds) == (1, 1)


def test_what_was_warmed_for_another_branch_is_given_up_when_the_unit_is_over():
    """Half of the runs end without the test; its warm-up is then unused, idle till the end."""
    runs = [write_and_test(10, 5.0), [Execution(WRITE, 1, 10), Execution(READ, 1, 20)]]
    workload = of_runs(runs)
    pools = {"container": Pool.containers(2, 4.0, keep_seconds=0.0)}
    report = serve(workload, pools, AlwaysAtStart()).backends["container"]
    assert (report.uses, report.unused, report.unused_seconds) == (1, 1, 4)
    assert report.idle_seconds == 6 + 6  # both warm at 4, the writing is over at 10
    kept = {"container": Pool.containers(2, 4.0)}
    # One ends with its job at 15; the other is kept until its job ends, at 30.
    assert serve(workload, kept, AlwaysAtStart()).backends["container"].idle_seconds == 6 + 26
    assert serve(workload, pools, PrewarmPlanner(0.6)).backends["container"].unused == 0


def test_idle_instances_expire_and_the_least_recently_used_makes_room():
    a, b, c = (Unit(name, "model") for name in "abc")

    def use(unit):
        return Execution(unit, seconds=1.0)

    run = [use(a), use(b), use(a), use(c), use(b), use(a)]
    workload = of_runs([run])
    # Slots 2: a cold, b cold, a warm, c evicts b, b evicts a, a evicts c.
    report = serve(workload, {"model": Pool.models(2, 2.0)}).backends["model"]
    assert (report.cold, report.warm) == (5, 1)
    assert serve(workload, {"model": Pool.models(3, 2.0)}).backends["model"].cold == 3
    # a is idle for 3 s while b is loaded and used: it expires after 2.5 s.
    brief = serve(workload, {"model": Pool.models(3, 2.0, keep_seconds=2.5)}).backends["model"]
    assert (brief.cold, brief.warm) == (6, 0)
    assert serve(workload, {"model": Pool.models(3, 2.0, keep_seconds=0.0)}).mean == 6 * 3


def test_scopes_say_who_shares():
    runs = [[Execution(TEST, seconds=5.0)]] * 3
    workload = of_runs(runs, names=["a", "a", "b"])
    ends = {
        (scope, shared): serve(
            workload, {"test": Pool(3, 2.0, scope, shared)}
        ).backends["test"]
        for scope in ("job", "application", "unit")
        for shared in (True, False)
    }  # fmt: skip
    assert [report.cold for report in ends.values()] == [3, 3, 2, 3, 1, 3]
    assert [report.late for report in ends.values()] == [0, 0, 1, 0, 2, 0]


def test_units_wait_for_slots_in_the_order_of_the_policy():
    runs = [[Execution(TEST, seconds=s)] for s in (9.0, 5.0, 1.0)]
    workload = of_runs(runs, arrivals=[0, 1, 2])
    pool = {"test": Pool(1, 0.0, "unit")}
    first = simulate_engine(workload, FCFS(), STEPS, backends=pool)
    short = simulate_engine(workload, Oracle(), STEPS, backends=pool)
    assert first.completion_times.tolist() == [9, 13, 13]
    assert short.completion_times.tolist() == [9, 14, 8]


def test_the_waiting_queue_hides_the_loading_of_an_adapter():
    """The second request waits for ten steps anyway; loaded on demand it waits for four more."""
    workload = of_runs([[Execution(WRITE, 1, 10)], [Execution(READ, 1, 10)]], names=["a", "b"])
    one = Engine.counting_steps(1)
    adapter = {"llm": Pool.adapters(2, 4.0)}
    on_demand = serve(workload, adapter, NoPrewarm(), one)
    queued = serve(workload, adapter, WaitingQueue(), one)
    assert on_demand.completion_times.tolist() == [14, 28 - 4]
    assert queued.completion_times.tolist() == [14, 24]
    busy = replace(workload, arrivals=np.array([0.0, 5.0]))
    assert serve(busy, adapter, NoPrewarm(), one).completion_times.tolist() == [14, 14 + 14 - 5]
    assert serve(busy, adapter, WaitingQueue(), one).completion_times.tolist() == [14, 24 - 5]


def test_an_adapter_in_use_is_not_evicted():
    runs = [[Execution(WRITE, 1, 10)], [Execution(READ, 1, 10)]]
    workload = of_runs(runs, names=["a", "b"])
    result = serve(workload, {"llm": Pool.adapters(1, 4.0)}, WaitingQueue())
    assert result.completion_times.tolist() == [14, 28]


units = st.one_of(
    st.builds(Execution, st.sampled_from([WRITE, READ]), st.integers(1, 9), st.integers(1, 12)),
    st.builds(Execution, st.just(TEST), seconds=st.integers(0, 9).map(float)),
)


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.lists(units, min_size=1, max_size=4)),
             min_size=1, max_size=6),
    st.builds(Pool, st.integers(1, 3), st.integers(0, 6).map(float),
              st.sampled_from(["job", "application", "unit"]), st.booleans(),
              st.sampled_from([0.0, 3.0, np.inf])),
    st.sampled_from(["container", "llm", "write"]),
    st.sampled_from([NoPrewarm(), WaitingQueue(), AlwaysAtStart(), PrewarmPlanner(0.3),
                     CostAwarePlanner(0.5), OraclePrewarm()]),
)  # fmt: skip
def test_what_always_holds_of_pools(jobs, pool, where, prewarm):
    jobs.sort(key=lambda job: job[0])
    workload = of_runs([run for _, run in jobs], [float(at) for at, _ in jobs])
    executed = [e.unit for _, run in jobs for e in run]
    if where == "write" and WRITE not in executed:
        where = "llm"
    result = serve(workload, {where: pool}, prewarm)
    report = result.backends[where]
    uses = sum(where in (unit.kind, unit.name) for unit in executed)
    assert report.uses == uses == report.warm + report.late + report.cold
    assert report.wait_seconds >= report.cold * pool.warm_seconds
    end = float((workload.arrivals + result.completion_times).max())
    assert 0 <= report.idle_seconds <= pool.slots * end
    assert 0 <= report.unused_seconds <= report.unused * pool.warm_seconds
    if prewarm.knows == "nothing":
        assert report.unused == 0
    without = serve(workload, {})
    lone = len(jobs) == 1
    if lone:  # then the waits are all that differs; a request still starts at the end of a step
        waited = result.mean - without.mean
        assert waited == pytest.approx(report.wait_seconds)


def test_a_closed_loop_keeps_each_user_to_one_job():
    drawn = closed_loop(hermes_applications(50), users=5, think_seconds=20.0, jobs=60, seed=2)
    names = [str(user) for user in drawn.users]
    loop = ClosedLoop(replace(drawn.jobs, tenants=names), drawn.users, drawn.think_seconds)
    result = simulate_engine(loop, SERPT(), Engine(max_requests=8))
    arrivals, ends = result.workload.arrivals, result.workload.arrivals + result.completion_times
    assert (np.diff(arrivals) >= 0).all()
    for user in set(names):
        mine = np.array(result.workload.tenants) == user
        thinks = loop.think_seconds[np.array(names) == user]
        # One after the other, each after its own thought.
        np.testing.assert_allclose(arrivals[mine][1:] - ends[mine][:-1], thinks[1:], atol=1e-6)
        assert arrivals[mine][0] == thinks[0]
    again = simulate_engine(loop, SERPT(), Engine(max_requests=8))
    np.testing.assert_array_equal(result.completion_times, again.completion_times)


def test_a_closed_loop_of_one_user_is_served_alone():
    runs = [[Execution(WRITE, 1, n)] for n in (3, 5, 2)]
    jobs = of_runs(runs)
    loop = ClosedLoop(jobs, [0, 0, 0], [1.0, 2.0, 4.0])
    result = serve(loop, {})
    assert result.completion_times.tolist() == [3, 5, 2]
    assert result.workload.arrivals.tolist() == [0, 3 + 2, 10 + 4]


def test_refinement_is_asked_at_the_end_of_every_unit():
    asked = []

    def refine(application, progress):
        asked.append([e.unit.name for e in progress.executed])
        return Distribution([1.0])

    run = [Execution(WRITE, 1, 2), Execution(TEST, seconds=1.0), Execution(READ, 1, 2)]
    serve(of_runs([run]), {}, estimator=refine)
    assert asked == [["write"], ["write", "test"]]


def test_refinement_and_the_single_server_queue_agree():
    """Zero prefill, one slot, llm units only: what is learned at a boundary counts alike."""
    rng = np.random.default_rng(3)
    runs = [
        [Execution(WRITE, 1, int(rng.integers(1, 30))), Execution(READ, 1, int(rng.integers(1, 9)))]
        for _ in range(40)
    ]
    cost = TOKEN_A_SECOND
    graph = PDGraph.fit(runs, name="a", cost=cost)
    workload = Workload(
        np.sort(rng.integers(0, 600, 40)).astype(float), [cost.run_seconds(run) for run in runs],
        ["a"] * 40, {"a": graph.remaining()}, runs=runs, graphs={"a": graph},
    )  # fmt: skip
    refine = DemandEstimator({"a": graph}, CurrentUnit(walks=50))
    engine = simulate_engine(workload, SERPT(), Engine.counting_steps(1), estimator=refine)
    queue = simulate(workload, SERPT(), estimator=refine)
    np.testing.assert_allclose(engine.completion_times, queue.completion_times, atol=1e-6)


def test_bad_backends_are_refused():
    for broken, message in [
        (dict(slots=0), "slots is 0"),
        (dict(warm_seconds=-1.0), r"warm-up takes -1.0 s; expected finite seconds"),
        (dict(keep_seconds=-1.0), "keep_seconds is -1.0"),
        (dict(footprint=0.0), "footprint is 0.0"),
        (dict(scope="user"), "scope is 'user'; expected one of job, application, unit"),
    ]:
        with pytest.raises(DemandError, match=message):
            Pool(**dict(slots=1, warm_seconds=1.0) | broken)
    workload = of_runs([write_and_test(3, 1.0)], graph=False)
    with pytest.raises(DemandError, match=r"pools for \['tset'\], which no job executes"):
        serve(workload, {"tset": Pool(1, 1.0)})
    with pytest.raises(DemandError, match=r"applications \['a'\] have no graph"):
        serve(workload, {"test": Pool(1, 1.0)}, PrewarmPlanner())
    assert serve(workload, {"test": Pool(1, 1.0)}, OraclePrewarm()).mean == 4


def test_a_unit_the_graph_has_not_seen_is_served_without_a_plan():
    seen = of_runs([write_and_test(3, 1.0)])
    workload = replace(seen, runs=[[Execution(READ, 1, 3), Execution(TEST, seconds=1.0)]])
    assert serve(workload, {"test": Pool(1, 2.0)}, AlwaysAtStart()).mean == 3 + 2 + 1


def test_the_hermes_mix_completes_under_every_prewarmer():
    workload = poisson_workload(hermes_applications(100), load=20, jobs=80, seed=1)
    pools = {"container": Pool.containers(8, 5.0), "model": Pool.models(2, 10.0)}
    cold = simulate_engine(workload, SERPT(), backends=pools)
    for prewarm in (PrewarmPlanner(0.3), AlwaysAtStart(), OraclePrewarm()):
        result = simulate_engine(workload, SERPT(), backends=pools, prewarm=prewarm)
        assert sum(r.wait_seconds for r in result.backends.values()) < sum(
            r.wait_seconds for r in cold.backends.values()
        )
        assert result.summary()["backend_idle_seconds"] >= 0


def test_an_instance_stays_for_the_next_unit_of_its_job():
    """Nothing is kept, yet two llm units in a row load the adapter once."""
    adapter = {"llm": Pool.adapters(1, 4.0, keep_seconds=0.0)}
    row = [Execution(WRITE, 1, 5), Execution(READ, 1, 5)]
    for prewarm in (NoPrewarm(), WaitingQueue()):
        assert serve(of_runs([row]), adapter, prewarm).mean == 4 + 10
    gap = [row[0], Execution(TEST, seconds=9.0), row[1]]
    assert serve(of_runs([gap]), adapter).mean == 4 + 5 + 9 + 4 + 5
    assert serve(of_runs([gap]), adapter, PrewarmPlanner()).mean == 4 + 5 + 9 + 5


@pytest.mark.parametrize("prewarm", [NoPrewarm(), WaitingQueue()])
def test_a_backend_that_is_warm_costs_no_step(prewarm):
    """The second job finds the adapter warm, beside a request that goes on for long."""
    runs = [[Execution(WRITE, 1, 5)], [Execution(READ, 1, 40)], [Execution(WRITE, 1, 5)]]
    workload = of_runs(runs, arrivals=[0.0, 0.0, 20.0], names=["a", "b", "a"])
    adapter = {"llm": Pool.adapters(2, 4.0)}
    assert serve(workload, adapter, prewarm).completion_times.tolist() == [9, 44, 5]
