"""What callers hand in, as the number that was meant, or refused by its name."""

import operator
from collections.abc import Callable
from typing import SupportsFloat, cast

from picache.errors import PICacheError


def whole_number(needs: str, value: object, least: int | None = None, remedy: str = "") -> int:
    """`value` as an int: an int of any kind (numpy's, a 0-d tensor) or a float without a fraction.

    Args:
        needs: what the error says is needed, such as "LegoLink needs a whole number k >= 0".
        value: what was given.
        least: the smallest number that is allowed; None allows all.
        remedy: what the error advises.

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
    """`value` as a float of Python; an int stays an int.

    Args:
        needs: what the error says is needed, such as "A3 needs a ratio of tokens between 0 and 1".
        value: what was given: a Python number, numpy's, or a 0-d array or tensor.
        allowed: whether a number is; never asked about NaN.
        remedy: what the error advises.

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
    """An int where `value` is one, else a float; None where it is no number."""
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
