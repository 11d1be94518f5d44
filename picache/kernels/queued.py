"""Small tensors of the host on their way to a device."""

import torch
from torch import Tensor


def queued(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; a CUDA stream is given the copy, and nobody waits for it.

    A copy out of memory that is not page-locked would wait for all that the stream has still to do.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
