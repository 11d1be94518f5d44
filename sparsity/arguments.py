"""What callers hand in: the number that was meant, the kind of object, or refused by its name."""

import math
from collections.abc import Iterable
from numbers import Integral, Real

import numpy as np
from torch import Tensor

from sparsity.errors import SparsityError


def whole_number(
    name: str, value: object, least: int | None = None, note: str = "", of: str = ""
) -> int:
    """`value` as an int: an int of any kind (numpy's, a 0-d tensor) or a float without a fraction.

    Args:
        name: of the argument, for the error.
        value: what was handed in.
        least: the smallest number allowed; None allows all.
        note: what the error adds about the number.
        of: the class that the argument belongs to, for the error.

    Raises:
        SparsityError: for a bool, text, a fraction, and a number below `least`.
    """
    number = _real(value)
    whole = None
    if number is not None and math.isfinite(number) and number == math.floor(number):
        whole = math.floor(number)
    if whole is None or (least is not None and whole < least):
        bound = "" if least is None else f" of at least {least}"
        raise SparsityError(f"{_said(name, value, of)}: expected a whole number{bound}{note}")
    return whole


def whole_numbers(name: str, values: Iterable[object]) -> list[int]:
    """Each of `values`, at least one, as an int, see `whole_number`.

    Raises:
        SparsityError: as `whole_number` does, and for what is no sequence or empty.
    """
    given = _scalar(values)
    items = [] if isinstance(given, str | bytes) or not isinstance(given, Iterable) else list(given)
    if not items:
        raise SparsityError(f"{name}={values!r}: expected a list of whole numbers, such as [0, 3]")
    return [whole_number(f"{name}[{i}]", value) for i, value in enumerate(items)]


def share(name: str, value: object, above: bool = False, of: str = "") -> float:
    """`value`, a number of any kind, as a float in [0, 1), or in (0, 1] with `above`.

    Args:
        name: of the argument, for the error.
        value: what was handed in.
        above: whether 1 is allowed, and 0 is not.
        of: the class that the argument belongs to, for the error.

    Raises:
        SparsityError: for a bool, text, and a number outside.
    """
    number = _real(value)
    if number is None or not (0 < number <= 1 if above else 0 <= number < 1):
        raise SparsityError(
            f"{_said(name, value, of)}: expected a share in {'(0, 1]' if above else '[0, 1)'}"
        )
    return float(number)


def check_instance(name: str, value: object, kind: type, expected: str, note: str = "") -> None:
    """Check that an argument is an object of its kind.

    Args:
        name: of the argument, for the error.
        value: what was given.
        kind: the class whose instances are taken.
        expected: in words, with an example to write.
        note: what to do with what was given, where that is known.

    Raises:
        SparsityError: for anything else, for a class in the place of its instance, too.
    """
    if not isinstance(value, kind):
        raise SparsityError(f"{name} is {described(value)}: expected {expected}{note}")


def described(value: object) -> str:
    """What a value is, short enough for an error."""
    if isinstance(value, type):
        return f"the class {value.__name__}, and not an object of it"
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else f"of type {type(value).__name__}"


def take_whole_number(config: object, field: str, least: int | None = None, note: str = "") -> None:
    """Put the int that was meant into `field` of a frozen dataclass, see `whole_number`."""
    number = whole_number(field, getattr(config, field), least, note, of=type(config).__name__)
    object.__setattr__(config, field, number)


def take_share(config: object, field: str, above: bool = False) -> None:
    """Put the float that was meant into `field` of a frozen dataclass, see `share`."""
    number = share(field, getattr(config, field), above, of=type(config).__name__)
    object.__setattr__(config, field, number)


def take_flag(config: object, field: str) -> None:
    """Put the bool that was meant into `field` of a frozen dataclass: of Python, numpy or torch.

    Raises:
        SparsityError: for anything else, text and numbers included, whose truth would be taken.
    """
    value = getattr(config, field)
    flag = _scalar(value)
    if not isinstance(flag, bool):
        said = _said(field, value, type(config).__name__)
        raise SparsityError(f"{said}: expected True or False")
    object.__setattr__(config, field, flag)


def _said(name: str, value: object, of: str) -> str:
    """The argument as a call writes it."""
    return f"{of}({name}={value!r})" if of else f"{name}={value!r}"


def _real(value: object) -> int | float | None:
    """The number in `value`; None for a bool and for what is no number."""
    value = _scalar(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return int(value) if isinstance(value, Integral) else float(value)


def _scalar(value: object) -> object:
    """A 0-d array or tensor as the Python object in it; anything else, masked arrays too, as is."""
    if isinstance(value, np.ma.MaskedArray) or not isinstance(
        value, Tensor | np.ndarray | np.generic
    ):
        return value
    return value.item() if value.ndim == 0 else value
