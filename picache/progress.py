"""A progress bar, where tqdm is installed."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def bar(items: Sequence[T], what: str, unit: str, wanted: bool = True) -> Iterable[T]:
    """The items, with a bar where one is wanted and tqdm is there.

    Args:
        items: what is gone through.
        what: stands in front of the bar.
        unit: one of the items, by name.
        wanted: whether to show a bar.
    """
    if not wanted:
        return items
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=what, unit=unit)
