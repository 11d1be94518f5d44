"""A picture of a distribution of demand: how it is spread, and the rank at each age."""

from typing import TYPE_CHECKING

import numpy as np

from demand.plotting import axes
from demand.seconds import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 40
INCHES = (6.0, 2.8)


def draw_distribution(
    values: Floats, weights: Floats, ages: Floats, ranks: Floats, ax: "Axes | None" = None
) -> "Axes":
    """Bars of the share of jobs that take so long; as a line, the rank of one of each age.

    Args:
        values: `[n]` atoms in seconds.
        weights: `[n]` their probabilities.
        ages: `[m]` seconds, ascending from 0; the picture ends at the last.
        ranks: `[m]` seconds.
        ax: to draw on; `None` makes a figure. The ranks have an axis of their own at its right.

    Raises:
        DemandError: matplotlib is not installed.
    """
    ax = axes(ax, INCHES)
    shares, edges = np.histogram(values, BINS, (0.0, ages[-1]), weights=weights)
    ax.stairs(shares, edges, fill=True, color="#9fc5e8")
    beyond = float(weights[values > ages[-1]].sum())
    rest = f"; {beyond:.2g} of the jobs take longer" if beyond else ""
    ax.set(xlabel=f"seconds{rest}", ylabel="share of the jobs", xlim=(0.0, ages[-1]))
    right = ax.twinx()
    right.plot(ages, ranks, color="#b03030", linewidth=1.2)
    right.set_ylabel("shifted rank at that age, s", color="#b03030")
    right.set_ylim(bottom=0.0)
    for one in (ax, right):
        one.locator_params(nbins=5)
    return ax
