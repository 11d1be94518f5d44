"""The last of the running jobs in the order of service, found with few of them ranked."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any, Generic, Protocol, TypeVar, final

from demand.policies.base import Rank
from demand.policies.exact_thresholds import half_way, just_below


class Bounded(Protocol):
    """A running job of which a simulator keeps a bound.

    Its place is where it stands in the order of service: a tuple that ends with its rank and its
    order of arrival. The smaller place is served first.

    Attributes:
        place: where it stood when it was last ranked.
        exact: whether it stands there still, `bound` being that very place.
        bound: the worst place it can have come to; `None` where that is not known.
    """

    place: Any
    exact: bool
    bound: Any


J = TypeVar("J", bound=Bounded)


@final
class BoundedRanks(Generic[J]):
    """Finds the running job that goes last, and ranks only those that it may be.

    Whenever a job wants what others have (a server, room in the batch), the last of those must be
    found, and their ranks move as they are served. To rank all of them each time would cost more
    than all the rest of a simulation. So a bound is kept of each running job: half-way between its
    own place and that of the best job waiting (`threshold`), with the attained service up to which
    it stays within (`Policy.next_above`). A job whose bound goes before the one that wants to be
    served is not ranked. Half-way leaves room on both sides: the bound need not be found anew each
    time that another job is the best one waiting.

    Bounds hold where serving one job leaves the ranks of the others alone: not under a policy that
    `reranks`.

    Args:
        rank: ranks a job as of a second; sets `place`, `bound` to the same, and `exact`.
    """

    def __init__(self, rank: Callable[[J, float], object]) -> None:
        self._rank = rank

    def last_after(self, candidates: list[J], place: Any, now: float) -> J | None:
        """The one of `candidates` that goes last, if it goes after `place`; else `None`.

        Args:
            candidates: the running jobs that may go after `place`, by their bounds; reordered.
            place: of the job that wants to be served.
            now: second as of which jobs are ranked.
        """
        for job in candidates:
            if job.bound is None:
                self._rank(job, now)
        if len(candidates) > 1:
            candidates.sort(key=_bound, reverse=True)
        last = None
        for job in candidates:
            if last is not None and job.bound < place:
                break  # and so are all that follow
            if not job.exact:
                self._rank(job, now)
            if job.place > place:
                last, place = job, job.place
        return last


def threshold(rank: Rank, index: int, best: Rank, best_index: int, halfway: bool) -> Rank:
    """The greatest rank at which a running job still goes before the best job waiting.

    Args:
        rank: of the running job, no greater than `best`.
        index: its order of arrival: at equal rank the earlier goes first.
        best: rank of the best job waiting.
        best_index: its order of arrival.
        halfway: whether to give the rank half-way between the two instead.
    """
    highest = half_way(rank, best) if halfway else best
    return just_below(highest) if index > best_index and highest == best else highest


_bound = attrgetter("bound")
