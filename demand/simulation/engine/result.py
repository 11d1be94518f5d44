"""What became of jobs served by an engine, and of the engine itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import numpy as np
from numpy.typing import NDArray

from demand.simulation.engine.engine import Engine
from demand.simulation.engine.pools import PoolReport
from demand.simulation.result import Result


@final
@dataclass(frozen=True, eq=False)
class EngineResult(Result):
    """What became of each job served by an engine in continuous batches.

    A slowdown can be below 1 here: demand adds up the seconds of parallel calls, by the cost
    model, and the engine runs them side by side. Its events are jobs that arrive,
    requests that are submitted, left out of a step after one they were in, and over, timed actions
    outside of the engine (ends of other units, warm-ups and what is planned for later), and
    steps, repeated ones included. Its preemptions are of requests, not jobs.

    Attributes:
        engine: its limits and times.
        completion_steps: `[n]` steps begun from arrival to finish.
        steps: how many were carried out.
        decisions: how often a batch was formed, empty ones too; steps in between repeat the last.
        busy_seconds: what the steps took.
        mean_batch: requests in a step, on average.
        prefilled_again: tokens whose KV was lost and computed again.
        swapped_blocks: blocks copied to the host or back.
        peak_blocks: the most blocks held at once.
        backends: what became of each pool, by its name.
    """

    engine: Engine
    completion_steps: NDArray[np.int64] = field(repr=False)
    steps: int
    decisions: int
    busy_seconds: float
    mean_batch: float
    prefilled_again: int
    swapped_blocks: int
    peak_blocks: int
    backends: Mapping[str, PoolReport] = field(repr=False)

    @property
    def mean_completion_steps(self) -> float:
        """Mean over jobs of `completion_steps`."""
        return float(self.completion_steps.mean())

    def summary(self) -> dict[str, float]:
        """The figures of every result, and those of the engine."""
        reports = self.backends.values()
        return super().summary() | {
            "mean_completion_steps": self.mean_completion_steps,
            "steps": self.steps,
            "busy_seconds": self.busy_seconds,
            "mean_batch": self.mean_batch,
            "prefilled_again": self.prefilled_again,
            "swapped_blocks": self.swapped_blocks,
            "peak_blocks": self.peak_blocks,
            "backend_wait_seconds": sum(report.wait_seconds for report in reports),
            "backend_idle_seconds": sum(report.idle_seconds for report in reports),
        }

    def __repr__(self) -> str:
        return (
            f"EngineResult({self.policy!r}, {self.completion_times.size} jobs, "
            f"mean {self.mean:.4g} s, p95 {self.quantile(0.95):.4g} s, {self.steps} steps of "
            f"{self.mean_batch:.3g} requests, {self.preemptions} preemptions, "
            f"{self.prefilled_again} tokens prefilled again)"
        )
