"""The jobs of a workload, made one by one as they arrive."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Generic, TypeVar, final

import numpy as np

from demand.arguments import instance_of, whole_number
from demand.errors import DemandError
from demand.lazy_runs import execution_seconds
from demand.policies.base import Policy, check_policy
from demand.policies.job import Job
from demand.units import CostModel
from demand.workloads.workload import Workload

J = TypeVar("J", bound=Job)


@final
class JobMaker(Generic[J]):
    """Makes the `Job` of each entry of a workload, under one policy and with one state.

    Jobs are made as they arrive, so that only those present take memory. The table of an
    application is computed once. `Job.lottery` is drawn for each entry beforehand, so that it is
    the same under every policy.

    Args:
        workload: the entries.
        policy: whose tables and state the jobs carry.
        kind: class of the jobs: `Job`, or what a simulator makes of it.
        seed: of the lottery.

    Raises:
        DemandError: no workload, no policy, or a seed that is not a whole number of at least 0.
    """

    def __init__(self, workload: Workload, policy: Policy, kind: type[J], seed: int = 0) -> None:
        instance_of("workload", workload, Workload)
        check_policy("policy", policy)
        self._workload = workload
        self._kind = kind
        self._state = policy.new_state()
        self._known = {
            name: (known, policy.table(known)) for name, known in workload.distributions.items()
        }
        generator = np.random.default_rng(whole_number("seed", seed, least=0))
        self._lottery: list[float] = generator.random(len(workload)).tolist()
        self._nominal: list[float] = workload.arrivals.tolist()
        self._demands: list[float] = workload.demands.tolist()
        self._deadlines: list[float] = workload.deadlines.tolist()

    def make(self, entry: int, index: int | None = None, arrival: float | None = None) -> J:
        """The job of `entry`.

        Args:
            entry: position in the workload.
            index: `Job.index`; `None` for the entry.
            arrival: second at which it arrives, and with it its deadline moves; `None` for that of
                the workload.
        """
        workload, nominal = self._workload, self._nominal[entry]
        if arrival is None:
            arrival = nominal
        application, tenant = workload.applications[entry], workload.tenants[entry]
        known, table = self._known[application]
        job = self._kind(
            entry if index is None else index,
            application,
            arrival,
            known,
            self._demands[entry],
            0.0,
            self._lottery[entry],
            table,
            self._deadlines[entry] + (arrival - nominal),
            tenant,
            workload.weights.get(tenant, 1.0),
            workload.priorities[entry],
        )
        job.state = self._state
        return job

    def cost(self, entry: int) -> CostModel:
        """The cost model of the graph of the application of `entry`, or the default one."""
        graph = self._workload.graphs.get(self._workload.applications[entry])
        return CostModel() if graph is None else graph.cost

    def unit_ends(self, entry: int) -> Sequence[float]:
        """Attained service at the end of each unit of the run of `entry`, its demand last.

        Seconds are those of the cost model of the application's graph, or of the default one.

        Raises:
            DemandError: no runs, a run that is no list of executions, or units that do not add up
                to the demand.
        """
        workload = self._workload
        if workload.runs is None:
            raise DemandError("the workload has no runs; give Workload(runs=...)")
        cost = self.cost(entry)
        demand = self._demands[entry]
        ends = list(accumulate(execution_seconds(workload.runs, entry, cost)))
        if not ends or not math.isclose(ends[-1], demand, rel_tol=1e-6, abs_tol=1e-9):
            raise DemandError(
                f"the units of job {entry} take {ends[-1] if ends else 0.0} s and its demand is "
                f"{demand} s; give both by one cost model, that of its graph if it has one"
            )
        return [*(min(end, demand) for end in ends[:-1]), demand]
