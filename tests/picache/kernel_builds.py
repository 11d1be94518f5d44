"""The kernels built for an H100 or H200 by Triton's compiler, on any machine."""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from picache.kernels import attention_mass_triton, place_triton, scattered_attention_triton
from picache.kernels.tables import Turn

H200 = scattered_attention_triton.Processors(132, 227 * 1024)
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
SHAPES = [
    # batch, kv_heads, groups, rows, capacity, head_dim, value_dim, dtype
    (1, 8, 4, 320, 32768, 128, 128, torch.bfloat16),
    (8, 8, 4, 88, 4096, 128, 128, torch.bfloat16),
    (1, 2, 4, 3, 4096, 64, 64, torch.float32),
    (1, 2, 4, 96, 4096, 64, 64, torch.float32),
    (2, 2, 2, 96, 8192, 256, 256, torch.float32),
    (1, 4, 2, 320, 8192, 256, 256, torch.float16),
    (1, 4, 3, 96, 8192, 80, 96, torch.bfloat16),
]
RULES = [
    # window, softcap, sinks
    (None, None, False),
    (4096, 50.0, True),
]


class Catch:
    """In the place of a kernel: keeps what it would be launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, num_warps=4, num_stages=3, **constants):
            options = {"num_warps": num_warps, "num_stages": num_stages}
            self.launches.append((self.kernel, args, constants, options))

        return launch


def launches(monkeypatch):
    """Every kernel as it is launched, for each shape and rule."""
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
    for batch, kv_heads, groups, rows, capacity, dim, value_dim, dtype in SHAPES:

        def like(*shape, dtype=dtype):
            return torch.empty(*shape, dtype=dtype, device="meta")

        query = like(batch, kv_heads * groups, rows, dim)
        keys, values = (like(batch, kv_heads, capacity, d) for d in (dim, value_dim))
        positions = like(batch, rows, dtype=torch.int64)
        lse = like(batch, kv_heads * groups, rows, dtype=torch.float32)
        for window, softcap, sinks in RULES:
            rules = (0.1, window, softcap)
            sink = like(kv_heads * groups) if sinks else None
            scattered_attention_triton.launch_scattered_attention(
                query, keys, values, positions, *rules, sink
            )
            weight = like(*keys.shape[:3], dtype=torch.float32) if sinks else None
            attention_mass_triton.launch_attention_mass(query, keys, positions, lse, *rules, weight)
        tables = [like(32, 17, dtype=torch.int64)] * 2 + [like(32, dtype=torch.int64)] * 2
        tables.append(like(17, 5, dtype=torch.int32))
        angles = (like(capacity, dim // 2, dtype=torch.float32),) * 2
        quarter = tuple(angle[:, ::2] for angle in angles)
        for turn, temperature in (
            (None, 1.0),
            (Turn(*angles, "half"), 1.0),
            (Turn(*quarter, "interleaved", dim // 2), 0.9),
        ):
            place_triton.launch_place(*tables, keys, values, capacity, turn, temperature)
    return caught


def source_of(kernel, args, constants):
    """What Triton compiles: types of arguments, those that are fixed, and what divides them."""
    names = kernel.arg_names
    signature, fixed, attributes = {}, {}, {}
    for i, (name, value) in enumerate(zip(names, args, strict=False)):
        tensor = isinstance(value, torch.Tensor)
        signature[name] = TYPES[value.dtype] if tensor else "i32"
        if isinstance(value, float):
            signature[name] = "fp32"
        elif tensor or (value % 16 == 0 and not kernel.params[i].do_not_specialize):
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif value == 1 and not kernel.params[i].do_not_specialize:
            signature[name], fixed[(i,)] = "constexpr", 1
    for name, value in constants.items():
        signature[name] = "constexpr"
        fixed[(names.index(name),)] = False if name == "WIDE" else value  # the interpreter's
    return ASTSource(kernel, signature, fixed, attributes)


def build(kernel, args, constants, options):
    """The kernel as built for compute capability 9.0."""
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source_of(kernel, args, constants), target=target, options=options)


def resources(cubin):
    """Registers, and bytes of the stack of a thread, where registers go that are too many."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", shown).group(1)) for name in ("REG", "STACK"))


def build_all(monkeypatch):
    """Name of each kernel with what it is built for, and the bytes that it spills and shares."""
    for launch in launches(monkeypatch):
        built = build(*launch)
        what = (launch[0].__name__, launch[2], launch[3])
        yield what, resources(built.asm["cubin"])[1], built.metadata.shared
