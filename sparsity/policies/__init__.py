"""Retention policies: each decides which tokens a KV cache keeps. One paper a file."""

from sparsity.policies.full import Full
from sparsity.policies.h2o import H2O
from sparsity.policies.lazy_eviction import LazyEviction
from sparsity.policies.pyramidkv import PyramidKV
from sparsity.policies.quest import Quest
from sparsity.policies.quest_raas import QuestRaaS
from sparsity.policies.raas import RaaS
from sparsity.policies.random import Random
from sparsity.policies.rkv import RKV
from sparsity.policies.share_raas import ShareRaaS
from sparsity.policies.snapkv import SnapKV
from sparsity.policies.streaming_llm import StreamingLLM
from sparsity.policies.then import Then
from sparsity.policies.tova import TOVA
from sparsity.policies.vase import VaSE

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
    "ShareRaaS",
    "SnapKV",
    "StreamingLLM",
    "Then",
    "VaSE",
]
