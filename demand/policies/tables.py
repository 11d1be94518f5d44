"""Access to the table a policy needs."""

from typing import Any

from demand.errors import DemandError
from demand.policies.base import Job


def table_of(job: Job) -> Any:
    """The table of `job`.

    Raises:
        DemandError: the job carries none.
    """
    if job.table is None:
        raise DemandError(
            f"job {job.index} of {job.application!r} has no table; give it "
            "table=policy.table(job.distribution), once per application"
        )
    return job.table
