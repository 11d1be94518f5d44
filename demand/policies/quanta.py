"""Service counted in whole quanta, so that jobs of equal rank do not swap at every instant."""

import math

from demand.errors import DemandError

_SLACK = 1e-9  # of a quantum: a sum of pieces of service counts as the whole it was meant to be


def whole_quanta(seconds: float, quantum: float) -> int:
    """How many quanta of `quantum` seconds are complete within `seconds`."""
    return math.floor(seconds / quantum + _SLACK)


def next_end(seconds: float, quantum: float, threshold: float) -> float:
    """The least end of a quantum, after `seconds`, that exceeds `threshold`."""
    if threshold == math.inf:
        return math.inf
    count = whole_quanta(seconds, quantum) + 1
    if count * quantum <= threshold:
        count = math.floor(threshold / quantum)
        while count * quantum <= threshold:
            count += 1
    return count * quantum


def check_positive(name: str, value: float) -> None:
    """Raise `DemandError` unless `value` is positive and finite."""
    if not 0.0 < value < math.inf:
        raise DemandError(f"{name} is {value}; expected a positive finite number")
