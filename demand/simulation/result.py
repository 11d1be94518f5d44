"""What became of each job of a simulated workload, and the figures people compare."""

from abc import ABC
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from demand.arguments import share
from demand.html_table import cell, html_table
from demand.policies.base import Policy
from demand.seconds import Floats
from demand.simulation.metrics import jain_index
from demand.workloads.workload import Workload


@dataclass(frozen=True, eq=False)
class Result(ABC):
    """What became of each job of a workload; each simulator adds figures of its own.

    Attributes:
        policy: what ranked the jobs.
        workload: what was served, in order of arrival.
        completion_times: `[n]` seconds from arrival to finish, in order of arrival.
        events: what happened; each kind of result says what it counts.
        preemptions: times a running job was put back to wait.
    """

    policy: Policy
    workload: Workload = field(repr=False)
    completion_times: Floats = field(repr=False)
    events: int
    preemptions: int

    @property
    def mean(self) -> float:
        """Mean completion time in seconds."""
        return float(self.completion_times.mean())

    def quantile(self, q: float) -> float:
        """The q-quantile of completion time in seconds, such as `quantile(0.95)`.

        Raises:
            DemandError: `q` is not a share.
        """
        return float(np.quantile(self.completion_times, share("q", q)))

    @cached_property
    def slowdowns(self) -> Floats:
        """`[n]` completion time over demand, of jobs with a demand; NaN for those without."""
        demands = self.workload.demands
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(demands > 0.0, self.completion_times / demands, np.nan)

    @property
    def jain(self) -> float:
        """Jain's index of the speeds (demand over completion time): 1 if all jobs fare alike.

        NaN if no job has a demand.
        """
        slowdowns = self.slowdowns[np.isfinite(self.slowdowns)]
        return jain_index(1.0 / slowdowns) if slowdowns.size else float("nan")

    @property
    def deadline_hits(self) -> float:
        """Share of the jobs with a deadline that met it; NaN if none has one."""
        due = self.workload.deadlines - self.workload.arrivals
        timed = np.isfinite(due)
        if not timed.any():
            return float("nan")
        return float((self.completion_times[timed] <= due[timed]).mean())

    def summary(self) -> dict[str, float]:
        """The figures by name: seconds, slowdowns, shares and counts.

        Slowdowns and Jain's index are NaN if no job has a demand, as are `deadline_hits` if none
        has a deadline.
        """
        slowdowns = self.slowdowns[np.isfinite(self.slowdowns)]
        if not slowdowns.size:
            slowdowns = np.array([np.nan])
        return {
            "mean_seconds": self.mean,
            "p50_seconds": self.quantile(0.5),
            "p95_seconds": self.quantile(0.95),
            "p99_seconds": self.quantile(0.99),
            "mean_slowdown": float(slowdowns.mean()),
            "p99_slowdown": float(np.quantile(slowdowns, 0.99)),
            "jain": self.jain,
            "deadline_hits": self.deadline_hits,
            "preemptions": self.preemptions,
        }

    def _repr_html_(self) -> str:
        kind = type(self).__name__
        caption = f"{kind}: {self.completion_times.size:,} jobs under {self.policy!r}"
        figures = [[name.replace("_", " "), cell(value)] for name, value in self.summary().items()]
        return html_table(caption, [["figure", "value"], *figures])

    def by_application(self) -> dict[str, Floats]:
        """Completion times of each application, `[n_a]` seconds."""
        names = np.array(self.workload.applications)
        return {str(name): self.completion_times[names == name] for name in np.unique(names)}
