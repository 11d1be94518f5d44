"""Atoms of a sum of independent demands, and fewer atoms in place of many."""

import numpy as np

from demand.atoms import Floats
from demand.errors import DemandError

MOST_OUTCOMES = 1 << 24
"""Pairs of atoms that one convolution may form: some 400 MB while it runs."""


def sum_atoms(first: tuple[Floats, Floats], second: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
    """Values, in no order, and weights of the sum of two independent demands: every pair of atoms.

    Raises:
        DemandError: more than `MOST_OUTCOMES` pairs.
    """
    (x, p), (y, q) = first, second
    if x.size * y.size > MOST_OUTCOMES:
        raise DemandError(
            f"the sum of {x.size} and {y.size} atoms has {x.size * y.size} outcomes; expected at "
            f"most {MOST_OUTCOMES}: call compress on the larger one first"
        )
    return np.add.outer(x, y).ravel(), np.multiply.outer(p, q).ravel()


def compress_atoms(values: Floats, weights: Floats, atoms: int) -> tuple[Floats, Floats]:
    """At most `atoms` atoms of the same mean for ascending values, each a mean of neighbours.

    Atoms become one where they share both a cell of equal width and a cell of equal mass, of
    each of which there are h = atoms // 2. So no mass moves by more than (max - min) / h seconds,
    no atom made of several holds much more than 1 / h of the mass, and the mean is exact. The
    cells of equal mass keep the head of a long-tailed demand, those of equal width its tail. The
    largest value stays as it is, for beyond it the doubling rule takes over.

    Raises:
        DemandError: fewer than 2 atoms asked for.
    """
    if atoms < 2:
        raise DemandError(f"atoms is {atoms}; expected at least 2, such as 1000")
    half = atoms // 2
    span = float(values[-1] - values[0])
    by_width = np.zeros(values.size) if span == 0.0 else (values - values[0]) / span * half
    by_mass = (np.cumsum(weights) - weights) * half
    cells = np.minimum(np.floor([by_width, by_mass]), half - 1)
    cells[:, -1] = half  # the largest value on its own
    starts = np.append(0, np.flatnonzero(np.diff(cells).any(axis=0)) + 1)
    mass = np.add.reduceat(weights, starts)
    return np.add.reduceat(weights * values, starts) / mass, mass
