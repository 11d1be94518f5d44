"""The loop that learns: runs are recorded as they go, refined at each call, observed at the end."""

from collections.abc import Callable, Hashable, Sequence
from typing import final

from demand.arguments import check_instance, instances_of
from demand.dependencies import After
from demand.distribution.distribution import Distribution
from demand.errors import DemandError
from demand.integrations.open_units import OpenUnits
from demand.integrations.plans import Planned
from demand.integrations.run_record import RunRecord
from demand.policies.job import Job
from demand.refine.estimator import DemandEstimator
from demand.refine.predictor import PendingCall, Predictor
from demand.units import CostModel, Execution, Unit

CALL = "call"
"""Name of the unit of calls that name none."""


@final
class LearningLoop:
    """Lets an estimator learn from the jobs of an adapter, and the jobs from the estimator.

    The estimator says what is known of a job as it arrives, and what is left of it at the end of
    each of its calls; a job that came to its end by itself is observed as a finished run. One that
    was closed with a call in progress, or whose last call failed or was cancelled, is not: its last
    unit would count as one after which runs end. A predictor is asked as a call is submitted, where
    no other call of the job is in progress.

    Args:
        estimator: learns, and says what is left; `None` for a predictor alone.
        predictor: says what is left from a call before its first token; `None` for none. Without
            either, nothing is recorded.
        cost: seconds of service that a token stands for.
        learn: lets a job take in what is left of it.

    Raises:
        DemandError: what is no estimator or no predictor; an estimator that counts the critical
            path, whose cost model is another, or with a graph of given probabilities.
    """

    def __init__(
        self,
        estimator: DemandEstimator | None,
        predictor: Predictor | None,
        cost: CostModel,
        learn: Callable[[Job, Distribution], None],
    ) -> None:
        if estimator is not None:
            check_estimator(estimator, cost)
        if predictor is not None:
            expected = "an object with a method predict(call), or None"
            check_instance("predictor", predictor, Predictor, expected)
        self._estimator = estimator
        self._predictor = predictor
        self._cost = cost
        self._learn = learn
        self._records: dict[int, RunRecord] = {}
        self._units = OpenUnits()

    @property
    def active(self) -> bool:
        """Whether there is anybody to tell, and jobs may learn of their rest."""
        return self._estimator is not None or self._predictor is not None

    @property
    def learns(self) -> bool:
        """Whether there is an estimator."""
        return self._estimator is not None

    def known(self, application: str) -> Distribution | None:
        """What is known of a job of `application` on arrival; `None` without an estimator."""
        return None if self._estimator is None else self._estimator(application)

    def opened(self, job: Job) -> None:
        """Note that `job` has arrived."""
        if self.active:
            self._records[job.index] = RunRecord(self._cost)

    def begin(
        self,
        job: Job,
        call: Hashable,
        unit: str,
        input_tokens: int | None = None,
        prompt: str | Sequence[int] | None = None,
    ) -> None:
        """Ask the predictor about `call`, then note that `job` submits it.

        A call that is refused, or about which the predictor fails, leaves nothing behind.

        Args:
            job: whose call it is.
            call: what tells it from the others of the job.
            unit: name of its unit, which is of kind "llm".
            input_tokens: of its prompt; `None` if nobody has counted them.
            prompt: text or ids of tokens, for a predictor that reads it.

        Raises:
            DemandError: a name that is no unit's, a unit that was of another kind before, in
                this run or in others, or a predictor that gives no distribution.
        """
        self.foresee(job, unit, input_tokens, prompt)
        self.enter(job, call, unit)

    def foresee(
        self,
        job: Job,
        unit: str,
        input_tokens: int | None = None,
        prompt: str | Sequence[int] | None = None,
    ) -> None:
        """Let `job` learn what the predictor says of a call that it is about to submit.

        Nothing is asked without a predictor, or while another call of the job is in progress.

        Args:
            job: this and the rest as in `begin`.
            unit: see there.
            input_tokens: see there.
            prompt: see there.

        Raises:
            DemandError: as `begin`.
        """
        made_of = Unit(unit, "llm")
        if self._predictor is None or (record := self._records[job.index]).busy:
            return
        self.check_unit(job.application, made_of)
        ahead = PendingCall(job.application, made_of, input_tokens, 1, record.progress(), prompt)
        self._take_in(job, self._predictor.predict(ahead), "predictor")

    def enter(self, job: Job, call: Hashable, unit: str) -> None:
        """Note that `job` submits `call`, of which nobody predicts anything more.

        Raises:
            DemandError: a name that is no unit's or has " + " in it beside others, or a unit that
                was of another kind before.
        """
        made_of = Unit(unit, "llm")
        if self.active:
            self.check_unit(job.application, made_of)
            self._records[job.index].check_name(made_of)
            self._hold(job, made_of)
            self._records[job.index].begin(call, made_of)

    def count(
        self,
        job: Job,
        call: Hashable,
        input_tokens: int,
        output_tokens: int,
        sequence: Hashable = None,
    ) -> None:
        """Note how many tokens `call` has read and generated so far, or one of its sequences."""
        if job.index in self._records:  # else its run was closed before its calls had ended
            self._records[job.index].count(call, input_tokens, output_tokens, sequence)

    def end(self, job: Job, call: Hashable, finished: bool) -> None:
        """Note that `call` is over, and let the job learn what is left of it."""
        if job.index in self._records:
            self._records[job.index].end(call, finished)
            self._refine(job)

    def add(self, job: Job, execution: Execution) -> None:
        """Note what `job` executed elsewhere, and let it learn what is left of it."""
        if job.index in self._records:
            self._hold(job, execution.unit)
            self._records[job.index].add(execution)
            self._refine(job)

    def check(self, job: Job, execution: Execution) -> None:
        """Refuse what `job` executed elsewhere if it could not be recorded.

        Raises:
            DemandError: as `check_unit`, or it waited for a unit that is not over.
        """
        self.check_unit(job.application, execution.unit)
        if job.index in self._records:
            self._records[job.index].check(execution)

    def over(self, job: Job) -> After:
        """What of the run of `job` a unit that begins now waited for, as `Execution.after`.

        Of those that are over, the ones for which no other has waited; `None` if nobody records.
        """
        return self._records[job.index].over if job.index in self._records else None

    def check_plan(self, plan: Sequence[Planned]) -> tuple[Planned, ...]:
        """`plan`, refused if it tells what is left of a job where an estimator does that.

        Raises:
            DemandError: it does, or it is no list of units of a plan.
        """
        planned = instances_of("the plan", plan, Planned)
        if self.learns and any(one.seconds is not None for one in planned):
            raise DemandError(
                "the plan says the seconds of its units beside an estimator, which says at the end "
                "of each what is left; give seconds to none of them"
            )
        return planned

    def check_unit(self, application: str, unit: Unit) -> None:
        """Refuse a unit of another kind than its name has in a run of `application`.

        The run is one that is open, or that was learned from.

        Raises:
            DemandError: it is; the graph could not observe such a run.
        """
        if self._estimator is None:
            return
        if application in self._estimator.graphs:
            self._estimator.graphs[application].check_unit(unit)
        self._units.check(application, unit)

    def closed(self, job: Job, whole: bool) -> None:
        """Forget `job`, and observe its run if it is whole."""
        record = self._records.pop(job.index, None)
        self._units.release(job.index)
        if whole and record is not None and record.whole and self._estimator is not None:
            self._estimator.observe(job.application, record.executed)

    def _hold(self, job: Job, unit: Unit) -> None:
        if self._estimator is not None:
            self._units.hold(job.index, job.application, unit)

    def _refine(self, job: Job) -> None:
        if self._estimator is not None:
            progress = self._records[job.index].progress()
            self._take_in(job, self._estimator(job.application, progress), "estimator")

    def _take_in(self, job: Job, told: object, who: str) -> None:
        expected = "a Distribution of seconds"
        check_instance(f"what the {who} says of {job.application!r}", told, Distribution, expected)
        assert isinstance(told, Distribution)
        self._learn(job, told)


def check_estimator(estimator: object, cost: CostModel) -> None:
    """Raise `DemandError` unless `estimator` can learn from an adapter that counts by `cost`."""
    check_instance(
        "estimator", estimator, DemandEstimator, "a DemandEstimator(graphs, refinement), or None"
    )
    assert isinstance(estimator, DemandEstimator)
    if estimator.parallel_calls != "sum":
        raise DemandError(
            f"the estimator counts parallel calls by their {estimator.parallel_calls}, and service "
            "here is summed over them; make it with parallel_calls='sum'"
        )
    costs = {"the estimator": estimator.cost} | {
        f"its graph of {name!r}": graph.cost for name, graph in estimator.graphs.items()
    }
    for whose, given in costs.items():
        if given != cost:
            raise DemandError(
                f"{whose} costs by {given} and service is counted by {cost}; attained service and "
                "demand must be the same seconds: give both one cost model"
            )
    for name, graph in estimator.graphs.items():
        if not graph.learns:  # said here, and not as the first of its runs ends inside an engine
            raise DemandError(
                f"the estimator's graph of {name!r} was given its probabilities and does not "
                "learn; fit one to draw_runs of it: PDGraph.fit(graph.draw_runs(1000), "
                "cost=graph.cost)"
            )
