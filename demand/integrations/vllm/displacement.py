"""Which running requests are preempted so that better ones that wait can be served."""

from collections.abc import Sequence

from demand.policies.base import Rank

Key = tuple[Rank, int]
"""What requests are sorted by, smallest first: rank of the run, then its number by arrival."""


def displaced(running: Sequence[Key], waiting: Sequence[Key], slots: int) -> list[int]:
    """Indices into `running` of the requests to preempt for some of `waiting`, largest key first.

    Requests that wait take free slots first, smallest key first. For each that is left over, the
    running request of largest key is preempted, if its rank is strictly larger. At equal rank the
    running one stays: preempting costs a prefill, and two of equal rank would only take turns.
    Afterwards the requests of smallest rank hold the slots.

    Args:
        running: keys of the requests being served; of one key the later in this order goes first.
        waiting: keys of those that could be served at once, in any order.
        slots: how many requests can be served at a time. Where more are running already, none is
            preempted for that reason.
    """
    free = max(slots - len(running), 0)
    best_waiting = sorted(waiting)[free:]
    worst_running = sorted(range(len(running)), key=lambda i: (running[i], i), reverse=True)
    victims = []
    for position, key in zip(worst_running, best_waiting, strict=False):
        if not key[0] < running[position][0]:  # type: ignore[operator]  # ranks are of one form
            break
        victims.append(position)
    return victims
