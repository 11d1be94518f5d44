"""Whether the kernels can serve, and a kernel's failure said by name."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from picache.errors import PICacheError

TRITON = find_spec("triton") is not None
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_HEAD_DIM = 256


class KernelError(PICacheError):
    """A kernel could not be built or launched."""


P = ParamSpec("P")
R = TypeVar("R")


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int) -> str | None:
    """Why the kernels cannot serve, in a few words for a report; None where they can.

    Args:
        device: of the keys and values.
        dtype: of the keys and values.
        head_dim: numbers in a key.
        value_dim: numbers in a value.
    """
    if device.type != "cuda":
        return f"no CUDA device ({device.type})"
    if not _is_new_enough(device):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return _unserved(dtype, max(head_dim, value_dim))


@cache
def _is_new_enough(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def require(name: str, dtypes: tuple[torch.dtype, ...], head_dim: int, value_dim: int) -> None:
    """Refuse tensors that the kernel `name` cannot take.

    Args:
        name: of the kernel.
        dtypes: of all tensors that must have the same one.
        head_dim: numbers in a key.
        value_dim: numbers in a value.

    Raises:
        PICacheError: with the reason, as `why_not` gives it.
    """
    reason = _unserved(dtypes[0], max(head_dim, value_dim))
    if len(set(dtypes)) > 1:
        reason = f"tensors of different types: {', '.join(map(str, dtypes))}"
    if reason is not None:
        raise PICacheError(
            f"the kernel {name}: {reason}; ask picache.kernels.available.why_not before and keep "
            "such a model on the path without kernels"
        )


def launch(
    name: str, like: Tensor, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
) -> R:
    """Call the function on the device of a tensor; its kernels are built where they come first.

    Raises:
        KernelError: where Triton fails, with the name of the kernel.
    """
    try:
        with torch.cuda.device_of(like):  # Triton launches on the current device
            return function(*args, **kwargs)
    except (PICacheError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise KernelError(
            f"the Triton kernel {name} could not be built or launched: "
            f"{type(error).__name__}: {error}"
        ) from error


def _unserved(dtype: torch.dtype, widest: int) -> str | None:
    """What is beyond the kernels, wherever they run."""
    if not TRITON:
        return "Triton is not installed"
    if dtype not in DTYPES:
        return f"{dtype} is none of bfloat16, float16, float32"
    if widest > MOST_HEAD_DIM:
        return f"head_dim {widest} is over {MOST_HEAD_DIM}"
    return None
