"""The engine simulator: applications served by continuous batching, step by step."""

from demand.simulation.engine.engine import Engine, Preemption, Scheduling
from demand.simulation.engine.pools import Pool, PoolReport
from demand.simulation.engine.result import EngineResult, Goodput, Prefixes
from demand.simulation.engine.retention import LRU, KeepAll, NextUse, Retention
from demand.simulation.engine.served_requests import ServedRequests
from demand.simulation.engine.simulate import simulate_engine

__all__ = [
    "LRU",
    "Engine",
    "EngineResult",
    "Goodput",
    "KeepAll",
    "NextUse",
    "Pool",
    "PoolReport",
    "Preemption",
    "Prefixes",
    "Retention",
    "Scheduling",
    "ServedRequests",
    "simulate_engine",
]
