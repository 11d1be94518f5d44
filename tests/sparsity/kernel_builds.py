"""The kernels built for an H100 or H200 by Triton's compiler, on any machine."""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsity.kernels import (
    append_triton,
    decode_attention_triton,
    page_scores_triton,
    top_pages_triton,
)

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
SHAPES = [
    # batch, heads, groups, places, size, head_dim, value_dim, dtype
    (1, 8, 4, 128, 16, 128, 128, torch.bfloat16),
    (2, 2, 3, 2100, 3, 80, 96, torch.float16),
    (64, 4, 1, 99, 64, 256, 256, torch.float32),
]


class Catch:
    """In the place of `launcher`: keeps what a kernel would be launched with."""

    def __init__(self, launches):
        self.launches = launches

    def __call__(self, kernel):
        self.kernel = kernel
        return self

    def __getitem__(self, grid):
        def launch(*args, num_warps=4, num_stages=3, **constants):
            options = {"num_warps": num_warps, "num_stages": num_stages}
            self.launches.append((self.kernel, args, constants, options))

        return launch


def launches(monkeypatch):
    """Every kernel as its operator launches it, for each shape."""
    caught = []
    modules = (append_triton, decode_attention_triton, page_scores_triton, top_pages_triton)
    for module in modules:
        monkeypatch.setattr(module, "launcher", Catch(caught))
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


def build(kernel, args, constants, options):
    """The name of the kernel, what it spills, and the shared memory it takes, in bytes."""
    names = kernel.arg_names
    signature, fixed, attributes = {}, {}, {}
    for i, (name, value) in enumerate(zip(names, args, strict=False)):
        tensor = isinstance(value, torch.Tensor)
        signature[name] = TYPES[value.dtype] if tensor else "i32"
        if tensor or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif value == 1:
            signature[name], fixed[(i,)] = "constexpr", 1
    for name, value in constants.items():
        signature[name] = "constexpr"
        fixed[(names.index(name),)] = False if name == "WIDE" else value  # the interpreter's
    source, target = ASTSource(kernel, signature, fixed, attributes), GPUTarget("cuda", 90, 32)
    built = triton.compile(source, target=target, options=options)
    return kernel.__name__, spilled(built.asm["cubin"]), built.metadata.shared


def spilled(cubin):
    """Bytes of the stack of a thread, where registers go that are too many."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(re.search(r"STACK:(\d+)", shown).group(1))


def build_all(monkeypatch):
    for launch in launches(monkeypatch):
        yield build(*launch)
