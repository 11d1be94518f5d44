"""A warning where a policy may evict what a model attends to most: its attention sinks.

Whether a model has sinks is measured on the first prompt that is long enough, of which the last
query is weighed over all keys, layer by layer: most decoder models give a large share of their
attention to the first tokens of a text, whatever stands there (arXiv 2309.17453).
"""

import math
import warnings
from collections.abc import Collection
from statistics import fmean

from sparsity.policies import Then
from sparsity.policies.base import Policy
from sparsity.retention.layer import LayerRetention
from sparsity.retention.query_weights import FIRST

SHARE = 0.15
"""Of the attention to the first tokens, from which on they are sinks; mean over layers and heads.

SmolLM2-135M gives 0.19 to 0.53 on prompts of 64 to 512 tokens, the models of the tests, which have
no sinks, 0.05 at most.
"""

_SAID: set[tuple[str, Policy]] = set()


def ask(model: str, policy: Policy, retentions: Collection[LayerRetention]) -> None:
    """Let the layers measure the first prompt, where the policy may evict the first tokens.

    Args:
        model: what stands for it.
        policy: of the cache.
        retentions: of its layers; where nothing is to be said, or was said before, not asked.
    """
    asked = not policy.keeps_sinks and (model, policy) not in _SAID
    for retention in retentions:
        evicts = retention.policy.evicts  # and is not one of the `dense_layers`
        retention.asked_for_sinks = asked and evicts and not retention.window


def warn(model: str, policy: Policy, retentions: Collection[LayerRetention]) -> None:
    """Say once for a model and a policy that sinks may be evicted, where the prompt shows them.

    Args:
        model: what stands for it.
        policy: of the cache.
        retentions: of its layers, behind a prompt; afterwards they are not asked any more.
    """
    shares = [retention.on_first for retention in retentions if retention.on_first is not None]
    if not shares:
        return
    share = fmean(map(float, shares))  # they may be on several devices
    for retention in retentions:
        retention.asked_for_sinks, retention.on_first = math.isnan(share), None
    if not share >= SHARE or (model, policy) in _SAID:
        return
    _SAID.add((model, policy))
    name = type(policy).__name__
    both = isinstance(policy, Then)
    remedy = f"sinks={FIRST} in both policies of it" if both else f"{name}(..., sinks={FIRST})"
    warnings.warn(
        f"{policy}: this model has attention sinks ({share:.0%} of the attention of the prompt's "
        f"last token goes to the first {FIRST} tokens), and this policy may evict them; without "
        f"them the model loses its text. Use {remedy}",
        stacklevel=2,
    )
