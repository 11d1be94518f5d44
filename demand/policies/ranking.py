"""The rank of a job as schedulers ask for it."""

from demand.errors import DemandError
from demand.policies.base import Job, Policy, Rank


def rank_of(job: Job, policy: Policy, now: float) -> Rank:
    """Rank of `job` under `policy` at second `now`.

    Raises:
        DemandError: a rank of NaN, or a tuple that has one.
    """
    rank = policy.rank(job, now)
    if not isinstance(rank, tuple):
        if rank == rank:
            return rank
    else:
        for entry in rank:  # a generator would cost as much as the rank
            if entry != entry:
                break
        else:
            return rank
    raise DemandError(f"{policy!r} ranked job {job.index} NaN ({rank}); ranks must be ordered")
