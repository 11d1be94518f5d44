"""A pass captured as several CUDA graphs, so that its later layers may still be on their way."""

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from picache.hf.due import Due

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

LAYERS = 4
"""Layers that are due with one graph. A graph of all layers would start only once all are loaded;
one for every layer takes the host longer to start than a small model takes to compute."""


class GraphPieces:
    """A pass as CUDA graphs, which are replayed one behind the other.

    A graph ends where a pass says that layers are due, after every few layers. Between two graphs
    the host may wait for a disk, and give the stream what the next one is to wait for.

    Args:
        stream: it is captured in.
        pool: the graphs' memory, from `torch.cuda.graph_pool_handle`; a later piece reads what an
            earlier one has left there.
    """

    def __init__(self, stream: torch.cuda.Stream, pool: "_POOL_HANDLE") -> None:
        self._stream, self._pool = stream, pool
        self._pieces: list[tuple[torch.cuda.CUDAGraph, list[range]]] = []
        self._open: torch.cuda.CUDAGraph | None = None

    def capture(self, forward: Callable[[Due], Tensor]) -> Tensor:
        """Capture a pass; the tensor that it will leave its result in."""
        torch.cuda.synchronize()
        gc.collect()  # what is freed while a graph is captured cannot be given back
        torch.cuda.empty_cache()
        with torch.cuda.stream(self._stream):
            try:
                self._begin()
                result = forward(self._due)
            except BaseException:
                with suppress(RuntimeError):  # what has failed is not captured: the first is said
                    self._end()
                raise
            self._end()
        return result

    def replay(self, due: Due) -> None:
        """Run it in the current stream.

        Args:
            due: called before each graph with the layers that it reads.
        """
        for graph, read in self._pieces:
            for layers in read:
                due(layers)
            graph.replay()

    def _due(self, layers: range) -> None:
        """Begin another graph before these layers, if the last one has enough."""
        if sum(map(len, self._pieces[-1][1])) >= LAYERS:
            self._end()
            self._begin()
        self._pieces[-1][1].append(layers)

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(self._pool, capture_error_mode="thread_local")  # others may go on
        self._open = graph
        self._pieces.append((graph, []))

    def _end(self) -> None:
        graph, self._open = self._open, None
        if graph is not None:
            graph.capture_end()
