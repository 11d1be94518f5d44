"""Kernels as operators of torch, which its compiler takes whole and does not look into.

`torch.library.triton_op` would let the compiler see each kernel. It then reads the kernel's code
again for every layer and every pass to find what is written, which took a quarter of the time in
which a step is compiled; nothing is fused into these kernels, so that it gains nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.library import CustomOpDef

_launches = ContextVar("launches", default=True)


def operator(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[..., CustomOpDef]:
    """Make an operator of a function that launches kernels by `launcher`.

    While torch's compiler traces, the function runs without its launches: what it allocates tells
    the shapes.

    Args:
        name: with the namespace, "sparsity::...".
        mutates_args: names of the arguments that the kernels write to.
    """

    def made(function: Callable[..., Any]) -> CustomOpDef:
        op = torch.library.custom_op(name, function, mutates_args=mutates_args)

        @op.register_fake
        def traced(*args: Any, **kwargs: Any) -> Any:
            with _nothing_launched():
                return function(*args, **kwargs)

        return op

    return made


def launcher(kernel: Any) -> Any:
    """The kernel, to be launched as ``launcher(kernel)[grid](...)``; where traced, nothing is."""
    return kernel if _launches.get() else _Nothing()


class _Nothing:
    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextmanager
def _nothing_launched() -> Iterator[None]:
    token = _launches.set(False)
    try:
        yield
    finally:
        _launches.reset(token)
