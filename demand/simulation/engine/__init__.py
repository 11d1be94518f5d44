"""Continuous batching: an engine by its limits and step times, and applications served on it."""

from demand.simulation.engine.engine import Engine, Preemption
from demand.simulation.engine.pools import Pool, PoolReport
from demand.simulation.engine.result import EngineResult
from demand.simulation.engine.simulate import simulate_engine

__all__ = ["Engine", "EngineResult", "Pool", "PoolReport", "Preemption", "simulate_engine"]
