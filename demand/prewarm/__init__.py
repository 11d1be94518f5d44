"""Warming the backend of a unit before the unit is reached: planners, baselines, real backends."""

from demand.prewarm.artifact import ArtifactPrewarm
from demand.prewarm.base import Prewarmer, Start, Successor
from demand.prewarm.baselines import AlwaysAtStart, NoPrewarm, OraclePrewarm, WaitingQueue
from demand.prewarm.cost_aware import CostAwarePlanner
from demand.prewarm.driver import Backend, CallbackBackend, Prewarming
from demand.prewarm.planner import PrewarmPlanner

__all__ = [
    "AlwaysAtStart",
    "ArtifactPrewarm",
    "Backend",
    "CallbackBackend",
    "CostAwarePlanner",
    "NoPrewarm",
    "OraclePrewarm",
    "PrewarmPlanner",
    "Prewarmer",
    "Prewarming",
    "Start",
    "Successor",
    "WaitingQueue",
]
