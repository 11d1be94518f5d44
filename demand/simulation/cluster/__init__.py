"""The cluster simulator: applications served by several engines behind a router."""

from demand.simulation.cluster.result import ClusterResult, EngineShare
from demand.simulation.cluster.simulate import simulate_cluster

__all__ = ["ClusterResult", "EngineShare", "simulate_cluster"]
