"""Whole numbers of any kind are taken; what is none is refused by its name."""

import numpy as np
import pytest
import torch

from demand import DemandError
from demand.arguments import whole_number


@pytest.mark.parametrize(
    "given",
    [
        3,
        3.0,
        np.int64(3),
        np.uint8(3),
        np.float32(3),
        np.array(3),
        torch.tensor(3),
        torch.tensor(3.0),
    ],
)
def test_whole_numbers_of_any_kind(given):
    number = whole_number("servers", given, least=1)
    assert number == 3
    assert type(number) is int


def test_large_floats_are_exact():
    assert whole_number("jobs", 1e4) == 10_000
    assert whole_number("jobs", 2.0**60) == 2**60


@pytest.mark.parametrize(
    "given",
    [True, np.True_, torch.tensor(True), "3", b"3", None, 1.5, np.inf, np.nan, np.array([3.0, 4.0]),
     np.timedelta64(3, "s"), 0, -1.0],
)  # fmt: skip
def test_what_is_no_whole_number_is_named(given):
    with pytest.raises(DemandError, match=r"servers is .*; expected a whole number of at least 1"):
        whole_number("servers", given, least=1)
