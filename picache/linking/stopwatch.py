"""Seconds by name, without making a device wait for the clock."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Adds up the time that spans of work take, under a name each.

    On a CUDA device a span is measured between two events of the stream that is current in it, so
    that work runs on while it is timed; `seconds` waits for it. Elsewhere it is measured by the
    clock. Spans may be entered by several threads, a name by one of them.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """What runs inside counts under `name`."""
        begun = self._now()
        try:
            yield
        finally:
            self._spans.append((name, begun, self._now()))

    def seconds(self, name: str) -> float:
        """All the time under `name` so far; 0 when there was none."""
        spans = [(begun, ended) for which, begun, ended in tuple(self._spans) if which == name]
        if self._device.type != "cuda":
            return float(sum(ended - begun for begun, ended in spans))
        for _, ended in spans:
            ended.synchronize()
        return sum(begun.elapsed_time(ended) for begun, ended in spans) / 1e3
