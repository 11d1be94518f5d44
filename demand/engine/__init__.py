"""Continuous batching: an engine by its limits and step times, and applications served on it."""

from demand.engine.model import Engine, Preemption
from demand.engine.pools import Pool, PoolReport
from demand.engine.result import EngineResult
from demand.engine.simulator import simulate_engine

__all__ = ["Engine", "EngineResult", "Pool", "PoolReport", "Preemption", "simulate_engine"]
