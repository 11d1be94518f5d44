"""A picture of a demand graph, with matplotlib: boxes for units, arrows for branches."""

from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from demand.graph.drawing_layout import BOX, Branches, lay_out
from demand.graph.readable import ReadableGraph
from demand.plotting import axes
from demand.units import END, START

if TYPE_CHECKING:
    from matplotlib.axes import Axes


COLOURS = {
    "llm": "#cfe2f3",
    "model": "#d9d2e9",
    "tool": "#fce5cd",
    "container": "#f4cccc",
    "search": "#d9ead3",
    "human": "#fff2cc",
}
"""Colour of a unit, by its kind."""

AHEAD, BACK = "#404040", "#b03030"
"""Colours of branches ahead and of those that lead back."""

RADIUS = 0.3
"""Of the circles of start and end, in inches."""

PORT = 0.12
"""Inches above the middle of a unit at which branches ahead leave and arrive; those back below."""

Point = tuple[float, float]


def draw_graph(
    graph: ReadableGraph, ax: "Axes | None" = None, min_probability: float = 0.01
) -> "Axes":
    """Draw units as boxes (colour by kind, mean seconds), branches as arrows with probabilities.

    Branches ahead are grey; those that lead back or to the same unit, the loops, are red. Seconds
    are those of one execution, summed over its parallel calls.

    Args:
        graph: with runs, or given probabilities.
        ax: to draw on; `None` makes a figure (`ax.figure.savefig(path)` writes it).
        min_probability: rarer branches are left out, and units that only they lead to; the
            picture says how many.

    Raises:
        DemandError: matplotlib is not installed, or a graph without runs.
    """
    everything = {
        name: graph.branches(name) for name in (START, *(unit.name for unit in graph.units))
    }
    branches = _likely(everything, min_probability)
    units = [unit for unit in graph.units if unit.name in branches]
    layout = lay_out(branches)
    points = np.array([*layout.centres.values(), *(p for r in layout.routes.values() for p in r)])
    (left, low), (right, high) = points.min(axis=0), points.max(axis=0)
    ax = axes(ax, (right - left + 2.2, high - low + 2.2))
    lines = Counter(name for route in layout.routes for name in route)
    for (name, to), route in layout.routes.items():
        probability = branches[name][to]
        _draw_branch(ax, route, (name == START, to == END), probability, lines[to] > lines[name])
    for name in branches:
        if name in branches[name]:
            _draw_self_loop(ax, layout.centres[name], branches[name][name])
    for name in (START, END):
        _draw_end(ax, layout.centres[name], name)
    for unit in units:
        samples = graph.samples(unit.name)
        seconds = float(np.mean([graph.cost.seconds(e) for e in samples]))
        calls = float(np.mean([e.parallelism for e in samples]))
        below = f"{seconds:.3g} s" + (f", {calls:.3g} calls" if calls > 1.0 else "")
        _draw_unit(ax, layout.centres[unit.name], unit.name, COLOURS[unit.kind], below)
    for kind in dict.fromkeys(unit.kind for unit in units):
        ax.scatter([], [], marker="s", s=90, color=COLOURS[kind], edgecolor="black", label=kind)
    ax.legend(loc="lower left", frameon=False, ncols=6, handletextpad=0.2, columnspacing=1.0)
    hidden = sum(map(len, everything.values())) - sum(map(len, branches.values()))
    if hidden:
        note = f"not drawn: {hidden} rarer branches, {len(graph.units) - len(units)} of the units"
        ax.text(right + 0.6, low - 0.8, note, ha="right", fontsize=8)
    ax.set_title(graph.name, parse_math=False)
    ax.set(xlim=(left - 0.7, right + 0.7), ylim=(low - 0.95, high + 0.85), aspect="equal")
    ax.set_axis_off()
    return ax


def _likely(branches: Branches, least: float) -> Branches:
    """The branches of at least some probability, from the start on."""
    likely: dict[str, dict[str, float]] = {}
    found = [START]
    while found:
        name = found.pop()
        if name not in likely and name != END:
            likely[name] = {to: p for to, p in branches[name].items() if p >= least}
            found += likely[name]
    return {name: likely[name] for name in branches if name in likely}


def _draw_end(ax: "Axes", at: Point, name: str) -> None:
    from matplotlib.patches import Circle

    ax.add_patch(Circle(at, RADIUS, facecolor="white", edgecolor="black", zorder=2))
    ax.text(*at, name, ha="center", va="center", fontsize=9, zorder=3)


def _draw_unit(ax: "Axes", at: Point, name: str, colour: str, below: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    ax.add_patch(
        FancyBboxPatch(
            (at[0] - BOX[0] / 2, at[1] - BOX[1] / 2),
            *BOX,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=colour,
            edgecolor="black",
            zorder=2,
        )
    )
    size = min(10.0, 10.0 * 18 / len(name))  # as much as fits the box
    place: dict[str, Any] = dict(ha="center", va="center", zorder=3)
    ax.text(at[0], at[1] + 0.12, name, fontsize=size, parse_math=False, **place)
    ax.text(at[0], at[1] - 0.15, below, fontsize=8, **place)


def _draw_branch(
    ax: "Axes", route: list[Point], circles: tuple[bool, bool], probability: float, hub: bool
) -> None:
    """A smooth line through the points of a route.

    `circles` says which of its two ends is a circle (start and end) instead of a box. `hub` says
    that more branches meet where it ends than where it starts: the probability is written near
    the start then, and near its end otherwise.
    """
    back = route[-1][0] < route[0][0]
    side = -1.0 if back else 1.0
    shift = -PORT if back else PORT
    out, into = (RADIUS if circle else BOX[0] / 2 for circle in circles)
    (x, y), (end_x, end_y) = route[0], route[-1]
    stops = [(x + side * out, y + (0.0 if circles[0] else shift))]
    for x, y in route[1:-1]:
        stops += [(x - side * BOX[0] / 2, y), (x + side * BOX[0] / 2, y)]
    stops.append((end_x - side * into, end_y + (0.0 if circles[1] else shift)))
    vertices, codes = [stops[0]], [1]
    for before, after in pairwise(stops):
        middle = (before[0] + after[0]) / 2
        vertices += [(middle, before[1]), (middle, after[1]), after]
        codes += [4, 4, 4]
    colour = BACK if back else AHEAD
    _draw_arrow(ax, vertices, codes, probability, colour)
    x, y = _on_curve(vertices[:4], 0.28) if hub else _on_curve(vertices[-4:], 0.72)
    _label(ax, x, y, probability, colour)


def _draw_self_loop(ax: "Axes", at: Point, probability: float) -> None:
    top = at[1] + BOX[1] / 2
    peak = top + 0.35
    vertices = [
        (at[0] + 0.45, top), (at[0] + 0.45, peak), (at[0] - 0.45, peak), (at[0] - 0.45, top)
    ]  # fmt: skip
    _draw_arrow(ax, vertices, [1, 4, 4, 4], probability, BACK)
    _label(ax, *_on_curve(vertices, 0.5), probability, BACK)


def _draw_arrow(
    ax: "Axes", vertices: list[Point], codes: list[int], probability: float, colour: str
) -> None:
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    ax.add_patch(
        FancyArrowPatch(
            path=Path(vertices, codes),
            color=colour,
            arrowstyle="-|>",
            mutation_scale=10,
            linewidth=0.6 + 1.8 * probability,
            zorder=1,
        )
    )


def _on_curve(points: list[Point], t: float) -> Point:
    """Point of a cubic Bezier curve."""
    weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
    x, y = (sum(w * p[axis] for w, p in zip(weights, points, strict=True)) for axis in (0, 1))
    return x, y


def _label(ax: "Axes", x: float, y: float, probability: float, colour: str) -> None:
    box = dict(boxstyle="round,pad=0.1", facecolor="white", edgecolor="none")
    ax.text(x, y, f"{probability:.2g}", ha="center", va="center", fontsize=8, color=colour,
            zorder=4, bbox=box)  # fmt: skip
