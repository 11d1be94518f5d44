"""Quantiles of numbers that occur many times each, by label."""

import numpy as np

from demand.graph.run_columns import Ints
from demand.seconds import Floats


def weighted_quantiles(labels: Ints, values: Floats, counts: Ints, q: float, size: int) -> Floats:
    """`[size]` q-quantile of the values of each label; NaN for one without any.

    It is that of `np.quantile` (linear between neighbours) over `np.repeat(values, counts)`.

    Args:
        labels: `[n]` from 0 up to `size`.
        values: `[n]`.
        counts: `[n]` how often each occurs; 0 is allowed.
        q: a share.
        size: how many labels there are.
    """
    order = np.lexsort((values, labels))
    values, upto = values[order], np.cumsum(counts[order])
    totals = np.zeros(size, dtype=np.int64)
    np.add.at(totals, labels, counts)
    there = np.flatnonzero(totals)
    before, most = (np.cumsum(totals) - totals)[there], totals[there] - 1
    exact = most * q
    below = exact.astype(np.int64)
    low, high = (
        values[np.searchsorted(upto, before + rank, "right")]
        for rank in (below, np.minimum(below + 1, most))
    )
    found = np.full(size, np.nan)
    found[there] = low + (high - low) * (exact - below)
    return found
