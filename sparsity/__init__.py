"""Retention policies for the KV cache of long decoding, under transformers' `model.generate`.

Tensors are `[batch, kv_heads, tokens, head_dim]`; budgets are in tokens.
"""

from sparsity.cache import SparseCache, attach, detach
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
    VaSE,
)
from sparsity.report import Report

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
    "Report",
    "SnapKV",
    "SparseCache",
    "SparsityError",
    "StreamingLLM",
    "VaSE",
    "attach",
    "detach",
]
