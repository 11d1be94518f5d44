"""The training-free ways of linking that stayed nearest to full prefill, by what they recompute."""

import warnings
from typing import Any

from picache.arguments import real_number
from picache.methods import Combined, LegoLink, NaiveReuse, ProphetKV
from picache.methods import presets as _comparison
from picache.methods.base import LinkMethod
from picache.sinks import DummySinks, SharedPrefix

__all__ = ["best"]

_BEST = {
    0.0: _comparison.Arm(NaiveReuse(), DummySinks(1)),
    0.02: _comparison.Arm(ProphetKV(0.02, value_norm=True)),
    0.05: _comparison.Arm(Combined((LegoLink(1), ProphetKV(1.0)), 0.05), DummySinks(1)),
    0.15: _comparison.Arm(Combined((LegoLink(4), ProphetKV(1.0)), 0.15)),
    0.3: _comparison.Arm(Combined((LegoLink(4), ProphetKV(1.0)), 0.3)),
}
"""By the share of the prompt that is recomputed besides its query."""
_BEST_BEHIND_PREFIX: dict[float, LinkMethod] = {
    0.0: NaiveReuse(),
    0.02: ProphetKV(0.02),
    0.05: ProphetKV(0.05),
}
"""Methods that do better still where chunks are compiled behind the prompt's own prefix."""


def best(budget: float, prefix: str | tuple[int, ...] | None = None) -> _comparison.Arm:
    """The way of linking that was nearest to full prefill among those that recompute no more.

    It was measured on questions of five tasks by SmolLM2-135M-Instruct (docs/linking.md), chosen on
    one half of the questions; on the other half, in nats:

    | budget | arm | KL to full prefill | less than random tokens in the same number |
    |---|---|---|---|
    | 0 | naive, behind one dummy | 0.57 | |
    | 0.02 | ProphetKV by value norms | 0.40 | 0.51 |
    | 0.05 | LegoLink-1, then ProphetKV, behind one dummy | 0.33 | 0.23 |
    | 0.15 | LegoLink-4, then ProphetKV | 0.19 | 0.62 |
    | 0.3 | LegoLink-4, then ProphetKV | 0.10 | 0.61 |
    | 0, with a prefix | naive | 0.47 | |
    | 0.02, with a prefix | ProphetKV | 0.35 | 0.11 |
    | 0.05, with a prefix | ProphetKV | 0.28 | 0.18 |

    Those that come next are often within a tenth of it: at 0.05 plain ProphetKV is as near.
    Another model may have another best: ``examples/experiments/link_evidence.py --model`` measures
    it. ``arm = best(0.05); PIC(model, tokenizer, sinks=arm.sinks).link(..., method=arm.method)``.

    Args:
        budget: the largest share of the prompt's tokens, besides its query, that may be recomputed,
            from 0 to 1. Measured are 0, 0.02, 0.05, 0.15 and 0.3; between two of them the smaller
            one's arm is given, which recomputes less than it might.
        prefix: what all prompts begin with, such as the system prompt, as for `SharedPrefix`; where
            it is given, arms whose chunks are compiled behind it are among those chosen from.

    Raises:
        PICacheError: when `budget` is no number from 0 to 1, or `prefix` neither a text nor ids.
    """
    needs = "best needs a budget, the share of the prompt to recompute, from 0 to 1"
    budget = real_number(needs, budget, lambda number: 0 <= number <= 1)
    measured = max(share for share in _BEST if share <= budget)
    if prefix is not None:
        behind = SharedPrefix(prefix)
        if measured in _BEST_BEHIND_PREFIX:
            return _comparison.Arm(_BEST_BEHIND_PREFIX[measured], behind)
    return _BEST[measured]


def __getattr__(name: str) -> Any:
    """`arms` and `Arm`, which stood here; they go from here with the next release."""
    if name in ("Arm", "arms"):
        warnings.warn(
            f"picache.presets.{name} has moved: import it from picache",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(_comparison, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
