"""Ranks as integers, which is what servers take for the priority of a request."""

import math
from numbers import Real

from demand.errors import DemandError
from demand.policies.base import Rank

_RANKS = 2**32
_CLASSES = 2**10


def millisecond_priority(rank: Rank) -> int:
    """`rank`, a number of seconds, as an integer of whole milliseconds that sorts the same.

    vLLM takes any 64-bit integer, smaller first; this one stays within 53 bits, which JSON carries
    exactly. Ranks less than a millisecond apart may become equal (the server then goes by
    arrival), and ranks beyond 2**31 ms (25 days) of either sign, infinity included, are cut off
    there. In a rank that is a tuple, the entries before the last are classes: at most two, each a
    whole number from -512 to 511.

    Raises:
        DemandError: a rank that is no number or NaN, or classes that do not fit.
    """
    entries = rank if isinstance(rank, tuple) else (rank,)
    good = 1 <= len(entries) <= 3 and all(isinstance(entry, Real) for entry in entries)
    if not good or math.isnan(entries[-1]) or not all(map(_is_class, entries[:-1])):
        raise DemandError(
            f"rank is {rank!r}; expected a number, or at most two classes (whole numbers from -512 "
            "to 511) and a number: pass your own function from rank to integer as `priority`"
        )
    *classes, last = entries
    packed = 0
    for entry in classes:
        packed = packed * _CLASSES + int(entry)
    return packed * _RANKS + math.floor(min(max(last * 1000.0, -_RANKS / 2), _RANKS / 2 - 1))


def _is_class(entry: float) -> bool:
    return -_CLASSES / 2 <= entry < _CLASSES / 2 and entry == math.floor(entry)
