"""Who gives way: the decision that schedulers inside an engine add to the order."""

from collections.abc import Sequence

from demand.policies.base import Rank

Key = tuple[Rank, int]
"""Rank, then place in order of arrival; smaller goes first."""


def displaced(running: Sequence[Key], waiting: Sequence[Key], slots: int) -> list[int]:
    """Positions in `running` of those that give way to `waiting`, the worst first.

    After it the `slots` places go to the smallest ranks of all, except that a runner keeps its
    place against a waiting one of equal rank, earlier or not: giving way costs the engine work,
    and two of equal rank would only take turns. Waiting ones fill free places first, the smallest
    key first. Each runner displaced makes room for exactly one that waits.

    Args:
        running: those being served, in any order.
        waiting: those that could be served at once.
        slots: how many can be served; where more are running, nobody is displaced for the excess.
    """
    free = max(slots - len(running), 0)
    best_waiting = sorted(waiting)[free:]
    worst_running = sorted(range(len(running)), key=lambda i: running[i], reverse=True)
    victims = []
    for position, key in zip(worst_running, best_waiting, strict=False):
        if not key[0] < running[position][0]:  # type: ignore[operator]  # ranks are of one form
            break
        victims.append(position)
    return victims
