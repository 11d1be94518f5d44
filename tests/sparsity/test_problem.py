"""Problems with answers: what is refused, where an answer is found, and when it is right."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsity import Problem, SparsityError
from sparsity.problem import final_answer, is_right, overlap


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("So 3 + 4 = 7.\n#### 7\n", "7"),
        (r"Thus \boxed{\frac{1}{2}} or \boxed{x_{1}} .", "x_{1}"),
        (r"cut off: \boxed{3", r"cut off: \boxed{3"),
        ("Answer: no. The ANSWER IS: 12 apples.\nGood bye.", "12 apples."),
        ("Question : x ? Answer : 3 .", "3 ."),
        ("The answer is", ""),
        ("  Paris, of course ", "Paris, of course"),
    ],
)
def test_the_final_answer_of_a_chain_of_thought(text, said):
    assert final_answer(text) == said


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        ("7 apples, of which 3 are red: 1,234", "1234", 1.0),
        ("$1,234.00.", "$1,234", 1.0),
        ("42.", "42", 1.0),
        ("-42", "42", 0.0),
        ("5-3", "3", 1.0),
        ("x2", "2", 0.0),
        ("none", "0", 0.0),
        ("The cat, on a mat", "cat on mat", 1.0),
        ("no, the cat", "cat", 0.0),
        ("A. Paris", "A", 1.0),
        ("B", "A", 0.0),
        (r"-\frac{1}{2}", r"\frac{1}{2}", 0.0),
        (r"$-\frac{1}{2}$", r"-\frac{1}{2}", 1.0),
        ("x^{2}", "x^2", 1.0),
        ("x + 2", "x^2", 0.0),
        ("?", "!", 0.0),
        (" ? ", "?", 1.0),
        ("", "cat", 0.0),
    ],
)
def test_what_is_right(said, answer, right):
    assert is_right(said, answer) == right


@given(st.text(min_size=1), st.text(min_size=1))
def test_what_says_the_answer_is_right_and_marks_are_shares(said, answer):
    assert is_right(answer, answer) == overlap(answer, answer) == 1.0
    assert is_right(said, answer) in (0.0, 1.0)
    assert 0.0 <= overlap(said, answer) <= 1.0


def test_overlap_is_that_of_squad():
    assert overlap("the cat sat", "cat") == pytest.approx(2 / 3)
    assert overlap("dog", "cat") == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompt=""), "prompt must be a text, not empty, got ''"),
        (dict(prompt=3), "prompt must be a text"),
        (dict(answers="mat"), "answers must be a tuple of texts, none empty, got 'mat'"),
        (dict(answers=("mat", "")), "none empty"),
        (dict(answers=3), "answers must be a tuple of texts"),
        (dict(continuation=""), "continuation must be a text, not empty"),
    ],
)
def test_what_is_no_problem_is_refused(arguments, message):
    with pytest.raises(SparsityError, match=message):
        Problem(**(dict(prompt="who") | arguments))
