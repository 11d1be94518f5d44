"""What the GPU does in a link, by kind of kernel, and how long it waits for Python.

    python examples/benchmarks/link_profile.py --out docs/results
    python examples/benchmarks/link_profile.py --out rehearsal --tiny --device cpu

The cells are some of `link.py`'s, on the same model and texts. Each is linked three times under
torch's profiler, after two that are not counted. On a CPU, what stands for kernels is torch's own
operations. `link_profile.json` is written after every cell.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))  # scripts, not a package
from environment import environment
from link import Arms
from link_grid import Cell
from quickstart_pages import markdown
from shapes import SHAPES, build_model

LINKS = 3
KINDS = {
    "matrix products": "nvjet|gemm|cutlass|splitK",
    "attention": "^split_kernel|^join_kernel",
    "placing chunks": "^place_kernel",
    "copies": "^Memcpy|^Memset",
}
OTHERS = "norms, rotations, residuals, writes"


def kind_of(kernel: str) -> str:
    """What a kernel is for, told by its name."""
    return next((kind for kind, like in KINDS.items() if re.search(like, kernel)), OTHERS)


def by_kind(events: Iterable[tuple[float, float, str]], links: int) -> dict:
    """A link by kind of kernel.

    Args:
        events: of all links, when each began, how long it took, both in microseconds, and its name.
        links: how many.

    Returns:
        "kinds": milliseconds and kernels a link, the longest first; "busy_ms": a link, kernels that
        run side by side counted once.
    """
    events = sorted(events)
    kinds: dict[str, list[float]] = {}
    for _, took, name in events:
        kinds.setdefault(kind_of(name), []).append(took)
    busy, reached = 0.0, float("-inf")
    for begun, took, _ in events:
        busy += max(0.0, begun + took - max(begun, reached))
        reached = max(reached, begun + took)
    rows = [
        {"kind": kind, "ms": sum(took) / links / 1e3, "kernels": len(took) / links}
        for kind, took in kinds.items()
    ]
    return {"kinds": sorted(rows, key=lambda row: -row["ms"]), "busy_ms": busy / links / 1e3}


def table(record: dict) -> str:
    """What stands between the markers of link_profile.json in docs/linking.md."""
    kinds = list(dict.fromkeys(k["kind"] for cell in record["cells"] for k in cell["kinds"]))
    lines = []
    for cell in record["cells"]:
        found = {k["kind"]: f"{k['ms']:.1f} ({k['kernels']:,.0f})" for k in cell["kinds"]}
        batch = f"{cell['batch']} prompts, " if cell["batch"] > 1 else ""
        label = f"{batch}{cell['tokens']:,} tokens, {cell['tier']}"
        lines.append({"link": label, "busy": f"{cell['busy_ms']:.1f}", **found})
    columns = {"link of": "{link}", "busy ms": "{busy}"} | {k: "{" + k + "}" for k in kinds}
    empty = dict.fromkeys(kinds, "")
    where = record["environment"]
    beneath = (
        f"Milliseconds a link, and kernels; {where['hardware']}, torch {where['torch']}, "
        f"{record['configuration']['shape']}, at {where['commit'][:7]}."
    )
    return f"{markdown([empty | line for line in lines], columns)}\n\n{beneath}"


def profiled(arms: Arms, cell: Cell) -> dict:
    """One cell by kind of kernel."""
    turn = arms.ready(cell)
    for _ in range(2):
        turn()
    cuda = arms.model.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if cuda else []
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(LINKS):
            turn()
    events = [
        (event.time_range.start, event.time_range.elapsed_us(), event.name)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        or (not cuda and event.cpu_parent is None)
    ]
    return cell.asdict() | by_kind(events, LINKS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="rehearse: small model, lengths / 16")
    parser.add_argument("--query", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    k = 64 if args.tiny else 1024
    if args.tiny:
        args.shape, args.dtype, args.query = "llama-tiny-4", "float32", 16
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    record = {"configuration": settings | {"links": LINKS}, "environment": environment()}
    record["cells"] = []
    model = build_model(args.shape, args.seed, args.device, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        arms = Arms(model, args.query, args.seed, Path(folder), k)
        for tokens, tier, batch in (
            (4 * k, "device", 1),
            (32 * k, "device", 1),
            (32 * k, "host", 1),
            (4 * k, "device", 8),
        ):
            cell = Cell("LegoLink-16", tokens, 16, tier, batch)
            record["cells"].append(profiled(arms, cell))
            text = json.dumps(record, indent=1) + "\n"
            (args.out / "link_profile.json").write_text(text)
            arms.forget()
    print(table(record))


if __name__ == "__main__":
    main()
