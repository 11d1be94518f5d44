"""Whole-prompt keys and values, put together from compiled chunks layer by layer."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from picache.chunk import KV
from picache.errors import PICacheError
from picache.hf.rope import Angles, Rotation, difference, rotate_
from picache.linking.stopwatch import Stopwatch
from picache.methods.base import Layout, ParallelEncoding

if TYPE_CHECKING:
    from picache.hf.model import HFModel


class LinkedKV:
    """Every layer of a linked prompt, made when it is first asked for.

    Chunks are copied to their places and their keys rotated there from where they were compiled.
    With `prefetch_from`, the layer after the one asked for is made meanwhile, so that loading
    overlaps with recomputing: on a CUDA device in a stream of its own, and by a thread where that
    has to wait for a disk (two threads of Python get in each other's way) or there is no such
    stream. To be used as a context manager, which ends that thread.

    Args:
        model: the model the chunks were compiled with.
        parts: what gives the KV of one chunk by layer, ``[1, kv_heads, tokens, head_dim]``, on
            the model's device; in prompt order, and after them the query's if it was compiled too.
        skips: leading tokens of each part that are left out.
        layout: where the chunks stand.
        prefetch_from: prefetch layer i + 1 while layer i is computed, out of "host" memory or from
            "disk"; None to make each layer when it is asked for.
        parallel: for chunks side by side, whose keys are also divided by the temperature.

    Attributes:
        watch: time spent copying ("load"), rotating ("rotate") and by the reader waiting ("wait").
        nbytes: of the keys and values copied so far.
    """

    def __init__(
        self,
        model: "HFModel",
        parts: Sequence[Callable[[int], KV]],
        skips: Sequence[int],
        layout: Layout,
        prefetch_from: Literal["host", "disk"] | None = None,
        parallel: ParallelEncoding | None = None,
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
        self._model, self._parts, self._skips, self._layout = model, parts, skips, layout
        self._made: list[KV | None] = [None] * layout.num_layers
        self._turns: dict[tuple[Rotation, str | None], Angles] = {}
        self._prefetches, self._device = prefetch_from is not None, model.device
        self._thread: ThreadPoolExecutor | None = None
        if prefetch_from == "disk" or (prefetch_from and self._device.type != "cuda"):
            self._thread = ThreadPoolExecutor(1, "picache-load")
        self._coming: dict[int, Future[KV]] = {}
        self._stream: torch.cuda.Stream | None = None
        if prefetch_from and self._device.type == "cuda":
            self._stream = model.loading
            # What compiled the chunks may still be under way.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self.nbytes = 0
        self.watch = Stopwatch(self._device)
        lengths = (*layout.chunk_lengths, layout.query_length)[: len(parts)]
        # Tokens behind the exact prefix: where they were compiled, where they stand in the prompt,
        # and the position they are rotated to.
        moved = [torch.arange(s, s + n) for s, n in zip(skips, lengths, strict=True)][1:]
        self._old = torch.cat([torch.empty(0, dtype=torch.int64), *moved])
        self._rows = slice(layout.prefix_length, layout.prefix_length + len(self._old))
        everywhere = torch.arange(layout.total_length)
        self._new = (layout.parallel_positions() if parallel else everywhere)[self._rows]
        self._temperature = parallel.temperature if parallel else 1.0

    def __enter__(self) -> "LinkedKV":
        return self

    def __exit__(self, *error: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, layer: int) -> KV:
        """Keys and values ``[1, kv_heads, tokens, head_dim]``; the same tensors at each call."""
        made = self._made[layer]
        if made is None:
            with self.watch.span("wait"):
                coming = self._coming.pop(layer, None)
                made = self._make(layer) if coming is None else coming.result()
                self._made[layer] = made
                self._hand_over(made)
            if self._prefetches and layer + 1 < len(self):
                self._coming[layer + 1] = self._begin(layer + 1)
        return made

    def _begin(self, layer: int) -> Future[KV]:
        if self._thread is not None:
            return self._thread.submit(self._make, layer)
        begun: Future[KV] = Future()
        begun.set_result(self._make(layer))  # returns once the stream has its orders
        return begun

    def _make(self, layer: int) -> KV:
        beside: AbstractContextManager[object] = nullcontext()
        if self._stream is not None:
            beside = torch.cuda.stream(self._stream)
        with beside:
            with self.watch.span("load"):
                kv = self._copied([part(layer) for part in self._parts])
            with self.watch.span("rotate"):
                self._move(layer, kv)
        return kv

    def _hand_over(self, kv: KV) -> None:
        """Let the reader's stream wait for the one that made these."""
        if self._stream is None:
            return
        reader = torch.cuda.current_stream(self._device)
        # All that the side stream was given so far is this layer, and maybe another link's.
        reader.wait_stream(self._stream)
        for tensor in kv:
            tensor.record_stream(reader)  # or their memory is reused while the reader still reads

    def _copied(self, parts: list[KV]) -> KV:
        starts = (*self._layout.starts, self._layout.context_length)
        both: list[Tensor] = []
        for which in (0, 1):
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
        if self._temperature != 1:
            kv[0][:, :, self._rows] /= self._temperature
        rotation = self._model.rotations[layer]
        if rotation is None or not len(self._old):
            return
        # Layers share angles unless their rotary frequencies differ (Gemma 3's layer types).
        same = (rotation, self._model.rotary.layer_type(layer))
        if same not in self._turns:
            old, new = (self._model.angles(layer, at) for at in (self._old, self._new))
            self._turns[same] = difference(old, new)
        moved = kv[rotation.part][:, :, self._rows]
        rotate_(moved, self._turns[same], rotation.pairing, rotation.offset)
