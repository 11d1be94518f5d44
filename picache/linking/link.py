"""Link one prompt: fetch its chunks, let the method choose tokens, recompute those."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from picache.chunk import KV, Form
from picache.errors import CorruptChunk
from picache.linking.fetched_chunk import FetchedChunk, compile_chunk
from picache.linking.linked_kv import LinkedKV
from picache.linking.measured_evidence import MeasuredEvidence, squared_distance
from picache.linking.report import LinkReport
from picache.linking.stopwatch import Stopwatch
from picache.methods.base import Layout, LinkMethod, Metric, positions_to_recompute
from picache.store import ChunkStore

if TYPE_CHECKING:
    from picache.hf.model import HFModel


@dataclass(frozen=True)
class Row:
    """One row of a batch, to be linked: its chunks in prompt order, and its query.

    Attributes:
        chunks: as they are prefilled; the first is an exact prefix of the prompt.
        query: token ids of what follows the last chunk.
        query_dropped: ids of special tokens that came with the query and are not in the prompt.
        seams: see `LinkReport`.
    """

    chunks: tuple[Form, ...]
    query: tuple[int, ...]
    query_dropped: tuple[int, ...] = ()
    seams: tuple[bool | None, ...] = ()

    @property
    def ids(self) -> Tensor:
        """Token ids of the linked prompt, int64 ``[tokens]``."""
        chunks = [token for form in self.chunks for token in form.ids[form.skip :]]
        return torch.tensor([*chunks, *self.query])

    def layout(self, num_layers: int) -> Layout:
        """Where the chunks, without the sinks they were compiled behind, and the query stand."""
        lengths = tuple(len(form.ids) - form.skip for form in self.chunks)
        return Layout(lengths, len(self.query), num_layers)


@dataclass(frozen=True)
class LinkedRow:
    """One row of a batch, linked.

    Attributes:
        ids: token ids, int64 ``[tokens]``.
        layout: where the chunks stand.
        kv: keys and values of every token, layer by layer.
        logits: of the first new token, ``[1, vocab_size]``.
        report: what linking did.
    """

    ids: Tensor
    layout: Layout
    kv: list[KV]
    logits: Tensor
    report: LinkReport


@dataclass(frozen=True)
class _Recomputed:
    """What running the chosen tokens through the model gave."""

    logits: Tensor
    kv: list[KV]
    entered: list[Tensor]  # positions of the tokens that went through each layer
    flops: float
    flops_full_prefill: float
    full_prefill: str  # why the prompt was prefilled in full; empty when it was linked


def link_row(
    model: "HFModel",
    store: ChunkStore,
    row: Row,
    method: LinkMethod,
    flops_per_byte: float | None = None,
) -> LinkedRow:
    """Link one prompt, or prefill it in full where linking would cost as much.

    Args:
        model: the model the chunks were compiled with.
        store: where their KV lives.
        row: the prompt.
        method: says which tokens of the chunks to recompute.
        flops_per_byte: what moving a byte of KV costs, in floating-point operations; None to link
            whatever it costs.
    """
    watch, ids, layout = Stopwatch(), row.ids, row.layout(len(model.rotations))
    failures_before = store.failures
    with store.using([form.key for form in row.chunks]):  # nobody evicts what is being read
        different = {form.key: form for form in row.chunks}  # a chunk may stand in several places
        found = {key: FetchedChunk(model, store, form, watch) for key, form in different.items()}
        fetched = [found[form.key] for form in row.chunks]
        parts: list[Callable[[int], KV]] = [chunk.layer for chunk in fetched]
        skips = [form.skip for form in row.chunks]
        compiled_tokens = sum(len(form.ids) for form in row.chunks)
        if not method.force_query:
            with watch.span("compile"):
                query = compile_chunk(model, row.query)
            parts.append(lambda layer: query[layer])
            skips.append(0)
            compiled_tokens += len(row.query)
        tiers = {chunk.tier for chunk in fetched}
        prefetch_from = next((tier for tier in ("disk", "host") if tier in tiers), None)
        nbytes = model.bytes_per_token * compiled_tokens
        while True:
            try:
                with LinkedKV(model, parts, skips, layout, prefetch_from, method.parallel) as kv:
                    done = _recompute(model, kv, ids, layout, method, flops_per_byte, nbytes)
                break
            except CorruptChunk:  # a layer was damaged when it was due: mend it and begin again
                for chunk in found.values():
                    chunk.mend()
        first_token = watch.elapsed
        for key, chunk in found.items():
            if chunk.tier == "host" and chunk.hit:
                with suppress(CorruptChunk):  # it has left for a disk meanwhile, which fails
                    store.promote(key, model.device)

    report = LinkReport(
        method=repr(method),
        tokens_total=layout.total_length,
        tokens_recomputed_per_layer=tuple(len(positions) for positions in done.entered),
        bytes_loaded=kv.nbytes,
        chunk_hits=tuple(chunk.hit for chunk in fetched),
        flops=done.flops,
        flops_full_prefill=done.flops_full_prefill,
        seconds={
            "look_up": watch.seconds("look_up"),
            "compile": watch.seconds("compile"),
            "load": kv.watch.seconds("load"),
            "rotate": kv.watch.seconds("rotate"),
            "choose": kv.watch.seconds("choose", without="wait"),
            "recompute": kv.watch.seconds("recompute", without="wait"),
            "first_token": first_token,
        },
        full_prefill=done.full_prefill,
        store_failures=dict(store.failures - failures_before),
        dropped=(*(form.dropped for form in row.chunks), row.query_dropped),
        seams=row.seams,
    )
    return LinkedRow(ids, layout, done.kv, done.logits, report)


def _recompute(
    model: "HFModel",
    kv: LinkedKV,
    ids: Tensor,
    layout: Layout,
    method: LinkMethod,
    flops_per_byte: float | None,
    nbytes: int,
) -> _Recomputed:
    """Choose tokens and recompute them, or prefill the prompt in full where that costs no more.

    Args:
        model: the model the chunks were compiled with.
        kv: of the whole prompt as compiled; overwritten at the tokens that are recomputed.
        ids: token ids of the prompt, ``[tokens]``.
        layout: of the prompt.
        method: chooses the tokens.
        flops_per_byte: see `link_row`.
        nbytes: of compiled KV that linking moves.
    """
    with kv.watch.span("choose"):
        evidence = MeasuredEvidence(model, ids, layout, kv)
        positions = positions_to_recompute(method, layout, evidence)
    narrow = _narrowing(method, layout)
    everything = [torch.arange(layout.total_length)] * layout.num_layers
    flops_full_prefill, reason = model.flops(everything), ""
    if narrow is None and flops_per_byte is not None and method.parallel is None:
        linking = model.flops([positions] * layout.num_layers) + flops_per_byte * nbytes
        ratio = linking / flops_full_prefill
        reason = f"linking would cost {ratio:.2f} times as much (estimated)" if ratio >= 1 else ""
    with kv.watch.span("recompute"):
        if reason:
            logits, layers = model.full_prefill(ids)
            entered = everything
        else:
            parallel, rotary_positions = None, positions
            if method.parallel is not None:
                side_by_side = slice(layout.prefix_length, layout.context_length)
                parallel = (side_by_side, method.parallel.lse_scale)
                rotary_positions = layout.parallel_positions()[positions]
            logits, entered = model.scattered_forward(
                ids[positions], positions, kv, narrow, rotary_positions, parallel
            )
            layers = [kv[layer] for layer in range(layout.num_layers)]
    model.finish()
    alone = [] if method.force_query else [torch.arange(layout.query_length)] * layout.num_layers
    flops = model.flops([*evidence.entered, *alone, *entered])
    return _Recomputed(logits, layers, entered, flops, flops_full_prefill, reason)


def _narrowing(method: LinkMethod, layout: Layout) -> Callable | None:
    """The method's `narrow` as `HFModel.scattered_forward` calls it; None if it has none.

    What must be recomputed in every layer, the query or its last token, is left out of what the
    method sees and added to what it chose.
    """
    if type(method).narrow is LinkMethod.narrow:
        return None
    forced = layout.context_length if method.force_query else layout.total_length - 1

    def narrow(
        layer: int, positions: Tensor, fresh: KV, reused: KV
    ) -> tuple[Tensor, Tensor] | None:
        free = int((positions < forced).sum())
        fresh_free, reused_free = (
            (keys[:, :, :free], values[:, :, :free]) for keys, values in (fresh, reused)
        )

        def deviation(metric: Metric) -> Tensor:
            return squared_distance(fresh_free, reused_free, metric).cpu()

        chosen = method.narrow(layer, layout, positions[:free].cpu(), deviation)
        if chosen is None:
            return None
        always = positions[free:].cpu()
        return torch.cat([chosen[0], always]), torch.cat([chosen[1], always])

    return narrow
