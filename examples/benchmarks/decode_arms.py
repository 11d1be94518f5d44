"""The caches that decode.py decodes with, filled to the length of a context.

Keys and values are random instead of a prompt's, which would take seconds at 128k tokens. What a
step costs does not depend on them: what is read, scored and evicted follows from shapes and
budgets.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from decode_grid import EVICT_EVERY, Cell, random_kv
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)

from sparsity import H2O, Full, Quest, RaaS, Random, SnapKV, SparseCache, StreamingLLM
from sparsity.policies.base import Policy


def policy_of(cell: Cell) -> Policy:
    """The policy of a cell; prompts are not pinned, or a long one would leave no budget."""
    budget = cell.budget or 0
    make = {
        "Full": Full,
        "Random": lambda: Random(budget, pin_prompt=False),
        "StreamingLLM": lambda: StreamingLLM(budget),
        "H2O": lambda: H2O(budget),
        "SnapKV": lambda: SnapKV(budget, evict_every=EVICT_EVERY),
        "Quest": lambda: Quest(budget),
        "RaaS": lambda: RaaS(budget, pin_prompt=False),
    }
    return make[cell.policy]()


def filled_cache(model: PreTrainedModel, cell: Cell, new: int, seed: int, static: bool) -> Cache:
    """The cache of a cell, holding all of its context but the last token.

    Args:
        model: the model; "ours" attaches it.
        cell: of any arm but kvpress's.
        new: tokens that will be decoded at most.
        seed: of keys and values.
        static: whether "ours compiled" has to ask for the fixed pool (on a CPU).
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    held = cell.context - 1
    if cell.arm == "dense static":
        cache = StaticCache(config=model.config, max_cache_len=cell.context + new)
        random_kv(model, cache, cell.batch, held, generator)
        return cache
    past = DynamicCache(config=model.config)
    random_kv(model, past, cell.batch, held, generator)
    if cell.arm == "dense eager":
        return past
    if cell.arm == "ours eager":
        return SparseCache(model, policy_of(cell), past=past, static=False)
    asked = dict(static=True) if static else {}
    return SparseCache(model, policy_of(cell), past=past, max_tokens=cell.context + new, **asked)


def bytes_a_step(model: PreTrainedModel, cell: Cell) -> int:
    """Bytes that a step has to read at least: weights, keys and values attended to, page bounds.

    The embedding's table is left out (a row of it is read), as is what is written.
    """
    config = model.config
    embedding = model.get_input_embeddings().weight
    tied = embedding is model.get_output_embeddings().weight
    weights = sum(p.nbytes for p in model.parameters()) - (0 if tied else embedding.nbytes)
    head = config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    if cell.arm == "no attention":
        return weights
    attended = cell.context if cell.budget is None else min(cell.budget, cell.context)
    scored = {"RaaS": attended, "Quest": cell.context}.get(cell.policy, 0)
    bounds = 0 if not scored else scored // policy_of(cell).page_size
    dense = min(policy_of(cell).dense_layers if cell.policy else 0, config.num_hidden_layers)
    tokens = dense * cell.context + (config.num_hidden_layers - dense) * (attended + bounds)
    return weights + cell.batch * 2 * head * tokens


@contextmanager
def without_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model's forward has everything but attention and the cache."""
    AttentionInterface.register("no_attention", no_attention)
    AttentionMaskInterface.register("no_attention", lambda *args, **kwargs: None)
    before = model.config._attn_implementation  # noqa: SLF001, as transformers names it
    model.set_attn_implementation("no_attention")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def no_attention(module: nn.Module, query: torch.Tensor, *args, **kwargs) -> tuple:
    """The query goes for the output: everything of a forward but attention and the cache."""
    return query.transpose(1, 2).contiguous(), None
