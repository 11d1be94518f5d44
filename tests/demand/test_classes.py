"""A class in place of an instance is named, with what to write instead, wherever one is taken."""

from functools import partial

import pytest

from demand import (
    FCFS,
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
    JobMaker,
    NearestRuns,
    PDGraph,
    Prewarming,
    PrewarmPlanner,
    PriorityClasses,
    Progress,
    Refinement,
    TimeSlice,
    Unit,
    Workload,
    bimodal_mix,
    calibrate,
    compare,
    poisson_workload,
    simulate,
    simulate_engine,
)
from demand.integrations.job_ledger import JobLedger
from demand.policies import Job
from demand.workloads import Application

RUN = [Execution(Unit("plan", "llm"), 10, 5)]
GRAPH = PDGraph.fit([RUN, RUN])
KNOWN = {"a": Distribution([1.0, 2.0])}
JOBS = Workload([0.0, 1.0], [1.0, 2.0], ["a", "a"], KNOWN, runs=[RUN, RUN])
MIX = partial(bimodal_mix, 0.5, 20)


def admission(policy):
    pytest.importorskip("openai")
    from demand.integrations.vllm import AdmissionController, Server

    AdmissionController(Server("http://127.0.0.1:1/v1"), policy, KNOWN, in_flight=1)


def job_table(policy):
    pytest.importorskip("transformers")
    from demand.integrations.transformers import JobTable

    JobTable(policy, KNOWN)


@pytest.mark.parametrize(
    "take",
    [
        lambda policy: simulate(JOBS, policy),
        lambda policy: simulate_engine(JOBS, policy),
        lambda policy: compare(MIX, [policy], [0, 1]),
        lambda policy: compare(MIX, {"mine": policy}, [0, 1]),
        lambda policy: JobMaker(JOBS, policy, Job),
        lambda policy: JobLedger(policy, KNOWN),
        lambda policy: Aging(policy, cap=1.0, rate=1.0),
        lambda policy: Hysteresis(policy, 1.0),
        lambda policy: TimeSlice(policy, 1.0),
        PriorityClasses,
        lambda policy: DeadlineMix(policy, FCFS()),
        lambda policy: DeadlineMix(FCFS(), policy),
        lambda policy: TimeSlice(Aging(policy, 1.0, 1.0), 1.0),
        admission,
        job_table,
    ],
)
def test_wherever_a_policy_is_taken(take):
    says = (
        r"is the class Gittins; expected a policy, such as Gittins\(\); make one: Gittins\(\.\.\."
    )
    with pytest.raises(DemandError, match=says):
        take(Gittins)


ESTIMATOR = r"expected a DemandEstimator\(graphs, refinement\)"


@pytest.mark.parametrize(
    ("take", "says"),
    [
        (lambda: compare(MIX, Gittins, [0, 1]), r"the class Gittins; expected .* \[Gittins\(\)\]"),
        (lambda: simulate(JOBS, FCFS(), estimator=DemandEstimator), ESTIMATOR),
        (lambda: simulate(JOBS, FCFS(), estimator=NearestRuns), f"class NearestRuns; {ESTIMATOR}"),
        (lambda: simulate_engine(JOBS, FCFS(), estimator=DemandEstimator), ESTIMATOR),
        (lambda: DemandEstimator({"a": GRAPH}, NearestRuns), r"make one: NearestRuns\("),
        (lambda: DemandEstimator({"a": GRAPH}, Refinement), r"is the class Refinement; expected"),
        (
            lambda: DemandEstimator({"a": PDGraph}),
            r"'a' is the class PDGraph; .* make one: PDGraph",
        ),
        (lambda: DemandEstimator(PDGraph), "graphs is the class PDGraph; expected a mapping"),
        (lambda: DemandEstimator({}, cost=CostModel), r"make one: CostModel\("),
        (lambda: DemandEstimator({"a": GRAPH})("a", Progress), r"make one: Progress\("),
        (lambda: calibrate(DemandEstimator, [RUN]), "the class DemandEstimator; expected a functi"),
        (lambda: NearestRuns().fit(PDGraph), r"make one: PDGraph\("),
        (lambda: Prewarming(PrewarmPlanner, {}, {}), r"make one: PrewarmPlanner\("),
        (
            lambda: Prewarming(PrewarmPlanner(), PDGraph, {}),
            "graphs is the class PDGraph; expected",
        ),
        (lambda: Prewarming(PrewarmPlanner(), {}, PDGraph), "backends is the class PDGraph; expec"),
        (
            lambda: simulate_engine(JOBS, FCFS(), prewarm=PrewarmPlanner),
            r"make one: PrewarmPlanner\(",
        ),
        (lambda: simulate_engine(JOBS, FCFS(), engine=Engine), r"make one: Engine\("),
        (
            lambda: poisson_workload(Application, 0.5, 2),
            r"is the class Application; expected a list of Application: \[Application\(",
        ),
    ],
)
def test_wherever_an_estimator_a_planner_or_the_like_is_taken(take, says):
    with pytest.raises(DemandError, match=says):
        take()
