"""Attention of a padded pass as an operator of torch, which its compiler does not look into."""

import torch
from torch import Tensor

from picache.kernels.scattered_attention import scattered_attention


@torch.library.custom_op("picache::scattered_attention", mutates_args=())
def attention_operator(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`scattered_attention` without its log-sum-exp, for passes that are compiled.

    Its arguments and errors are those of `scattered_attention`.

    Returns:
        The output, contiguous ``[batch, rows, heads, value_dim]``, with the rows before the heads.
    """
    given = (query, keys, values, positions, scaling, window, softcap, sinks)
    return scattered_attention(*given)[0].transpose(1, 2).contiguous()


@attention_operator.register_fake
def _shape(query: Tensor, keys: Tensor, values: Tensor, *rest: object) -> Tensor:
    """What the compiler must know of the result: how large it is."""
    batch, heads, rows, _ = query.shape
    return values.new_empty(batch, rows, heads, values.shape[3])
