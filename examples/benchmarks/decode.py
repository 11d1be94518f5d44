"""Milliseconds a token inside `model.generate`: dense, under our policies and under kvpress's.

    python examples/benchmarks/decode.py --out docs/results --part 1 kernels
    python examples/benchmarks/decode.py --out docs/results --part 2 peers --peers .venv/peers
    python examples/benchmarks/decode.py --out docs/results --profile --only "ours compiled RaaS"
    python examples/benchmarks/decode.py --out rehearsal --tiny --device cpu

One H200 and a Llama of 8 billion random weights; all arms in one run, three windows of steps each,
of which the median counts. `decode.json` is written anew after every cell, and a later call adds to
it or replaces what it measures again; each row tells its call, and each call measures the copy
bandwidth. `decode_figure.py` draws it again; `--profile` writes `decode_profile.json` instead.
`.ci/peers` makes the folder for `--peers`.
"""

import argparse
import gc
import importlib.util
import json
import re
import sys
import time
import traceback
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from tqdm import tqdm
from transformers import (
    CompileConfig,
    LogitsProcessorList,
    PreTrainedModel,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))  # scripts, not a package
from decode_arms import bytes_a_step, filled_cache, without_attention
from decode_clock import Clock, profile_rows
from decode_figure import draw
from decode_grid import COMPILED, Cell, floors, main_grid, peer_grid, wide_grid, window_of
from decode_kernels import copy_bandwidth, kernel_rows
from decode_kvpress import peer_rows
from decode_tables import failures, main_table, profile_table, tables
from environment import environment
from shapes import SHAPES, build_model

from sparsity import SparseCache, detach
from sparsity.hf.fixed_memory import left_bytes

PARTS = {"1": main_grid, "2": wide_grid}


def compiled_anywhere() -> CompileConfig:
    """For a rehearsal on a CPU: `generate` traces the step and runs it as it is."""
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True  # noqa: SLF001, transformers has no public name for it
    return config


def allocated(device: torch.device) -> int:
    """Bytes that tensors occupy on the device, by its allocator; 0 on a CPU."""
    gc.collect()
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


@torch.no_grad()
def run_floor(model: PreTrainedModel, cell: Cell, clock: Clock) -> None:
    """Clock the compiled forward of one token a row, without attention and without a cache."""
    how = dict(mode="reduce-overhead") if clock.cuda else dict(backend="eager")
    step = torch.compile(model.forward, fullgraph=True, **how)
    ids = torch.ones((cell.batch, 1), dtype=torch.long, device=model.device)
    with without_attention(model):
        for _ in range(clock.new_tokens):
            clock(ids, step(ids, use_cache=False).logits)


def run_cell(model: PreTrainedModel, cell: Cell, clock: Clock, seed: int) -> dict:
    """Decode with the cell's cache inside `generate`; what was held, and what the report says."""
    device, cpu = model.device, model.device.type == "cpu"
    decoder = model.get_decoder()
    before = allocated(device) - left_bytes(decoder)  # this cell takes or frees it, or leaves it
    cache = filled_cache(model, cell, clock.new_tokens, seed, static=cpu)
    ids = torch.randint(
        3,
        model.config.vocab_size,
        (cell.batch, cell.context),
        generator=torch.Generator().manual_seed(seed),
    ).to(device)
    compiled = cpu and cell.arm in ("dense static", "ours compiled")
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=clock.new_tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([clock]),
        **(dict(compile_config=compiled_anywhere()) if compiled else {}),
    )
    held = allocated(device) - left_bytes(decoder) - before
    row: dict = {"held_bytes": held if not cpu else None}
    if isinstance(cache, SparseCache):
        report = cache.report()
        row |= {
            "reported_bytes": report.num_bytes,
            "tokens_kept": max(report.tokens_kept),
            "decoding": report.decoding,
        }
    return row


def measure(model: PreTrainedModel, cell: Cell, args: argparse.Namespace) -> tuple[dict, Clock]:
    """One row: milliseconds a token, tokens a second, bytes held, graphs."""
    if not cell.arm.startswith("ours"):  # which attaches it, once: hooks are part of its graph
        detach(model)
    clock = Clock(
        model.device, window_of(cell, args.window), args.repeats, 5 if args.profile else 0
    )
    row = cell.asdict()
    if cell.arm == "no attention":
        run_floor(model, cell, clock)
    else:
        row |= run_cell(model, cell, clock, args.seed)
    row |= clock.row()
    if cell.arm == "no attention":  # its clock starts behind the compilation
        del row["first_steps_seconds"]
    if cell.arm in COMPILED and not row["graphs"]:
        raise RuntimeError(f"nothing was compiled; decoded {row.get('decoding', '')}")
    row["tokens_a_second"] = 1e3 * cell.batch / row["step_ms"]
    row["bytes_a_step"] = bytes_a_step(model, cell)
    return row, clock


class Results:
    """`decode.json`: what earlier calls measured, and what this one adds cell by cell."""

    def __init__(self, path: Path, args: argparse.Namespace, bandwidth: float) -> None:
        self.path = path
        call = {
            "configuration": configuration(args),
            "environment": environment(),
            "copy_bytes_a_second": bandwidth,
        }
        first = {name: call[name] for name in ("configuration", "environment")}
        new = first | {"calls": [], "rows": []}
        self.record = json.loads(path.read_text()) if path.exists() else new
        self.call = len(self.record["calls"])
        self.record["calls"].append(call)

    def add(self, row: dict) -> None:
        """Put a row in, in the place of one of its name, and write the file.

        What that one had measured is kept beside: machines differ.
        """
        kept = [r for r in self.record["rows"] if r["name"] != row["name"]]
        earlier = [e for r in self.record["rows"] if r["name"] == row["name"] for e in before(r)]
        self.record["rows"] = [*kept, row | {"call": self.call, "earlier": earlier}]
        self.path.write_text(json.dumps(self.record, indent=1) + "\n")


def before(row: dict) -> list[dict]:
    """What earlier calls measured of a row that is replaced, itself among them."""
    keys = ("call", "step_ms", "first_steps_seconds", "first_token_seconds")
    now = {key: row[key] for key in keys if key in row}
    measured = "step_ms" in now or "first_token_seconds" in now
    return [*row.get("earlier", ()), *([now] if measured else ())]


def failed(cell: Cell, error: Exception) -> dict:
    """A row that says what went wrong: a run goes on, and exits with 1 at its end."""
    traceback.print_exc()
    return cell.asdict() | {"error": f"{type(error).__name__}: {error}".split("\n")[0][:400]}


def run_grid(
    model: PreTrainedModel, cells: list[Cell], args: argparse.Namespace, results: Results
) -> None:
    """All cells in their order, until the time is up; those not reached are named."""
    graph = None
    bar = tqdm(cells, desc="cells", mininterval=10)
    for place, cell in enumerate(bar):
        if time.perf_counter() - args.began > args.seconds:
            print("no time left for:", *(c.name for c in cells[place:]), sep="\n  ")
            return
        bar.set_postfix_str(cell.name)
        if cell.graph != graph:  # a new shape shall not be traced as a dynamic one
            torch.compiler.reset()
            counters.clear()
        graph = cell.graph
        begun = time.perf_counter()
        try:
            row, clock = measure(model, cell, args)
        except Exception as error:
            row, graph = failed(cell, error), None
        else:
            row["cell_seconds"] = time.perf_counter() - begun
            if args.profile:
                write_profile(args, row, clock)
            del clock
        if not args.profile:
            results.add(row)
        step = row.get("step_ms")
        print(cell.name, row.get("error") if step is None else f"{step:.2f} ms", flush=True)
        if model.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def configuration(args: argparse.Namespace) -> dict:
    """What was asked for, as the records keep it."""
    left_out = ("out", "peers", "began", "list")
    return {name: value for name, value in vars(args).items() if name not in left_out}


def write_profile(args: argparse.Namespace, row: dict, clock: Clock) -> None:
    """Add a cell's step by kernel to `decode_profile.json`."""
    path = args.out / "decode_profile.json"
    record = json.loads(path.read_text()) if path.exists() else {"cells": {}}
    record["cells"][row["name"]] = profile_rows(clock) | {"step_ms": row["step_ms"]}
    record |= {"configuration": configuration(args), "environment": environment()}
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(profile_table(row["name"], record["cells"][row["name"]]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = [*PARTS, "kernels", "peers"]
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--part", nargs="+", choices=parts, default=parts)
    parser.add_argument("--only", default="", help="a regular expression that cells' names match")
    parser.add_argument("--list", action="store_true", help="print the cells and do nothing")
    parser.add_argument("--peers", type=Path, help="the folder that .ci/peers has made")
    parser.add_argument("--profile", action="store_true", help="five steps by kernel")
    parser.add_argument("--seconds", type=float, default=540, help="begin no cell after these")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="rehearse: small model, contexts / 16")
    parser.add_argument("--window", type=int, default=64, help="steps in a compiled arm's window")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.began = time.perf_counter()
    args.scale = 64 if args.tiny else 1024
    if args.tiny:
        args.shape, args.dtype = "llama-tiny", "float32"
    return args


def chosen(args: argparse.Namespace) -> tuple[list[Cell], list[Cell]]:
    """Our cells, each part behind its floors, and kvpress's."""
    cells = []
    for part, grid in PARTS.items():
        if part in args.part:
            cells += [*floors(grid(args.scale)), *grid(args.scale)]
    cells = [cell for cell in dict.fromkeys(cells) if re.search(args.only, cell.name)]
    peers = peer_grid(args.scale) if "peers" in args.part and args.peers else []
    return cells, [cell for cell in peers if re.search(args.only, cell.name)]


def main() -> None:
    args = arguments()
    cells, peers = chosen(args)
    if args.list:
        print(*(cell.name for cell in [*cells, *peers]), sep="\n")
        return
    device = torch.device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    bandwidth = copy_bandwidth(device)
    results = Results(args.out / "decode.json", args, bandwidth)
    if cells:
        model = build_model(args.shape, args.seed, args.device, args.dtype)
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        run_grid(model, cells, args, results)
        del model
    if args.profile:
        return
    if "kernels" in args.part:
        for row in kernel_rows(device, args.tiny):
            results.add(row)
    for row in peer_rows(peers, args):
        results.add(row)
    print(tables(results.record))
    if importlib.util.find_spec("matplotlib"):
        draw(results.record, args.out / "decode.png")
    else:
        print(f"no matplotlib here: draw it with decode_figure.py {args.out}")
    print(main_table(results.record))
    if failures(results.record, results.call):
        sys.exit(1)


if __name__ == "__main__":
    main()
