"""Seconds by name, without making a device wait for the clock."""

import operator
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
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
        self._spans: list[_Span] = []
        self._open = threading.local()
        self._made = time.perf_counter()
        self._stamp: Callable[[], Any] = time.perf_counter
        self._between: Callable[[Any, Any], float] = operator.sub
        if device is not None and device.type == "cuda":
            self._stamp, self._between = partial(_event, device), _seconds_between

    @property
    def elapsed(self) -> float:
        """Seconds since this stopwatch was made, by the clock."""
        return time.perf_counter() - self._made

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count what runs inside the ``with`` block under `name`."""
        outer = getattr(self._open, "span", None)
        span = self._open.span = _Span(name, self._stamp())
        try:
            yield
        finally:
            span.ended = self._stamp()
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
        inside = [one for span in spans for one in span.inside if one.name == without]
        return sum(self._between(one.ended, one.begun) for one in spans) - sum(
            self._between(one.ended, one.begun) for one in inside
        )


def _event(device: torch.device) -> torch.cuda.Event:
    """An event in the CUDA stream that is current on the device."""
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds_between(ended: torch.cuda.Event, begun: torch.cuda.Event) -> float:
    """Seconds from one event to a later one, once the device has reached it."""
    ended.synchronize()
    return begun.elapsed_time(ended) / 1e3
