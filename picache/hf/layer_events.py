"""Layers that are loaded in one CUDA stream while a captured pass computes in another."""

import inspect

import torch


class LayerEvents:
    """For each layer an event: its keys and values are in place.

    A pass that is captured as a CUDA graph would wait for all that is being loaded before its
    first kernel. With an event a layer it waits for each layer by itself: `wait` is captured as a
    node of the graph, which at every replay waits for the last `placed` of that layer.

    A replay waits for what was recorded before it was launched. So load and record every layer
    first, which takes the host the queueing alone, and replay then. Let the device finish a replay
    (`torch.cuda.synchronize`, or a wait for its logits) before layers are recorded for the next.

    Args:
        layers: how many.
        device: of the model.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        self._device = device
        self._events = [torch.cuda.Event(external=True) for _ in range(layers)]
        for layer in range(layers):
            self.placed(layer)  # torch leaves out waiting for an event that was never recorded

    @staticmethod
    def exist() -> bool:
        """Whether this torch has events that can be waited for inside a graph, as from 2.9 on."""
        return "external" in inspect.signature(torch.cuda.Event.__new__).parameters

    def placed(self, layer: int) -> None:
        """A layer is in place as soon as the current stream has done what it was given so far."""
        self._events[layer].record(torch.cuda.current_stream(self._device))

    def wait(self, layer: int) -> None:
        """Let the current stream, or the graph that is captured in it, wait for a layer."""
        self._events[layer].wait(torch.cuda.current_stream(self._device))
