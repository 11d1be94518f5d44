"""What a simulator learns of a job from the units it has finished."""

from demand.arguments import check_callable, check_instance
from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.policies.base import Policy
from demand.policies.job import Job
from demand.refine.base import Refine
from demand.units import Progress
from demand.workloads.workload import Workload

_EXPECTED = "a DemandEstimator(graphs, refinement), or any function of (application, Progress)"


def check_refine(refine: object, entries: Workload) -> None:
    """Raise `DemandError` unless `refine` can be asked about the jobs of `entries`, or is None."""
    if refine is None:
        return
    check_callable("refine", refine, _EXPECTED)
    if entries.runs is None:
        raise DemandError(
            "refine is asked at the end of every unit, and the workload has no runs; give "
            "Workload(runs=...), the executions of each job"
        )


def learn(job: Job, progress: Progress, refine: Refine, policy: Policy) -> None:
    """Let `job`, which is at `progress`, take in what `refine` says is left of it.

    Raises:
        DemandError: `refine` answers with something else than a distribution.
    """
    remaining = refine(job.application, progress)
    check_instance(
        f"what refine says of {job.application!r}", remaining, Distribution, "a Distribution"
    )
    job.learn(remaining, policy.table(remaining))
