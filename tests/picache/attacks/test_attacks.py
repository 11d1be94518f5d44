"""The attacks as tests: a tenth of each in every run, all of it where slow tests are run."""

import os

import pytest

from tests.picache.attacks.__main__ import ATTACKS

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills processes as on POSIX")


def check(name, scale, seed):
    if name == "a network that fails":
        pytest.importorskip("fsspec")
    tally = ATTACKS[name](scale, seed)
    assert tally.failures == [], tally.failures[0]
    assert tally.wrong == 0
    assert tally.trials >= 20
    assert tally.hits > 0


@pytest.mark.parametrize("name", ATTACKS)
def test_a_store_under_attack_gives_what_is_right_and_goes_on(name):
    check(name, 0.1, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_a_store_under_attack_for_long_gives_what_is_right_and_goes_on(name):
    check(name, 1.0, seed=1)
