"""The pages with the highest scores, for policies that attend to some of the pages they hold."""

import torch
from torch import Tensor

from sparsity.errors import SparsityError
from sparsity.kernels.available import TRITON, capable, launch

MOST_PLACES = 16 * 1024  # that a program of the kernel holds in registers
FEW_SCORES = 1024  # which are sorted in less time than six operations take to start


def top_pages(scores: Tensor, count: int) -> Tensor:
    """Places of the `count` highest scores of each row and KV head; of equals the lower place.

    In no particular order: attention over a list of pages does not depend on it. CUDA tensors of up
    to `MOST_PLACES` places go to one kernel, all others to `top_pages_reference`.

    Args:
        scores: float32 `[batch, kv_heads, P]`; may hold infinities, but no NaN.
        count: of places chosen, 1 <= count <= P.

    Returns:
        int64 `[batch, kv_heads, count]`, distinct places.

    Raises:
        SparsityError: for scores that are not float32, or a count beyond the places.
    """
    places = scores.shape[-1]
    if scores.dtype != torch.float32 or not 1 <= count <= places:
        raise SparsityError(
            f"top_pages: scores are {scores.dtype} of {places} places and count is {count}; give "
            "float32 scores and a count from 1 to the number of places"
        )
    if not (TRITON and places <= MOST_PLACES and capable(scores.device)):
        return top_pages_reference(scores, count)
    from sparsity.kernels.top_pages_triton import top_pages_op

    chosen: Tensor = launch("top_pages", top_pages_op, scores, count)
    return chosen


def top_pages_reference(scores: Tensor, count: int) -> Tensor:
    """`top_pages` in plain torch.

    torch.topk says nothing about equals, and a stable sort of many places takes several times as
    long on a CPU; so the place is made part of what is compared, as whole numbers.
    """
    if scores.numel() <= FEW_SCORES:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    places = scores.shape[-1]
    bits = scores.masked_fill(scores == 0, 0.0).view(torch.int32)  # -0.0 equals 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    later = torch.arange(places, device=scores.device)
    return (ordered * places - later).topk(count, dim=-1, sorted=False).indices
