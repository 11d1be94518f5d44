"""Jobs with the least slack before their deadline first."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import final

import numpy as np
from typing_extensions import override

from demand.arguments import positive_seconds
from demand.distribution.atoms import beyond_samples
from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.policies.base import Policy, Rank, number, table_of
from demand.policies.exact_thresholds import greatest_addend, whole_quanta
from demand.policies.job import Job
from demand.seconds import check_age, one_number


@final
@dataclass(frozen=True)
class LeastSlack(Policy):
    """Least slack first (Hermes-DDL, arXiv 2506.14851): deadline - now - remaining demand.

    The paper takes the largest sample for the total demand, sup X - a at attained service a; one
    outlier then makes an application urgent for good. A quantile of X - a given X > a does not.
    Beyond the samples, remaining demand follows `beyond_samples`.

    `now` is left out, being the same for all. Attained service is counted in whole quanta: a job's
    slack stands still while it is served and shrinks while it waits, so that two jobs of equal
    slack would otherwise swap at every instant. Jobs without a deadline come last, in order of
    arrival; `DeadlineMix` gives them a policy of their own.

    Args:
        quantile: of the remaining demand, such as 0.95; `None` for the largest sample.
        quantum: seconds of service.

    Raises:
        DemandError: a quantile outside [0, 1], or a quantum that is not positive and finite.
    """

    quantile: float | None = None
    quantum: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "quantum", positive_seconds("quantum", self.quantum))
        if self.quantile is None:
            return
        object.__setattr__(self, "quantile", one_number("quantile", self.quantile))
        if not 0.0 <= self.quantile <= 1.0:
            raise DemandError(
                f"quantile is {self.quantile}; expected a number from 0 to 1, or None for the "
                "largest sample"
            )

    @override
    def table(self, distribution: Distribution) -> "SlackTable":
        """Minus the remaining demand in seconds, by age."""
        return SlackTable(distribution, self.quantile, self.quantum)

    @override
    def rank(self, job: Job, now: float) -> float:
        """Deadline less remaining seconds: the slack, without the common `now`."""
        return job.deadline + table_of(job).at(job.age)

    @override
    def next_above(self, job: Job, threshold: Rank) -> float:
        """The end of a quantum; infinity for a job without a deadline."""
        if job.deadline == math.inf:
            return math.inf
        within = greatest_addend(job.deadline, number(threshold, self))
        return job.attained_at(table_of(job).next_above(job.age, within))


class SlackTable:
    """Minus the remaining demand by age.

    It rises as a job is served, and falls where the total demand is revised: where the age passes
    a sample, the quantile of those still possible is a larger one. A job of age
    `ends[i - 1] <= age < ends[i]` is taken to have the total demand `totals[i]`.
    """

    def __init__(self, distribution: Distribution, quantile: float | None, quantum: float) -> None:
        values, weights = distribution.values, distribution.weights
        if quantile is None:
            totals = values[-1:]
            ends = values[-1:]
        else:
            # The least atom by which a share `quantile` of those still there has finished.
            passed = np.append(0.0, np.cumsum(weights))
            alive = passed[-1] - passed[:-1]
            at = np.searchsorted(passed[1:], passed[:-1] + (quantile - 1e-12) * alive)
            totals, ends = values[np.maximum(at, np.arange(values.size))], values
        self._quantum = quantum
        self._largest = float(values[-1])
        self._ends: list[float] = ends.tolist()
        self._totals: list[float] = totals.tolist()

    def at(self, age: float) -> float:
        """Minus the remaining seconds at `age`, counted in whole quanta."""
        return self._after(whole_quanta(check_age(age), self._quantum))

    def next_above(self, age: float, threshold: float) -> float:
        """Least age, from `age` on, at which minus the remaining seconds exceed `threshold`."""
        count = whole_quanta(age, self._quantum)
        if self._after(count) > threshold:
            return age
        count += 1
        while (piece := bisect_right(self._ends, count * self._quantum)) < len(self._ends):
            total, end = self._totals[piece], self._ends[piece]
            while count * self._quantum < end and count * self._quantum - total <= threshold:
                reached = math.ceil((min(end, threshold + total)) / self._quantum) - 1
                count = max(count + 1, reached)
            if count * self._quantum < end:
                return count * self._quantum
        return math.inf  # beyond the samples it only falls

    def _after(self, quanta: int) -> float:
        age = quanta * self._quantum
        piece = bisect_right(self._ends, age)
        if piece == len(self._ends):
            return -float(beyond_samples(self._largest, age))
        return age - self._totals[piece]
