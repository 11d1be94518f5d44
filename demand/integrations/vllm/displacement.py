"""Who gives way: the decision that schedulers inside an engine add to the order."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar


class Comparable(Protocol):
    """Anything that sorts."""

    def __lt__(self, other: Any, /) -> bool: ...


Key = TypeVar("Key", bound=Comparable)


def displaced(running: Sequence[Key], waiting: Sequence[Key], slots: int) -> list[int]:
    """Positions in `running` of those that give way to `waiting`, the worst first.

    After it, the `slots` places go to the smallest keys of all, except that a runner keeps its
    place against a waiting one of equal key: only one strictly smaller displaces it, so two equal
    ones never take turns. Waiting ones fill free places first, the smallest first. Each runner
    displaced makes room for exactly one that waits.

    Args:
        running: keys of those being served, in any order; smaller is better.
        waiting: keys of those that could be served at once.
        slots: how many can be served; where more are running, nobody is displaced for the excess.
    """
    free = max(slots - len(running), 0)
    best_waiting = sorted(waiting)[free:]
    worst_running = sorted(range(len(running)), key=lambda i: running[i], reverse=True)
    victims = []
    for position, key in zip(worst_running, best_waiting, strict=False):
        if not key < running[position]:
            break
        victims.append(position)
    return victims
