"""Demand graphs of LLM applications, and scheduling by what is known of their demand.

    graph = PDGraph.fit(runs)  # each run a list of Execution(unit, ...), what it took
    demand = graph.remaining(Progress(run[:2]))  # Distribution of the seconds still needed
    rank = demand.gittins()  # its Gittins rank in seconds; who has the smaller goes first
    print(simulate(bimodal_mix(load=0.8), Gittins()).mean)  # mean completion time in seconds

After Hermes (arXiv 2506.14851): an application is a graph of units learned from its runs; random
walks over the graph say how much of it may be left, and the Gittins rank of that says who is served
first. `demand.traces` reads what others recorded; `demand.integrations` has the same policies
inside transformers and vLLM. All times are seconds, all ranks are smaller-first. Needs numpy alone.
"""

from typing import Any

from demand.arguments import moved_attribute
from demand.compare import compare
from demand.comparison import Comparison
from demand.distribution.distribution import Distribution
from demand.distribution.rank import gittins_brute_force as _gittins_brute_force
from demand.distribution.rank import gittins_rank
from demand.distribution.rank_table import RankTable, rank_many
from demand.errors import DemandError
from demand.graph.drift import DriftReport, drift
from demand.graph.given_units import GivenUnit
from demand.graph.pdgraph import PDGraph
from demand.policies import (
    EDF,
    FCFS,
    LAS,
    MLFQ,
    NEVER_SEEN,
    SERPT,
    VTC,
    Aging,
    ClassMean,
    DeadlineMix,
    DecayingLAS,
    Gittins,
    Hysteresis,
    Job,
    LeastSlack,
    Oracle,
    Policy,
    PriorityClasses,
    RandomOrder,
    RequestFCFS,
    TimeSlice,
    VirtualTime,
)
from demand.policies import known_of as _known_of
from demand.prewarm import CallbackBackend, CostAwarePlanner, Prewarming, PrewarmPlanner
from demand.refine import (
    CurrentUnit,
    NearestRuns,
    NoRefinement,
    PearsonFilter,
    PendingCall,
    Predictor,
    ProgressRegression,
    PromptRegression,
    Refinement,
    WholeRuns,
)
from demand.refine.calibration import CalibrationReport, calibrate, calibrate_calls
from demand.refine.estimator import DemandEstimator
from demand.routing import (
    ExpectedDemand,
    LeastLoaded,
    PrefixAffinity,
    RandomEngine,
    Router,
    WeightedScores,
)
from demand.simulation.cluster import ClusterResult, simulate_cluster
from demand.simulation.engine import Engine, EngineResult, Pool, simulate_engine
from demand.simulation.job_maker import JobMaker
from demand.simulation.metrics import (
    Interval,
    bootstrap_interval,
    jain_index,
    paired_ratio_interval,
)
from demand.simulation.queue.simulate import SimulationResult, simulate
from demand.simulation.result import Result
from demand.units import CostModel, Execution, Progress, Unit
from demand.workloads import (
    Application,
    ClosedLoop,
    Workload,
    bimodal_applications,
    bimodal_mix,
    closed_loop,
    heavy_tailed_applications,
    heavy_tailed_mix,
    hermes_applications,
    hermes_mix,
    poisson_workload,
    recorded_applications,
    with_arrivals,
    with_deadlines,
)

_MOVED: dict[str, tuple[str, Any]] = {
    "Quantum": ("demand.TimeSlice", TimeSlice),
    "gittins_brute_force": ("demand.distribution.rank.gittins_brute_force", _gittins_brute_force),
    "known_of": ("demand.policies.known_of", _known_of),
}


def __getattr__(name: str) -> Any:
    """Names of before, for one release."""
    return moved_attribute(__name__, name, _MOVED)


__all__ = [
    # learn an application from its runs
    "PDGraph",
    "Unit",
    "Execution",
    "Progress",
    "CostModel",
    "GivenUnit",
    "DriftReport",
    "drift",
    # say what progress tells of the rest
    "Refinement",
    "NoRefinement",
    "WholeRuns",
    "CurrentUnit",
    "PearsonFilter",
    "ProgressRegression",
    "NearestRuns",
    "DemandEstimator",
    "Predictor",
    "PendingCall",
    "PromptRegression",
    "CalibrationReport",
    "calibrate",
    "calibrate_calls",
    # distributions of seconds, and their ranks
    "Distribution",
    "RankTable",
    "rank_many",
    "gittins_rank",
    "NEVER_SEEN",
    # policies
    "Policy",
    "Job",
    "RequestFCFS",
    "FCFS",
    "RandomOrder",
    "LAS",
    "DecayingLAS",
    "MLFQ",
    "ClassMean",
    "SERPT",
    "Gittins",
    "VTC",
    "VirtualTime",
    "EDF",
    "LeastSlack",
    "DeadlineMix",
    "Oracle",
    # policies around policies
    "Aging",
    "TimeSlice",
    "Hysteresis",
    "PriorityClasses",
    # simulate a queue
    "simulate",
    "SimulationResult",
    "Result",
    "JobMaker",
    # simulate an engine with continuous batching
    "simulate_engine",
    "Engine",
    "EngineResult",
    # simulate several engines behind a router
    "simulate_cluster",
    "ClusterResult",
    "Router",
    "RandomEngine",
    "LeastLoaded",
    "PrefixAffinity",
    "ExpectedDemand",
    "WeightedScores",
    # warm what may follow
    "Pool",
    "PrewarmPlanner",
    "CostAwarePlanner",
    "Prewarming",
    "CallbackBackend",
    # workloads
    "Workload",
    "Application",
    "poisson_workload",
    "ClosedLoop",
    "closed_loop",
    "hermes_mix",
    "hermes_applications",
    "bimodal_mix",
    "bimodal_applications",
    "heavy_tailed_mix",
    "heavy_tailed_applications",
    "recorded_applications",
    "with_arrivals",
    "with_deadlines",
    # compare
    "compare",
    "Comparison",
    "Interval",
    "bootstrap_interval",
    "paired_ratio_interval",
    "jain_index",
    # errors
    "DemandError",
]
