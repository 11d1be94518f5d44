"""Seconds and other numbers as callers hand them in: read as float64, or refused by name.

numpy turns much into float64 that was not meant as a number of seconds: a `timedelta64` of
milliseconds becomes its count of milliseconds, the text "12" becomes 12, a masked entry becomes
whatever lies under the mask. So every array and every number of seconds that enters the package is
read here. A duration is converted by its unit; what is no number is refused.
"""

import datetime
import math
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demand.errors import DemandError

Floats = NDArray[np.float64]

_PER_SECOND = {"ms": 1e3, "us": 1e6, "ns": 1e9, "ps": 1e12, "fs": 1e15, "as": 1e18}
_SECONDS = {"W": 604_800.0, "D": 86_400.0, "h": 3600.0, "m": 60.0, "s": 1.0}


def as_seconds(name: str, values: object) -> Floats:
    """`values` in seconds, as a new float64 array of the same shape.

    Numbers are seconds already. `timedelta64` arrays (a pandas Series of timedeltas is one) and
    `datetime.timedelta` are converted by their unit. An array of objects is converted if each is
    a number (an int of any size, `Fraction`, `Decimal`) or a duration. Infinities and NaN are
    left in: whether they are allowed differs from argument to argument.

    Args:
        name: of the argument, for the error.
        values: what was given, of any shape.

    Raises:
        DemandError: moments (`datetime64`, `datetime`), which are no durations; text, bytes,
            bool, complex numbers, records, or any other object; masked entries; a duration
            without a value ("NaT") or without a length in seconds (months, years, no unit);
            nested lists of different lengths.
    """
    return _read(name, values, durations=True)


def as_numbers(name: str, values: object) -> Floats:
    """`values` as plain numbers, such as weights: as `as_seconds`, but durations are refused.

    Raises:
        DemandError: as `as_seconds`, and durations.
    """
    return _read(name, values, durations=False)


def one_of_seconds(name: str, value: object) -> float:
    """A single number of seconds, as `as_seconds` reads an array of them.

    Raises:
        DemandError: as `as_seconds`, and several numbers in place of one.
    """
    return _read_one(name, value, durations=True)


def one_number(name: str, value: object) -> float:
    """A single plain number, as `as_numbers` reads an array of them.

    Raises:
        DemandError: as `as_numbers`, and several numbers in place of one.
    """
    return _read_one(name, value, durations=False)


def _read_one(name: str, value: object, durations: bool) -> float:
    if type(value) is float:
        return value
    if type(value) is int and value.bit_length() < 64:
        return float(value)
    read = _read(name, value, durations)
    if read.ndim:
        raise DemandError(f"{name} has shape {read.shape}; expected a single number")
    return float(read)


def _read(name: str, values: object, durations: bool) -> Floats:
    if type(values) is np.ndarray and values.dtype == np.float64:
        return values.copy()
    if isinstance(values, list | tuple) and not {bool, np.bool}.isdisjoint(map(type, values)):
        raise DemandError(f"{name} holds truth values; expected {_expected(durations)}")
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise DemandError(
            f"{name} has {np.ma.count_masked(values)} masked entries, which have no value; "
            "leave them out: pass values.compressed(), and the weights of the same entries"
        )
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DemandError(
            f"{name} is not a list of numbers ({error}); pass one number for each entry"
        ) from error
    kind = array.dtype.kind
    if kind in "iuf":
        return array.astype(np.float64)
    expected = _expected(durations)
    # numpy would give numbers in a list the unit of the durations beside them.
    if kind == "m" and durations and not isinstance(values, list | tuple):
        return _durations(name, array)
    if kind in "mO":
        objects = np.asarray(values, dtype=object)
        read = [
            _entry(f"{name}{list(at) if at else ''}", entry, durations, expected)
            for at, entry in np.ndenumerate(objects)
        ]
        return np.array(read, dtype=np.float64).reshape(objects.shape)
    if kind == "M":
        raise DemandError(_moments(name, array.dtype))
    what = {"U": "text", "S": "bytes", "b": "truth values", "c": "complex numbers"}
    raise DemandError(
        f"{name} holds {what.get(kind, 'records')} ({array.dtype}); expected {expected}"
    )


def _expected(durations: bool) -> str:
    return "numbers of seconds, timedelta64 or timedelta" if durations else "plain numbers"


def _entry(place: str, entry: Any, durations: bool, expected: str) -> float:
    """One entry of an array of objects."""
    if isinstance(entry, datetime.date | np.datetime64):
        raise DemandError(_moments(place, type(entry).__name__))
    if durations and isinstance(entry, np.timedelta64):
        return float(_durations(place, np.asarray(entry)))
    if durations and isinstance(entry, datetime.timedelta):
        return entry.total_seconds()
    if not isinstance(entry, Real | Decimal) or isinstance(entry, bool | np.timedelta64):
        raise DemandError(f"{place} is {entry!r:.60}; expected {expected}")
    try:
        return float(entry)
    except (OverflowError, ValueError) as error:
        raise DemandError(f"{place} is {entry!r:.60}, which no float can hold") from error


def _durations(name: str, array: NDArray[np.timedelta64]) -> Floats:
    unit, count = np.datetime_data(array.dtype)
    if unit not in _PER_SECOND and unit not in _SECONDS:
        length = "has no unit" if unit == "generic" else "is in units of no fixed length"
        raise DemandError(
            f"{name} {length} ({array.dtype}); give the unit: values.astype('timedelta64[s]')"
        )
    missing = np.isnat(array)
    if missing.any():
        at = np.argwhere(missing)[0].tolist() or ""
        raise DemandError(f"{name}{at} is NaT, a duration without a value; leave it out")
    # Not divided by timedelta64(1, "s"): numpy converts to a common unit, and overflows silently.
    counts = array.astype(np.int64).astype(np.float64) * count
    return counts / _PER_SECOND[unit] if unit in _PER_SECOND else counts * _SECONDS[unit]


def _moments(place: str, kind: object) -> str:
    return (
        f"{place} holds moments ({kind}), which are no durations; expected seconds: subtract the "
        "first, as in times - times[0]"
    )


def check_age(age: object) -> float:
    """`age` in seconds as a float, or `DemandError` if negative, not finite or no number."""
    seconds = one_of_seconds("age", age)
    if not 0.0 <= seconds < math.inf:
        raise DemandError(
            f"age is {seconds}; it is attained service in seconds, finite and at least 0: "
            "pass the time the job has been served, not a clock difference that can go backwards"
        )
    return seconds


def check_seconds(name: str, value: object) -> float:
    """`value` in seconds as a float, or `DemandError` if negative, not finite or no number."""
    seconds = one_of_seconds(name, value)
    if not 0.0 <= seconds < math.inf:
        raise DemandError(f"{name} is {seconds}; expected finite seconds of at least 0: 0 for none")
    return seconds
