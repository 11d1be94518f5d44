"""What the tests of picache share: tiny PICs, prompts of random tokens, the right results."""

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from picache import PIC, Chunk, LinkedPrompt, LinkMethod, StoredChunk
from picache.chunk import KV
from picache.sinks import Sinks
from tests.helpers import random_ids, tiny_model

LENGTHS = (7, 20, 33, 1, 18)


@cache
def pic_of(family: str, sinks: Sinks = "drop", device: str = "cpu") -> PIC:
    """A PIC of a tiny model of the family that links whatever it costs; the same one each time."""
    return PIC(tiny_model(family).to(device), sinks=sinks, flops_per_byte=None)


def prompt_parts(
    lengths: Iterable[int] = LENGTHS, query: int = 9, seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    """Random documents of these lengths and a random query, as token ids."""
    parts = [random_ids(n, seed=seed * 100 + i) for i, n in enumerate((*lengths, query))]
    return parts[:-1], parts[-1]


def compiled(pic: PIC, documents: Iterable[Tensor]) -> list[Chunk]:
    return [pic.compile(document) for document in documents]


def chunks_of(pic: PIC, *lengths: int) -> list[Chunk]:
    """Compiled random documents of these lengths; each is drawn by its own length."""
    return compiled(pic, [random_ids(n, seed=n) for n in lengths])


def linked(
    pic: PIC,
    method: LinkMethod,
    lengths: Iterable[int] = LENGTHS,
    query: int = 9,
    seed: int = 0,
) -> tuple[LinkedPrompt, Tensor]:
    """A linked prompt of random parts, and its token ids ``[tokens]``."""
    documents, question = prompt_parts(lengths, query, seed)
    return pic.link(compiled(pic, documents), question, method), torch.cat([*documents, question])


def prefill(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Cache]:
    """The model's own logits behind ids ``[tokens]``, and its cache."""
    with torch.no_grad():
        out = model(ids[None].to(model.device), use_cache=True)
    return out.logits[:, -1], out.past_key_values


def full_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The model's own logits behind ids ``[tokens]``."""
    return prefill(model, ids)[0]


def same_kv(stored: StoredChunk, kv: list[KV]) -> bool:
    """Whether a store gives out what was put in, to the bit."""
    return all(
        torch.equal(mine, theirs)
        for ours, given in zip(stored, kv, strict=True)
        for mine, theirs in zip(ours, given, strict=True)
    )
