"""Routers behind one protocol: `Router` chooses which of several engines serves a unit's calls."""

from demand.routing.base import ReadyUnit, Router, SeenEngine
from demand.routing.expected_demand import ExpectedDemand
from demand.routing.least_loaded import LeastLoaded
from demand.routing.load import Load
from demand.routing.prefix_affinity import PrefixAffinity
from demand.routing.random_engine import RandomEngine
from demand.routing.weighted_scores import WeightedScores

__all__ = [
    "ExpectedDemand",
    "LeastLoaded",
    "Load",
    "PrefixAffinity",
    "RandomEngine",
    "ReadyUnit",
    "Router",
    "SeenEngine",
    "WeightedScores",
]
