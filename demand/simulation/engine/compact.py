"""Numbers that are noted one after the other, cheaply and in little memory."""

from array import array
from typing import Any

import numpy as np

from demand.seconds import Floats

MOST = 1 << 18
"""Numbers in a list, where adding is fast, before they are moved to an array, which is small."""


def move(numbers: list[Any], into: "array[float]") -> None:
    """Move all of `numbers` to the end of an array of kind "d"; whole ones up to 2^53 are exact."""
    into.fromlist(numbers)
    numbers.clear()


def columns(numbers: list[Any], moved: "array[float]", width: int) -> Floats:
    """A copy of what was moved and of what was not, `[n, width]`."""
    return np.concatenate([np.array(moved), np.array(numbers, np.float64)]).reshape(-1, width)
