"""A bar that shows how far something long has come."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def bar(total: int, what: str, progress: bool) -> Iterator[Callable[[], Any]]:
    """What to call after each of `total` parts, with a bar where one is wanted and tqdm is there.

    Args:
        total: parts.
        what: they are, in the plural.
        progress: whether a bar is wanted.
    """
    if progress:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            progress = False
    if not progress:
        yield lambda: None
        return
    with tqdm(total=total, desc=what) as shown:
        yield shown.update
