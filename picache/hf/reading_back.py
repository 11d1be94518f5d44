"""Finds out whether a forward waits for the device, before it is captured as a CUDA graph."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from picache.hf.sparse_pass import CannotCapture

_aten = torch.ops.aten
# Operations that read values to know a number or a shape.
_READING = (
    _aten._local_scalar_dense,  # noqa: SLF001 - .item(), bool(), int(), an index
    _aten.nonzero,
    _aten.equal,
    _aten.masked_select,
    _aten.bincount,
    _aten.unique_consecutive,
    _aten._unique2,  # noqa: SLF001
    _aten.repeat_interleave,
)
_INDEXING = (_aten.index, _aten.index_put, _aten.index_put_)  # by booleans: a shape is read


class RefuseReadingBack(TorchDispatchMode):
    """Inside its ``with`` block an operation that waits for the device raises `CannotCapture`.

    A capture that fails in the middle leaves memory of the allocator behind. Other threads are not
    concerned.

    Args:
        kind: of the device, such as "cuda".
    """

    def __init__(self, kind: str = "cuda") -> None:
        super().__init__()
        self._kind = kind

    @override
    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        kinds = {x.device.type for x in tensors}
        reads = func.overloadpacket in _READING or (
            func.overloadpacket in _INDEXING
            and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        )
        if self._kind in kinds and reads:
            raise CannotCapture(f"its Python reads numbers of the device back ({func})")
        copied = func.overloadpacket in (_aten.copy_, _aten._to_copy)  # noqa: SLF001
        if copied and self._kind in (kinds := kinds | {out.device.type}) and len(kinds) > 1:
            raise CannotCapture(f"its forward copies between the device and the host ({func})")
        return out


def refusing() -> bool:
    """Whether this thread is inside a block of `RefuseReadingBack`."""
    return isinstance(_get_current_dispatch_mode(), RefuseReadingBack)
