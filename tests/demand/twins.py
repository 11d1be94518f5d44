"""Slow, obvious simulators, written without the simulator's ideas."""

import math

import numpy as np

from demand import Workload


def unit_step(workload: Workload, rank, servers: int) -> np.ndarray:
    """Completion times on a grid of one second: at each second, rank everyone and serve the best.

    Exact when arrivals, demands and atoms are whole seconds. `rank(i, age)` ranks job i.
    """
    arrivals, demands = workload.arrivals, workload.demands
    n = len(workload)
    age, finish = np.zeros(n), np.full(n, math.nan)
    now = 0.0
    while np.isnan(finish).any():
        present = [i for i in range(n) if arrivals[i] <= now and math.isnan(finish[i])]
        for i in sorted(present, key=lambda i: (rank(i, age[i]), i))[:servers]:
            age[i] += 1.0
            if age[i] == demands[i]:
                finish[i] = now + 1.0
        now += 1.0
    return finish - arrivals


def exhaustive(workload: Workload, rank, servers: int) -> np.ndarray:
    """Completion times by ranking everyone anew whenever anything could have changed.

    That is at every arrival, every completion, and every age of a running job at which its rank
    may jump: an atom of its distribution or a doubling of the largest one.
    """
    arrivals, demands = workload.arrivals.tolist(), workload.demands.tolist()
    n = len(workload)
    jumps = [_jumps(workload.distributions[name].values) for name in workload.applications]
    age, finish = [0.0] * n, [math.nan] * n
    now = 0.0
    while any(math.isnan(f) for f in finish):
        present = [i for i in range(n) if arrivals[i] <= now and math.isnan(finish[i])]
        chosen = sorted(present, key=lambda i: (rank(i, age[i]), i))[:servers]
        step = min((a - now for a in arrivals if a > now), default=math.inf)
        stops = {}
        for i in chosen:
            stops[i] = min([demands[i], *(x for x in jumps[i] if x > age[i])])
            step = min(step, stops[i] - age[i])
        for i in chosen:
            # Landing on an atom exactly is what makes equal ages have equal ranks.
            age[i] = stops[i] if stops[i] - age[i] <= step else age[i] + step
        reached = [a for a in arrivals if a > now and a - now <= step]
        now = reached[0] if reached else now + step
        for i in chosen:
            if age[i] >= demands[i]:
                finish[i] = now
    return np.array(finish) - np.array(arrivals)


def _jumps(atoms: np.ndarray) -> list[float]:
    return [*atoms.tolist(), *(atoms[-1] * 2.0 ** np.arange(1, 30)).tolist()]
