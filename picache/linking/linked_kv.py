"""The keys and values of a whole prompt, put together from compiled chunks layer by layer."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from picache.chunk import KV
from picache.errors import PICacheError
from picache.hf.rope import rotate_
from picache.kernels.placing import LayerKV, Resident, place_layers
from picache.linking.moves import Moves
from picache.linking.read_ahead import ReadAhead
from picache.linking.sources import Part
from picache.linking.stopwatch import Stopwatch
from picache.methods.base import Layout, ParallelEncoding

if TYPE_CHECKING:
    from picache.hf.model import HFModel


class _Made(NamedTuple):
    """Layers that are made, or will be as soon as the device comes to it.

    Args:
        layers: keys and values of each.
        done: tells when they are, in the CUDA stream for loading; None where they are.
    """

    layers: Sequence[KV]
    done: torch.cuda.Event | None


class LinkedKV:
    """The keys and values of a prompt, layer by layer; a layer is made when it is first asked for.

    The KV of each chunk is copied to its place in the prompt, and its keys are rotated from the
    positions they were compiled at to those they have in the prompt. A few layers are made at a
    time: a copy for every layer of every chunk would take longer to begin than to do.

    In memory that is handed in, all layers of chunks that lie on the model's device are made when
    the first is asked for, or before, together with other prompts (`place_rows`).

    With `prefetch_from`, the next layers are made while the last ones are recomputed, so that
    loading and computing overlap. On a CUDA device that is done in a stream of its own. A thread is
    used where loading waits for a disk; not otherwise, since two threads of Python slow each other
    down, and a CPU that copies does not compute meanwhile. From a disk, further threads read and
    check the chunks in those layers and in later ones (`ReadAhead`). Use it as a context manager,
    which ends the threads.

    Args:
        model: the model the chunks were compiled with.
        parts: for each chunk in prompt order, a function that gives its KV in some layers,
            ``[1, kv_heads, tokens, head_dim]``, on the model's device; after them one for the
            query, if it was compiled too.
        layer_groups: the layers that are made at a time, in their order.
        skips: how many of the first tokens of each part, its sinks, are left out.
        layout: where the chunks stand in the prompt.
        prefetch_from: prefetch the next layers out of "host" memory or from "disk"; None to make
            layers when they are asked for, as on a CPU out of "host" too.
        parallel: how chunks side by side are encoded (APE); None for chunks one after the other.
        memory: keys and values ``[1, kv_heads, tokens, head_dim]`` of each layer, which the prompt
            is put together in; None to allocate them.
        residents: the parts again, in all layers, where all of them lie on the model's device.
        placeable: whether kernels can write to the memory (`can_place`).

    Attributes:
        at_once: whether all layers are made at once.
        begun: whether they were.
        moves: where the parts go.
        watch: measures copying ("load"), rotating ("rotate"), and how long the reader of a layer
            waits for it ("wait").
        nbytes: bytes of the keys and values copied so far.

    Raises:
        PICacheError: when chunks shall stand side by side in a model that cannot do that.
    """

    def __init__(
        self,
        model: "HFModel",
        parts: Sequence[Part],
        layer_groups: Sequence[range],
        skips: Sequence[int],
        layout: Layout,
        prefetch_from: Literal["host", "disk"] | None = None,
        parallel: ParallelEncoding | None = None,
        memory: Sequence[KV] | None = None,
        residents: Sequence[Resident] | None = None,
        placeable: bool = False,
    ) -> None:
        if parallel is not None and model.window is not None:
            raise PICacheError(
                f"{type(model.model).__name__} attends through a window of {model.window} tokens, "
                "which chunks side by side (APE) do not go with: choose a method that places them "
                "in order"
            )
        latent = any(rotation is not None and rotation.part for rotation in model.rotations)
        if parallel is not None and latent:
            raise PICacheError(
                f"{type(model.model).__name__} caches latents, whose attention a temperature does "
                "not reach: chunks side by side (APE) are refused, choose a method that places "
                "them in order"
            )
        self._parts, self._groups = parts, layer_groups
        self._group_of = [index for index, group in enumerate(layer_groups) for _ in group]
        self._skips, self._layout = skips, layout
        self._memory, self.residents = memory, residents
        self._placeable = memory is not None and placeable
        self.at_once = self._placeable and residents is not None
        self._made: list[KV | None] = [None] * layout.num_layers
        self._device = model.device
        self._coming: dict[int, Future[_Made]] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: ReadAhead | None = None
        if prefetch_from == "disk":
            self._thread = ThreadPoolExecutor(1, "picache-load")
            self._ahead = ReadAhead(parts, layer_groups, self._loading)
        self._stream: torch.cuda.Stream | None = None
        if prefetch_from and self._device.type == "cuda":
            self._stream = model.loading
            # Chunks that were compiled just now may not be finished in the model's stream.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self.begun = False
        self.nbytes = 0
        self.watch = Stopwatch(self._device)
        in_order = torch.arange(layout.total_length)
        positions = layout.parallel_positions() if parallel else in_order
        self.moves = Moves.of(model, layout, skips, positions)
        moved = len(self.moves.old)
        self._moved = slice(layout.prefix_length, layout.prefix_length + moved)
        self._temperature = parallel.temperature if parallel else 1.0

    def __enter__(self) -> "LinkedKV":
        return self

    def __exit__(self, *error: object) -> None:
        if self._ahead is not None:
            self._ahead.close()  # first: the thread that puts layers together waits for it
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, layer: int) -> KV:
        """Keys and values of a layer, ``[1, kv_heads, tokens, head_dim]``.

        Each call for a layer gives the same tensors, which may be written to.
        """
        if self.at_once:
            assert self._memory is not None
            if not self.begun:
                place_rows([self], [0], self._memory, self.watch)
            return self._memory[layer]
        made = self._made[layer]
        if made is None:
            made = self._receive(layer)
        return made

    def _receive(self, layer: int) -> KV:
        """Make the layers of a group, or wait for them; begin to make the next."""
        group = self._group_of[layer]
        with self.watch.span("wait"):
            coming = self._coming.pop(group, None)
            made = self._make(group) if coming is None else coming.result()
            self._hand_over(made)
        layers = self._groups[group]
        self._made[layers.start : layers.stop] = made.layers
        prefetches = self._thread is not None or self._stream is not None
        if prefetches and group + 1 < len(self._groups):
            self._coming[group + 1] = self._begin(group + 1)
        return made.layers[layer - layers.start]

    def _begin(self, group: int) -> Future["_Made"]:
        """Start to make the layers of a group, in the thread or in the CUDA stream."""
        if self._thread is not None:
            return self._thread.submit(self._make, group)
        begun: Future[_Made] = Future()
        begun.set_result(self._make(group))  # returns as soon as the work is queued
        return begun

    def _make(self, group: int) -> "_Made":
        """Copy the chunks' KV in a group of layers together, and rotate the keys."""
        layers = self._groups[group]
        with self._loading():
            with self.watch.span("load"):
                ahead = self._ahead
                parts = [part(layers) for part in self._parts] if ahead is None else ahead(group)
                placed = self._placeable and self._device.type == "cuda"
                if placed:
                    made = self._placed(layers, parts)
                else:
                    each = zip(layers, zip(*parts, strict=True), strict=True)
                    made = [self._copied(layer, kv) for layer, kv in each]
            if not placed:
                with self.watch.span("rotate"):
                    for layer, kv in zip(layers, made, strict=True):
                        self._move(layer, kv)
            return _Made(made, None if self._stream is None else self._stream.record_event())

    def _placed(self, layers: range, parts: list[list[KV]]) -> list[KV]:
        """Copy and rotate the parts in one kernel, to where the prompt's memory is."""
        assert self._memory is not None
        memory = [self._memory[layer] for layer in layers]
        held = [Resident.of(kv) for kv in parts]
        into = [LayerKV(kv, self.moves.turn(at)) for at, kv in zip(layers, memory, strict=True)]
        place_layers(into, held, self.moves.pieces)
        self._count(held)
        return memory

    def _count(self, parts: Sequence[Resident]) -> None:
        """Add what was copied of the parts to `nbytes`."""
        for part, piece in zip(parts, self.moves.pieces, strict=True):
            self.nbytes += part.nbytes // piece.held * (piece.held - piece.skipped)

    def _loading(self) -> AbstractContextManager[object]:
        """What a thread loads in: the CUDA stream for it, where there is one."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _hand_over(self, made: "_Made") -> None:
        """Let the reader's CUDA stream wait until these layers are made."""
        if made.done is None:
            return
        reader = torch.cuda.current_stream(self._device)
        reader.wait_event(made.done)
        for tensor in chain.from_iterable(made.layers):
            tensor.record_stream(reader)  # or their memory is reused while the reader still reads

    def _copied(self, layer: int, parts: Sequence[KV]) -> KV:
        """One layer of the whole prompt, with the KV of the parts in their places."""
        starts = (*self._layout.starts, self._layout.context_length)
        both: list[Tensor] = []
        for which in (0, 1):
            if self._memory is not None:
                whole = self._memory[layer][which]
            else:
                first = parts[0][which]
                shape = (1, first.shape[1], self._layout.total_length, first.shape[3])
                whole = first.new_empty(shape, device=self._device)
            for part, skip, start in zip(parts, self._skips, starts, strict=False):
                tokens = part[which][:, :, skip:]
                whole[:, :, start : start + tokens.shape[2]] = tokens
                self.nbytes += tokens.nbytes
            both.append(whole)
        return both[0], both[1]

    def _move(self, layer: int, kv: KV) -> None:
        """Rotate the keys behind the exact prefix to their positions in the prompt, in place."""
        if self._temperature != 1:
            kv[0][:, :, self._moved] /= self._temperature
        if (turn := self.moves.turn(layer)) is not None:
            moved = kv[turn.part][:, :, self._moved]
            rotate_(moved, (turn.cos, turn.sin), turn.pairing, turn.offset)

    def made_at_once(self) -> None:
        """All layers stand where they belong."""
        assert self.residents is not None
        self.begun = True
        self._count(self.residents)


def place_rows(
    rows: Sequence[LinkedKV], at: Sequence[int], places: Sequence[KV], watch: Stopwatch
) -> None:
    """Put prompts together in all layers at once, where their memory is.

    Args:
        rows: prompts that are made at once, of which nothing is made yet.
        at: which row of the places each is.
        places: keys and values of each layer, ``[batch, kv_heads, places, head_dim]``.
        watch: measures it as "load".
    """
    with watch.span("load"):
        moves = Moves.together([row.moves for row in rows], at)
        layers = [LayerKV(memory, moves.turn(layer)) for layer, memory in enumerate(places)]
        parts = [part for row in rows for part in row.residents or ()]
        place_layers(layers, parts, moves.pieces)
    for row in rows:
        row.made_at_once()
