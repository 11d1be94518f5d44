"""Access to the rank table a policy needs."""

from demand.errors import DemandError
from demand.policies.base import Job
from demand.rank_table import RankTable


def table_of(job: Job) -> RankTable:
    """The table of `job`.

    Raises:
        DemandError: the job carries none.
    """
    if job.table is None:
        raise DemandError(
            f"job {job.index} of {job.application!r} has no rank table; give it "
            "table=policy.table(job.distribution), once per application"
        )
    return job.table
