"""When torch.compile may act: forwards of this package run compiled models without compilation."""

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


class _NeverCompiled:
    """Inside its ``with`` block, functions that torch.compile has wrapped run as plain Python.

    A sparse pass has another shape every time and writes into tensors that it is given, so that
    compiling it gains nothing. The switch of torch holds for the whole process: the first thread
    that enters turns it, and the last one that leaves turns it back. What is to be compiled
    (`compiling`) therefore waits for those inside, and they for it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._compiling = False
        self._stance: AbstractContextManager[Any] | None = None

    def __enter__(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._compiling)
            self._inside += 1
            # Where the compiler was never loaded nothing is compiled; loading it takes a second.
            if self._stance is None and "torch._dynamo" in sys.modules:
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._inside -= 1
            if not self._inside and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None
            self._changed.notify_all()

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """The block in which a compiled function is called; not to be entered from inside."""
        with self._changed:
            self._changed.wait_for(lambda: not self._inside and not self._compiling)
            self._compiling = True
        try:
            yield
        finally:
            with self._changed:
                self._compiling = False
                self._changed.notify_all()


never_compiled = _NeverCompiled()


def uncompiled(implementation: str) -> AbstractContextManager[None]:
    """The block for a forward with the model's own attention, `implementation` by name.

    flex_attention is itself compiled, and without that would hold all scores at once.
    """
    return nullcontext() if implementation == "flex_attention" else never_compiled
