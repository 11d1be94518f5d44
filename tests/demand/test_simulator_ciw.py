"""The simulator against the library ciw: the same arrivals and demands, compared job by job.

ciw (https://ciw.readthedocs.io) simulates networks of queues; it shares no code or idea with
this simulator.
"""

import numpy as np
import pytest

from demand import FCFS, Distribution, Workload, simulate
from demand.policies import PriorityClasses

ciw = pytest.importorskip("ciw", reason="needs ciw (pip install ciw)")

KNOWN = {"a": Distribution([1.0])}
NEVER = 1e9


def sequence(numbers):
    """The numbers in order, then nothing for good."""
    return ciw.dists.Sequential([*numbers.tolist(), NEVER])


def ciw_completion_times(workload, servers):
    """Completion times of each priority class in order of arrival, one ciw class for each."""
    priorities = np.array(workload.priorities)
    classes = {f"class {p}": int(p) for p in np.unique(priorities)}
    mine = {name: priorities == p for name, p in classes.items()}
    network = ciw.create_network(
        arrival_distributions={
            name: [sequence(np.diff(workload.arrivals[who], prepend=0.0))]
            for name, who in mine.items()
        },
        service_distributions={
            name: [sequence(workload.demands[who])] for name, who in mine.items()
        },
        number_of_servers=[servers],
        priority_classes=(classes, ["resume"]),
    )
    simulation = ciw.Simulation(network)
    simulation.simulate_until_max_time(NEVER / 2)
    served = [r for r in simulation.get_all_records() if r.record_type == "service"]
    found = np.empty(len(workload))
    for name, who in mine.items():
        records = sorted((r for r in served if r.customer_class == name), key=_arrival)
        found[who] = [r.exit_date - r.arrival_date for r in records]
    return found


def _arrival(record):
    return record.arrival_date, record.id_number


def drawn(demands, load, servers, seed, priorities=None):
    rng = np.random.default_rng(seed)
    demands = demands(rng, 3000)
    arrivals = np.cumsum(rng.exponential(demands.mean() / (load * servers), demands.size))
    return Workload(arrivals, demands, ["a"] * demands.size, KNOWN, priorities=priorities)


DEMANDS = {
    "exponential": lambda rng, n: rng.exponential(size=n),
    "constant": lambda rng, n: np.ones(n),
    "hyperexponential": lambda rng, n: rng.exponential(np.where(rng.random(n) < 0.9, 0.5, 5.5)),
    "lognormal": lambda rng, n: rng.lognormal(0.0, 2.0, n),
}


@pytest.mark.parametrize("load", [0.5, 0.9])
@pytest.mark.parametrize("servers", [1, 2, 5])
@pytest.mark.parametrize("demands", DEMANDS.values(), ids=DEMANDS)
def test_first_come_first_served_job_by_job(demands, servers, load):
    workload = drawn(demands, load, servers, seed=servers)
    result = simulate(workload, FCFS(), servers)
    np.testing.assert_allclose(
        result.completion_times, ciw_completion_times(workload, servers), rtol=1e-9, atol=1e-6
    )


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("demands", DEMANDS.values(), ids=DEMANDS)
def test_preemptive_resume_priorities_job_by_job(demands, servers):
    priorities = np.random.default_rng(7).integers(0, 3, 3000).tolist()
    workload = drawn(demands, 0.85, servers, seed=11, priorities=priorities)
    result = simulate(workload, PriorityClasses(FCFS()), servers)
    assert result.preemptions > 100
    np.testing.assert_allclose(
        result.completion_times, ciw_completion_times(workload, servers), rtol=1e-9, atol=1e-6
    )
