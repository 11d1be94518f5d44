"""Retention policies for the KV cache of long decoding, under transformers' `model.generate`.

Tensors are `[batch, kv_heads, tokens, head_dim]`; budgets are in tokens.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
    SnapKV,
    StreamingLLM,
    Then,
    VaSE,
)
from sparsity.recorded.milestones import milestone_map
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
    "Full",
    "LazyEviction",
    "PyramidKV",
    "Quest",
    "QuestRaaS",
    "RaaS",
    "Random",
    "Replay",
    "Report",
    "SnapKV",
    "SparseCache",
    "SparsityError",
    "StreamingLLM",
    "Then",
    "Trace",
    "VaSE",
    "attach",
    "detach",
    "milestone_map",
    "record",
    "replay",
]


def __getattr__(name: str) -> Any:
    """What knows transformers is loaded when it is first asked for, not with the package."""
    if name not in ("SparseCache", "attach", "detach"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module("sparsity.hf.cache" if name == "SparseCache" else "sparsity.hf.attach")
    return getattr(module, name)


def __dir__() -> list[str]:
    """The public names, those not loaded yet among them."""
    return sorted({*globals(), *__all__})
