"""Whether the kernels can serve, and a kernel's failure said by name."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from sparsity.errors import SparsityError

TRITON = find_spec("triton") is not None
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_HEAD_DIM, MOST_PAGE_SIZE = 256, 64


def why_not(
    device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int, page_size: int
) -> str | None:
    """Why the kernels cannot serve, in a few words for a report; None where they can.

    Args:
        device: of the keys and values.
        dtype: of the keys and values.
        head_dim: numbers in a key.
        value_dim: numbers in a value.
        page_size: tokens a page.
    """
    if device.type != "cuda":
        return f"no CUDA device ({device.type})"
    if not _is_new_enough(device):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return _unserved(dtype, max(head_dim, value_dim), page_size)


def capable(device: torch.device) -> bool:
    """Whether kernels run on this device; a step that is traced has asked `why_not` before."""
    return device.type == "cuda" and (torch.compiler.is_compiling() or _is_new_enough(device))


@cache
def _is_new_enough(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def serves(tensor: Tensor, page_size: int = 1) -> bool:
    """Whether a kernel takes this tensor of keys, for functions that go on without it."""
    return capable(tensor.device) and _unserved(tensor.dtype, tensor.shape[-1], page_size) is None


def require(name: str, keys: Tensor, values: Tensor, page_size: int) -> None:
    """Refuse CUDA tensors that the kernel `name` cannot take.

    Raises:
        SparsityError: with the reason, as `why_not` gives it.
    """
    reason = _unserved(keys.dtype, max(keys.shape[-1], values.shape[-1]), page_size)
    if values.dtype != keys.dtype:
        reason = f"keys are {keys.dtype} and values {values.dtype}"
    if reason is not None:
        raise SparsityError(
            f"{name} on {keys.device}: {reason}; ask sparsity.kernels.available.why_not before "
            "and keep such a model on the path without kernels"
        )


def launch(name: str, op: Callable[..., Any], *args: object) -> Any:
    """Call the operator `op`, whose kernel is compiled where it comes first.

    While torch traces, the operator goes into the graph as it is, and a kernel that fails to build
    is an error of torch's compiler.

    Raises:
        SparsityError: where Triton fails, with the name of the kernel.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except (SparsityError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise SparsityError(
            f"the Triton kernel {name} could not be built or launched: "
            f"{type(error).__name__}: {error}"
        ) from error


def _unserved(dtype: torch.dtype, widest: int, page_size: int) -> str | None:
    """What is beyond the kernels, wherever they run."""
    if not TRITON:
        return "Triton is not installed"
    if dtype not in DTYPES:
        return f"{dtype} is none of bfloat16, float16, float32"
    if widest > MOST_HEAD_DIM:
        return f"head_dim {widest} is over {MOST_HEAD_DIM}"
    if page_size > MOST_PAGE_SIZE:
        return f"page_size {page_size} is over {MOST_PAGE_SIZE}"
    return None
