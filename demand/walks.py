"""Random walks over a demand graph, all walkers in lockstep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from demand.atoms import Floats, beyond_samples
from demand.errors import DemandError

Ints = NDArray[np.int64]
Sample = tuple[float, str]
"""Seconds of one execution, and the name of what followed it."""


@dataclass(frozen=True, eq=False)
class WalkArrays:
    """The samples of a graph laid end to end.

    Node 0 is the end, node 1 the start (whose samples take no time), then the units in order.
    Samples of node u are `seconds[offsets[u]:offsets[u + 1]]`, followed by node `successors[...]`.
    """

    nodes: Mapping[str, int]
    offsets: Ints
    seconds: Floats
    successors: Ints

    @classmethod
    def of(cls, samples: Mapping[str, Sequence[Sample]], start: str, end: str) -> "WalkArrays":
        """Lay out `samples` by node name; `start` is among the names, `end` has no samples."""
        names = [end, start, *(name for name in samples if name != start)]
        nodes = {name: number for number, name in enumerate(names)}
        laid = [samples[name] if name != end else () for name in names]
        return cls(
            nodes,
            np.cumsum([0, *map(len, laid)]),
            np.array([seconds for node in laid for seconds, _ in node], dtype=np.float64),
            np.array([nodes[after] for node in laid for _, after in node], dtype=np.int64),
        )

    def without_exit(self) -> list[str]:
        """Names of the nodes from which the end is not reached by any path."""
        source = np.repeat(np.arange(len(self.nodes)), np.diff(self.offsets))
        reached = np.zeros(len(self.nodes), dtype=bool)
        reached[0] = True
        for _ in self.nodes:
            reached[source[reached[self.successors]]] = True
        return [name for name, node in self.nodes.items() if not reached[node]]

    def unfinished(self, node: int, attained_seconds: float) -> tuple[Floats, Ints]:
        """Samples (seconds left, successor) of a node that has run for `attained_seconds`.

        Those longer than what was attained, less that; when none is longer, all of them, with
        the seconds left by the doubling rule.
        """
        seconds, successors = self._own(node)
        if attained_seconds == 0.0:
            return seconds, successors
        longer = seconds > attained_seconds
        if longer.any():
            return seconds[longer] - attained_seconds, successors[longer]
        left = beyond_samples(seconds.max(), attained_seconds)
        return np.full_like(seconds, left), successors

    def finished(self, node: int) -> tuple[Floats, Ints]:
        """Samples (0 seconds left, successor) of a node that has just finished."""
        seconds, successors = self._own(node)
        return np.zeros_like(seconds), successors

    def walk(
        self, first: tuple[Floats, Ints], rng: np.random.Generator, walks: int, steps: int
    ) -> Floats:
        """Seconds to the end, `[walks]`, when the first draw is among the samples `first`.

        Each later step draws one joint sample (seconds, successor) of the walker's node.

        Raises:
            DemandError: a walk is not over after `steps` more units.
        """
        seconds, successors = first
        drawn = rng.integers(seconds.size, size=walks)
        total, at = seconds[drawn], successors[drawn]
        sizes = np.diff(self.offsets)
        walking = np.flatnonzero(at)
        for _ in range(steps):
            if not walking.size:
                break
            here = at[walking]
            drawn = self.offsets[here] + rng.integers(sizes[here])
            total[walking] += self.seconds[drawn]
            at[walking] = self.successors[drawn]
            walking = walking[at[walking] != 0]
        if walking.size:
            raise DemandError(
                f"{walking.size} of {walks} walks are not over after {steps} units; "
                "raise max_units, or check that the loops of the runs do end"
            )
        return total

    def _own(self, node: int) -> tuple[Floats, Ints]:
        own = slice(self.offsets[node], self.offsets[node + 1])
        return self.seconds[own], self.successors[own]
