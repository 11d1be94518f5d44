"""The policies every generic test runs over; a new policy is added to each list."""

from dataclasses import fields, replace

from sparsity import (
    H2O,
    RKV,
    TOVA,
    Full,
    LazyEviction,
    PyramidKV,
    Quest,
    QuestRaaS,
    RaaS,
    Random,
    ShareRaaS,
    SnapKV,
    StreamingLLM,
    Then,
    VaSE,
)
from sparsity.policies.base import Policy
from tests.helpers import tiny_model

# Nothing is evicted from, or left out of, 52 tokens: equal to dense.
AMPLE = [
    Full(),
    Random(64),
    StreamingLLM(64),
    Quest(64, dense_layers=0),
    RaaS(64),
    RaaS(64, page_size=4, top_ratio=0.5, pin_prompt=False),
    RaaS(128, attend="top", score="exact"),
    QuestRaaS(64, prompt_budget=64),
    ShareRaaS(64),
    H2O(64),
    H2O(64, page_size=4, normalise="age", shared_heads=True),
    TOVA(64),
    SnapKV(64, window=8),
    SnapKV(64, window=8, evict_every=8),
    PyramidKV(1000, window=8),
    RKV(64, evict_every=8),
    LazyEviction(64, evict_every=8),
    VaSE(64, window=8, evict_every=4),
    Then(SnapKV(64, window=8, page_size=4), RaaS(128, page_size=4)),
]

# Evicts, or leaves out, within a prompt of 13 tokens and 14 more.
TIGHT = [
    Full(),
    Random(20),
    Random(10, recent=3, pin_prompt=False, evict_every=3),
    StreamingLLM(8),
    Quest(8, page_size=4, dense_layers=0),
    RaaS(32, page_size=4, alpha=0.15),
    RaaS(8, page_size=4, pin_prompt=False, alpha=0.15, dense_layers=1),
    RaaS(12, page_size=2, pin_prompt=False, top_ratio=0.4, score="exact", attend="top"),
    QuestRaaS(8, page_size=4, prompt_budget=4, alpha=0.15),
    H2O(10),
    H2O(12, page_size=2, sinks=1, normalise="age", shared_heads=True, evict_every=4),
    TOVA(8),
    SnapKV(8, window=3, kernel=3),
    SnapKV(9, window=4, kernel=3, pooling="max", group="max", evict_every=4),
    PyramidKV(10, window=3, beta=4, evict_every=2),
    RKV(8, window=2, kernel=3, evict_every=3, mix=0.4),
    LazyEviction(10, evict_every=4, alpha=0.05),
    VaSE(10, sinks=1, window=3, large=2, evict_every=2),
    Then(SnapKV(12, window=3, kernel=3, page_size=4), RaaS(20, page_size=4, alpha=0.15)),
    Then(PyramidKV(6, window=2, beta=4), H2O(12)),
    StreamingLLM(8, positions="absolute"),
    RaaS(15, page_size=3, sinks=2, pin_prompt=False, ties="score"),
    LazyEviction(9, evict_every=3, recent=2, alpha=0.01, ties="score"),
    ShareRaaS(12, page_size=2, sinks=3),
]

# A quarter of a text of 256 tokens after a prompt of 32.
QUARTER = [
    Random(64),
    StreamingLLM(64),
    Quest(64, dense_layers=0),
    RaaS(64),
    QuestRaaS(48, prompt_budget=16),
    ShareRaaS(64),
    H2O(64),
    TOVA(64),
    SnapKV(64, window=16, evict_every=16),
    RKV(64, evict_every=16),
    LazyEviction(64, evict_every=16),
    VaSE(64, window=16, evict_every=16),
    Then(SnapKV(24, window=8, page_size=4), RaaS(64, page_size=4)),
]

# Small enough to be compared with the slow twin on a few tokens.
SMALL = [
    Full(page_size=4),
    Random(6, pin_prompt=False, recent=2),
    Random(20, recent=0, seed=7),
    Random(6, pin_prompt=False, recent=2, evict_every=4),
    StreamingLLM(6, sinks=2, positions="absolute"),
    StreamingLLM(5, sinks=0, evict_every=3),
    Quest(8, page_size=4, dense_layers=0),
    Quest(6, page_size=2, dense_layers=0, group="mean"),
    RaaS(8, page_size=4, pin_prompt=False, alpha=0.21),
    RaaS(8, page_size=2, pin_prompt=False, top_ratio=0.5),
    RaaS(9, page_size=3, pin_prompt=False, alpha=0.03, group="mean"),
    RaaS(28, page_size=4, alpha=0.21),
    RaaS(3, page_size=1, pin_prompt=False, top_ratio=0.25),
    RaaS(8, page_size=2, pin_prompt=False, alpha=0.13, score="exact", evict_every=4),
    RaaS(12, page_size=2, sinks=3, recent=3, pin_prompt=False, top_ratio=0.5, attend="top"),
    RaaS(8, page_size=2, pin_prompt=False, alpha=0.13, shared_heads=True),
    RaaS(9, page_size=3, pin_prompt=False, alpha=0.03, ties="score"),
    RaaS(5, page_size=1, pin_prompt=False, alpha=0.03, sinks=1, recent=1, ties="score"),
    RaaS(8, page_size=2, pin_prompt=False, alpha=0.03, shared_heads=True, ties="score"),
    RaaS(28, page_size=4, alpha=0.03, ties="score"),
    RaaS(
        8, page_size=2, pin_prompt=False, top_ratio=0.5, score="exact", evict_every=4, ties="score"
    ),
    QuestRaaS(4, page_size=2, prompt_budget=4, alpha=0.03, ties="score"),
    ShareRaaS(9, page_size=3, sinks=2),
    ShareRaaS(7, page_size=1, sinks=1, share=0.6, ties="score"),
    ShareRaaS(8, page_size=2, sinks=0, score="exact", shared_heads=True),
    QuestRaaS(4, page_size=2, prompt_budget=4, alpha=0.13),
    QuestRaaS(6, page_size=3, prompt_budget=3, top_ratio=0.5, evict_every=6),
    H2O(6),
    H2O(5, recent=0, group="max", pin_prompt=False, evict_every=4),
    H2O(9, page_size=3, sinks=1, recent=1, shared_heads=True),
    H2O(6, recent=2, normalise="age"),
    H2O(20, recent=2, pin_prompt=True),
    H2O(12, page_size=4, recent=2, evict_every=None),
    LazyEviction(8, page_size=2, evict_every=None, recent=2, alpha=0.13, sinks=0, ties="age"),
    TOVA(5),
    TOVA(6, shared_heads=False, group="max", sinks=1, evict_every=2),
    TOVA(8, page_size=2),
    SnapKV(6, window=3, kernel=3),
    SnapKV(6, window=2, kernel=1, evict_every=1),
    SnapKV(7, window=4, recent=2, kernel=5, group="max", pooling="max", evict_every=3),
    SnapKV(6, window=3, kernel=3, shared_heads=True, sinks=1, evict_every=2),
    PyramidKV(7, window=2, kernel=3, beta=3, evict_every=2),
    RKV(6, window=2, kernel=3, evict_every=3, mix=0.4, threshold=0.47),
    RKV(5, window=3, kernel=1, evict_every=1, mix=0.1, threshold=0.13),
    LazyEviction(6, evict_every=3, alpha=0.13, sinks=0, ties="age"),
    LazyEviction(6, evict_every=3, alpha=0.03, ties="score", sinks=0),
    LazyEviction(7, evict_every=1, recent=2, alpha=0.03, shared_heads=True, ties="score", sinks=0),
    LazyEviction(
        6, evict_every=1, recent=2, alpha=0.03, group="mean", shared_heads=True, sinks=0, ties="age"
    ),
    LazyEviction(8, page_size=2, evict_every=2, alpha=0.13, sinks=0, ties="age"),
    VaSE(7, sinks=1, window=2, large=2, evict_every=2, kernel=3),
    VaSE(6, sinks=0, window=2, large=0, evict_every=1, kernel=1, seed=3),
    SnapKV(8, window=3, kernel=3, page_size=2, evict_every=2),
    SnapKV(9, window=2, recent=1, kernel=5, page_size=3, pooling="max"),
    Then(SnapKV(4, window=2, recent=1, kernel=3, page_size=2), RaaS(8, page_size=2, alpha=0.13)),
    Then(
        SnapKV(6, window=3, kernel=3, page_size=2),
        RaaS(6, page_size=2, top_ratio=0.5, pin_prompt=False),
    ),
    Then(
        SnapKV(4, window=2, recent=1, kernel=1, page_size=2),
        QuestRaaS(4, page_size=2, prompt_budget=2, alpha=0.13),
    ),
    Then(
        SnapKV(4, window=2, recent=1, kernel=3, page_size=2), Quest(4, page_size=2, dense_layers=0)
    ),
    Then(SnapKV(5, window=3, kernel=3), H2O(7)),
    Then(SnapKV(5, window=3, recent=2, kernel=3), SnapKV(7, window=3, kernel=1, evict_every=2)),
    Then(PyramidKV(5, window=2, kernel=3, beta=3), Random(9, recent=1, seed=5)),
    Then(
        SnapKV(5, window=2, group="max"),
        LazyEviction(6, evict_every=3, alpha=0.13, sinks=0, ties="age"),
    ),
]


def enlarged(policy, times):
    """The policy with every budget in it, its own and those of its parts, `times` as large."""
    changes = {}
    for field in fields(policy):
        value = getattr(policy, field.name)
        if isinstance(value, Policy):
            changes[field.name] = enlarged(value, times)
        elif field.init and field.name in ("budget", "prompt_budget"):
            changes[field.name] = times * value
    return replace(policy, **changes)


# Models whose attention is more than a softmax of products, by the name of their config.
HALF = {"sliding_window": 16, "num_hidden_layers": 2, "head_dim": 16}  # one has the window
SCORES = {
    "Gemma2": HALF | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 1.0},
    "GptOss": HALF | {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def shallow_model(family):
    """A tiny model of two layers, one of them with a sliding window in hybrid families."""
    first = "sliding_attention" if family == "gemma3" else "full_attention"
    kinds = {"layer_types": [first, "full_attention"]} if family in ("gemma3", "qwen3") else {}
    return tiny_model(family, num_hidden_layers=2, **kinds)


def selects(policy):
    """Whether a decoded token attends to less than what is held."""
    policy = policy.decoding
    return isinstance(policy, Quest | QuestRaaS) or getattr(policy, "attend", "all") == "top"


def asks_the_prompt(policy):
    """Whether it decides by queries that a cache taken over with `past=` no longer has."""
    return policy.needs.window > 0 or policy.needs.attention == "all"
