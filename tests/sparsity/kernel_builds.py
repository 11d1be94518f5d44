"""The kernels of a decoding step as they are launched on an H200, caught on any machine."""

from functools import partial

import torch

from sparsity.kernels import (
    append_triton,
    decode_attention_triton,
    page_scores_triton,
    top_pages_triton,
)
from tests.triton_kernels import Catch

SHAPES = [
    # batch, heads, groups, places, size, head_dim, value_dim, dtype
    (1, 8, 4, 128, 16, 128, 128, torch.bfloat16),
    (2, 2, 3, 2100, 3, 80, 96, torch.float16),
    (64, 4, 1, 99, 64, 256, 256, torch.float32),
]


def launches(monkeypatch):
    """Every kernel as its operator launches it, for each shape."""
    caught = []
    modules = (append_triton, decode_attention_triton, page_scores_triton, top_pages_triton)
    for module in modules:
        monkeypatch.setattr(module, "launcher", partial(Catch, launches=caught))
    monkeypatch.setattr(decode_attention_triton, "processors_of", lambda _: 132)
    for batch, heads, groups, places, size, dim, value_dim, dtype in SHAPES:

        def like(*shape, dtype=dtype):
            return torch.empty(*shape, dtype=dtype, device="meta")

        pages = like(batch, heads, places, dtype=torch.int32)
        keys, values = (like(batch, heads, places * size, d) for d in (dim, value_dim))
        query, now = like(batch, heads * groups, dim), like(batch, dtype=torch.int64)
        bounds, sums = like(batch, heads, places, dim), pages[..., None].float()
        new = (keys[:, :, 0], values[:, :, 0], pages.float(), now, now[0], now.bool())
        slots, filled = (like(*keys.shape[:3], dtype=d) for d in (torch.int32, torch.bool))
        state = (keys, values, slots, pages, pages, sums, pages.bool(), bounds, bounds)
        append_triton.append_op._init_fn(*state, like(batch, heads, dtype=torch.int64), *new, size)
        page_scores_triton.page_bounds_op._init_fn(query, bounds, bounds, "max")
        page_scores_triton.page_logits_op._init_fn(query, keys, filled, size, "mean")
        attend = decode_attention_triton.decode_attention_op._init_fn
        held = (query, keys, values, pages, now, size, 0.1)
        attend(*held, None, None, None, "max")
        attend(*held, pages[..., : places // 2].long(), 30.0, like(heads * groups), None)
    for places, count in ((64, 1), (2048, 128), (4095, 256), (8191, 16), (16384, 16383)):
        scores = torch.empty(2, 8, places, device="meta")
        top_pages_triton.top_pages_op._init_fn(scores, count)
    return caught
