"""The jobs that an engine or a server has on its hands, and the service each has attained."""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict, final

from demand.arguments import check_instance, instance_of, whole_number
from demand.distribution.distribution import Distribution
from demand.distribution.never_seen import known_of
from demand.errors import DemandError
from demand.integrations.learning import LearningLoop
from demand.policies.base import Policy, Rank, check_policy, rank_of
from demand.policies.job import Job
from demand.refine.estimator import DemandEstimator
from demand.refine.predictor import Predictor
from demand.seconds import check_seconds, one_number, one_of_seconds
from demand.units import CostModel, Execution


class JobDetails(TypedDict, total=False):
    """What may be said of a job when it is opened, apart from its application.

    Attributes:
        deadline_seconds: from its arrival, by when it should be finished; infinity, the default,
            for none.
        tenant: who pays for it; `None`, the default, makes the application the tenant.
        weight: share of its tenant relative to the other tenants; 1 by default.
        priority: class that a priority policy serves by, smaller first; 0 by default.
        demand_seconds: its true total demand, for an oracle; NaN, the default, if not known.
    """

    deadline_seconds: float
    tenant: str | None
    weight: float
    priority: int
    demand_seconds: float


@final
class JobLedger:
    """Keeps the jobs of an adapter as a policy wants to see them, and ranks them.

    Every adapter to an engine or a server goes through it: it opens a job when an application
    arrives, counts the service the job attains, tells the policy of both, and asks it for ranks.

    Wherever an argument is called `now`, it is a second on the clock of whoever owns the ledger.
    When that clock goes backwards, the time here stands still until it has caught up.

    Args:
        policy: ranks the jobs.
        distributions: what is known of the total demand, in seconds, by name of the application.
            Jobs of any other application are ranked by attained service, and a warning names the
            application once.
        seed: of the random number that each job draws on arrival (`Job.lottery`).
        estimator: says instead what is known of a job, at its arrival and at each of its calls, and
            learns from the jobs that end; `None` for none. An application that it has seen no run
            of is ranked by attained service, without a warning: it is about to learn.
        predictor: says what is left of a job as it submits a call; `None` for none.
        cost: seconds of service that a token stands for, as the adapter counts them; `None` for
            that of the estimator, or `CostModel()`.

    Raises:
        DemandError: a `policy` that is no policy, `distributions` that are no mapping to
            distributions, or a seed that is no whole number; distributions beside an estimator;
            and what `LearningLoop` refuses.

    Attributes:
        policy: as given.
        cost: seconds of service that a token stands for.
        loop: is told of the calls of the jobs.
    """

    def __init__(
        self,
        policy: Policy,
        distributions: Mapping[str, Distribution],
        seed: int = 0,
        *,
        estimator: DemandEstimator | None = None,
        predictor: Predictor | None = None,
        cost: CostModel | None = None,
    ) -> None:
        check_policy("policy", policy)
        if estimator is not None and distributions:
            raise DemandError(
                f"there are distributions of {sorted(distributions)} beside an estimator, which "
                "says what is known of every application; give one of them"
            )
        check_instance(
            "distributions",
            distributions,
            Mapping,
            'a mapping such as {"report": Distribution([40, 55, 300])}',
        )
        for name, known in distributions.items():
            _check_text("name of an application in distributions", name)
            _check_distribution(f"distribution of {name!r}", known)
        self.policy = policy
        self.cost = cost_of(cost, estimator)
        self._distributions = {**distributions}
        self._tables = {name: policy.table(known) for name, known in distributions.items()}
        self._lottery = random.Random(whole_number("seed", seed))
        self._state = policy.new_state()
        self.loop = LearningLoop(estimator, predictor, self.cost, self.expect)
        self._opened = 0
        self._now = -math.inf

    def open(
        self,
        application: str,
        now: float,
        *,
        deadline_seconds: float = math.inf,
        tenant: str | None = None,
        weight: float = 1.0,
        priority: int = 0,
        demand_seconds: float = math.nan,
    ) -> Job:
        """Open a job: one run of `application` arrives at second `now`.

        Args:
            application: its name.
            now: second of its arrival.
            deadline_seconds: this and the rest as in `JobDetails`.
            tenant: see there.
            weight: see there.
            priority: see there.
            demand_seconds: see there.

        Raises:
            DemandError: a value of the wrong type, a deadline that is not positive, a weight that
                is not positive and finite, a priority that is NaN, a negative demand, a clock that
                is not finite, or a job that the policy cannot rank, such as one of unknown demand
                under an oracle. A job that is refused leaves nothing behind.
        """
        _check_text("application of a job", application)
        _check_text("tenant of a job", application if tenant is None else tenant)
        deadline_seconds = one_of_seconds("deadline_seconds of a job", deadline_seconds)
        weight = one_number("weight of a job", weight)
        demand_seconds = one_of_seconds("demand_seconds of a job", demand_seconds)
        for name, value, good, expected in (
            ("deadline_seconds", deadline_seconds, deadline_seconds > 0.0, "a positive number"),
            ("weight", weight, 0.0 < weight < math.inf, "a positive finite number"),
            (
                "priority",
                priority,
                not math.isnan(one_number("priority of a job", priority)),
                "a number",
            ),
            ("demand_seconds", demand_seconds, not demand_seconds < 0.0, "seconds of at least 0"),
        ):
            if not good:
                raise DemandError(f"{name} of a job is {value!r}; expected {expected}")
        self._know(application)
        now = self._at(now)
        job = Job(
            self._opened,
            application,
            now,
            self._distributions[application],
            demand=demand_seconds,
            lottery=self._lottery.random(),
            table=self._tables[application],
            deadline=now + deadline_seconds,
            tenant=application if tenant is None else tenant,
            weight=weight,
            priority=priority,
        )
        job.state = self._state
        self.policy.arrived(job, now)
        try:
            self.rank(job, now)  # refused here, not in the middle of serving
        except Exception:
            self.policy.departed(job, now)
            raise
        self._opened += 1
        self.loop.opened(job)
        return job

    def _know(self, application: str) -> None:
        """Look up what is known of `application`, and make its table where that is new."""
        learned = self.loop.known(application)
        if learned is None:
            if application in self._tables:
                return
            learned = known_of(application, self._distributions)
        if learned is not self._distributions.get(application):
            self._distributions[application] = learned
            self._tables[application] = self.policy.table(learned)

    def rank(self, job: Job, now: float) -> Rank:
        """Rank of `job` at second `now`: the smallest is served first, ties by `job.index`.

        Raises:
            DemandError: a policy that gives no rank: NaN, or what is no number at all.
        """
        return rank_of(job, self.policy, self._at(now))

    def request(self, job: Job, now: float) -> None:
        """Note that `job` submits a request at second `now` (`Job.requested`)."""
        job.requested = self._at(now)

    def record(self, job: Job, execution: Execution, now: float) -> None:
        """Count the service of an execution elsewhere, such as that of a tool, and record it.

        Of one that went side by side with others, `Execution.after` says what it waited for, by
        the order in which the units of its run ended; `None`: for all that have by now.

        Raises:
            DemandError: what is no execution, of a unit that was of another kind before, or one
                that waited for a unit that is not over.
        """
        seconds = self.cost.seconds(execution)
        self.loop.check(job, execution)
        self.serve(job, seconds, now)
        self.loop.add(job, execution)

    def serve_elsewhere(self, job: Job, seconds: float, now: float) -> None:
        """Count `seconds` of service that `job` received elsewhere, in nobody knows what unit.

        Raises:
            DemandError: seconds that are no number, negative or not finite; an estimator, which
                would learn of runs that lack them.
        """
        if self.loop.learns:
            raise DemandError(
                "seconds of service without a unit cannot be learned from; with an estimator, give "
                'an execution to record: Execution(Unit("search", "tool"), seconds=2.0)'
            )
        self.serve(job, seconds, now)

    def start(self, job: Job) -> None:
        """Note that `job` is being served from here on. No effect if it is already."""
        if not job.running:
            job.running, job.started_at = True, job.attained_service

    def serve(self, job: Job, seconds: float, now: float) -> None:
        """Count `seconds` of service that `job` received up to second `now`.

        Raises:
            DemandError: seconds that are no number, negative or not finite.
        """
        seconds = check_seconds("service", seconds)
        if seconds:
            job.attained_service += seconds
            self.policy.served(job, seconds, self._at(now))

    def stop(self, job: Job) -> None:
        """Note that `job` is no longer being served."""
        job.running = False

    def expect(self, job: Job, remaining: Distribution) -> None:
        """Take in the distribution of the seconds that `job` still needs, as its progress tells it.

        Raises:
            DemandError: something that is no distribution.
        """
        _check_distribution("remaining", remaining)
        job.expect(remaining, self.policy.table(remaining))

    def close(self, job: Job, now: float, whole: bool = True) -> None:
        """Let `job` depart at second `now`: its application is over.

        Args:
            job: to depart.
            now: second on the clock.
            whole: whether it came to its end by itself, so that its run may be learned from.
        """
        self.stop(job)
        self.policy.departed(job, self._at(now))
        self.loop.closed(job, whole)

    def _at(self, now: float) -> float:
        if not math.isfinite(now):
            raise DemandError(f"the clock says {now}; expected finite seconds")
        self._now = max(self._now, now)
        return self._now


def cost_of(cost: CostModel | None, estimator: DemandEstimator | None) -> CostModel:
    """The cost model of an adapter: as given, or that of the estimator, or the default.

    Raises:
        DemandError: what is no cost model.
    """
    if cost is None:
        return estimator.cost if isinstance(estimator, DemandEstimator) else CostModel()
    return instance_of("cost", cost, CostModel)


def _check_text(name: str, value: object) -> None:
    check_instance(name, value, str, "a string")


def _check_distribution(name: str, value: object) -> None:
    check_instance(name, value, Distribution, "a distribution of seconds, Distribution([40, 55])")


@final
@dataclass(slots=True)
class TokenMeter:
    """Turns the token counts of one call into seconds of service, each token once.

    When a call starts over, because it is retried or recomputed after a preemption, it attains
    nothing until it has got further than ever before: what was lost is work for the engine, but no
    progress of the job.

    Args:
        cost: seconds of service that a token stands for.
        seconds: service counted so far.
    """

    cost: CostModel
    seconds: float = 0.0

    def gained(self, input_tokens: int, output_tokens: int) -> float:
        """Seconds of service since the last call, now that this many tokens are done in all.

        Args:
            input_tokens: tokens of the prompt that were read.
            output_tokens: tokens that were generated.
        """
        total = (
            input_tokens * self.cost.prefill_seconds_per_token
            + output_tokens * self.cost.decode_seconds_per_token
        )
        gained = max(total - self.seconds, 0.0)
        self.seconds += gained
        return gained
