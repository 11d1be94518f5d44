"""The jobs in an engine's hands, kept as a policy wants to see them."""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import final

from demand.distribution.distribution import Distribution
from demand.distribution.never_seen import known_of
from demand.errors import DemandError
from demand.policies.base import Job, Policy, Rank, rank_of
from demand.policies.wrapper import check_policy
from demand.units import CostModel


@final
class Ledger:
    """Opens jobs, counts their service, tells the policy, and ranks.

    `now` is seconds on the owner's clock. A clock that goes backwards stands still here.

    Args:
        policy: ranks the jobs.
        distributions: what is known of the total demand, in seconds, by application name. A job
            of another application is ranked by attained service, and a warning names it once
            (`demand.known_of`).
        seed: of the number each job draws (`Job.lottery`).

    Raises:
        DemandError: something that is no policy.
    """

    def __init__(
        self, policy: Policy, distributions: Mapping[str, Distribution], seed: int = 0
    ) -> None:
        check_policy("policy", policy)
        self.policy = policy
        self._distributions = {**distributions}
        self._tables = {name: policy.table(known) for name, known in distributions.items()}
        self._lottery = random.Random(seed)
        self._state = policy.new_state()
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
        """A new job of `application`.

        Args:
            application: its name.
            now: second of its arrival.
            deadline_seconds: from `now`, by when it should be finished; infinity for none.
            tenant: who pays; `None` makes the application the tenant.
            weight: share of the tenant.
            priority: class that a priority policy serves by, smaller first.
            demand_seconds: true total demand, for an oracle.

        Raises:
            DemandError: a value of the wrong type, a deadline that is not positive, a weight that
                is not positive and finite, a priority that is NaN, a negative demand, or a job
                that the policy cannot rank, such as one of unknown demand under an oracle.
        """
        _check_text("application", application)
        _check_text("tenant", application if tenant is None else tenant)
        for name, value, allowed, expected in (
            ("deadline_seconds", deadline_seconds, lambda x: x > 0.0, "a positive number"),
            ("weight", weight, lambda x: 0.0 < x < math.inf, "a positive finite number"),
            ("priority", priority, lambda x: not math.isnan(x), "a number"),
            ("demand_seconds", demand_seconds, lambda x: not x < 0.0, "a number from 0 on, or NaN"),
        ):
            if not isinstance(value, Real) or not allowed(value):
                raise DemandError(f"{name} of a job is {value!r}; expected {expected}")
        if application not in self._tables:
            known = known_of(application, self._distributions)
            self._distributions[application] = known
            self._tables[application] = self.policy.table(known)
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
        return job

    def rank(self, job: Job, now: float) -> Rank:
        """Rank of `job`; smaller goes first, ties to the smaller `job.index`.

        Raises:
            DemandError: the policy ranks it NaN.
        """
        return rank_of(job, self.policy, self._at(now))

    def request(self, job: Job, now: float) -> None:
        """`job` submits its next request."""
        job.requested = self._at(now)

    def start(self, job: Job) -> None:
        """`job` is being served from here on."""
        if not job.running:
            job.running, job.started_at = True, job.attained_service

    def serve(self, job: Job, seconds: float, now: float) -> None:
        """Count `seconds` of service that `job` received up to `now`.

        Raises:
            DemandError: seconds that are negative or not finite.
        """
        if not 0.0 <= seconds < math.inf:
            raise DemandError(f"service is {seconds} seconds; expected a finite number from 0 on")
        if seconds:
            job.attained_service += seconds
            self.policy.served(job, seconds, self._at(now))

    def stop(self, job: Job) -> None:
        """`job` is no longer being served."""
        job.running = False

    def learn(self, job: Job, remaining: Distribution) -> None:
        """Take in what the progress of `job` says of its demand from here on."""
        job.learn(remaining, self.policy.table(remaining))

    def close(self, job: Job, now: float) -> None:
        """`job` is over."""
        self.stop(job)
        self.policy.departed(job, self._at(now))

    def _at(self, now: float) -> float:
        if not math.isfinite(now):
            raise DemandError(f"the clock says {now}; expected finite seconds")
        self._now = max(self._now, now)
        return self._now


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise DemandError(f"{name} of a job is {value!r}; expected a string")


@final
@dataclass(slots=True)
class TokenMeter:
    """Turns the token counts of one call into service, each token once.

    A call that starts over (a retry, a recomputation after preemption) attains nothing until it
    is further than it ever was: what was lost is work of the engine, not progress of the job.
    """

    cost: CostModel
    seconds: float = 0.0

    def gained(self, input_tokens: int, output_tokens: int) -> float:
        """Seconds gained now that this many tokens were read and generated."""
        total = (
            input_tokens * self.cost.prefill_seconds_per_token
            + output_tokens * self.cost.decode_seconds_per_token
        )
        gained = max(total - self.seconds, 0.0)
        self.seconds += gained
        return gained
