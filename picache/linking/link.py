"""Link one prompt: place its chunks, ask the method, recompute the rows it chose."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from picache.chunk import KV, Form
from picache.errors import CorruptChunk, StoreFull
from picache.linking.linked_kv import LinkedKV
from picache.linking.measured_evidence import MeasuredEvidence, squared_distance
from picache.linking.report import LinkReport
from picache.methods.base import Layout, LinkMethod, Metric, rows_to_compute
from picache.store import ChunkStore
from picache.store.quantize import decode, encode

if TYPE_CHECKING:
    from picache.hf.model import HFModel


@dataclass(frozen=True)
class Row:
    """One prompt to link: its chunks as they are compiled, the first an exact prefix, its query."""

    chunks: tuple[Form, ...]
    query: Form


def layout_of(row: Row, num_layers: int) -> Layout:
    """Where the chunks, less their skipped leading tokens, and the query stand."""
    lengths = tuple(len(form.ids) - form.skip for form in row.chunks)
    return Layout(lengths, len(row.query.ids) - row.query.skip, num_layers)


def compile_chunk(model: "HFModel", ids: tuple[int, ...]) -> list[KV]:
    """KV of a chunk prefilled alone, positions from 0 (EPIC, arXiv 2410.15332, section 3)."""
    return model.prefill(torch.tensor([ids]))


class Fetched:
    """One chunk's KV by layer, compiled where the store has lost it or finds it damaged.

    Attributes:
        hit: whether the store had it.
        tier: where: "device", "host" or "disk"; "device" when it was compiled just now.
        look_up_seconds: what finding it took.
    """

    def __init__(self, model: "HFModel", store: ChunkStore, form: Form, keep: bool = False) -> None:
        self._model, self._store, self._form = model, store, form
        self._device = model.device
        looking = time.perf_counter()
        self._stored = store.get(form.key)
        self.look_up_seconds = time.perf_counter() - looking
        self._compiled: list[KV] = []
        self._damaged = False
        self.hit = self._stored is not None
        self.tier = "device" if self._stored is None else self._stored.tier
        if self._stored is None:
            with suppress(*() if keep else (StoreFull,)):  # a link goes on with the KV in hand
                self._compile()

    def _compile(self) -> None:
        """Prefill the chunk and store it; raises `StoreFull`, with the KV in hand all the same."""
        assert self._form.header is not None
        begun = time.perf_counter()
        computed = compile_chunk(self._model, self._form.ids)
        header = replace(self._form.header, compile_seconds=time.perf_counter() - begun)
        storage = self._store.storage  # a link goes on with what a hit would give
        self._compiled = [decode(encode(kv, storage), kv[0].dtype) for kv in computed]
        self._store.put(self._form.key, computed, header)

    def layer(self, index: int) -> KV:
        """Keys and values ``[1, kv_heads, tokens, head_dim]`` on the model's device.

        Raises:
            CorruptChunk: when the file is damaged; the store has dropped it, `mend` compiles it.
        """
        if self._stored is None:
            return self._compiled[index]
        try:
            return self._stored.layer(index, self._device)
        except CorruptChunk:
            self._damaged = True
            raise

    def mend(self) -> None:
        """Compile the chunk again if it was found damaged; no pass may be under way."""
        if self._damaged:
            self._damaged, self._stored, self.hit = False, None, False
            with suppress(StoreFull):
                self._compile()


def _narrowing(method: LinkMethod, layout: Layout) -> Callable | None:
    """The method's `narrow` in the engine's terms; None when it keeps its rows."""
    if type(method).narrow is LinkMethod.narrow:
        return None
    forced = layout.context_length if method.force_query else layout.total_length - 1

    def narrow(layer: int, rows: Tensor, fresh: KV, stale: KV) -> tuple[Tensor, Tensor] | None:
        free = int((rows < forced).sum())
        fresh_free, stale_free = (
            (keys[:, :, :free], values[:, :, :free]) for keys, values in (fresh, stale)
        )

        def deviation(metric: Metric) -> Tensor:
            return squared_distance(fresh_free, stale_free, metric).cpu()

        chosen = method.narrow(layer, layout, rows[:free].cpu(), deviation)
        if chosen is None:
            return None
        always = rows[free:].cpu()
        return torch.cat([chosen[0], always]), torch.cat([chosen[1], always])

    return narrow


@dataclass(frozen=True)
class Linked:
    """One linked prompt.

    Attributes:
        ids: token ids ``[tokens]``.
        layout: where the chunks stand.
        kv: keys and values of every token per layer.
        logits: of the first new token ``[1, vocab_size]``.
        report: what linking did.
    """

    ids: Tensor
    layout: Layout
    kv: list[KV]
    logits: Tensor
    report: LinkReport


@dataclass
class _Outcome:
    """What one pass over a prompt gave."""

    logits: Tensor
    kv: list[KV]
    entered: list[Tensor]  # positions that went through each layer
    flops: float
    flops_full_prefill: float
    full_prefill: str
    seconds: dict[str, float]


def _pass(
    model: "HFModel",
    kv: LinkedKV,
    ids: Tensor,
    layout: Layout,
    method: LinkMethod,
    flops_per_byte: float | None,
    nbytes: int,
) -> _Outcome:
    """Choose rows and recompute them, or prefill in full where that costs no more."""
    begun = time.perf_counter()
    evidence = MeasuredEvidence(model, ids, layout, kv)
    rows, narrow = rows_to_compute(method, layout, evidence), _narrowing(method, layout)
    model.finish()
    chosen, waited = time.perf_counter(), kv.watch.seconds("wait")
    everything = [torch.arange(layout.total_length)] * layout.num_layers
    full, reason = model.flops(everything), ""
    if narrow is None and flops_per_byte is not None and method.parallel is None:
        linking = model.flops([rows] * layout.num_layers) + flops_per_byte * nbytes
        ratio = linking / full
        reason = f"linking would cost {ratio:.2f} times as much (estimated)" if ratio >= 1 else ""
    if reason:
        logits, layers = model.full_prefill(ids)
        entered = everything
    else:
        parallel, at = None, rows
        if method.parallel is not None:
            behind = slice(layout.prefix_length, layout.context_length)
            parallel, at = (behind, method.parallel.scale), layout.parallel_positions()[rows]
        logits, entered = model.scattered_forward(ids[rows], rows, kv, narrow, at, parallel)
        layers = [kv[layer] for layer in range(layout.num_layers)]
    model.finish()
    seconds = {
        "load": kv.watch.seconds("load"),
        "rotate": kv.watch.seconds("rotate"),
        "choose": chosen - begun - waited,
        "recompute": time.perf_counter() - chosen - (kv.watch.seconds("wait") - waited),
    }
    alone = [] if method.force_query else [torch.arange(layout.query_length)] * layout.num_layers
    flops = model.flops([*evidence.entered, *alone, *entered])
    return _Outcome(logits, layers, entered, flops, full, reason, seconds)


def link_row(
    model: "HFModel",
    store: ChunkStore,
    row: Row,
    method: LinkMethod,
    flops_per_byte: float | None = None,
) -> Linked:
    """Link one prompt, or prefill it in full where linking would cost as much.

    Args:
        model: the model the chunks were compiled with.
        store: where their KV lives.
        row: the prompt.
        method: says which tokens of the chunks to recompute.
        flops_per_byte: what moving a byte of KV costs, in floating-point operations; None to link
            whatever it costs.
    """
    failed = store.failures
    with store.using([form.key for form in row.chunks]):  # nobody evicts what is being read
        linked = _link_row(model, store, row, method, flops_per_byte)
    seen = dict(store.failures - failed)
    return replace(linked, report=replace(linked.report, store_failures=seen)) if seen else linked


def _link_row(
    model: "HFModel",
    store: ChunkStore,
    row: Row,
    method: LinkMethod,
    flops_per_byte: float | None,
) -> Linked:
    begun = time.perf_counter()
    layout = layout_of(row, len(model.rotations))
    forms = (*row.chunks, row.query)
    ids = torch.tensor([token for form in forms for token in form.ids[form.skip :]])
    unlike = {form.key: form for form in row.chunks}  # a chunk may stand in several places
    found = {key: Fetched(model, store, form) for key, form in unlike.items()}
    fetched = [found[form.key] for form in row.chunks]
    looking = sum(one.look_up_seconds for one in found.values())
    parts: list[Callable[[int], KV]] = [one.layer for one in fetched]
    if not method.force_query:
        query = compile_chunk(model, row.query.ids)
        parts.append(lambda layer: query[layer])
    compiling = time.perf_counter() - begun - looking
    skips = [form.skip for form in forms][: len(parts)]
    nbytes = model.bytes_per_token * sum(len(form.ids) for form in forms[: len(parts)])
    tiers = {one.tier for one in fetched}
    far = next((tier for tier in ("disk", "host") if tier in tiers), None)
    while True:
        try:
            with LinkedKV(model, parts, skips, layout, far, method.parallel) as kv:
                done = _pass(model, kv, ids, layout, method, flops_per_byte, nbytes)
            break
        except CorruptChunk:  # found when its layer was due: mend it and begin again
            mending = time.perf_counter()
            for one in found.values():
                one.mend()
            compiling += time.perf_counter() - mending
    first_token = time.perf_counter() - begun
    for key, one in found.items():
        if one.tier == "host" and one.hit:
            with suppress(CorruptChunk):  # it has left for a disk meanwhile, and that fails
                store.promote(key, model.device)

    report = LinkReport(
        method=repr(method),
        tokens_total=layout.total_length,
        tokens_recomputed_per_layer=tuple(len(positions) for positions in done.entered),
        bytes_loaded=kv.nbytes,
        chunk_hits=tuple(one.hit for one in fetched),
        flops=done.flops,
        flops_full_prefill=done.flops_full_prefill,
        seconds={
            "look_up": looking,
            "compile": compiling,
            **done.seconds,
            "first_token": first_token,
        },
        full_prefill=done.full_prefill,
    )
    return Linked(ids, layout, done.kv, done.logits, report)
