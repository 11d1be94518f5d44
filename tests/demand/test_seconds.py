"""What enters as seconds is converted by its unit, or refused by its name."""

import datetime as dt
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from demand import DemandError
from demand.seconds import as_numbers, as_seconds, check_age, one_of_seconds


class Series:
    """What numpy sees of a pandas Series: an array behind `__array__`, and its dtype."""

    def __init__(self, values):
        self.values, self.dtype = np.asarray(values), np.asarray(values).dtype

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype=dtype)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ([1, 2.5], [1.0, 2.5]),
        (np.array([1, 2], np.uint8), [1.0, 2.0]),
        (np.array([[1.5]], np.float16), [[1.5]]),
        (torch.tensor([0.5, 4.0]), [0.5, 4.0]),
        (np.array([1500, 20], "timedelta64[ms]"), [1.5, 0.02]),
        (np.array([1_500_000_000], "timedelta64[ns]"), [1.5]),
        (np.array([2**62], "timedelta64[D]"), [2.0**62 * 86_400]),
        (np.array([3, 4], "timedelta64[5m]"), [900.0, 1200.0]),
        (np.timedelta64(2, "h"), 7200.0),
        ([np.timedelta64(1, "s"), np.timedelta64(5, "ms")], [1.0, 0.005]),
        ([1, np.timedelta64(5, "ms")], [1.0, 0.005]),
        ([dt.timedelta(minutes=1), dt.timedelta(milliseconds=250)], [60.0, 0.25]),
        (Series(np.array([1, 2], "timedelta64[us]")), [1e-6, 2e-6]),
        ([Decimal("1.5"), Fraction(1, 4), 10**30, np.float32(2.0)], [1.5, 0.25, 1e30, 2.0]),
        (np.array([3, 4.5], dtype=object), [3.0, 4.5]),
        (np.ma.MaskedArray([1.0, 2.0], mask=[False, False]), [1.0, 2.0]),
        ([], []),
        ([1.0, np.inf], [1.0, np.inf]),
    ],
)
def test_seconds_are_read_by_their_unit(given, seconds):
    read = as_seconds("values", given)
    assert read.dtype == np.float64
    np.testing.assert_array_equal(read, np.asarray(seconds, dtype=np.float64))


REFUSED = [
    (np.array(["2026-01-01", "2026-01-02"], "datetime64[s]"), r"moments .datetime64.*times\[0\]"),
    ([dt.datetime(2026, 1, 1)], r"values\[0\] holds moments .datetime."),
    (np.datetime64("2026-01-01"), "values holds moments"),
    (np.ma.MaskedArray([1.0, 2.0], mask=[False, True]), "1 masked entries"),
    (["1", "2"], "values holds text"),
    ([1.0, "2"], "values holds text"),
    ([1.0, True], "values holds truth values"),
    ((np.True_, 1.0), "values holds truth values"),
    (np.array([b"1"]), "values holds bytes"),
    (np.array([True, False]), "truth values"),
    ([1.0 + 0j], "complex numbers"),
    (np.zeros(2, dtype=[("a", float)]), "records"),
    ([1.0, None], r"values\[1\] is None; expected numbers of seconds"),
    (np.array([1.0, "2"], dtype=object), r"values\[1\] is '2'"),
    (np.array([1.0, True], dtype=object), r"values\[1\] is True"),
    ([Decimal(1), 2j], r"values\[1\] is 2j"),
    (10**400, r"values is 1000.*no float can hold"),
    ((number for number in (1.0, 2.0)), "values is <generator"),
    ({1.0, 2.0}, r"values is \{1.0, 2.0\}"),
    ([[1.0], [1.0, 2.0]], "values is not a list of numbers"),
    (np.array([3, "NaT"], "timedelta64[s]"), r"values\[1\] is NaT"),
    (np.array([3], "timedelta64"), r"values has no unit \(timedelta64\)"),
    (np.array([3], "timedelta64[M]"), "no fixed length"),
]


@pytest.mark.parametrize(("given", "says"), REFUSED)
def test_what_is_no_number_of_seconds_is_refused_by_name(given, says):
    with pytest.raises(DemandError, match=says):
        as_seconds("values", given)


@pytest.mark.parametrize(
    "given", [np.array([1], "timedelta64[s]"), [dt.timedelta(1)], [1.0, np.timedelta64(1, "s")]]
)
def test_durations_are_no_weights(given):
    with pytest.raises(DemandError, match=r"weights.* expected plain numbers"):
        as_numbers("weights", given)


def test_one_number_of_seconds():
    assert one_of_seconds("quantum", dt.timedelta(seconds=3)) == 3.0
    assert one_of_seconds("quantum", np.array(2)) == 2.0
    with pytest.raises(DemandError, match=r"quantum has shape \(2,\); expected a single number"):
        one_of_seconds("quantum", [1.0, 2.0])
    for age in ("3", True, None, dt.timedelta(seconds=-1), np.nan):
        with pytest.raises(DemandError, match="age "):
            check_age(age)


def test_what_is_read_is_a_copy():
    given = np.array([1.0, 2.0])
    as_seconds("values", given)[0] = 5.0
    assert given[0] == 1.0
