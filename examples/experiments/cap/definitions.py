"""Context, accuracy and performance as a user perceives them: functions of what was measured.

The survey of the CAP principle (arXiv 2405.11299, section 1) asks for metrics that a user
perceives, that are defined, and that are continuous: a goal is met by degrees. Each function here
says its units, and where it is continuous. What is measured at some contexts is a curve: straight
between neighbours, from nothing at no token, and never falling (where a longer context takes less
than a shorter one, that is noise).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = Sequence[float] | NDArray[np.float64]


def curve(contexts: Numbers, values: Numbers) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A measured cost by context, from (0, 0) on and never falling.

    Args:
        contexts: tokens, each once.
        values: what is paid there, in any unit; not negative.

    Returns:
        Contexts in order and values, 0 in front of both.

    Raises:
        ValueError: no contexts, as many values or others, a context twice or not above 0.
    """
    at, paid = np.asarray(contexts, float), np.asarray(values, float)
    if at.ndim != 1 or at.shape != paid.shape or not len(at):
        raise ValueError(f"{len(at)} contexts and {len(paid)} values: give one value a context")
    order = np.argsort(at)
    at, paid = at[order], paid[order]
    if at[0] <= 0 or (np.diff(at) == 0).any():
        raise ValueError(f"contexts {at.tolist()} must be above 0, and each there once")
    return np.concatenate([[0.0], at]), np.maximum.accumulate(np.concatenate([[0.0], paid]))


def cost(contexts: Numbers, values: Numbers, context: float) -> float:
    """What is paid at a context: bytes, seconds to the first token, seconds between tokens.

    Continuous in the context, and in every measured value: the result moves by at most as much as
    the value that moves most. Beyond the longest measured context it is that of the longest.

    Args:
        contexts: tokens, those measured.
        values: what was paid there.
        context: tokens, the one asked for.
    """
    return float(np.interp(context, *curve(contexts, values)))


def within(contexts: Numbers, values: Numbers, bound: float) -> float:
    """The longest context whose cost is within a bound, in tokens.

    Continuous in the bound wherever the cost rises with the context, by the inverse of its slope.
    Where the cost stays the same over some contexts the result leaps over them, as it does for the
    user: a cache of a fixed size serves any context once it fits, and none that fills it before.
    The longest measured context is the most that is ever said.

    Args:
        contexts: tokens, those measured.
        values: what was paid there.
        bound: in the unit of the values.
    """
    at, paid = curve(contexts, values)
    if bound < 0:
        return 0.0
    last = int(np.searchsorted(paid, bound, side="right")) - 1  # the last one within the bound
    if last == len(at) - 1:
        return float(at[-1])
    share = (bound - paid[last]) / (paid[last + 1] - paid[last])
    return float(at[last] + share * (at[last + 1] - at[last]))


def longest_context(
    contexts: Numbers,
    memory: Numbers,
    first_token: Numbers,
    memory_bound: float,
    first_token_bound: float,
) -> float:
    """C: the longest context that fits into the memory and whose first token comes in time, tokens.

    Continuous where `within` is, in both bounds and in what was measured.

    Args:
        contexts: tokens, those measured.
        memory: bytes held at each.
        first_token: seconds to the first token at each.
        memory_bound: bytes.
        first_token_bound: seconds.
    """
    return min(
        within(contexts, memory, memory_bound), within(contexts, first_token, first_token_bound)
    )


def extra_loss(nats: Numbers, full: Numbers) -> float:
    """A: nats a token that the right text loses against full attention; below 0 it gains.

    Continuous: it moves by the mean of what its tokens' likelihoods move by.

    Args:
        nats: minus log likelihood of each token of the text, given those before it.
        full: the same with full attention.
    """
    return float(np.mean(np.asarray(nats, float) - np.asarray(full, float)))


def agreement(likeliest: Sequence[int], full: Sequence[int]) -> float:
    """A: share of the tokens at which full attention finds the same one likeliest, 0 to 1.

    A mean over tokens: with n of them it moves in steps of 1/n, which is as continuous as a count
    can be; the extra loss is what moves by less.

    Args:
        likeliest: token at each place.
        full: with full attention.
    """
    return float(np.mean(np.asarray(likeliest) == np.asarray(full)))


def tokens_a_second(
    first_token: float,
    between_tokens: float,
    answer: int,
    first_token_bound: float,
    between_tokens_bound: float,
) -> float:
    """P: tokens a second of an answer that are there when they are due, both bounds at once.

    A reader waits `first_token_bound` for the first token and then takes one every
    `between_tokens_bound`: token i is due at the first bound plus i times the second. What comes
    later counts for nothing; an answer that begins late and is fast catches up, one that begins in
    time and is slow falls behind. The rate is of the time that the whole answer takes.

    Continuous in the times and in the bounds, since the token from which on all are late (or in
    time) is told in fractions. The one exception is an answer that meets both bounds exactly: if
    both get tighter at once, however little, it is late as a whole.

    Args:
        first_token: seconds until the first token is there.
        between_tokens: seconds from one token to the next.
        answer: tokens of the answer, at least 2.
        first_token_bound: seconds.
        between_tokens_bound: seconds.
    """
    late, slow = first_token - first_token_bound, between_tokens - between_tokens_bound
    last = answer - 1  # tokens 0 to this one
    if late <= 0 and slow <= 0:
        share = 1.0
    elif late > 0 and slow < 0:  # catches up from token late / -slow on
        share = max(0.0, 1 - late / -slow / last)
    elif late <= 0 < slow:  # falls behind from token -late / slow on
        share = min(1.0, -late / slow / last)
    else:
        share = 0.0
    return share * answer / (first_token + last * between_tokens)
