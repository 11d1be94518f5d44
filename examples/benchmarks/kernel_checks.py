"""Pools for `kernel_variants.py`, its report, and whether kernels compute what their twins do."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo as dynamo
from torch import Tensor

from sparsity.kernels.append import append, append_reference
from sparsity.kernels.decode_attention import decode_attention, decode_attention_reference
from sparsity.kernels.page_scores import page_bounds_reference, page_logits_reference
from sparsity.kernels.top_pages import top_pages, top_pages_reference

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))  # scripts, not a package
from environment import environment

HEADS, GROUPS, DIM, SIZE = 8, 4, 128, 16
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def ops() -> tuple[Callable, ...]:
    """append, page_bounds, page_logits, top_pages and decode_attention as operators."""
    from sparsity.kernels.append_triton import append_op
    from sparsity.kernels.decode_attention_triton import decode_attention_op
    from sparsity.kernels.page_scores_triton import page_bounds_op, page_logits_op
    from sparsity.kernels.top_pages_triton import top_pages_op

    return append_op, page_bounds_op, page_logits_op, top_pages_op, decode_attention_op


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


def differs(got: Tensor, expected: Tensor, tolerance: float) -> float:
    """The largest difference as a share of what is tolerated: right below 1."""
    both_inf = (got == expected) & got.isinf()
    gap = (got.double() - expected.double()).abs().masked_fill(both_inf, 0)
    return float((gap / (tolerance + tolerance * expected.double().abs())).nan_to_num(1e9).max())


def check(report: Report, device: str, tiny: bool) -> None:
    """Each kernel against its twin, on odd sizes."""
    append_op, bounds_op, logits_op, top_op, attend_op = ops()
    half, brain, full = torch.float16, torch.bfloat16, torch.float32
    shapes = [  # batch, places, page size, KV heads, groups, dims, dtypes
        (3, 37, 3, 2, 3, (80, 96), (brain, full)),
        (1, 130, 16, 2, 4, (128, 128), (half, brain)),
        (2, 9, 64, 1, 8, (256, 256), (full,)),
        (2, 300, 1, 2, 1, (64, 128), (brain,)),
    ]
    for batch, places, size, heads, groups, dims, dtypes in shapes[: 1 if tiny else None]:
        for dtype in dtypes:
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
            ranks = (pool.start // 5).float()  # with equals
            chosen, same = top_op(ranks, 4), top_pages_reference(ranks, 4)
            worst["top"] = float(not torch.equal(chosen, same.sort(-1).values)) * 1e9
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
    listed = top_pages(pool.start.float(), 3)
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
