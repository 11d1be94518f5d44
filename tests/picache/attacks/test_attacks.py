"""The attacks as tests, a tenth of each; `python -m tests.picache.attacks` does all of it."""

import os

import pytest

from tests.picache.attacks.__main__ import ATTACKS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="kills processes as on POSIX"),
]


@pytest.mark.parametrize("name", ATTACKS)
def test_a_store_under_attack_gives_what_is_right_and_goes_on(name):
    if name == "a network that fails":
        pytest.importorskip("fsspec")
    tally = ATTACKS[name](0.1, seed=0)
    assert tally.failures == [], tally.failures[0]
    assert tally.wrong == 0
    assert tally.trials >= 20
    assert tally.hits > 0
