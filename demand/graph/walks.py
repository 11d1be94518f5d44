"""Random walks over a demand graph, a thousand at a time.

Every walk is advanced by one unit at each step, so that numpy draws for all of them at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from demand.arguments import instance_of
from demand.distribution.atoms import beyond_samples
from demand.errors import DemandError
from demand.flow import visits, without_end
from demand.graph.run_columns import Ints, RunColumns, decayed
from demand.seconds import Floats
from demand.units import END, START, ParallelCalls, Progress

MAX_UNITS = 10_000
"""Executions after which a walk is given up, unless said otherwise."""


class Draws(NamedTuple):
    """Samples that the first step of a random walk is drawn from.

    Attributes:
        seconds: `[n]` left of the unit that the walk starts in.
        successors: `[n]` number of the node that follows.
        weights: `[n]` of sum 1, or `None` for equal ones.
    """

    seconds: Floats
    successors: Ints
    weights: Floats | None

    def draw(self, rng: np.random.Generator, walks: int) -> tuple[Floats, Ints]:
        """Draw for `walks` walks: seconds left `[walks]`, and the nodes that follow `[walks]`."""
        n = self.seconds.size
        if self.weights is None:
            drawn = rng.integers(n, size=walks)
        else:
            drawn = rng.choice(n, size=walks, p=self.weights)
        return self.seconds[drawn], self.successors[drawn]


@dataclass(frozen=True, eq=False)
class WalkArrays:
    """The samples of a graph as arrays, those of each node next to each other.

    Node 0 is the end, node 1 the start (whose samples take no time), then the units in order.
    Samples of node u are `seconds[offsets[u]:offsets[u + 1]]`, followed by node `successors[...]`
    and drawn by `weights[...]`, of sum 1 over a node; `None` weighs all samples alike.
    """

    nodes: Mapping[str, int]
    offsets: Ints
    seconds: Floats
    successors: Ints
    weights: Floats | None = None

    @cached_property
    def sizes(self) -> Ints:
        """`[nodes]` samples of each node."""
        return np.diff(self.offsets)

    @cached_property
    def cumulative(self) -> Floats:
        """`[n + 1]` running sum of the weights, from which samples are drawn by bisection."""
        assert self.weights is not None
        return np.append(0.0, np.cumsum(self.weights))

    @classmethod
    def of(
        cls,
        units: Mapping[str, object],
        node: ArrayLike,
        seconds: ArrayLike,
        successors: ArrayLike,
        weights: ArrayLike | None = None,
    ) -> "WalkArrays":
        """The arrays of `[n]` samples in any order of nodes; those of a node keep their order.

        Args:
            units: the names, in the order in which nodes are numbered from 2 on.
            node: `[n]` number of the node of each sample.
            seconds: `[n]` that it takes.
            successors: `[n]` number of the node that follows it.
            weights: `[n]` relative to the other samples of its node; `None` for all alike.
        """
        nodes = {name: number for number, name in enumerate([END, START, *units])}
        node = np.asarray(node, dtype=np.int64)
        order = np.argsort(node, kind="stable")
        counts = np.bincount(node, minlength=len(nodes))
        shares = None
        if weights is not None:
            weights = np.asarray(weights, dtype=np.float64)
            shares = (weights / np.bincount(node, weights, len(nodes))[node])[order]
        return cls(
            nodes,
            np.cumsum([0, *counts]),
            np.asarray(seconds, dtype=np.float64)[order],
            np.asarray(successors, dtype=np.int64)[order],
            shares,
        )

    @classmethod
    def of_runs(
        cls, columns: RunColumns, parallel_calls: ParallelCalls, half_life_runs: float | None = None
    ) -> "WalkArrays":
        """Samples of the remembered runs, those of a run weighed by 2^(-age / half-life).

        The samples of node u are those of unit u - 2 in the order of `columns`.
        """
        node = np.concatenate([np.ones(columns.starts.size - 1, np.int64), columns.unit + 2])
        following = np.append(columns.unit[1:] + 2, 0)
        following[columns.starts[1:] - 1] = 0
        weights = None
        if half_life_runs is not None:
            age = np.concatenate([columns.ages, columns.ages[columns.run]])
            newest = np.full(node.max() + 1, age.max())
            np.minimum.at(newest, node, age)  # so that a unit seen long ago keeps its own order
            weights = decayed(age - newest[node], half_life_runs)
        return cls.of(
            {unit.name: unit for unit in columns.units},
            node,
            np.concatenate(
                [np.zeros(columns.starts.size - 1), columns.execution_seconds(parallel_calls)]
            ),
            np.concatenate([columns.unit[columns.starts[:-1]] + 2, following]),
            weights,
        )

    def without_end(self) -> list[str]:
        """Names of the nodes from which the end is not reached by any path."""
        names = list(self.nodes)
        source = np.repeat(np.arange(len(names)), np.diff(self.offsets))
        following: dict[str, list[str]] = {name: [] for name in names if name != END}
        for branch in np.unique(source * len(names) + self.successors).tolist():
            at, to = divmod(branch, len(names))
            following[names[at]].append(names[to])
        return without_end(following)

    def node(self, name: str) -> int:
        """Number of a node.

        Raises:
            DemandError: an unknown unit.
        """
        if name not in self.nodes or name == END:
            raise DemandError(
                f"unit {name!r} is not in the graph, which has {', '.join([*self.nodes][2:])}; "
                "observe a run that has it first"
            )
        return self.nodes[name]

    def branches(self, node: int) -> dict[str, float]:
        """Probability of each successor of a node, by name."""
        own = self.finished(node)
        counts = np.bincount(own.successors, own.weights, len(self.nodes))
        return {
            name: float(counts[at] / counts.sum()) for name, at in self.nodes.items() if counts[at]
        }

    def keeping(self, kept: Mapping[int, Ints]) -> "WalkArrays":
        """The same with, at each node in `kept`, only the samples at these positions in it."""
        parts = [
            self.offsets[u] + kept.get(u, np.arange(self.offsets[u + 1] - self.offsets[u]))
            for u in range(len(self.nodes))
        ]
        chosen = np.concatenate(parts)
        weights = None
        if self.weights is not None:
            sums = [self.weights[part].sum() for part in parts]
            weights = self.weights[chosen] / np.repeat(sums, [part.size for part in parts])
        return replace(
            self,
            offsets=np.cumsum([0, *(part.size for part in parts)]),
            seconds=self.seconds[chosen],
            successors=self.successors[chosen],
            weights=weights,
        )

    def first_draws(self, progress: Progress, parallel_calls: ParallelCalls) -> Draws:
        """What a walk draws its first step from, for an application that stands at `progress`.

        Raises:
            DemandError: an unknown unit, among those executed too.
        """
        at = START
        instance_of("progress", progress, Progress)
        for execution in progress.executed:
            at = execution.unit.name
            self.node(at)
        if progress.current is None:
            return self.finished(self.node(at))
        return self.unfinished(
            self.node(progress.current), progress.current_seconds(parallel_calls)
        )

    def unfinished(self, node: int, received_seconds: float) -> Draws:
        """Samples (seconds left, successor) of a unit that has received some service already.

        Those that took longer, less what was received; when none took longer, all of them, with
        the seconds left that the doubling rule assumes (`beyond_samples`).
        """
        seconds, successors, weights = own = self._own(node)
        if received_seconds == 0.0:
            return own
        longer = seconds > received_seconds
        if not longer.any():
            left = beyond_samples(seconds.max(), received_seconds)
            return Draws(np.full_like(seconds, left), successors, weights)
        if weights is not None:
            weights = weights[longer] / weights[longer].sum()
        return Draws(seconds[longer] - received_seconds, successors[longer], weights)

    def finished(self, node: int) -> Draws:
        """Samples (0 seconds left, successor) of a unit that has just finished."""
        own = self._own(node)
        return own._replace(seconds=np.zeros_like(own.seconds))

    def walk(self, first: Draws, rng: np.random.Generator, walks: int, steps: int) -> Floats:
        """Seconds to the end, `[walks]`: the first step drawn from `first`, the others by node.

        Each later step draws one joint sample (seconds, successor) of the node a walk has come to.

        Raises:
            DemandError: a walk is not over after `steps` more units.
        """
        total, at = first.draw(rng, walks)
        walking = np.flatnonzero(at)
        here = at[walking]
        for _ in range(steps):
            if not walking.size:
                break
            drawn = self._draw(here, rng)
            total[walking] += self.seconds[drawn]
            here = self.successors[drawn]
            if not here.all():
                going = here != 0
                walking, here = walking[going], here[going]
        check_over(walking, walks, steps)
        return total

    def path(self, rng: np.random.Generator, steps: int) -> list[tuple[int, int]]:
        """Nodes of one walk from the start to the end, and which of its samples each drew.

        Raises:
            DemandError: it is not over after `steps` units.
        """
        path: list[tuple[int, int]] = []

        def following(node: int) -> int:
            drawn = int(self._draw(np.array([node]), rng)[0])
            path.append((node, drawn - int(self.offsets[node])))
            return int(self.successors[drawn])

        for _ in visits(self.nodes[START], following, self.nodes[END]):
            if len(path) > steps:
                raise DemandError(f"a run is not over after {steps} units; raise max_units")
        return path[1:]

    def step(self, total: Floats, at: Ints, walking: Ints, rng: np.random.Generator) -> None:
        """Advance the walks numbered `walking` by a drawn sample: add its seconds, move on."""
        drawn = self._draw(at[walking], rng)
        total[walking] += self.seconds[drawn]
        at[walking] = self.successors[drawn]

    def _draw(self, here: Ints, rng: np.random.Generator) -> Ints:
        """A sample of each node of `here`, by position in `seconds`."""
        first = self.offsets[here]
        if self.weights is None:
            return first + rng.integers(self.sizes[here])
        cumulative = self.cumulative
        low, high = cumulative[first], cumulative[self.offsets[here + 1]]
        drawn = np.searchsorted(cumulative, low + rng.random(here.size) * (high - low), "right") - 1
        return np.clip(drawn, first, self.offsets[here + 1] - 1)

    def _own(self, node: int) -> Draws:
        own = slice(self.offsets[node], self.offsets[node + 1])
        weights = None if self.weights is None else self.weights[own]
        return Draws(self.seconds[own], self.successors[own], weights)


def check_over(walking: Ints, walks: int, steps: int) -> None:
    """Raise `DemandError` if some walks have not come to the end."""
    if walking.size:
        raise DemandError(
            f"{walking.size} of {walks} walks are not over after {steps} units; "
            "raise max_units, or check that the loops of the runs do end"
        )
