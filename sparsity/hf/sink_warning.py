"""A warning where a policy may evict what a model attends to most: its attention sinks.

Whether a model has sinks is measured once, on the first prompt that is long enough, of which the
last query is weighed over all keys, layer by layer: most decoder models give a large share of their
attention to the first tokens of a text, whatever stands there (arXiv 2309.17453).
"""

import inspect
import math
import warnings
from collections.abc import Collection
from dataclasses import fields, is_dataclass
from statistics import fmean

from sparsity.policies import Then
from sparsity.policies.base import Policy
from sparsity.retention.layer import LayerRetention
from sparsity.retention.query_weights import FIRST

SHARE = 0.15
"""Of the attention to the first tokens, from which on they are sinks; mean over layers and heads.

What models give them is measured by examples/experiments/sink_share.py.
"""

_SHARES: dict[str, float] = {}
"""By what stands for a model: the share that was measured."""
_SAID: set[tuple[str, str]] = set()
"""What stands for a model, and the policy in words: a policy of one's own may have no hash."""


def ask(model: str, policy: Policy, retentions: Collection[LayerRetention]) -> None:
    """Say what is known of the model, or let the layers measure a prompt where nothing is.

    Args:
        model: what stands for it.
        policy: of the cache; of one that keeps the first tokens nothing is asked or said.
        retentions: of its layers.
    """
    if policy.keeps_sinks:
        return
    if model in _SHARES:
        _say(model, policy)
        return
    for retention in retentions:
        evicts = retention.policy.evicts  # and is not one of the `dense_layers`
        retention.asked_for_sinks = evicts and not retention.window


def warn(model: str, policy: Policy, retentions: Collection[LayerRetention]) -> None:
    """Say once for a model and a policy that sinks may be evicted, where the prompt shows them.

    Args:
        model: what stands for it.
        policy: of the cache.
        retentions: of its layers, behind a prompt; once measured they are not asked any more.
    """
    shares = [retention.on_first for retention in retentions if retention.on_first is not None]
    if not shares:
        return
    share = fmean(map(float, shares))  # they may be on several devices
    for retention in retentions:
        retention.on_first = None
    if math.isnan(share):  # the rows are too short
        return
    for retention in retentions:
        retention.asked_for_sinks = False
    _SHARES[model] = share
    _say(model, policy)


def _say(model: str, policy: Policy) -> None:
    share, said = _SHARES[model], (model, str(policy))
    if share < SHARE or said in _SAID:
        return
    _SAID.add(said)
    warnings.warn(
        f"{policy}: this model has attention sinks ({share:.0%} of the attention of a prompt's "
        f"last token goes to the first {FIRST} tokens), and this policy does not protect them; "
        f"where they are evicted the model loses its text. Use {_remedy(policy)}",
        stacklevel=_callers_level(),
    )


def _remedy(policy: Policy) -> str:
    """What keeps the first tokens under a policy of this kind."""
    if isinstance(policy, Then):
        parts = [part for part in (policy.prompt, policy.decode) if not part.keeps_sinks]
        return " and ".join(map(_remedy, parts))
    name = type(policy).__name__
    offered = {field.name for field in fields(policy) if field.init} if is_dataclass(policy) else ()
    for argument, value in (("sinks", FIRST), ("pin_prompt", True)):
        if argument in offered:
            return f"{name}(..., {argument}={value})"
    return (
        f"a {name} whose `priority` is infinite for pages with `start` below {FIRST} and whose "
        "`keeps_sinks` is True"
    )


def _callers_level() -> int:
    """The `stacklevel` of the line that called the model or made the cache, for `_say`."""
    level, frame = 0, inspect.currentframe()
    while frame is not None and _is_inside(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    return level


def _is_inside(module: str) -> bool:
    return module.partition(".")[0] in ("sparsity", "torch", "transformers")
