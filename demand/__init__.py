"""Demand graphs of LLM applications, and scheduling by what is known of their demand.

An application is a graph of units (`PDGraph`, after Hermes, arXiv 2506.14851) learned from its
runs. Random walks turn it into a `Distribution` of seconds; a `RankTable` turns that into exact
Gittins ranks; `simulate` serves a `Workload` under any `Policy`. All times are in seconds, all
ranks are smaller-first. Needs numpy alone.
"""

from demand.distribution import Distribution
from demand.errors import DemandError
from demand.gittins import gittins_brute_force, gittins_rank
from demand.graph import PDGraph
from demand.metrics import Interval, bootstrap_interval, paired_ratio_interval
from demand.policies import FCFS, SERPT, ClassMean, Gittins, Job, Oracle, Policy, RandomOrder
from demand.rank_table import RankTable
from demand.simulator import SimulationResult, simulate
from demand.units import CostModel, Execution, Progress, Unit
from demand.workloads import (
    Application,
    Workload,
    bimodal_applications,
    bimodal_mix,
    hermes_applications,
    hermes_mix,
    poisson_workload,
)

__all__ = [
    "FCFS",
    "SERPT",
    "Application",
    "ClassMean",
    "CostModel",
    "DemandError",
    "Distribution",
    "Execution",
    "Gittins",
    "Interval",
    "Job",
    "Oracle",
    "PDGraph",
    "Policy",
    "Progress",
    "RandomOrder",
    "RankTable",
    "SimulationResult",
    "Unit",
    "Workload",
    "bimodal_applications",
    "bimodal_mix",
    "bootstrap_interval",
    "gittins_brute_force",
    "gittins_rank",
    "hermes_applications",
    "hermes_mix",
    "paired_ratio_interval",
    "poisson_workload",
    "simulate",
]
