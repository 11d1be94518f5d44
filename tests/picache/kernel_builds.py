"""The kernels of a link as they are launched on an H200, caught on any machine."""

import torch

from picache.kernels import attention_mass_triton, place_triton, scattered_attention_triton
from picache.kernels.tables import Turn
from tests.triton_kernels import Catch

H200 = scattered_attention_triton.Processors(132, 227 * 1024)
PLAIN, ALL = (None, None, False), (4096, 50.0, True)  # window, softcap, sinks
CASES = [
    # batch, kv_heads, groups, rows, capacity, head_dim, value_dim, dtype, rules, turns of `place`
    # Building takes seconds: the shape that is used most under each rule and turn, the others
    # under all rules together, which need the most registers.
    (1, 8, 4, 320, 32768, 128, 128, torch.bfloat16, (PLAIN, ALL), ("none", "half", "part")),
    (1, 2, 4, 96, 4096, 64, 64, torch.float32, (ALL,), ("half",)),
    (2, 2, 2, 96, 8192, 256, 256, torch.float32, (ALL,), ("part",)),
    (1, 4, 3, 96, 8192, 80, 96, torch.bfloat16, (ALL,), ("part",)),
]


def launches(monkeypatch):
    """Every kernel as it is launched, for each shape and what is asked of it."""
    caught = []
    for module, names in (
        (scattered_attention_triton, ("split_kernel", "join_kernel")),
        (attention_mass_triton, ("mass_kernel",)),
        (place_triton, ("place_kernel",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Catch(getattr(module, name), caught))
    for module in (scattered_attention_triton, place_triton):
        monkeypatch.setattr(module, "processors_of", lambda _: H200)
    for batch, kv_heads, groups, rows, capacity, dim, value_dim, dtype, rules, turns in CASES:

        def like(*shape, dtype=dtype):
            return torch.empty(*shape, dtype=dtype, device="meta")

        query = like(batch, kv_heads * groups, rows, dim)
        keys, values = (like(batch, kv_heads, capacity, d) for d in (dim, value_dim))
        positions = like(batch, rows, dtype=torch.int64)
        lse = like(batch, kv_heads * groups, rows, dtype=torch.float32)
        for window, softcap, sinks in rules:
            rule = (0.1, window, softcap)
            sink = like(kv_heads * groups) if sinks else None
            scattered_attention_triton.launch_scattered_attention(
                query, keys, values, positions, *rule, sink
            )
            weight = like(*keys.shape[:3], dtype=torch.float32) if sinks else None
            attention_mass_triton.launch_attention_mass(query, keys, positions, lse, *rule, weight)
        tables = [like(32, 17, dtype=torch.int64)] * 2 + [like(32, dtype=torch.int64)] * 2
        tables.append(like(17, 5, dtype=torch.int32))
        angles = (like(capacity, dim // 2, dtype=torch.float32),) * 2
        quarter = tuple(angle[:, ::2] for angle in angles)
        known = {
            "none": (None, 1.0),
            "half": (Turn(*angles, "half"), 1.0),
            "part": (Turn(*quarter, "interleaved", dim // 2), 0.9),
        }
        for turn, temperature in map(known.get, turns):
            place_triton.launch_place(*tables, keys, values, capacity, turn, temperature)
    return caught
