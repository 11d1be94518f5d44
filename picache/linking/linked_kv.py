"""The keys and values of a whole prompt, put together from compiled chunks layer by layer."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from picache.chunk import KV
from picache.errors import PICacheError
from picache.hf.rope import rotate_
from picache.kernels.placing import LayerKV, Resident, place_layers
from picache.linking.moves import Moves
from picache.linking.read_ahead import ReadAhead
from picache.linking.stopwatch import Stopwatch
from picache.methods.base import Layout, ParallelEncoding

if TYPE_CHECKING:
    from picache.hf.model import HFModel


class LinkedKV:
    """The keys and values of a prompt, layer by layer; a layer is made when it is first asked for.

    The KV of each chunk is copied to its place in the prompt, and its keys are rotated from the
    positions they were compiled at to those they have in the prompt.

    In memory that is handed in, all layers of chunks that lie on the model's device are made when
    the first is asked for, or before, together with other prompts (`place_rows`). Those that lie in
    host memory may be made ahead of a pass that waits for each layer by itself (`make_ahead`).

    With `prefetch_from`, layer i + 1 is made while layer i is recomputed, so that loading and
    computing overlap. On a CUDA device that is done in a stream of its own. A thread is used where
    loading waits for a disk; not otherwise, since two threads of Python slow each other down, and a
    CPU that copies does not compute meanwhile. From a disk, further threads read and check the
    chunks of that layer and the next ones (`ReadAhead`). Use it as a context manager, which ends
    the threads.

    Args:
        model: the model the chunks were compiled with.
        parts: for each chunk in prompt order, a function that gives its KV in a layer,
            ``[1, kv_heads, tokens, head_dim]``, on the model's device; after them one for the
            query, if it was compiled too.
        skips: how many of the first tokens of each part, its sinks, are left out.
        layout: where the chunks stand in the prompt.
        prefetch_from: prefetch layer i + 1 while layer i is computed, out of "host" memory or from
            "disk"; None to make each layer when it is asked for, as on a CPU out of "host" too.
        parallel: how chunks side by side are encoded (APE); None for chunks one after the other.
        memory: keys and values ``[1, kv_heads, tokens, head_dim]`` of each layer, which the prompt
            is put together in; None to allocate them.
        residents: the parts again, in all layers, where all of them lie on the model's device.
        placeable: whether kernels can write to the memory (`can_place`).

    Attributes:
        at_once: whether all layers are made at once.
        begun: whether they were.
        ahead: whether layers may be made ahead of a pass that waits for each by itself.
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
        parts: Sequence[Callable[[int], KV]],
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
        self._parts, self._skips, self._layout = parts, skips, layout
        self._memory, self.residents = memory, residents
        self._placeable = memory is not None and placeable
        self.at_once = self._placeable and residents is not None
        self._made: list[KV | None] = [None] * layout.num_layers
        self._device = model.device
        self._coming: dict[int, Future[KV]] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: ReadAhead | None = None
        if prefetch_from == "disk":
            self._thread = ThreadPoolExecutor(1, "picache-load")
            self._ahead = ReadAhead(parts, layout.num_layers, self._loading)
        self._stream: torch.cuda.Stream | None = None
        if prefetch_from and self._device.type == "cuda":
            self._stream = model.loading
            # Chunks that were compiled just now may not be finished in the model's stream.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self.ahead = self._stream is not None and self._thread is None and memory is not None
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
            with self.watch.span("wait"):
                coming = self._coming.pop(layer, None)
                made = self._make(layer) if coming is None else coming.result()
                self._made[layer] = made
                self._hand_over(made)
            prefetches = self._thread is not None or self._stream is not None
            if prefetches and layer + 1 < len(self):
                self._coming[layer + 1] = self._begin(layer + 1)
        return made

    def make_ahead(self, layer: int) -> None:
        """Make a layer in the CUDA stream for loading, which its reader has yet to wait for."""
        if self.at_once:
            if not self.begun:
                assert self._memory is not None
                with self._loading():
                    place_rows([self], [0], self._memory, self.watch)
        elif self._made[layer] is None:
            coming = self._coming.pop(layer, None)
            self._made[layer] = (coming or self._begin(layer)).result()

    def _begin(self, layer: int) -> Future[KV]:
        """Start to make a layer, in the thread or in the CUDA stream."""
        if self._thread is not None:
            return self._thread.submit(self._make, layer)
        begun: Future[KV] = Future()
        begun.set_result(self._make(layer))  # returns as soon as the work is queued
        return begun

    def _make(self, layer: int) -> KV:
        """Copy the chunks' KV in a layer together, and rotate the keys to their positions."""
        with self._loading():
            with self.watch.span("load"):
                ahead = self._ahead
                parts = [part(layer) for part in self._parts] if ahead is None else ahead(layer)
                if self._placeable and self._device.type == "cuda":
                    return self._placed(layer, parts)
                kv = self._copied(layer, parts)
            with self.watch.span("rotate"):
                self._move(layer, kv)
        return kv

    def _placed(self, layer: int, parts: list[KV]) -> KV:
        """Copy and rotate the parts in one kernel, to where the prompt's memory is."""
        assert self._memory is not None
        memory = self._memory[layer]
        held = [Resident.of([kv]) for kv in parts]
        place_layers([LayerKV(memory, self.moves.turn(layer))], held, self.moves.pieces)
        self._count(held)
        return memory

    def _count(self, parts: Sequence[Resident]) -> None:
        """Add what was copied of the parts to `nbytes`."""
        for part, piece in zip(parts, self.moves.pieces, strict=True):
            self.nbytes += part.nbytes // piece.held * (piece.held - piece.skipped)

    def _loading(self) -> AbstractContextManager[object]:
        """What a thread loads in: the CUDA stream for it, where there is one."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _hand_over(self, kv: KV) -> None:
        """Let the reader's CUDA stream wait for the stream that made these tensors."""
        if self._stream is None:
            return
        reader = torch.cuda.current_stream(self._device)
        # The loading stream has been given this layer so far, and perhaps layers of another link.
        reader.wait_stream(self._stream)
        for tensor in kv:
            tensor.record_stream(reader)  # or their memory is reused while the reader still reads

    def _copied(self, layer: int, parts: list[KV]) -> KV:
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
