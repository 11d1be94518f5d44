"""Coordinates of the nodes and branches of a demand graph in a picture, from left to right."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from demand.units import END, START

Branches = Mapping[str, Mapping[str, float]]
"""Probability of each successor, by node."""

BOX = (1.7, 0.62)
"""Width and height of a unit in inches."""

ROW = 0.95
"""Distance between two rows, in inches."""


@dataclass(frozen=True)
class Layout:
    """Positions in inches.

    Attributes:
        centres: of each node.
        routes: for each branch to another node, the points it passes, the centres of both nodes
            included. It goes left exactly where it leads back, in a loop.
    """

    centres: Mapping[str, tuple[float, float]]
    routes: Mapping[tuple[str, str], list[tuple[float, float]]]


def lay_out(branches: Branches) -> Layout:
    """Columns by the longest path from the start without going back; rows so that few lines cross.

    All nodes are reached from the start. A branch that skips columns keeps a row of each for
    itself, so that it runs over no unit.
    """
    column = _columns(branches)
    rows: list[list[object]] = [[] for _ in range(max(column.values()) + 1)]
    for name, at in column.items():
        rows[at].append(name)
    passes: dict[tuple[str, str], list[tuple[int, tuple[str, str, int]]]] = {}
    for name, following in branches.items():
        for to in following:
            low, high = sorted((column[name], column[to]))
            between = [(at, (name, to, at)) for at in range(low + 1, high)]
            passes[name, to] = between if column[name] < column[to] else between[::-1]
            for at, virtual in between:
                rows[at].append(virtual)
    x, centres = 0.0, dict[object, tuple[float, float]]()
    for at, own in enumerate(rows):
        if at:
            own.sort(key=lambda node: _height(node, branches, centres))
            x += BOX[0] + 1.0 + 0.2 * max(len(own), len(rows[at - 1]))
        for row, node in enumerate(own):
            centres[node] = (x, (row - (len(own) - 1) / 2) * ROW)
    routes = {
        (name, to): [centres[name], *(centres[virtual] for _, virtual in between), centres[to]]
        for (name, to), between in passes.items()
        if name != to
    }
    return Layout({name: centres[name] for name in column}, routes)


def _columns(branches: Branches) -> dict[str, int]:
    """The column of each node; a depth-first search finds the branches that lead back."""
    finished: list[str] = []
    ahead: dict[str, list[str]] = {}
    open_nodes: set[str] = set()
    stack: list[tuple[str, list[str]]] = []

    def enter(name: str) -> None:
        ahead[name] = []
        open_nodes.add(name)
        likely_last = sorted(branches.get(name, {}).items(), key=lambda branch: branch[1])
        stack.append((name, [to for to, _ in likely_last]))

    enter(START)
    while stack:
        name, left = stack[-1]
        if not left:
            stack.pop()
            open_nodes.discard(name)
            finished.append(name)
            continue
        to = left.pop()
        if to not in open_nodes:
            ahead[name].append(to)
            if to not in ahead:
                enter(to)
    column = dict.fromkeys([*branches, END], 0)
    for name in reversed(finished):
        for to in ahead[name]:
            column[to] = max(column[to], column[name] + 1)
    column[END] = max(column[END], 1 + max(column[name] for name in branches))
    return column


def _height(
    node: object, branches: Branches, centres: Mapping[object, tuple[float, float]]
) -> float:
    """Mean height of what stands to the left and leads to a node."""
    if isinstance(node, tuple):
        name, to, at = node
        before = [(name, to, at - 1), name, (name, to, at + 1), to]
        return next(centres[b][1] for b in before if b in centres)
    heights = [centres[name][1] for name in branches if node in branches[name] and name in centres]
    return float(np.mean(heights)) if heights else 0.0
