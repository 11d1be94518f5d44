"""The engine simulator: applications served by continuous batching, step by step."""

from demand.simulation.engine.engine import Engine, Preemption
from demand.simulation.engine.pools import Pool, PoolReport
from demand.simulation.engine.result import EngineResult
from demand.simulation.engine.simulate import simulate_engine

__all__ = ["Engine", "EngineResult", "Pool", "PoolReport", "Preemption", "simulate_engine"]
