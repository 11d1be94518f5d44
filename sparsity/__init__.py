"""Retention policies for the KV cache of long decoding, for `model.generate` of transformers.

``SparseCache(model, RaaS(budget=1024))`` is a cache that keeps what a policy keeps. A policy of
your own derives from `Policy` or `Evicting`. Tensors are `[batch, kv_heads, tokens, head_dim]`;
budgets are in tokens.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparsity.compare import compare
from sparsity.comparison import Comparison
from sparsity.errors import SparsityError
from sparsity.policies import (
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
from sparsity.policies.base import Needs, PageView, Policy
from sparsity.policies.evicting import Evicting
from sparsity.problem import Problem
from sparsity.recorded.milestones import Thresholds, milestone_map
from sparsity.recorded.record import record
from sparsity.recorded.replay import Replay, replay
from sparsity.recorded.trace import Trace
from sparsity.retention.report import Report

if TYPE_CHECKING:
    from sparsity.hf.attach import attach, detach
    from sparsity.hf.cache import SparseCache

__all__ = [
    "H2O",
    "RKV",
    "TOVA",
    "Comparison",
    "Evicting",
    "Full",
    "LazyEviction",
    "Needs",
    "PageView",
    "Policy",
    "Problem",
    "PyramidKV",
    "Quest",
    "QuestRaaS",
    "RaaS",
    "Random",
    "Replay",
    "Report",
    "ShareRaaS",
    "SnapKV",
    "SparseCache",
    "SparsityError",
    "StreamingLLM",
    "Then",
    "Thresholds",
    "Trace",
    "VaSE",
    "attach",
    "compare",
    "detach",
    "milestone_map",
    "record",
    "replay",
]


def __getattr__(name: str) -> Any:
    """The names that need transformers, which is imported when one of them is asked for first."""
    if name not in ("SparseCache", "attach", "detach"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module("sparsity.hf.cache" if name == "SparseCache" else "sparsity.hf.attach")
    return getattr(module, name)


def __dir__() -> list[str]:
    """The public names, those not loaded yet among them."""
    return sorted({*globals(), *__all__})
