"""The oracle."""

from dataclasses import dataclass
from typing import final

from demand.atoms import check_age
from demand.errors import DemandError
from demand.policies.base import Job, Policy


@final
@dataclass(frozen=True)
class Oracle(Policy):
    """Shortest remaining processing time with the true demands: optimal on one server, unreal."""

    def rank(self, job: Job, now: float) -> float:
        """True remaining seconds.

        Raises:
            DemandError: the true demand of the job is not known, or service that is negative or not
                finite.
        """
        remaining = job.demand - check_age(job.attained_service)
        if remaining != remaining:
            raise DemandError(
                f"the demand of job {job.index} is {job.demand}; an oracle serves only where true "
                "demands are known, as in a simulation"
            )
        return remaining
