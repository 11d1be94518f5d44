"""Numbers that callers hand in, converted to Python's or refused by the argument's name."""

import operator
from collections.abc import Callable
from typing import SupportsFloat, cast

from picache.errors import PICacheError


def whole_number(needs: str, value: object, least: int | None = None, remedy: str = "") -> int:
    """Convert an argument to an int.

    Args:
        needs: begins the error, such as "LegoLink needs a whole number k >= 0".
        value: the argument: an int, one of numpy, a 0-d tensor, or a float without a fraction.
        least: the smallest number that is allowed; None for no bound.
        remedy: ends the error.

    Raises:
        PICacheError: on a bool, text, a fraction, or a number below `least`.
    """
    number = _as_int(value)
    if number is None or (least is not None and number < least):
        raise PICacheError(f"{needs}, got {value!r}" + (remedy and f": {remedy}"))
    return number


def real_number(
    needs: str, value: object, allowed: Callable[[float], bool], remedy: str = ""
) -> float:
    """Convert an argument to a Python float; an int stays an int.

    Args:
        needs: begins the error, such as "A3 needs a ratio of tokens between 0 and 1".
        value: the argument: a Python number, one of numpy, or a 0-d array or tensor.
        allowed: tells whether a number is allowed; it is never called with NaN.
        remedy: ends the error.

    Raises:
        PICacheError: on a bool, text, NaN, or a number that is not allowed.
    """
    number = _as_number(value)
    if number is None or number != number or not allowed(number):
        raise PICacheError(f"{needs}, got {value!r}" + (remedy and f": {remedy}"))
    return number


def _as_int(value: object) -> int | None:
    number = _as_number(value)
    if isinstance(number, float):
        return int(number) if number.is_integer() else None
    return number


def _as_number(value: object) -> float | None:
    """The value as an int if it is one, else as a float; None when it is no number."""
    if isinstance(value, bool | str | bytes) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]  # that is what is being asked
    except TypeError:
        pass
    try:
        return float(cast(SupportsFloat, value))
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several elements
        return None
