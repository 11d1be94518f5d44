"""The bucketed ranks of all ages, which are exact lower envelopes of ten falling functions."""

import math

import numpy as np

from demand.atoms import Floats
from demand.ranks.hull import Tails
from demand.ranks.pieces import Pieces
from demand.ranks.variants import BUCKETS, bucket_entries


def bucketed_pieces(tails: Tails) -> Pieces:
    """`demand.ranks.variants.bucketed_rank` by age."""
    return _bucket_pieces(tails, artifact=False)


def hermes_artifact_pieces(tails: Tails) -> Pieces:
    """`demand.ranks.variants.hermes_artifact_rank` by age."""
    return _bucket_pieces(tails, artifact=True)


def _bucket_pieces(tails: Tails, artifact: bool) -> Pieces:
    """Between two ages at which an atom is passed or comes within a stop, every term is linear.

    The stops D = j (m - a) / 10 shrink as the age grows, so that atoms enter them: there are up to
    11 n such ages, and up to 10 pieces between two of them.
    """
    ages, survival, excess = tails
    largest = ages[-1]
    entries = [bucket_entries(ages, bucket) for bucket in range(1, BUCKETS + 1)]
    marks = np.unique(np.concatenate([ages, *entries]))
    marks = marks[(marks >= 0.0) & (marks <= largest)]
    starts, ends = marks[:-1], marks[1:]
    i = ages.searchsorted(starts, side="right") - 1
    alive = survival[i]
    left = excess[i + 1] + (ages[i + 1] - ends) * alive  # E[(X - end)+]
    values = np.full((BUCKETS, starts.size), math.inf)
    rates = np.zeros((BUCKETS, starts.size))
    for row, entry in enumerate(entries):
        k = np.maximum(entry.searchsorted(starts, side="right") - 1, i)
        some = np.flatnonzero(k > i)
        k, here, end = k[some], alive[some], ends[some]
        done = here - survival[k]
        if artifact:  # E[X - a; X - a <= D] alive / done^2
            served = left[some] - excess[k] - (ages[k] - end) * survival[k]
            values[row, some] = served * here / done**2
            rates[row, some] = here / done
        else:  # E[min(X - a, D)] / done, where a + D = (1 - share) a + share m
            share = (row + 1) / BUCKETS
            reach = (1.0 - share) * end + share * largest
            values[row, some] = (left[some] - excess[k] + (reach - ages[k]) * survival[k]) / done
            rates[row, some] = (here - (1.0 - share) * survival[k]) / done
    return _lower_envelope(starts, ends, np.maximum(values, 0.0), rates)


def _lower_envelope(starts: Floats, ends: Floats, values: Floats, rates: Floats) -> Pieces:
    """Least of the lines `values[j] + rates[j] * (end - age)` within each gap, as pieces.

    Walks back from the end of all gaps at once: the least line there, then at each meeting the
    line that is less steep, until none meets before the start.
    """
    gap = np.arange(ends.size)
    at = ends
    line = np.lexsort((rates, values), axis=0)[0]
    found = [(ends[:0], ends[:0], ends[:0])]
    while gap.size:
        back = ends[gap] - at
        value, rate = values[line, gap], rates[line, gap]
        found.append((at, value + rate * back, rate))
        slower = rates[:, gap] < rate
        with np.errstate(divide="ignore", invalid="ignore"):
            meets = (values[:, gap] - value) / (rate - rates[:, gap])
        meets = np.where(slower, meets, math.inf)
        line = meets.argmin(axis=0)
        at = ends[gap] - np.maximum(meets.min(axis=0), back)
        more = at > starts[gap]
        gap, line, at = gap[more], line[more], at[more]
    columns = np.concatenate([np.array(part) for part in found], axis=1)
    # Of pieces with the same end the last found is the least below it; the others have no length.
    order = np.lexsort((-np.arange(columns.shape[1]), columns[0]))
    columns = columns[:, order]
    kept = np.diff(columns[0], prepend=-1.0) > 0.0
    return Pieces(*np.ascontiguousarray(columns[:, kept]))
