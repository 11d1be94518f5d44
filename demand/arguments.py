"""What callers hand in, as what was meant, or refused by its name."""

import math
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, SupportsFloat, TypeVar, cast

from demand.errors import DemandError
from demand.seconds import one_number, one_of_seconds

Function = TypeVar("Function", bound=Callable[..., Any])
Instance = TypeVar("Instance")


def check_instance(name: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """Raise `DemandError` unless `value` is an instance of one of `kinds`.

    Args:
        name: of the argument, for the error.
        value: what was given.
        kinds: a class or several; abstract ones and protocols are allowed.
        expected: what to say was expected, such as "a policy, such as Gittins()".

    Raises:
        DemandError: anything else; of a class it is said that an instance of it was meant.
    """
    if isinstance(value, type):
        meant = kinds if isinstance(kinds, tuple) else (kinds,)
        call = f"; make one: {value.__name__}(...)" if set(meant) & set(value.__mro__) else ""
        raise DemandError(f"{name} is the class {value.__name__}; expected {expected}{call}")
    if not isinstance(value, kinds):
        raise DemandError(f"{name} is {value!r:.200}; expected {expected}")


def check_callable(name: str, value: object, expected: str) -> None:
    """Raise `DemandError` unless `value` can be called and is not a class.

    Args:
        name: of the argument, for the error.
        value: what was given.
        expected: what to say was expected.
    """
    if isinstance(value, type):
        raise DemandError(f"{name} is the class {value.__name__}; expected {expected}")
    if not callable(value):
        raise DemandError(f"{name} is {value!r:.200}; expected {expected}")


def file_to_write(name: str, value: object) -> Path:
    """`value` as the path of a file that can be made: one in a folder that exists.

    Raises:
        DemandError: what is no path, a folder itself, or a folder that is missing.
    """
    check_instance(name, value, (str, os.PathLike), 'the path of a file, such as "learned.json"')
    path = Path(cast("str | os.PathLike[str]", value))
    if path.is_dir():
        raise DemandError(f"{name} is {str(path)!r}, a folder; expected the path of a file in it")
    if not path.parent.is_dir():
        raise DemandError(
            f"{name} is {str(path)!r}, and there is no folder {str(path.parent)!r}; make it first"
        )
    return path


def positive_number(name: str, value: object) -> float:
    """`value` as a float, or `DemandError` unless it is a positive finite number."""
    return _positive(name, one_number(name, value))


def positive_seconds(name: str, value: object) -> float:
    """`value` in seconds as a float, or `DemandError` unless it is positive and finite.

    A duration (`timedelta`, `timedelta64`) is converted by its unit.
    """
    return _positive(name, one_of_seconds(name, value))


def share(name: str, value: object) -> float:
    """`value` as a float, or `DemandError` unless it is a number from 0 to 1."""
    number = one_number(name, value)
    if not 0.0 <= number <= 1.0:
        raise DemandError(f"{name} is {value}; expected a share from 0 to 1, such as 0.95")
    return number


def _positive(name: str, number: float) -> float:
    if not 0.0 < number < math.inf:
        raise DemandError(f"{name} is {number}; expected a positive finite number")
    return number


def whole_number(name: str, value: object, least: int | None = None) -> int:
    """`value` as an int: an int of any kind (numpy's, a 0-d array) or a float without a fraction.

    Args:
        name: of the argument, for the error.
        value: what was given.
        least: the smallest number that is allowed; `None` allows all.

    Raises:
        DemandError: a bool, text, a fraction, or a number below `least`.
    """
    number = _as_int(value)
    if number is None or (least is not None and number < least):
        bound = "" if least is None else f" of at least {least}"
        raise DemandError(f"{name} is {value!r}; expected a whole number{bound}")
    return number


def _as_int(value: object) -> int | None:
    if isinstance(value, bool | str | bytes) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]  # that is what is being asked
    except TypeError:
        pass
    try:
        number = float(cast(SupportsFloat, value))
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None


def set_whole_numbers(configuration: object, *names: str, least: int) -> None:
    """Replace fields of a frozen dataclass by the ints that they mean, or refuse them.

    Raises:
        DemandError: as `whole_number`.
    """
    for name in names:
        value = whole_number(name, getattr(configuration, name), least)
        object.__setattr__(configuration, name, value)


def instance_of(name: str, value: object, expected: type[Instance]) -> Instance:
    """`value`, which is an instance of `expected`, or `DemandError` as `check_instance`."""
    what = expected.__name__
    check_instance(name, value, expected, f"{'an' if what[0] in 'AEIO' else 'a'} {what}")
    return cast(Instance, value)


def instances_of(name: str, values: object, expected: type[Instance]) -> tuple[Instance, ...]:
    """`values` as a tuple, or `DemandError` unless it is a list of instances of `expected`."""
    if isinstance(values, type):
        what = expected.__name__
        raise DemandError(
            f"{name} is the class {values.__name__}; expected a list of {what}: [{what}(...)]"
        )
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise DemandError(f"{name} is {values!r:.200}; expected a list of {expected.__name__}")
    found = tuple(values)
    for at, value in enumerate(found):
        if not isinstance(value, expected):  # a name for each of them would cost more than this
            instance_of(f"{name}[{at}]", value, expected)
    return found


def mapping_of(name: str, value: object, expected: str) -> dict[Any, Any]:
    """`value` as a new dict, or `DemandError` unless it is a mapping.

    Args:
        name: of the argument, for the error.
        value: what was given.
        expected: what to say was expected, such as "runs by application".
    """
    check_instance(name, value, Mapping, f"a mapping: {expected}")
    return dict(cast("Mapping[Any, Any]", value))


def warn_renamed(function: str, old: str, new: str) -> None:
    """Say to who called `function` that its keyword `old=` is now `new=`."""
    message = f"{old}= of {function} is now {new}=; the old name goes with the next release"
    warnings.warn(message, DeprecationWarning, stacklevel=3)


def warn_renamed_method(owner: str, old: str, new: str) -> None:
    """Say to who called `old` of `owner` that it is now `new`."""
    message = f"{owner}.{old} is now {owner}.{new}; the old name goes with the next release"
    warnings.warn(message, DeprecationWarning, stacklevel=3)


def moved_attribute(module: str, name: str, moved: Mapping[str, tuple[str, Any]]) -> Any:
    """What a module's `__getattr__` gives for a name that it has no more, with a warning.

    Args:
        module: its name.
        name: what was asked for.
        moved: by old name, where it stands now ("demand.TimeSlice") and what it is.

    Raises:
        AttributeError: a name that it never had.
    """
    if name not in moved:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    place, found = moved[name]
    message = f"{module}.{name} is now {place}; the old name goes with the next release"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
    return found


_RENAMED: dict[Any, tuple[Callable[..., Any], dict[str, str]]] = {}
"""Of each function that `renamed_keyword` made: the one inside, and its keywords, old to new."""


def renamed_keyword(old: str, new: str) -> Callable[[Function], Function]:
    """Decorator: the keyword `old=` still works for one release, as `new=`, with a warning.

    Several of them make one wrapper, so that the warning is of the line that calls it.
    """

    def decorate(function: Function) -> Function:
        inner, names = _RENAMED.get(function, (function, {}))
        names = names | {old: new}

        @wraps(inner)
        def call(*args: Any, **kwargs: Any) -> Any:
            for was in names.keys() & kwargs.keys():
                name, now = inner.__qualname__, names[was]
                if now in kwargs:
                    raise DemandError(
                        f"{name} is given {now}= and {was}=, its old name; drop {was}="
                    )
                warn_renamed(name, was, now)
                kwargs[now] = kwargs.pop(was)
            return inner(*args, **kwargs)

        _RENAMED[call] = inner, names
        return cast(Function, call)

    return decorate
