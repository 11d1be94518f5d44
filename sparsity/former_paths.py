"""Names at the module paths of the last release: they still work there, with a warning."""

import warnings
from collections.abc import Callable
from typing import Any


def names_moved(former: str, home: Any, names: tuple[str, ...]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module whose names are in another place now.

    Args:
        former: name of the module.
        home: the module in which the names are now.
        names: those that the docs of the last release had here.

    Returns:
        A function that gives each of the names, with a DeprecationWarning.
    """

    def getattr_moved(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {former!r} has no attribute {name!r}")
        warnings.warn(
            f"{former}.{name} is now sparsity.{name}; the former path goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(home, name)

    return getattr_moved
