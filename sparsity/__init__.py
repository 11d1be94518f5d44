"""Retention policies for the KV cache of long decoding, under transformers' `model.generate`.

Tensors are `[batch, kv_heads, tokens, head_dim]`; budgets are in tokens.
"""

from sparsity.cache import SparseCache, attach, detach
from sparsity.errors import SparsityError
from sparsity.policies import Full, Quest, RaaS, Random, StreamingLLM
from sparsity.report import Report

__all__ = [
    "Full",
    "Quest",
    "RaaS",
    "Random",
    "Report",
    "SparseCache",
    "SparsityError",
    "StreamingLLM",
    "attach",
    "detach",
]
