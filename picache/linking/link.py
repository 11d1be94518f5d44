"""Link a batch of prompts: fetch the chunks, let the method choose tokens, recompute those."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from picache.chunk import KV
from picache.errors import CorruptChunk
from picache.hf.due import Due, nothing_due
from picache.hf.sparse_pass import CannotCapture, Question
from picache.kernels.placing import can_place
from picache.linking.linked_kv import LinkedKV, place_rows
from picache.linking.measured_evidence import MeasuredEvidence
from picache.linking.narrowing import narrowing, narrows, why_never_captured
from picache.linking.prompt import LinkedPrompt, batched
from picache.linking.questions import question
from picache.linking.report import LinkReport
from picache.linking.row import LinkedRow, Row, RowPlaces
from picache.linking.sources import Part, Sources
from picache.linking.stopwatch import Stopwatch
from picache.methods.base import Layout, LinkMethod, positions_to_recompute
from picache.store import ChunkStore

if TYPE_CHECKING:
    from picache.hf.captured_pass import CapturedPasses
    from picache.hf.model import HFModel


_WAIT_TO_CHOOSE = "wait to choose"
_NONE = torch.empty(0, dtype=torch.int64)


class ModelChanged(Exception):  # noqa: N818 - no error: the link begins again
    """Says that the model is not the one that a link has begun with."""


@dataclass
class _Linking:
    """One row while it is linked.

    Attributes:
        row: as asked for.
        ids: token ids of the prompt, ``[tokens]``.
        layout: where the chunks stand.
        kv: of the whole prompt as compiled; overwritten at the tokens that are recomputed.
        positions: of the tokens to recompute.
        measured: for each layer that was run to choose them, the positions that entered it.
        full_prefill: why the prompt is prefilled in full; empty where it is linked.
        entered: positions of the tokens that went through each layer.
        in_places: whether its keys and values lie in the arena in the end.
        layers: elsewhere keys and values of every token, layer by layer, in the end.
        logits: of the first new token, ``[1, vocab_size]``, in the end.
        recompute_pass: how the pass ran.
    """

    row: Row
    ids: Tensor
    layout: Layout
    kv: LinkedKV
    positions: Tensor = _NONE
    measured: list[Tensor] = field(default_factory=list)
    full_prefill: str = ""
    entered: list[Tensor] = field(default_factory=list)
    in_places: bool = False
    layers: list[KV] = field(default_factory=list)
    logits: Tensor = _NONE
    recompute_pass: str = ""

    @cached_property
    def everything(self) -> list[Tensor]:
        """All positions in each layer, as a full prefill runs them."""
        return [torch.arange(self.layout.total_length)] * self.layout.num_layers


class Link:
    """The link of one batch: fetch, choose, place, recompute, report.

    Args:
        model: the model the chunks were compiled with.
        passes: its captured passes.
        store: where the chunks' KV lives.
        rows: the prompts.
        method: says which tokens of the chunks to recompute.
        flops_per_byte: what moving a byte of KV costs, in floating-point operations; None to link
            whatever it costs. A prompt is prefilled in full where linking would cost as much.
        pad_id: token id of the padding of a batch.
        watch: started when linking began; by the clock.
        look_again: raises `ModelChanged`, or what refuses the model, where it is not as the rows
            take it to be; None where it was looked at just now. It is asked before anything is
            compiled, read, captured or run eagerly, else while the device replays a captured pass.
    """

    def __init__(
        self,
        model: "HFModel",
        passes: "CapturedPasses",
        store: ChunkStore,
        rows: Sequence[Row],
        method: LinkMethod,
        flops_per_byte: float | None,
        pad_id: int,
        watch: Stopwatch,
        look_again: Callable[[], None] | None = None,
    ) -> None:
        self._look_again = look_again
        self._model, self._passes, self._store = model, passes, store
        self._rows, self._method = rows, method
        self._flops_per_byte, self._pad_id, self._watch = flops_per_byte, pad_id, watch
        self._failures = store.failures
        self._together = Stopwatch(model.device)  # what is done for all rows at once
        # What capturing took: of passes that a method chose by, and of the one that followed.
        self._choose_capture_seconds = self._recompute_capture_seconds = 0.0

    def __call__(self) -> LinkedPrompt:
        """Link the batch."""
        keys = [form.key for row in self._rows for form in row.chunks]
        # Nobody evicts what is being read.
        with self._store.using(keys):
            if not self._store.on_device(keys):
                self._see()  # before anything is compiled or read
            alone = not self._method.force_query
            sources = Sources(self._model, self._store, self._rows, alone, self._watch, self._see)
            while True:
                try:
                    with self._places() as (places, reason):
                        return self._linked(sources, places, reason)
                except CorruptChunk:  # a layer was damaged when it was due: mend, begin again
                    if self._model.shards is not None:
                        raise  # the other processes are in the middle of the pass
                    sources.mend()

    def _see(self) -> None:
        """Look at the model again, unless that was done: `ModelChanged` where it has changed."""
        if self._look_again is not None:
            self._look_again()
            self._look_again = None

    @contextmanager
    def _places(self) -> Iterator[tuple[list[KV] | None, str]]:
        """The arena's places for the batch, in whose turn the block runs, or why there are none."""
        passes = self._passes
        reason = why_never_captured(self._method) or passes.why_no_device()
        with ExitStack() as turn:
            places = None
            if not reason:
                turn.enter_context(passes.turn())
                longest = max(row.layout(1).total_length for row in self._rows)
                try:
                    places = passes.claim(len(self._rows), longest)
                except CannotCapture as error:
                    reason = str(error)
                    turn.close()
            yield places, reason

    def _linked(self, sources: Sources, places: list[KV] | None, reason: str) -> LinkedPrompt:
        """The prompt, put together in the places, or each row in memory of its own."""
        placeable = False
        if places is not None:  # as the first row lies, and the second, so lie all
            second = RowPlaces(places, min(1, len(self._rows) - 1), 1)
            placeable = can_place(places) and can_place(second)
        with ExitStack() as open_:
            linkings = [
                open_.enter_context(self._begun(sources, index, parts, places, placeable))
                for index, parts in enumerate(sources.parts())
            ]
            asked = _Asked(self, linkings, places)
            for index, linking in enumerate(linkings):
                self._choose(linking, sources, partial(asked, index))
            if places is not None:
                reason = self._recompute_together(linkings, places)
            if not all(linking.in_places for linking in linkings):
                self._see()
            for linking in linkings:
                if not linking.in_places:
                    self._recompute(linking, reason)
        # What was begun for layers that a row prefilled in full does not need may still be placed.
        self._model.wait_for_loading()
        # What follows keeps Python busy while the device still computes.
        reports = [self._report(linking, sources) for linking in linkings]
        self._see()  # before a prompt holds on to the arena
        arena = None if places is None else self._passes.arena
        rows = [
            LinkedRow(one.ids, one.layout, one.layers, one.logits, one.in_places)
            for one in linkings
        ]
        prompt = batched(self._model, rows, self._method, self._pad_id, arena)
        self._model.finish()
        first_token = self._watch.elapsed
        self._promote(sources)
        timed = [
            replace(report, seconds=self._seconds(linking, first_token))
            for report, linking in zip(reports, linkings, strict=True)
        ]
        failures = dict(self._store.failures - self._failures)
        timed[0] = replace(timed[0], store_failures=failures)
        return prompt(tuple(timed), self._watch.elapsed)

    @contextmanager
    def _begun(
        self,
        sources: Sources,
        index: int,
        parts: list[Part],
        places: list[KV] | None,
        placeable: bool,
    ) -> Iterator["_Linking"]:
        """A row of which nothing is chosen yet."""
        row = self._rows[index]
        layout = row.layout(len(self._model.rotations))
        memory = None if places is None else RowPlaces(places, index, layout.total_length)
        with LinkedKV(
            self._model,
            parts,
            sources.layer_groups,
            sources.skips(row),
            layout,
            sources.prefetch_from,
            self._method.parallel,
            memory,
            None if memory is None else sources.residents(index),
            placeable,
        ) as kv:
            yield _Linking(row, row.ids, layout, kv)

    def _choose(
        self,
        linking: "_Linking",
        sources: Sources,
        masses: Callable[[int | None, bool], Tensor | None],
    ) -> None:
        """Choose the tokens to recompute, or to prefill the prompt in full if it costs no more."""
        model, method, layout = self._model, self._method, linking.layout
        with linking.kv.watch.span("choose"):
            evidence = MeasuredEvidence(model, linking.ids, layout, linking.kv, masses, self._see)
            linking.positions = positions_to_recompute(method, layout, evidence)
        linking.measured = evidence.entered
        if self._flops_per_byte is None or narrows(method) or method.parallel is not None:
            return
        processes = 1 if model.shards is None else model.shards.size
        nbytes = processes * model.bytes_per_token * sources.compiled_tokens(linking.row)
        linked = model.flops([linking.positions] * layout.num_layers)
        ratio = (linked + self._flops_per_byte * nbytes) / model.flops(linking.everything)
        if ratio >= 1:
            linking.full_prefill = f"linking would cost {ratio:.2f} times as much (estimated)"

    def _recompute_together(self, linkings: list["_Linking"], places: list[KV]) -> str:
        """Recompute the rows that are linked in one captured pass; why not, if it cannot be."""
        chosen = [
            linking.positions[:0] if linking.full_prefill else linking.positions
            for linking in linkings
        ]
        if not any(map(len, chosen)):
            return ""
        due = self._placing(linkings, places, "wait")
        ids = [linking.ids[at] for linking, at in zip(linkings, chosen, strict=True)]
        if not self._passes.only_replays(ids):
            self._see()
        try:
            with self._together.span("recompute"):
                logits, how, seconds = self._passes.run(ids, chosen, due)
        except CannotCapture as error:
            self._model.wait_for_loading()
            return str(error)
        self._recompute_capture_seconds = seconds
        for index, linking in enumerate(linkings):
            if not linking.full_prefill:
                linking.entered = [linking.positions] * linking.layout.num_layers
                linking.in_places = True
                linking.logits, linking.recompute_pass = logits[index : index + 1], how
        return ""

    def masses(
        self, linkings: list["_Linking"], places: list[KV], question: Question
    ) -> Tensor | None:
        """How much the queries of all rows attend to each place; None where it is not captured.

        Returns:
            fp32 ``[layers, batch, places]`` on the CPU.
        """
        due = self._placing(linkings, places, _WAIT_TO_CHOOSE)
        positions = [
            torch.arange(one.layout.context_length, one.layout.total_length) for one in linkings
        ]
        ids = [one.ids[at] for one, at in zip(linkings, positions, strict=True)]
        if not self._passes.only_replays(ids, question):
            self._see()
        try:
            found, seconds = self._passes.masses(ids, positions, question, due)
        except CannotCapture:  # the pass over the chosen rows says why
            self._model.wait_for_loading()
            return None
        self._choose_capture_seconds += seconds
        return found

    def _placing(self, linkings: list["_Linking"], places: list[KV], waiting: str) -> Due:
        """Put the rows together that are linked: at once, or, as what is returned does, when due.

        Layer by layer, what rows share is soon let go. The time until they are there is measured
        under the name that is given.
        """
        at = [index for index, linking in enumerate(linkings) if not linking.full_prefill]
        at = [index for index in at if not linkings[index].kv.begun]
        rows = [linkings[index].kv for index in at]
        if all(row.at_once for row in rows):
            if rows:
                place_rows(rows, at, places, self._together)
            return nothing_due

        def due(layers: range) -> None:
            with self._together.span(waiting):
                for layer in layers:
                    for row in rows:
                        row[layer]

        return due

    def _recompute(self, linking: "_Linking", reason: str) -> None:
        """Recompute one row eagerly, or prefill it in full."""
        model, method, layout, kv = self._model, self._method, linking.layout, linking.kv
        with kv.watch.span("recompute"):
            if linking.full_prefill:
                linking.logits, linking.layers = model.full_prefill(linking.ids)
                linking.entered = linking.everything
                return
            parallel, rotary_positions = None, linking.positions
            if method.parallel is not None:
                side_by_side = slice(layout.prefix_length, layout.context_length)
                parallel = (side_by_side, method.parallel.lse_scale)
                rotary_positions = layout.parallel_positions()[linking.positions]
            linking.logits, linking.entered = model.scattered_forward(
                linking.ids[linking.positions],
                linking.positions,
                kv,
                narrowing(method, layout, model.over_heads),
                rotary_positions,
                parallel,
            )
            linking.layers = [kv[layer] for layer in range(layout.num_layers)]
        linking.recompute_pass = f"eager: {reason}"

    def _promote(self, sources: Sources) -> None:
        """Bring chunks that were found in host memory back to the device."""
        for key, chunk in sources.chunks.items():
            if chunk.tier == "host" and chunk.hit:
                with suppress(CorruptChunk):  # it has left for a disk meanwhile, which fails
                    self._store.promote(key, self._model.device)

    def _report(self, linking: "_Linking", sources: Sources) -> LinkReport:
        """What linking did to a row; the seconds are not known yet."""
        model, row, layout = self._model, linking.row, linking.layout
        alone = [] if self._method.force_query else [torch.arange(layout.query_length)]
        flops = [*linking.measured, *alone * layout.num_layers, *linking.entered]
        return LinkReport(
            method=repr(self._method),
            tokens_total=layout.total_length,
            tokens_recomputed_per_layer=tuple(len(at) for at in linking.entered),
            bytes_loaded=linking.kv.nbytes,
            chunk_hits=tuple(chunk.hit for chunk in sources.of(row)),
            flops=model.flops(flops),
            flops_full_prefill=model.flops(linking.everything),
            full_prefill=linking.full_prefill,
            dropped=(*(form.dropped for form in row.chunks), row.query_dropped),
            seams=row.seams,
            recompute_pass=linking.recompute_pass,
        )

    def _seconds(self, linking: "_Linking", first_token: float) -> dict[str, float]:
        """The seconds of a row; of what was done for all rows at once, its share."""
        watch, share = linking.kv.watch, 1 / len(self._rows)
        capture = self._choose_capture_seconds + self._recompute_capture_seconds
        choose = watch.seconds("choose", without="wait")
        if linking.row is self._rows[0]:  # which is asked first, for all
            waited = self._together.seconds(_WAIT_TO_CHOOSE)
            if waited:
                choose = watch.seconds("choose") - waited
            choose = max(0.0, choose - self._choose_capture_seconds)
        recompute = watch.seconds("recompute", without="wait")
        if not linking.full_prefill:
            together = self._together.seconds("recompute", without="wait")
            recompute += share * max(together - self._recompute_capture_seconds, 0.0)
        return {
            "look_up": share * self._watch.seconds("look_up"),
            "compile": share * self._watch.seconds("compile"),
            "load": watch.seconds("load") + share * self._together.seconds("load"),
            "rotate": watch.seconds("rotate"),
            "choose": choose,
            "capture": share * capture,
            "recompute": recompute,
            "first_token": first_token,
        }


class _Asked:
    """How much the queries of a batch attend to each token, from one captured pass of all rows.

    Every row is asked the same, since one method links them all: what the first one is asked is
    answered for all.

    Args:
        link: of the batch.
        rows: of it, in order.
        places: the arena's places; None where the batch lies elsewhere, and nothing is answered.
    """

    def __init__(self, link: Link, rows: list[_Linking], places: list[KV] | None) -> None:
        self._link, self._rows, self._places = link, rows, places
        self._answers: dict[Question, Tensor | None] = {}

    def __call__(self, index: int, layers: int | None, value_norm: bool) -> Tensor | None:
        """Of one row, fp32 ``[layers, tokens]`` on the CPU; None where no pass is captured."""
        if self._places is None:
            return None
        asked = question(layers, value_norm, self._rows[index].layout.num_layers)
        if asked not in self._answers:
            self._answers[asked] = self._link.masses(self._rows, self._places, asked)
        found = self._answers[asked]
        return None if found is None else found[:, index, : self._rows[index].layout.total_length]
