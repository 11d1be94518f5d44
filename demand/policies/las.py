"""Least attained service."""

from dataclasses import dataclass
from typing import final

from typing_extensions import override

from demand.arguments import positive_seconds
from demand.policies.base import Policy, Rank, number
from demand.policies.exact_thresholds import next_quantum_end, whole_quanta
from demand.policies.job import Job
from demand.seconds import check_age


@final
@dataclass(frozen=True)
class LAS(Policy):
    """Least attained service first (foreground-background), over whole applications.

    This is the program-level order of Autellix (PLAS, arXiv 2502.13965). It needs to know nothing,
    and is optimal on one server where hazard rates fall (Aalto, Ayesta and Righter 2009).

    Attained service is counted in whole quanta: of jobs in the same quantum the first to arrive is
    served through it. The textbook discipline is the limit of a quantum of 0, where equal jobs
    share the server; Autellix uses a few levels of growing quanta and promotes jobs that starve,
    for which there is `Aging`.

    Each end of a quantum can displace a job. Where an engine recomputes the KV of whom it displaces
    (vLLM with `make_scheduler`, `Engine(preemption="recompute")`) short quanta cost more than they
    gain: take a longer one, wrap it, `TimeSlice(LAS(20.0), 100.0)`, or let nobody be displaced
    (`preemption="none"`); docs/engine.md has the figures.

    Args:
        quantum: seconds of service.

    Raises:
        DemandError: a quantum that is not positive and finite.
    """

    quantum: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "quantum", positive_seconds("quantum", self.quantum))

    @override
    def rank(self, job: Job, now: float) -> float:
        """Attained service in seconds, counted in whole quanta.

        Raises:
            DemandError: service that is negative or not finite.
        """
        return whole_quanta(check_age(job.attained_service), self.quantum) * self.quantum

    @override
    def next_above(self, job: Job, threshold: Rank) -> float:
        """The first end of a quantum that exceeds the threshold."""
        return next_quantum_end(job.attained_service, self.quantum, number(threshold, self))
