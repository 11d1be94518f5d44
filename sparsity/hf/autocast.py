"""What `torch.autocast` makes of a managed layer: one low dtype, as of transformers' own attention.

Autocast hands `scaled_dot_product_attention` queries, keys and values in its dtype. Here they are
held in it, too, and what a policy then computes from them in float32 is left in float32.
"""

import torch
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of `torch.autocast` on the kind of `device`; None where autocast is off."""
    kind = device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def lowered(states: Tensor, dtype: torch.dtype) -> Tensor:
    """The states as autocast to `dtype` has them: float64 is left alone."""
    return states if states.dtype == torch.float64 else states.to(dtype)
