"""The kernels of a decoding step: are they right on this device, and how fast is each variant?

    python examples/benchmarks/kernel_variants.py --out docs/results/kernel_variants.json

Each kernel is compared with its twin, alone and inside one compiled graph; then variants (tile,
warps, stages, parts of the keys) are timed: medians of a CUDA graph that goes round over so many
pools that none is in the cache of the device. Sizes are those of an 8-billion-parameter Llama 3.1
(8 KV heads, 32 query heads, head_dim 128), bfloat16. Results are printed and written as they come.
`--device cpu` rehearses with tiny pools; with `TRITON_INTERPRET=1` through Triton's interpreter.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo as dynamo
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from sparsity.kernels.append import append, append_reference
from sparsity.kernels.decode_attention import decode_attention, decode_attention_reference
from sparsity.kernels.page_scores import page_bounds_reference, page_logits_reference

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))  # scripts, not a package
from environment import environment

HEADS, GROUPS, DIM, SIZE = 8, 4, 128, 16
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def ops() -> tuple[Callable, Callable, Callable, Callable]:
    """append, page_bounds, page_logits and decode_attention as operators."""
    from sparsity.kernels.append_triton import append_op
    from sparsity.kernels.decode_attention_triton import decode_attention_op
    from sparsity.kernels.page_scores_triton import page_bounds_op, page_logits_op

    return append_op, page_bounds_op, page_logits_op, decode_attention_op


class Pool:
    """A full pool in the middle of decoding; pages in no order, the newest not full."""

    def __init__(
        self,
        batch: int,
        places: int,
        device: str,
        dtype: torch.dtype = torch.bfloat16,
        size: int = SIZE,
        heads: int = HEADS,
        groups: int = GROUPS,
        dims: tuple[int, int] = (DIM, DIM),
        used: int | None = None,
        inside: int = 2,
    ) -> None:
        used = places if used is None else used
        self.size, to = size, {"device": device, "dtype": dtype}
        order = torch.rand(batch, heads, used, device=device).argsort(-1)
        self.start = torch.full((batch, heads, places), -1, dtype=torch.int32, device=device)
        self.start[..., :used] = order * size
        self.now = torch.full((batch,), (used - 1) * size + inside % size, device=device)
        self.keys = torch.randn(batch, heads, places * size, dims[0], **to)
        self.values = torch.randn(batch, heads, places * size, dims[1], **to)
        self.query = torch.randn(batch, heads * groups, dims[0], **to)
        rank = self.start[..., None] + torch.arange(size, device=device)
        held = (self.start[..., None] >= 0) & (rank <= self.now[:, None, None, None])
        self.slots = torch.where(held, rank, -1).flatten(2).int()
        self.stamp = self.start.clone()
        self.sums = torch.rand(batch, heads, places, 1, device=device)
        self.pinned = torch.zeros(batch, heads, places, dtype=torch.bool, device=device)
        self.kmin, self.kmax = torch.randn(2, batch, heads, places, dims[0], **to).sort(0).values
        # Of a memory of its own each: what shares memory is copied where a graph changes it.
        self.kmin, self.kmax = self.kmin.clone(), self.kmax.clone()
        self.current = self.start.argmax(-1)
        self.worth = torch.where(self.start < 0, -torch.inf, torch.rand_like(self.start.float()))

    @property
    def state(self) -> list[Tensor]:
        names = "keys values slots start stamp sums pinned kmin kmax current"
        return [getattr(self, name) for name in names.split()]

    @property
    def held(self) -> tuple[Tensor, ...]:
        return self.query, self.keys, self.values, self.start, self.now

    def new(self, rank: Tensor) -> list[Tensor]:
        """Key, value, worth, rank, column and valid of a token."""
        batch = len(self.current)
        key = torch.randn_like(self.keys[:, :, 0])
        value = torch.randn_like(self.values[:, :, 0])
        valid = torch.arange(batch, device=rank.device) % 3 != 1
        return [key, value, self.worth, rank, rank.max(), valid]


class Report:
    """What was measured so far: printed, and written to a file at once."""

    def __init__(self, out: Path | None, seconds: float) -> None:
        self.out, self.end = out, time.monotonic() + seconds
        self.record: dict = {"environment": environment(), "checks": [], "times": []}

    def late(self) -> bool:
        return time.monotonic() > self.end

    def add(self, kind: str, row: dict) -> None:
        self.record[kind].append(row)
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
                       for k, v in row.items()), flush=True)  # fmt: skip
        self.write()

    def write(self) -> None:
        if self.out is not None:
            self.out.write_text(json.dumps(self.record, indent=1) + "\n")


# --- right? ---


def differs(got: Tensor, expected: Tensor, tolerance: float) -> float:
    """The largest difference as a share of what is tolerated: right below 1."""
    both_inf = (got == expected) & got.isinf()
    gap = (got.double() - expected.double()).abs().masked_fill(both_inf, 0)
    return float((gap / (tolerance + tolerance * expected.double().abs())).nan_to_num(1e9).max())


def check(report: Report, device: str, tiny: bool) -> None:
    """Each kernel against its twin, on odd sizes."""
    append_op, bounds_op, logits_op, attend_op = ops()
    shapes = [  # batch, places, page size, KV heads, groups, dims
        (3, 37, 3, 2, 3, (80, 96)),
        (1, 130, 16, 2, 4, (128, 128)),
        (2, 9, 64, 1, 8, (256, 256)),
        (2, 300, 1, 2, 1, (64, 128)),
    ]
    for dtype in TOLERANCE:
        for batch, places, size, heads, groups, dims in shapes[: 1 if tiny else None]:
            worst: dict[str, float] = {}
            pool = Pool(batch, places, device, dtype, size, heads, groups, dims, places - 2, 1)
            pool.now[0] = -1 if batch > 2 else pool.now[0]
            rules = [(None, None, None, None), (None, 30.0, True, "max"), (True, None, True, None),
                     (None, None, None, "mean")]  # fmt: skip
            for listed, cap, sink, weights in rules:
                pages = torch.rand(pool.start.shape, device=device).argsort(-1)
                pages = pages[..., : places // 2] if listed else None
                sinks = torch.randn(heads * groups, device=device, dtype=dtype) if sink else None
                args = (*pool.held, size, dims[0] ** -0.5, pages, cap, sinks, weights)
                got, expected = attend_op(*args), decode_attention_reference(*args)
                name = f"attend_{'listed' if listed else 'all'}_{weights}"
                worst[name] = differs(got[0], expected[0], TOLERANCE[dtype])
                if weights:
                    worst[name + "_w"] = differs(got[1], expected[1], 1e-3)
            for group in ("max", "mean"):
                low = (pool.query, pool.kmin, pool.kmax, group)
                worst["bounds"] = differs(bounds_op(*low), page_bounds_reference(*low), 1e-4)
                exact = (pool.query, pool.keys, pool.slots >= 0, size, group)
                worst["logits"] = differs(logits_op(*exact), page_logits_reference(*exact), 1e-4)
            twin, rank = [t.clone() for t in pool.state], pool.now.clamp(min=0) + 1
            for _ in range(size + 2):
                new = [*pool.new(rank), size]
                append_op(*pool.state, *new)
                append_reference(*twin, *new)
                rank = rank + new[-2]
            pairs = zip(pool.state, twin, strict=True)
            worst["append"] = float(not all(torch.equal(a, b) for a, b in pairs)) * 1e9
            right = max(worst.values()) < 1
            row = {"right": right, "dtype": str(dtype), "pages": (batch, places, size, *dims)}
            report.add("checks", row | worst)


def one_step(write: Callable, attend: Callable, pool: Pool, new: list[Tensor]) -> list[Tensor]:
    """A token is written, then attends to all, with weights, and to the newest three pages."""
    write(*pool.state, *new, SIZE)
    held = (pool.query, pool.keys, pool.values, pool.start, new[3])
    listed = pool.start.topk(3).indices
    out, weights = attend(*held, SIZE, DIM**-0.5, weights="mean")
    return [out, weights, attend(*held, SIZE, DIM**-0.5, pages=listed)[0]]


def check_compiled(report: Report, device: str, batch: int, places: int, steps: int) -> None:
    """One graph of append and attention, replayed, against the twins; what the device did in it."""

    def step(pool: Pool, new: list[Tensor]) -> list[Tensor]:
        return one_step(append, decode_attention, pool, new)

    mode = {"mode": "reduce-overhead"} if device == "cuda" else {"backend": "aot_eager"}
    compiled = torch.compile(step, fullgraph=True, **mode)
    pool, twin = (Pool(batch, places, device, torch.float32) for _ in range(2))
    for name, value in vars(pool).items():
        if isinstance(value, Tensor):
            dynamo.mark_static_address(value)
            setattr(twin, name, value.clone())
    rank, worst, before = pool.now + 1, 0.0, 0
    dynamo.utils.counters.clear()
    with torch.no_grad():
        for i in range(steps):
            if device == "cuda" and i == 3:
                before = torch.cuda.memory_allocated()
            new = pool.new(rank)
            outs = [t.clone() for t in compiled(pool, new)]
            expected = one_step(append_reference, decode_attention_reference, twin, new)
            gaps = [differs(a, b, 1e-4) for a, b in zip(outs, expected, strict=True)]
            worst, rank = max(worst, *gaps), rank + new[-1]
        same = all(torch.equal(a, b) for a, b in zip(pool.state, twin.state, strict=True))
        counted = dynamo.utils.counters
        row = {"right": same and worst < 1, "compiled": batch, "worst": worst, "equal": same,
               "graphs": counted["stats"]["unique_graphs"],
               "breaks": sum(counted["graph_break"].values()),
               "inductor": {k: v for k, v in counted["inductor"].items()
                            if "cudagraph" in k or "reinplac" in k}}  # fmt: skip
        if device == "cuda":
            row["allocated_in_steps"] = torch.cuda.memory_allocated() - before
            row["state_bytes"] = sum(t.nbytes for t in pool.state)
            kinds = [torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=kinds) as profile:
                compiled(pool, new)
                torch.cuda.synchronize()
            events = profile.key_averages()
            row["device_us"] = {e.key[:60]: round(e.device_time_total, 1) for e in events}
    report.add("checks", row)


# --- fast? ---


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
    """Times variants of one thing over pools that together are larger than any cache."""

    def __init__(self, report: Report, device: str, copy: float) -> None:
        self.report, self.device, self.copy = report, device, copy

    def pools(self, batch: int, places: int, **how) -> list[Pool]:
        if self.device != "cuda":
            return [Pool(batch, places, self.device, **how)]
        size = how.get("size", SIZE)
        each = batch * HEADS * places * size * DIM * 4
        count = max(2, min(40, -(-(256 << 20) // each)))
        return [Pool(batch, places, self.device, **how) for _ in range(count)]

    def time(self, what: str, name: str, pools: list[Pool], call: Callable, read: int) -> float:
        """Microseconds of `call(pool)`, which reads `read` bytes; infinite where it fails."""
        rounds = max(1, 8 // len(pools)) if self.device == "cuda" else 1
        calls = [lambda pool=pool: call(pool) for pool in pools] * rounds
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
    pools = bench.pools(batch, places, **how)
    size = how.get("size", SIZE)
    for pool in pools:
        order = torch.rand(pool.start.shape, device=bench.device).argsort(-1)
        pool.pages = order[..., :listed].contiguous() if listed else None
    tokens = (listed or used or places) * size
    read = batch * HEADS * tokens * DIM * 2 * pools[0].keys.element_size()
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
    append_op, bounds_op, logits_op, _ = ops()
    pools, what = bench.pools(batch, places), f"B{batch} P{places}"
    read = batch * HEADS * places * DIM * 2 * 2
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=None, help="JSON, written as results come")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=165, help="after which variants are left")
    parser.add_argument("--only", nargs="*", choices=["check", "compiled", "attention", "small"])
    args = parser.parse_args()
    only = set(args.only or ["check", "compiled", "attention", "small"])
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
    if "attention" in only and runs:
        for batch, places, how in (
            (32, 64, {}),
            (1, 128, {}),
            (32, 128, {}),
            (8, 128, {}),
            (32, 64, {"weights": "mean"}),
            (1, 128, {"weights": "mean"}),
            (1, 2048, {"listed": 128}),
            (1, 8192, {"used": 256}),
            (1, 2048, {"size": 1}),
        )[: 1 if tiny else None]:
            if not report.late():
                time_attention(bench, 1 if tiny else batch, 6 if tiny else places, tiny, **how)
                print(f"{report.end - time.monotonic():.0f} s left", flush=True)
    if "small" in only and runs:
        for batch, places in [(1, 6)] if tiny else [(1, 128), (32, 64), (1, 2048)]:
            time_small(bench, batch, places, tiny)
    report.write()
    wrong = [row for row in report.record["checks"] if not row["right"]]
    print(f"{len(report.record['checks'])} checks, {len(wrong)} wrong")
    for row in wrong:
        print("WRONG", row)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
