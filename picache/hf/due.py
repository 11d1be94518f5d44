"""How a pass says which layers it is about to read, so that they can still be on their way."""

from collections.abc import Callable

Due = Callable[[range], None]
"""Called with layers before a pass reads what stands in their places: puts it there."""


def nothing_due(layers: range) -> None:
    """For a pass whose layers stand in their places already."""
