"""Seconds by name, without making a device wait for the clock."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class _Span:
    """One measured block: its name, when it began and ended, and the blocks inside it."""

    name: str
    begun: Any
    ended: Any = None
    inside: list["_Span"] = field(default_factory=list)


class Stopwatch:
    """Adds up the time that blocks of work take, under a name each.

    On a CUDA device a block is measured between two events of the stream that is current in it, so
    that the program runs on while the device works; only `seconds` waits for the device. Elsewhere
    a block is measured by the clock. Blocks may be nested, and several threads may measure at the
    same time.

    Args:
        device: where the work is done; None to measure by the clock whatever the device.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        self._spans: list[_Span] = []
        self._open = threading.local()
        self._made = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds since this stopwatch was made, by the clock."""
        return time.perf_counter() - self._made

    def _now(self) -> Any:
        if self._device is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count what runs inside the ``with`` block under `name`."""
        outer = getattr(self._open, "span", None)
        span = self._open.span = _Span(name, self._now())
        try:
            yield
        finally:
            span.ended = self._now()
            self._open.span = outer
            self._spans.append(span)
            if outer is not None:
                outer.inside.append(span)

    def seconds(self, name: str, without: str | None = None) -> float:
        """All the time under `name` so far, in seconds; 0 when there was none.

        Args:
            name: of the blocks.
            without: the name of blocks directly inside those, on the same thread, whose time is
                taken off.
        """
        spans = [span for span in tuple(self._spans) if span.name == name]
        inner = [one for span in spans for one in span.inside if one.name == without]
        return sum(map(self._length, spans)) - sum(map(self._length, inner))

    def _length(self, span: _Span) -> float:
        """Seconds from the beginning to the end of one block."""
        if self._device is None:
            return float(span.ended - span.begun)
        span.ended.synchronize()
        return float(span.begun.elapsed_time(span.ended) / 1e3)
