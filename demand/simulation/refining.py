"""What a simulator learns of a job from the units it has finished."""

from collections.abc import Sequence

from demand.arguments import check_callable, check_instance, instance_of
from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.policies.base import Policy
from demand.policies.job import Job
from demand.refine.base import Estimator
from demand.refine.predictor import PendingCall, Predictor
from demand.stages import stage_ahead
from demand.units import CostModel, Execution, Progress
from demand.workloads.workload import Workload

_EXPECTED = "a DemandEstimator(graphs, refinement), or any function of (application, Progress)"


def check_estimator(estimator: object, entries: Workload) -> None:
    """Raise `DemandError` unless `estimator` can be asked about jobs of `entries`, or is None."""
    if estimator is None:
        return
    check_callable("estimator", estimator, _EXPECTED)
    if entries.runs is None:
        raise DemandError(
            "the estimator is asked at the end of every unit, and the workload has no runs; give "
            "Workload(runs=...), the executions of each job"
        )


def check_predictor(predictor: object, entries: Workload) -> None:
    """Raise `DemandError` unless `predictor` can be asked about calls of `entries`, or is None."""
    if predictor is None:
        return
    expected = "an object with a method predict(call), such as a DemandEstimator"
    check_instance("predictor", predictor, Predictor, expected)
    if entries.runs is None:
        raise DemandError(
            "the predictor is asked before every call, and the workload has no runs; give "
            "Workload(runs=...), the executions of each job"
        )


def ask_estimator(job: Job, progress: Progress, estimator: Estimator, policy: Policy) -> None:
    """Let `job`, which is at `progress`, take in what `estimator` says is left of it.

    Raises:
        DemandError: `estimator` answers with something else than a distribution.
    """
    _take_in(job, estimator(job.application, progress), "the estimator", policy)


def ask_predictor(
    job: Job,
    run: Sequence[Execution],
    finished: int,
    predictor: Predictor,
    policy: Policy,
    cost: CostModel,
) -> None:
    """Let `job` take in what `predictor` says at the call that follows `finished` units.

    Nothing is asked where what follows is no call to a model, where others than calls go side by
    side with it, or where something is over that did. The prompt is not known, only its length.

    Raises:
        DemandError: `predictor` answers with something else than a distribution.
    """
    ahead = stage_ahead(run, finished, cost)
    if ahead is not None and ahead.unit.kind == "llm":
        call = PendingCall.of_run(job.application, run, finished, cost=cost)
        _take_in(job, predictor.predict(call), "the predictor", policy)


def _take_in(job: Job, remaining: object, who: str, policy: Policy) -> None:
    name = f"what {who} says of {job.application!r}"
    known = instance_of(name, remaining, Distribution)
    job.expect(known, policy.table(known))
