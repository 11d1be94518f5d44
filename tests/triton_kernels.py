"""What tests of Triton kernels share: cases in a process of their own, and kernels built for a GPU.

Triton's interpreter is chosen when Triton is imported, so that cases run in a process of their own.
"""

import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")


def interpreted(cases):
    """Run the tests of a file in Triton's interpreter."""
    triton, numpy = (version(name).split(".")[:2] for name in ("triton", "numpy"))
    if [int(n) for n in triton] <= [3, 6] and [int(n) for n in numpy] >= [2, 4]:
        pytest.skip("the interpreter of Triton up to 3.6 cannot run a loop under NumPy 2.4")
    _run(cases, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


def on_the_device(cases):
    """Run the tests of a file on the CUDA device that there is."""
    _run(cases, TRITON_INTERPRET="0")


def _run(cases, **environ):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        env={**os.environ, **environ},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


class Catch:
    """In the place of a kernel: keeps what it would be launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, num_warps=4, num_stages=3, **constants):
            options = {"num_warps": num_warps, "num_stages": num_stages}
            self.launches.append((self.kernel, args, constants, options))

        return launch


def built(kernel, args, constants, options):
    """The kernel as Triton builds it for an H100 or H200, on any machine."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature, fixed, attributes = {}, {}, {}
    for i, (name, value) in enumerate(zip(names, args, strict=False)):
        tensor = isinstance(value, torch.Tensor)
        special = tensor or not kernel.params[i].do_not_specialize
        signature[name] = TYPES[value.dtype] if tensor else "i32"
        if isinstance(value, float):
            signature[name] = "fp32"
        elif special and (tensor or value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif special and value == 1:
            signature[name], fixed[(i,)] = "constexpr", 1
    for name, value in constants.items():
        signature[name] = "constexpr"
        fixed[(names.index(name),)] = False if name == "WIDE" else value  # the interpreter's
    source = ASTSource(kernel, signature, fixed, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def spilled(kernel):
    """Bytes of the stack of a thread of a built kernel, where registers go that are too many."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(re.search(r"STACK:(\d+)", shown).group(1))


def assert_fit(launches):
    """Build kernels as they were launched; none may spill, nor share more than an SM has."""
    seen = set()
    for launch in launches:
        kernel, args, constants, options = launch
        kinds = [x.dtype if isinstance(x, torch.Tensor) else x for x in args]
        key = repr((kernel.__name__, kinds, constants, options))
        if key in seen:
            continue
        seen.add(key)
        made = built(*launch)
        assert spilled(made) == 0, (kernel.__name__, constants, options)
        assert made.metadata.shared < 227 * 1024, (kernel.__name__, constants, options)
