"""Run a plan: put compiled chunks in their places, and recompute only the chosen rows."""

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from picache.chunk import KV, Chunk
from picache.plan import Layout, LinkMethod, rows_to_compute
from picache.report import LinkReport
from picache.rope import Angles, Rotation, difference, rotate
from picache.store import ChunkStore, kv_bytes

if TYPE_CHECKING:
    from picache.hf import HFModel


def compile_chunk(model: "HFModel", ids: tuple[int, ...]) -> list[KV]:
    """KV of a chunk prefilled alone, positions from 0 (EPIC, arXiv 2410.15332, section 3)."""
    return model.prefill(torch.tensor([ids]))


def fetch(model: "HFModel", store: ChunkStore, chunk: Chunk) -> tuple[list[KV], bool]:
    """The chunk's KV and whether the store had it; compiled again when it was evicted."""
    kv = store.get(chunk.key)
    if kv is not None:
        return kv, True
    kv = compile_chunk(model, chunk.ids)
    store.put(chunk.key, kv)
    return kv, False


class _Clock:
    """Seconds between marks, with the device's work finished at each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def lap(self) -> float:
        before, self.last = self.last, self._now()
        return self.last - before


def _place(parts: list[list[KV]], skips: list[int], layout: Layout) -> list[KV]:
    """Whole-prompt KV per layer, the chunks copied in and the query's rows left to be written."""
    placed = []
    for layer in zip(*parts, strict=True):
        both = []
        for which in (0, 1):
            first = layer[0][which]
            shape = (1, first.shape[1], layout.total_length, first.shape[3])
            whole = first.new_empty(shape)
            for kv, skip, start in zip(layer, skips, layout.starts, strict=True):
                part = kv[which][:, :, skip:]
                whole[:, :, start : start + part.shape[2]] = part
            both.append(whole)
        placed.append((both[0], both[1]))
    return placed


def _move_keys(model: "HFModel", kv: list[KV], skips: list[int], layout: Layout) -> None:
    """Rotate every chunk's keys but the first's from where they were compiled to their place."""
    first, context = layout.chunk_lengths[0], layout.context_length
    if first == context:
        return
    new = torch.arange(first, context)
    old = torch.cat(
        [torch.arange(s, s + n) for s, n in zip(skips, layout.chunk_lengths, strict=True)][1:]
    )
    turns: dict[tuple[Rotation, bytes], Angles] = {}
    probe = torch.tensor([1])
    for layer, rotation in enumerate(model.rotations):
        if rotation is None:
            continue
        # Layers share angles unless their rotary frequencies differ (Gemma 3's layer types).
        same = (rotation, model.angles(layer, probe)[0].cpu().numpy().tobytes())
        if same not in turns:
            turns[same] = difference(model.angles(layer, old), model.angles(layer, new))
        keys = kv[layer][rotation.part][:, :, first:context]
        keys.copy_(rotate(keys, turns[same], rotation.layout, rotation.offset))


def layout_of(chunks: list[Chunk], skips: list[int], query: tuple[int, ...]) -> Layout:
    """Where chunks, less their skipped leading tokens, and the query stand."""
    lengths = (chunk.num_tokens - skip for chunk, skip in zip(chunks, skips, strict=True))
    return Layout(tuple(lengths), len(query))


def link_row(
    model: "HFModel",
    store: ChunkStore,
    chunks: list[Chunk],
    skips: list[int],
    query: tuple[int, ...],
    method: LinkMethod,
) -> tuple[Tensor, list[KV], Tensor, LinkReport]:
    """Link one prompt.

    Args:
        model: the model the chunks were compiled with.
        store: where their KV lives.
        chunks: in prompt order.
        skips: leading tokens of each chunk to leave out (a BOS in the middle, say).
        query: token ids after the last chunk.
        method: says which tokens of the chunks to recompute.

    Returns:
        Token ids ``[tokens]``, KV of every token per layer, logits of the first new token
        ``[1, vocab_size]``, and the report.
    """
    layout = layout_of(chunks, skips, query)
    rows = rows_to_compute(method, layout)
    tokens = [chunk.ids[skip:] for chunk, skip in zip(chunks, skips, strict=True)]
    ids = torch.tensor([token for part in (*tokens, query) for token in part])

    clock = _Clock(model.device)
    fetched = [fetch(model, store, chunk) for chunk in chunks]
    parts, hits = [kv for kv, _ in fetched], sum(hit for _, hit in fetched)
    compiling = clock.lap()
    kv = _place(parts, skips, layout)
    loading = clock.lap()
    _move_keys(model, kv, skips, layout)
    rotating = clock.lap()
    logits = model.scattered_forward(ids[rows], rows, kv)
    recomputing = clock.lap()

    report = LinkReport(
        method=repr(method),
        tokens_total=layout.total_length,
        tokens_reused=layout.total_length - len(rows),
        tokens_recomputed=len(rows),
        bytes_loaded=sum(kv_bytes(part) for part in parts),
        hits=hits,
        misses=len(chunks) - hits,
        seconds={
            "compile": compiling,
            "load": loading,
            "rotate": rotating,
            "recompute": recomputing,
            "first_token": compiling + loading + rotating + recomputing,
        },
    )
    return ids, kv, logits, report
