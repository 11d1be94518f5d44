"""For tests of accuracy: `assert_within` holds an arm of a comparison to a bound.

    result = picache.compare(model, tokenizer, problems, [LegoLink(16)])
    assert_within(result, "LegoLink(k=16)", by=0.05)

It takes what `compare` of any of the three packages returns. The pytest plugin of the distribution
(docs/testing.md) has the fixtures that such a test begins with.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

from picache.errors import PICacheError


class _Result(Protocol):
    """What the three packages' comparisons have in common."""

    unit: str

    @property
    def reference(self) -> str: ...

    @property
    def units(self) -> int: ...

    def __getitem__(self, arm: str) -> Mapping[str, Any]: ...

    def loss(self, arm: str, metric: str, of: str | None = None) -> Any: ...


def assert_within(
    result: _Result, arm: str, of: str | None = None, by: float = 0.05, metric: str = "accuracy"
) -> None:
    """Pass where an arm is surely worse than another by at most `by`.

    What counts is the 95 % interval of the paired loss, `result.loss(arm, metric, of)`. All of it
    at most `by`: passed. All of it above: failed. Else the test fails as undecided, and says how
    many problems would be about enough, an interval's width going with one over their square root.
    The failure prints the interval and the table.

    Args:
        result: a Comparison of `picache`, `sparsity` or `demand`.
        arm: the arm in question.
        of: the arm it is held against; the reference (full, dense, FCFS) by default.
        by: the loss that is allowed, in units of the metric, positive where the arm may be worse:
            less where more is better, more where less is. A negative one asks that the arm be
            better, by that much.
        metric: which number.

    Raises:
        AssertionError: the arm is worse, or it is undecided.
        PICacheError: a bound that is no number, or a metric without numbers.
        ValueError: an arm or a metric that was not measured; the comparison's own error.
    """
    if isinstance(by, bool) or not isinstance(by, int | float) or not math.isfinite(by):
        raise PICacheError(f"by must be a number in units of {metric!r}, got {by!r}")
    measured = result[result.reference]
    if metric in ("accuracy", "f1") and not {"accuracy", "f1"} & set(measured):
        raise PICacheError(
            f"{metric!r} was not measured, which takes problems with answers: give them answers, "
            f"or choose another metric of {', '.join(measured)}"
        )
    loss = result.loss(arm, metric, of)
    if any(map(math.isnan, loss)):
        raise PICacheError(
            f"there is no {metric!r} of {arm!r}: some of the {result.unit} have none, which is so "
            "where they have no answers; give answers, or choose another metric"
        )
    __tracebackhide__ = True  # pytest shows the caller's line and the message
    other = result.reference if of is None else of
    count = f"{result.units} {result.unit}"
    says = f"{arm!r} loses {loss} to {other!r} in {metric}, 95 % interval over {count}"
    if result.units < 2:
        reason = f"; one of the {result.unit} gives no interval: give more"
    elif loss.high <= by:
        return
    elif loss.low > by:
        raise AssertionError(f"{says}: more than {by:g}\n\n{result}")
    else:
        reason = f", which holds {by:g}; {_enough(loss, by, result.units, result.unit)}"
    raise AssertionError(f"undecided: {says}{reason}\n\n{result}")


def _enough(loss: Any, by: float, units: int, unit: str) -> str:
    """How many problems would decide, were the loss to stay what it is."""
    room = abs(by - loss.estimate)
    reach = loss.high - loss.estimate if loss.estimate <= by else loss.estimate - loss.low
    if room == 0.0 or reach / room > 1e3:
        return f"the loss is so near to {by:g} that no number of {unit} would decide"
    needed = max(units + 1, math.ceil(units * (reach / room) ** 2))
    digits = max(len(str(needed)) - 2, 0)  # two digits: it is an estimate
    needed = math.ceil(needed / 10**digits) * 10**digits
    return f"about {needed} {unit} would be enough if the loss stays what it is"
