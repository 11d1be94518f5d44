"""Ranks as the integers that servers take for a priority."""

import math

from demand.errors import DemandError
from demand.policies.base import Rank

_RANKS = 2**32
_CLASSES = 2**10


def millisecond_priority(rank: Rank) -> int:
    """`rank` in whole milliseconds, as an integer that sorts alike; smaller goes first.

    vLLM takes any 64-bit integer, lower first; this one stays within 53 bits, which JSON carries
    exactly. Ranks less than a millisecond apart may become equal (the server then goes by
    arrival), and ranks beyond 2**31 ms (25 days) of either sign, infinity included, are cut off
    there. The entries of a tuple before its last are classes: whole numbers from -512 to 511, at
    most two.

    Raises:
        DemandError: a rank that is NaN, or classes that do not fit.
    """
    *classes, last = rank if isinstance(rank, tuple) else (rank,)
    fits = all(-_CLASSES / 2 <= c < _CLASSES / 2 and c == math.floor(c) for c in classes)
    if len(classes) > 2 or not fits or math.isnan(last):
        raise DemandError(
            f"rank is {rank}; expected a number, or at most two classes (whole numbers from -512 "
            "to 511) and a number: pass your own function from rank to integer as `priority`"
        )
    packed = 0
    for entry in classes:
        packed = packed * _CLASSES + int(entry)
    return packed * _RANKS + math.floor(min(max(last * 1000.0, -_RANKS / 2), _RANKS / 2 - 1))
