"""Answers of mathematics: what is told plainly, what by math-verify, what is said without."""

import sys
import threading
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsity.grader import plainly, same_value

PLAIN = [
    (r"\frac{14}{3}", "14/3", True),
    (r"\dfrac{28}{6}", r"\frac{14}{3}", True),
    (r"\frac12", "0.5", True),
    (r"-\tfrac{1}{2}", r"\frac{-1}{2}", True),
    (r"\frac{1}{2}", r"\frac{2}{1}", False),
    ("$18", "18", True),
    ("18.00", "18", True),
    ("18 dollars", "18", True),
    (r"5 \text{ cm}", "5", True),
    (r"90^\circ", "90", True),
    (r"70,\!000", "70000", True),
    ("1,234,567", "1234567", True),
    ("073", "73", True),
    ("7.", "7", True),
    ("-7", "7", False),
    ("Evelyn", r"\text{Evelyn}", True),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", True),
    (r"\sqrt{ 2 }", r"\sqrt{2}", True),
    ("", "3", False),
    ("   ", "3", False),
    (r"\sqrt{8}", r"2\sqrt{2}", None),
    ("x+1", "1", None),
    ("5 x", "5", None),
    ("5 pi", "5", None),
    (r"5\pi", "5", None),
    ("1/0", "3", None),
    (r"\frac{", "3", None),
]
BEYOND = [
    (r"\sqrt{8}", r"2\sqrt{2}", 1.0),
    (r"(3,\pi/2)", r"\left( 3, \frac{\pi}{2} \right)", 1.0),
    ("2,1", "1, 2", 1.0),
    ("x = 5", "5", 1.0),
    ("1 + 2x", "2x+1", 1.0),
    ("2x+1", "2x", 0.0),
    ("(1,2)", "(2,1)", 0.0),
    ("[1,2)", "[1,2]", 0.0),
    (r"\frac{", "3", 0.0),
    ("no answer at all", r"\frac{1}{2}", 0.0),
]


@pytest.mark.parametrize(("said", "answer", "same"), PLAIN)
def test_what_can_be_told_plainly(said, answer, same):
    assert plainly(said, answer) is same
    if same is not None:
        assert same_value(said, answer) == same


@given(st.fractions(max_denominator=99), st.fractions(max_denominator=99), st.integers(1, 9))
def test_fractions_are_the_same_as_python_says(one, two, times):
    def latex(value: Fraction) -> str:
        sign = "-" if value < 0 else ""
        return rf"{sign}\frac{{{abs(value.numerator) * times}}}{{{value.denominator * times}}}"

    assert plainly(latex(one), str(two)) == (one == two)
    assert plainly(latex(one), str(one)) is True


@pytest.mark.parametrize(("said", "answer", "same"), BEYOND)
def test_the_rest_is_told_by_math_verify(said, answer, same):
    pytest.importorskip("math_verify", reason="pip install 'picache[math]'")
    assert plainly(said, answer) is None
    assert same_value(said, answer) == same


def test_it_tells_the_same_in_a_thread():
    pytest.importorskip("math_verify", reason="pip install 'picache[math]'")
    told = []
    thread = threading.Thread(
        target=lambda: told.extend(same_value(*pair[:2]) for pair in BEYOND[:2])
    )
    thread.start()
    thread.join()
    assert told == [1.0, 1.0]


@pytest.mark.parametrize(("said", "answer"), [case[:2] for case in BEYOND])
def test_without_math_verify_it_says_what_it_cannot_compare(monkeypatch, said, answer):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.warns(UserWarning, match=r"cannot be compared without math-verify.*picache\[math]"):
        assert same_value(said, answer) == 0.0
