"""The arrivals of a recorded trace in place of Poisson ones."""

from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from demand.arguments import instance_of, whole_number
from demand.errors import DemandError
from demand.seconds import Floats, as_seconds
from demand.workloads.workload import Workload


def with_arrivals(
    workload: Workload,
    times: ArrayLike,
    order: Literal["recorded", "resampled"] = "recorded",
    seed: int = 0,
) -> Workload:
    """The same jobs at the same load, arriving in the rhythm of a recorded trace.

    Intervals between arrivals are stretched so that the last job arrives when it did. Deadlines
    move with their jobs.

        times = [request.arrival_seconds for request in read_mooncake(path)]
        bursty = with_arrivals(hermes_mix(), times, "resampled")

    Args:
        workload: the jobs, with arrivals of their own.
        times: `[m]` seconds or timedeltas, ascending, counted from any moment; for moments
            (`datetime64`) give `times - times[0]`.
        order: "recorded" takes the first intervals of the trace as they follow each other, bursts
            and lulls included; "resampled" draws each interval on its own, with replacement, as
            the Hermes evaluation does: their spread is kept, their order is not.
        seed: of the drawing.

    Raises:
        DemandError: times that are not finite or not ascending, no time between any, or too few
            for the order "recorded".
    """
    instance_of("workload", workload, Workload)
    recorded = as_seconds("times", times)
    intervals = np.diff(recorded) if recorded.ndim == 1 else np.empty(0)
    if not np.isfinite(recorded).all() or not (intervals >= 0.0).all() or not intervals.any():
        raise DemandError(
            f"times have shape {recorded.shape}; expected ascending finite seconds, not all equal: "
            "give the arrivals of one trace"
        )
    n = len(workload)
    drawn = _intervals(intervals, n, order, seed)
    if not drawn.any():
        raise DemandError(f"the first {n} intervals are all 0; give more of the trace")
    shifted = np.cumsum(drawn) * (workload.arrivals[-1] / drawn.sum())
    deadlines = shifted + (workload.deadlines - workload.arrivals)
    return replace(workload, arrivals=shifted, deadlines=np.maximum(deadlines, shifted))


def _intervals(intervals: Floats, n: int, order: str, seed: int) -> Floats:
    if order == "resampled":
        return np.random.default_rng(whole_number("seed", seed, least=0)).choice(intervals, size=n)
    if order != "recorded":
        raise DemandError(f"order is {order!r}; expected recorded or resampled")
    if n > intervals.size:
        raise DemandError(
            f"there are {n} jobs and {intervals.size} intervals; take fewer jobs, or "
            'order="resampled"'
        )
    return intervals[:n]
