"""Ranks of many running applications at once."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from demand.atoms import Floats
from demand.errors import DemandError
from demand.ranks.table import RankTable


def rank_many(tables: Sequence[RankTable], applications: ArrayLike, ages: ArrayLike) -> Floats:
    """Ranks in seconds of `n` jobs, each by the table of its application.

    Args:
        tables: one for each application.
        applications: `[n]` whole numbers, which of `tables` each job goes by.
        ages: `[n]` attained service in seconds.

    Returns:
        `[n]` float64: `tables[applications[k]].at(ages[k])`.

    Raises:
        DemandError: shapes that differ, a number that names no table, or a bad age.
    """
    which, age = np.asarray(applications), np.asarray(ages, dtype=np.float64)
    if which.ndim != 1 or which.shape != age.shape:
        raise DemandError(
            f"applications has shape {which.shape} and ages {age.shape}; expected one of each for "
            "every job, in two one-dimensional arrays of the same length"
        )
    if not which.size:
        return np.empty(0)
    if which.dtype.kind not in "iu" or which.min() < 0 or which.max() >= len(tables):
        raise DemandError(
            f"applications holds {which.dtype} from {which.min()} to {which.max()}; expected whole "
            f"numbers from 0 to {len(tables) - 1}, one for each of the {len(tables)} tables"
        )
    ranks = np.empty(which.size)
    for number, table in enumerate(tables):
        mine = np.flatnonzero(which == number)
        ranks[mine] = table(age[mine])
    return ranks
