"""Demand graphs of LLM applications, and scheduling by what is known of their demand.

An application is a graph of units (`PDGraph`, after Hermes, arXiv 2506.14851) learned from its
runs. Random walks turn it into a `Distribution` of seconds, a refinement (`demand.refine`) into one
of what is left; a `RankTable` turns that into exact Gittins ranks. `simulate` serves a `Workload`
under any `Policy` in a queue, `simulate_engine` on a continuous-batching engine, with backends that
start cold and planners that warm them (`demand.prewarm`). `demand.traces` reads what others
recorded; `demand.integrations` has the same policies inside transformers and vLLM. All times are in
seconds, all ranks are smaller-first. Needs numpy alone.
"""

from demand.distribution.distribution import Distribution
from demand.distribution.rank import gittins_brute_force, gittins_rank
from demand.distribution.rank_table import RankTable, rank_many
from demand.errors import DemandError
from demand.graph.drift import DriftReport, drift
from demand.graph.given_units import GivenUnit
from demand.graph.pdgraph import PDGraph
from demand.policies import (
    EDF,
    FCFS,
    LAS,
    NEVER_SEEN,
    SERPT,
    VTC,
    Aging,
    ClassMean,
    DeadlineMix,
    Gittins,
    Hysteresis,
    Job,
    LeastSlack,
    Oracle,
    Policy,
    PriorityClasses,
    Quantum,
    RandomOrder,
    RequestFCFS,
    VirtualTime,
    known_of,
)
from demand.prewarm import CostAwarePlanner, PrewarmPlanner
from demand.refine import (
    CurrentUnit,
    NearestRuns,
    NoRefinement,
    PearsonFilter,
    ProgressRegression,
    Refinement,
    WholeRuns,
)
from demand.refine.calibration import CalibrationReport, calibrate
from demand.refine.estimator import DemandEstimator
from demand.simulation.engine import Engine, EngineResult, Pool, simulate_engine
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

__all__ = [
    "EDF",
    "FCFS",
    "LAS",
    "NEVER_SEEN",
    "SERPT",
    "VTC",
    "Aging",
    "Application",
    "CalibrationReport",
    "ClassMean",
    "ClosedLoop",
    "CostAwarePlanner",
    "CostModel",
    "CurrentUnit",
    "DeadlineMix",
    "DemandError",
    "DemandEstimator",
    "Distribution",
    "DriftReport",
    "Engine",
    "EngineResult",
    "Execution",
    "Gittins",
    "GivenUnit",
    "Hysteresis",
    "Interval",
    "Job",
    "LeastSlack",
    "NearestRuns",
    "NoRefinement",
    "Oracle",
    "PDGraph",
    "PearsonFilter",
    "Policy",
    "Pool",
    "PrewarmPlanner",
    "PriorityClasses",
    "Progress",
    "ProgressRegression",
    "Quantum",
    "RandomOrder",
    "RankTable",
    "Refinement",
    "RequestFCFS",
    "Result",
    "SimulationResult",
    "Unit",
    "VirtualTime",
    "WholeRuns",
    "Workload",
    "bimodal_applications",
    "bimodal_mix",
    "bootstrap_interval",
    "calibrate",
    "closed_loop",
    "drift",
    "gittins_brute_force",
    "gittins_rank",
    "heavy_tailed_applications",
    "heavy_tailed_mix",
    "hermes_applications",
    "hermes_mix",
    "jain_index",
    "known_of",
    "paired_ratio_interval",
    "poisson_workload",
    "rank_many",
    "recorded_applications",
    "simulate",
    "simulate_engine",
    "with_arrivals",
    "with_deadlines",
]
