r"""Whether two answers of mathematics are the same: "\frac{14}{3}", "14/3" and "\dfrac{28}{6}".

For `sparsity.compare(..., right=same_value)`. Texts and rational numbers are compared here; what
is more than that (roots, intervals, sets, expressions) by math-verify, the grader that Hugging Face
keeps for MATH (``pip install 'picache[math]'``), which reads LaTeX into SymPy.
"""

import re
import threading
import warnings
from fractions import Fraction

_LEFT_OUT = re.compile(r"\\left|\\right|\\[!,;: ]|\\\$|[$\s]|\^\\circ|\^\{\\circ\}|\.$")
_UNIT = re.compile(r"(?<=[\d}])\s*(?:\\(?:text|mbox|mathrm)\{[^{}]*\}|[A-Za-z]{3}[A-Za-z ]*)\s*$")
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf)\{([^{}]*)\}")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_FRAC = re.compile(r"\\[dt]?frac")
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)(?:"
    r"(?P<decimal>\d+(?:\.\d*)?|\.\d+)"
    r"|(?P<over>\d+)/(?P<under>\d+)"
    r"|\\frac(?:\{(?P<top>-?\d+)\}|(?P<top1>\d))(?:\{(?P<bottom>-?\d+)\}|(?P<bottom1>\d))"
    r")"
)


def same_value(said: str, answer: str) -> float:
    """1 where what was said is the answer, else 0.

    What `plainly` can tell is told so on every machine. The rest is left to math-verify; without it
    a warning names the two, and they count as different.

    Args:
        said: a final answer, such as `sparsity.problem.final_answer` finds in a text.
        answer: that is right, in LaTeX.
    """
    told = plainly(said, answer)
    if told is not None:
        return float(told)
    try:
        from math_verify import parse, verify
    except ImportError:
        warnings.warn(
            f"{said!r} and {answer!r} cannot be compared without math-verify and count as "
            "different: pip install 'picache[math]'",
            stacklevel=2,
        )
        return 0.0
    # Its time limit is a signal, which only the main thread of a process receives.
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    expected = parse(rf"\boxed{{{answer}}}", parsing_timeout=limit)
    found = parse(rf"\boxed{{{said}}}", parsing_timeout=limit)
    return float(verify(expected, found, timeout_seconds=limit))


def plainly(said: str, answer: str) -> bool | None:
    r"""Whether both are the same text or the same rational number; None where that does not tell.

    Spaces, dollar and degree signs, thousands' commas, the size of brackets and fractions, and
    units behind a number do not count; a unit is in "\text{...}", or words, the first of them of
    three letters at least.
    """
    texts = [_plain(said), _plain(answer)]
    if not texts[0] or texts[0] == texts[1]:
        return bool(texts[0])
    numbers = [_rational(text) for text in texts]
    if None in numbers:
        return None
    return numbers[0] == numbers[1]


def _plain(text: str) -> str:
    text = _TEXT.sub(r"\1", _UNIT.sub("", text.strip()))
    return _THOUSANDS.sub("", _FRAC.sub(r"\\frac", _LEFT_OUT.sub("", text)))


def _rational(text: str) -> Fraction | None:
    found = _NUMBER.fullmatch(text)
    if not found:
        return None
    part = found.groupdict()
    sign = -1 if part["sign"] == "-" else 1
    if part["decimal"]:
        return sign * Fraction(part["decimal"])
    over = int(part["over"] or part["top"] or part["top1"])
    under = int(part["under"] or part["bottom"] or part["bottom1"])
    return sign * Fraction(over, under) if under else None
