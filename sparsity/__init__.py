"""Retention policies for the KV cache of long decoding, under transformers' `model.generate`.

Tensors are `[batch, kv_heads, tokens, head_dim]`; budgets are in tokens.
"""

from sparsity.cache import SparseCache, attach, detach
from sparsity.errors import SparsityError
from sparsity.milestones import milestone_map
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
from sparsity.record import record
from sparsity.replay import Replay, replay
from sparsity.report import Report
from sparsity.trace import Trace

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
