"""Hypothesis strategies and quantile grids that the tests of demand share."""

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from demand import Distribution
from demand.distribution.rank_variants import COSTED_RANKS, RANKS

positive = st.floats(0.01, 100.0)
weights = st.floats(0.01, 1.0)


@st.composite
def distributions(draw: st.DrawFn, max_atoms: int = 12) -> Distribution:
    """Weighted atoms, with repeats and now and then an atom at 0."""
    atoms = st.one_of(positive, st.integers(0, 8).map(float))
    values = draw(st.lists(atoms, min_size=1, max_size=max_atoms))
    return Distribution(values, draw(st.lists(weights, min_size=len(values), max_size=len(values))))


@st.composite
def aged(draw: st.DrawFn) -> tuple[Distribution, float]:
    """A distribution, and an age at, between or beyond its atoms."""
    known = draw(distributions())
    age = st.one_of(st.floats(0.0, 250.0), st.sampled_from(known.values.tolist()), st.just(0.0))
    return known, draw(age)


@st.composite
def costs(draw: st.DrawFn) -> dict[str, float]:
    """A quantum and a preemption cost, each often 0."""
    seconds = st.one_of(st.just(0.0), st.integers(1, 8).map(float), st.floats(0.01, 150.0))
    return {"quantum": draw(seconds), "preemption_cost": draw(seconds)}


@st.composite
def ranks(draw: st.DrawFn) -> dict[str, str | float]:
    """Keywords of `RankTable` and `Distribution.gittins`: every variant, some with costs."""
    variant = draw(st.sampled_from(list(RANKS)))
    return {"variant": variant, **(draw(costs()) if variant in COSTED_RANKS else {})}


def quantile_grid(quantile: Callable[[np.ndarray], np.ndarray], atoms: int) -> Distribution:
    """Equally likely atoms at the k / (n + 1) quantiles: no random gaps between them."""
    return Distribution(quantile(np.arange(1, atoms + 1) / (atoms + 1)))


def hyperexponential_quantile(q: np.ndarray) -> np.ndarray:
    """Of 0.9 Exp(mean 0.5) + 0.1 Exp(mean 5.5), by bisection."""
    low, high = np.zeros_like(q), np.full_like(q, 1000.0)
    for _ in range(80):
        middle = (low + high) / 2
        above = 0.9 * np.exp(-middle / 0.5) + 0.1 * np.exp(-middle / 5.5) < 1.0 - q
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return high
