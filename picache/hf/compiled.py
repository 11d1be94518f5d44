"""Models whose forward goes through torch.compile: the package's own forwards run without it."""

import sys
import threading
from contextlib import AbstractContextManager
from typing import Any

import torch


class _NeverCompiled:
    """A context inside which what torch.compile has wrapped runs as plain Python.

    A pass over scattered rows has another shape every time and writes into tensors it is handed, so
    that nothing is won by compiling it. torch's switch is one for the whole process: the first
    thread to enter turns it, the last to leave turns it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._stance: AbstractContextManager[Any] | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            # Nothing is compiled where the compiler was never loaded, which takes a second.
            if self._stance is None and "torch._dynamo" in sys.modules:
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None


never_compiled = _NeverCompiled()
