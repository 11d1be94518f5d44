"""The kernels of a decoding step: are they right on this device, and how fast is each variant?

    python examples/benchmarks/kernel_variants.py --out docs/results/kernel_variants.json

Each kernel is compared with its twin, alone and inside one compiled graph; then variants (tile,
warps, stages, parts of the keys) are timed: medians of a CUDA graph of a call on each of many
pools, none of them in the cache of the device, which is flushed before. Sizes are those of an
8-billion-parameter Llama 3.1 (8 KV heads, 32 query heads, head_dim 128), bfloat16. Results are
printed and written as they come. `--device cpu` rehearses with tiny pools; with
`TRITON_INTERPRET=1` through Triton's interpreter.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from kernel_checks import DIM, GROUPS, HEADS, SIZE, Pool, Report, check, check_compiled, ops
from torch import Tensor

from sparsity.kernels.append import append_reference
from sparsity.kernels.page_scores import page_bounds_reference, page_logits_reference
from sparsity.kernels.top_pages import top_pages_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def microseconds(calls: list[Callable[[], object]], device: str) -> float:
    """Median time of a call, in a CUDA graph of all of them one after another."""
    if device != "cuda":
        seconds = []
        for call in calls:
            begun = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begun)
        return 1e6 * statistics.median(seconds)
    from triton.testing import do_bench

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return 1e3 * do_bench(graph.replay, warmup=5, rep=30, return_mode="median") / len(calls)


class Bench:
    """Times variants of one thing, each call on a pool that is not in the cache of the device."""

    def __init__(self, report: Report, device: str, copy: float) -> None:
        self.report, self.device, self.copy = report, device, copy

    def pools(self, batch: int, places: int, read: int, **how) -> list[Pool]:
        """So many that a graph of a call each outlasts its launch."""
        if self.device != "cuda":
            return [Pool(batch, places, self.device, **how)]
        count = max(10, min(100, (256 << 20) // read))  # each is read once in a replay
        return [Pool(batch, places, self.device, **how) for _ in range(count)]

    def time(self, what: str, name: str, pools: list, call: Callable, read: int) -> float:
        """Microseconds of `call(pool)`, which reads `read` bytes; infinite where it fails."""
        calls = [lambda pool=pool: call(pool) for pool in pools]
        try:
            us = microseconds(calls, self.device)
        except Exception as error:  # a variant that does not fit the device is no result
            self.report.add("times", {"what": what, "variant": name, "failed": str(error)[:200]})
            return float("inf")
        gb = read / us / 1e3
        row = {"what": what, "variant": name, "us": us, "GB/s": gb, "of_copy": gb / self.copy}
        self.report.add("times", row)
        return us


def copy_bandwidth(device: str) -> float:
    """GB/s of a copy, read and written bytes together."""
    source = torch.empty((1 << 30) if device == "cuda" else (1 << 22), dtype=torch.int8)
    source = source.to(device)
    target = torch.empty_like(source)
    us = microseconds([lambda: target.copy_(source)] * 4, device)
    return 2 * source.nbytes / us / 1e3


def time_attention(bench: Bench, batch: int, places: int, tiny: bool, **how) -> None:
    """Variants of tile, warps, stages, parts and trim: one at a time from the best so far."""
    *_, attend_op = ops()
    listed, used = how.pop("listed", 0), how.get("used")
    weights = how.pop("weights", None)
    size = how.get("size", SIZE)
    read = batch * HEADS * (listed or used or places) * size * DIM * 4
    pools = bench.pools(batch, places, read, **how)
    for pool in pools:
        order = torch.rand(pool.start.shape, device=bench.device).argsort(-1)
        pool.pages = order[..., :listed].contiguous() if listed else None
    what = f"attention B{batch} N{places * size} page{size}"
    what += f" listed{listed}" if listed else ""
    what += f" used{used}" if used else ""
    what += f" weights={weights}" if weights else ""

    def call(*plan: int | bool) -> Callable[[Pool], object]:
        def run(pool: Pool) -> object:
            rest = (pool.pages, None, None, weights)
            return attend_op(*pool.held, size, DIM**-0.5, *rest, *plan)

        return run

    bench.time(what, "plan", pools, call(), read)
    if not (listed or used or weights):

        def sdpa(pool: Pool) -> Tensor:
            query = pool.query.unflatten(1, (HEADS, GROUPS))
            return F.scaled_dot_product_attention(query, pool.keys, pool.values)

        bench.time(what, "sdpa, no mask", pools, sdpa, read)
    tiles = -(-(listed or places) * size // 64)
    parts = max(1, min(round(264 / (batch * HEADS)), tiles, 64))
    best = {"tile": 64, "parts": parts, "warps": 4, "stages": 3, "trim": bool(used)}
    least = float("inf")
    near = sorted({max(1, parts // 2), parts, min(2 * parts, tiles, 64), min(4 * parts, tiles, 64)})
    sweep: list[tuple[str, list]] = [
        ("tile", [64, 32, 128]), ("warps", [2, 4, 8]), ("stages", [2, 3, 4]), ("parts", near),
        ("trim", [False, True]),
    ]  # fmt: skip
    seen = set()
    for name, values in sweep[: 1 if tiny else None]:
        for value in values[: 1 if tiny else None]:
            plan = best | {name: value}
            key = tuple(plan.values())
            if key in seen or bench.report.late():
                continue
            seen.add(key)
            us = bench.time(what, " ".join(f"{k}{v}" for k, v in plan.items()), pools,
                            call(*key), read)  # fmt: skip
            if us < least:
                least, best = us, plan
    bench.report.record.setdefault("best", {})[what] = best | {"us": least}
    print("BEST", what, best, f"{least:.2f} us, {read / least / 1e3 / bench.copy:.1%} of copy")


def time_small(bench: Bench, batch: int, places: int, tiny: bool) -> None:
    """Scores of pages and append."""
    append_op, bounds_op, logits_op, *_ = ops()
    read, what = batch * HEADS * places * DIM * 4, f"B{batch} P{places}"
    pools = bench.pools(batch, places, read)
    for name, op, args, nbytes, blocks, twin in (
        ("bounds", bounds_op, lambda p: (p.query, p.kmin, p.kmax, "max"), read,
         (8, 16, 32), page_bounds_reference),
        ("logits", logits_op, lambda p: (p.query, p.keys, p.slots >= 0, SIZE, "max"),
         read * SIZE // 2, (32, 64, 128), page_logits_reference),
    ):  # fmt: skip
        for pool in pools:
            pool.args = args(pool)
        bench.time(f"{name} {what}", "twin", pools, lambda p, twin=twin: twin(*p.args), nbytes)
        for block in blocks[: 1 if tiny else None]:
            for warps in (2, 4, 8)[: 1 if tiny else None]:
                if not bench.report.late():
                    bench.time(f"{name} {what}", f"block{block} warps{warps}", pools,
                               lambda p, op=op, b=block, w=warps: op(*p.args, b, w),
                               nbytes)  # fmt: skip
    for opens in (False, True):
        for pool in pools:
            rank = pool.now - pool.now % SIZE + (SIZE if opens else 3)
            pool.args = (*pool.state, *pool.new(rank), SIZE)
        label = f"append {what} {'opens' if opens else 'goes on'}"
        bench.time(label, "twin", pools, lambda p: append_reference(*p.args), 1)
        for warps in (1, 2, 4, 8)[: 1 if tiny else None]:
            if not bench.report.late():
                bench.time(
                    label, f"warps{warps}", pools, lambda p, w=warps: append_op(*p.args, w), 1
                )


def time_top(bench: Bench, batch: int, places: int, tiny: bool) -> None:
    """The best sixteenth of the pages, unlike and where most are tied, against torch.topk."""
    top_op = ops()[3]
    count, read = max(1, places // 16), batch * HEADS * places * 4
    unlike = [torch.randn(batch, HEADS, places, device=bench.device) for _ in range(50)]
    for scores in unlike:
        scores[..., -1] = torch.inf  # the newest page
    tied = [s.masked_fill(s < s.topk(count).values[..., count // 2, None], -torch.inf)
            for s in unlike]  # fmt: skip
    for kind, rows in (("unlike", unlike), ("tied", tied)):
        what = f"top B{batch} P{places} of {count} {kind}"
        rows = rows[: 1 if tiny else None]
        bench.time(what, "torch.topk", rows, lambda s: s.topk(count, dim=-1).indices, read)
        bench.time(what, "twin", rows, lambda s: top_pages_reference(s, count), read)
        for warps in (0, 1, 2, 4, 8, 16)[: 1 if tiny else None]:
            if not bench.report.late():
                bench.time(what, f"warps{warps}" if warps else "plan", rows,
                           lambda s, w=warps: top_op(s, count, w), read)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=None, help="JSON, written as results come")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=165, help="after which variants are left")
    parser.add_argument(
        "--only", nargs="*", choices=["check", "compiled", "attention", "small", "top"]
    )
    args = parser.parse_args()
    only = set(args.only or ["check", "compiled", "top", "attention", "small"])
    torch.manual_seed(0)
    device, tiny = args.device, args.device == "cpu"
    runs = device == "cuda" or INTERPRETED  # whether the kernels themselves run
    report = Report(args.out, args.seconds)
    copy = copy_bandwidth(device)
    report.record["copy_GB/s"] = copy
    print(f"{report.record['environment']}\ncopy {copy:.0f} GB/s", flush=True)
    bench = Bench(report, device, copy)
    if "check" in only and runs:
        check(report, device, tiny)
    if "compiled" in only and not INTERPRETED:
        check_compiled(report, device, 2, 6 if tiny else 40, 3 if tiny else 40)
    for places in [40] if tiny else [128, 1024, 2048, 8192]:
        for batch in (1,) if tiny else (1, 32):
            if "top" in only and runs and not report.late():
                time_top(bench, batch, places, tiny)
    attention: list[tuple] = [
        (32, 64, {}),
        (1, 128, {}),
        (32, 128, {}),
        (1, 2048, {"listed": 128}),
        (8, 128, {}),
        (1, 8192, {"used": 256}),
        (32, 64, {"weights": "mean"}),
        (1, 128, {"weights": "mean"}),
        (1, 2048, {"size": 1}),
    ]
    small = [(1, 128), (32, 64), (1, 2048)]
    if tiny:
        attention, small = [(1, 6, {}), (1, 6, {"listed": 3}), (1, 6, {"used": 4})], [(1, 6)]
    for i, (batch, places, how) in enumerate(attention):
        if "attention" in only and runs and not report.late():
            time_attention(bench, batch, places, tiny, **how)
        if i < len(small) and "small" in only and runs and not report.late():
            time_small(bench, *small[i], tiny)
        print(f"{report.end - time.monotonic():.0f} s left", flush=True)
    report.write()
    wrong = [row for row in report.record["checks"] if not row["right"]]
    print(f"{len(report.record['checks'])} checks, {len(wrong)} wrong")
    for row in wrong:
        print("WRONG", row)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
