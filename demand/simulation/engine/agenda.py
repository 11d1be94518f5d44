"""Actions that are to happen at a given second."""

import math
from collections.abc import Callable
from heapq import heappop, heappush
from typing import final

Action = Callable[[float], None]
"""Called with the second at which it happens."""


@final
class Agenda:
    """A queue of actions by their time; those of one time happen in the order they were added.

    Attributes:
        next: second of the next action, infinity if there is none.
        happened: actions that have happened.
    """

    def __init__(self) -> None:
        self._actions: list[tuple[float, int, Action]] = []
        self._added = 0
        self.next = math.inf
        self.happened = 0

    def add(self, second: float, action: Action) -> None:
        """Let `action` happen at `second`."""
        heappush(self._actions, (second, self._added, action))
        self.next = self._actions[0][0]
        self._added += 1

    def happen(self) -> None:
        """Let the next action happen."""
        second, _, action = heappop(self._actions)
        self.next = self._actions[0][0] if self._actions else math.inf
        self.happened += 1
        action(second)
