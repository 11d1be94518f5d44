"""How much an engine has to do, and how much more than another it may have."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from demand.errors import DemandError
from demand.routing.base import SeenEngine
from demand.seconds import one_number

Load = Literal["requests", "waiting", "prompt_tokens", "kv_share"]
"""Requests that are not over, those of them that wait, prompt tokens to compute, blocks held."""

LOADS: dict[Load, Callable[[SeenEngine], float]] = {
    "requests": lambda engine: engine.requests,
    "waiting": lambda engine: engine.waiting,
    "prompt_tokens": lambda engine: engine.prompt_tokens,
    "kv_share": lambda engine: engine.kv_share,
}


def check_load(by: object) -> None:
    """Raise `DemandError` unless `by` is a measure of load."""
    if by not in get_args(Load):
        raise DemandError(f"by is {by!r}; expected one of {', '.join(get_args(Load))}")


def least_loaded(engines: Sequence[SeenEngine], by: Load) -> SeenEngine:
    """The engine of the least load, the smallest number among equals."""
    return min(engines, key=LOADS[by])


def checked_bound(bound: object, unit: str) -> float:
    """`bound` as a float.

    Raises:
        DemandError: it is negative or no number.
    """
    number = one_number("bound", bound)
    if math.isnan(number) or number < 0.0:
        raise DemandError(f"bound is {bound!r}; expected {unit}, at least 0, infinity for none")
    return number
