"""Retention policies, one paper a file."""

from sparsity.policies.full import Full
from sparsity.policies.quest import Quest
from sparsity.policies.raas import RaaS
from sparsity.policies.random import Random
from sparsity.policies.streaming_llm import StreamingLLM

__all__ = ["Full", "Quest", "RaaS", "Random", "StreamingLLM"]
