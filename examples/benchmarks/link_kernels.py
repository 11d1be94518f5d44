"""The kernels of a link: are they right on this device, and how fast are they?

    python examples/benchmarks/link_kernels.py --out docs/results/link_kernels.json --variants

Sizes are those of an 8-billion-parameter Llama 3.1 (32 layers, 32 query heads, 8 KV heads,
head_dim 128), bfloat16. *place* moves 16 chunks of all layers in one launch; its bandwidth counts
bytes read and written and is set against that of torch's copy. *Scattered attention* has the rows
of LegoLink, the first of every chunk and the query of 64, or only the last of the prompt; beside it
stand torch's cuDNN and flash attention without a mask, which compute something else and more, and
torch's attention under a mask. Each call is compared with the plain twin first. Times are medians
of replays of a CUDA graph, over so many layers that none is still in the cache of the device.
`--variants` tries tile sizes, warps, stages and splits. What fails is listed with why. Results are
printed and written as they come. `--device cpu --tiny` rehearses; with `TRITON_INTERPRET=1` through
Triton's interpreter.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))  # scripts, not a package
from decode_kernels import copy_bandwidth
from environment import environment

from picache.kernels.attention_mass import attention_mass_reference, last_rows
from picache.kernels.place import place_reference
from picache.kernels.scattered_attention import scattered_attention_reference
from picache.kernels.tables import Piece, Turn, addresses, table_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CHUNKS, QUERY = 16, 64
LARGE = 200e6  # bytes, four times the cache of an H200
WARM, REPLAYS = 3, 15
RIGHT = 1e-2  # of the norm; bfloat16 rounds by 2e-3
Call = Callable[[], object]


class Shape(NamedTuple):
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128


class Bench:
    """What was measured so far: printed, and written to a file at once.

    Args:
        out: the file, or None.
        device: "cuda" or "cpu".
        seconds: after which variants are left out.
    """

    def __init__(self, out: Path | None, device: str, seconds: float) -> None:
        self.out, self.device, self.end = out, device, time.monotonic() + seconds
        self.record: dict = {"environment": environment(), "rows": []}

    @property
    def kernels(self) -> bool:
        """Whether kernels run here."""
        return self.device == "cuda" or INTERPRETED

    def late(self) -> bool:
        return time.monotonic() > self.end

    def add(self, **row: object) -> None:
        self.record["rows"].append(row)
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print(" | ".join(shown), flush=True)
        self.write()

    def write(self) -> None:
        if self.out is not None:
            self.out.write_text(json.dumps(self.record, indent=1) + "\n")

    def part(self, measure: Callable[..., None], *args: object) -> None:
        """Measure; where that fails as a whole, go on with the next."""
        try:
            measure(self, *args)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:400]
            self.add(what=f"{measure.__name__} {args[1]}", arm="all", failed=reason)

    def table(self) -> None:
        """All rows again, a line each."""
        for row in self.record["rows"]:
            rest = {k: v for k, v in row.items() if k in ("TFLOP/s", "of_copy", "error")}
            shown = "  ".join(f"{k} {v:.3g}" for k, v in rest.items())
            took = f"{row['us']:10.1f} us" if "us" in row else f"failed: {row['failed'][:60]}"
            print(f"{row['what']:46} {row['arm']:58} {took}  {shown}")

    def time(
        self, what: str, arm: str, calls: Sequence[Call], check: Call | None = None, **units: float
    ) -> float:
        """Microseconds of one of the calls; infinite, and a row with the reason, where one fails.

        Args:
            what: is measured.
            arm: how it is done.
            calls: of one layer each.
            check: gives the relative error of what the calls wrote or returned.
            units: amounts of work, by the name of the rate that they are divided into, a
                microsecond.
        """
        try:
            begun = time.perf_counter()
            calls[0]()
            if self.device == "cuda":
                torch.cuda.synchronize()
            row: dict = {"first_call_s": time.perf_counter() - begun}
            if check is not None:
                row["error"] = error = float(check())  # type: ignore[arg-type]
                row["right"] = error < RIGHT
            us = median_us(calls, self.device)
        except Exception as error:
            self.add(what=what, arm=arm, failed=f"{type(error).__name__}: {error}"[:400])
            return float("inf")
        rates = {name: amount / us for name, amount in units.items()}
        self.add(what=what, arm=arm, us=us, **rates, **row)
        return us


def median_us(calls: Sequence[Call], device: str) -> float:
    """Median time of a call, in a CUDA graph of all of them one after another."""
    if device != "cuda":
        begun = time.perf_counter()
        calls[0]()
        return 1e6 * (time.perf_counter() - begun)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    samples = []
    for i in range(WARM + REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i >= WARM:
            samples.append(1e3 * begin.elapsed_time(end) / len(calls))
    return statistics.median(samples)


def relative(got: Tensor, expected: Tensor) -> Tensor:
    """Error in the Frobenius norm; NaN where anything is not a number."""
    return (got.float() - expected.float()).norm() / expected.float().norm()


# --- place ---


class Placing:
    """Chunks of all layers, arenas that they go to, and angles.

    Args:
        shape: of the model.
        tokens: of all chunks; the first is an exact prefix.
        device: of all of them.
    """

    def __init__(self, shape: Shape, tokens: int, device: str) -> None:
        each = tokens // CHUNKS
        self.tokens, self.shape = tokens, shape
        kind: dict = dict(dtype=torch.bfloat16, device=device)
        slab = (shape.kv_heads, each, shape.dim)
        layers = range(shape.layers)
        self.sources = [
            [[torch.randn(*slab, **kind) for _ in range(CHUNKS)] for _ in layers] for _ in range(2)
        ]
        arena = (1, shape.kv_heads, tokens, shape.dim)
        self.arenas = [[torch.zeros(*arena, **kind) for _ in layers] for _ in range(2)]
        angles = 6 * torch.rand(tokens - each, shape.dim // 2, device=device)
        self.turn = Turn(angles.cos(), angles.sin(), "half")
        starts = range(0, tokens, each)
        self.pieces = [Piece(each, 0, 0, at, at - each if at else -1) for at in starts]
        parts = [torch.stack([addresses(of) for of in part]) for part in self.sources]
        self.sources_at = [part.to(device) for part in parts]
        self.arenas_at = [addresses(part).to(device) for part in self.arenas]
        self.table = table_of(self.pieces, tokens - each, 1, tokens).to(device)

    @property
    def nbytes(self) -> int:
        """Read and written."""
        return 2 * sum(arena.nbytes for part in self.arenas for arena in part)

    def kernel(self, plan: tuple[int, int, int] | None = None, layer: int | None = None) -> None:
        """One launch, for all layers or for one."""
        from picache.kernels.place_triton import Plan, launch_place

        some = slice(None) if layer is None else slice(layer, layer + 1)
        tables = [table[some] for table in (*self.sources_at, *self.arenas_at)]
        chosen = None if plan is None else Plan(*plan)
        arenas = (self.arenas[0][0], self.arenas[1][0])
        launch_place(*tables, self.table, *arenas, self.tokens, self.turn, 1.0, chosen)

    def twin(self) -> None:
        place_reference(*self.sources, self.pieces, *self.arenas, self.turn)

    def check(self) -> Tensor:
        """The error of what the arenas hold now in the first and the last layer."""
        errors = []
        for layer in {0, self.shape.layers - 1}:
            one = [[part[layer]] for part in self.sources]
            expected = [[torch.zeros_like(part[layer])] for part in self.arenas]
            place_reference(*one, self.pieces, *expected, self.turn)
            errors += [relative(self.arenas[i][layer], expected[i][0]) for i in (0, 1)]
            first = self.pieces[0].held
            assert all(
                torch.equal(self.arenas[i][layer][0, :, :first], one[i][0][0]) for i in (0, 1)
            )
        return torch.stack(errors).max()

    def clear(self) -> None:
        for part in self.arenas:
            for arena in part:
                arena.zero_()


def measure_place(bench: Bench, shape: Shape, tokens: int, copy: float, variants: bool) -> None:
    placing, what = Placing(shape, tokens, bench.device), f"place {tokens}"
    rate = {"of_copy": placing.nbytes / copy}
    bench.time(what, "twin", [placing.twin], **rate)
    if not bench.kernels:
        return
    placing.clear()
    bench.time(what, "plan", [placing.kernel], placing.check, **rate)
    layers = range(shape.layers)
    one = {"of_copy": placing.nbytes / copy / shape.layers}
    by_layer = [lambda layer=layer: placing.kernel(layer=layer) for layer in layers]
    bench.time(what, "plan, a layer a launch", by_layer, **one)
    if not variants:
        return
    best, least = {"block": 32, "heads": shape.kv_heads, "warps": 4}, float("inf")
    sweep = {"block": [32, 16, 64, 128], "warps": [2, 4, 8], "heads": [8, 4, 2, 1]}
    for name, values in sweep.items():
        base = dict(best)
        for value in values:
            plan = base | {name: value}
            if bench.late() or shape.kv_heads % plan["heads"]:
                continue
            placing.clear()
            chosen = (plan["block"], plan["heads"], plan["warps"])
            calls = [lambda chosen=chosen: placing.kernel(chosen)]
            us = bench.time(what, f"block, heads, warps {chosen}", calls, placing.check, **rate)
            if us < least:
                best, least = plan, us


# --- attention ---


class Case(NamedTuple):
    """Rows over keys, in an arena of so many places."""

    rows: int
    keys: int
    capacity: int
    chunks: int = 16
    batch: int = 1
    at_the_end: bool = False

    @property
    def query(self) -> int:
        """Rows of the query, the last of the prompt."""
        return QUERY if self.rows > QUERY else self.rows // 2

    def __str__(self) -> str:
        text = f"{self.rows} rows {self.keys} keys"
        text += f" in {self.capacity}" if self.capacity != self.keys else ""
        text += f" batch {self.batch}" if self.batch > 1 else ""
        return text + (", the last" if self.at_the_end else "")

    def positions(self, device: str) -> Tensor:
        """The first tokens of chunks and the query, or the last tokens."""
        if self.at_the_end:
            at = torch.arange(self.keys - self.rows, self.keys)
        else:
            starts = torch.arange(self.chunks) * ((self.keys - self.query) // self.chunks)
            first = torch.arange((self.rows - self.query) // self.chunks)
            query = torch.arange(self.keys - self.query, self.keys)
            at = torch.cat([(starts[:, None] + first).flatten(), query])
        return at.expand(self.batch, -1).contiguous().to(device)


class Attending:
    """Queries, arenas of several layers and positions of a case; NaN behind the last position."""

    def __init__(self, shape: Shape, case: Case, device: str) -> None:
        self.shape, self.case = shape, case
        kind: dict = dict(dtype=torch.bfloat16, device=device)
        arena = (case.batch, shape.kv_heads, case.capacity, shape.dim)
        used = 4 * case.batch * shape.kv_heads * case.keys * shape.dim
        count = max(2, int(LARGE // used) + 1) if device == "cuda" else 1
        self.layers = [tuple(torch.randn(*arena, **kind) for _ in range(2)) for _ in range(count)]
        for layer in self.layers:
            for part in layer:
                part[:, :, case.keys :] = torch.nan
        # Scores spread enough that some keys matter.
        self.query = 3 * torch.randn(case.batch, case.rows, shape.heads, shape.dim, **kind)
        self.query = self.query.transpose(1, 2)
        self.positions = case.positions(device)
        self.scaling = shape.dim**-0.5
        self.out: tuple[Tensor, Tensor] | None = None
        self.mass: Tensor | None = None

    @property
    def work(self) -> dict[str, float]:
        """Operations that the mask leaves, in units of a rate in TFLOP/s."""
        seen = float((self.positions + 1).sum())
        return {"TFLOP/s": 4 * self.shape.heads * self.shape.dim * seen / 1e6}

    def kernel(self, plan: tuple[int, ...] | None = None) -> list[Call]:
        from picache.kernels.scattered_attention_triton import Plan, launch_scattered_attention

        chosen = None if plan is None else Plan(*plan)
        rest = (self.positions, self.scaling, None, None, None, chosen)

        def run(keys: Tensor, values: Tensor) -> None:
            self.out = launch_scattered_attention(self.query, keys, values, *rest)

        return [lambda layer=layer: run(*layer) for layer in self.layers]

    def twin(self) -> list[Call]:
        keys, values = self.layers[0]
        rest = (self.positions, self.scaling)
        return [lambda: scattered_attention_reference(self.query, keys, values, *rest)]

    def torch_unmasked(self, backend: SDPBackend) -> list[Call]:
        def run(keys: Tensor, values: Tensor) -> None:
            with sdpa_kernel(backend):
                sdpa(self.query, keys, values, scale=self.scaling, enable_gqa=True)

        return [lambda layer=layer: run(*layer) for layer in self.layers]

    def torch_masked(self) -> list[Call]:
        place = torch.arange(self.case.capacity, device=self.query.device)
        mask = (place <= self.positions[..., None])[:, None]

        def run(keys: Tensor, values: Tensor) -> None:
            sdpa(self.query, keys, values, mask, scale=self.scaling, enable_gqa=True)

        return [lambda layer=layer: run(*layer) for layer in self.layers]

    def mass_kernel(self, rows: int, lse: Tensor, plan: tuple[int, ...] | None) -> list[Call]:
        from picache.kernels.attention_mass_triton import Plan, launch_attention_mass

        counted = last_rows(self.positions, rows)
        chosen = None if plan is None else Plan(*plan)

        def run(keys: Tensor) -> None:
            given = (self.query, keys, counted, lse, self.scaling, None, None, None)
            self.mass = launch_attention_mass(*given, chosen)

        return [lambda layer=layer: run(layer[0]) for layer in self.layers]

    def _one_head(self, index: int, head: int) -> tuple[Tensor, Tensor, Tensor, slice]:
        """What a KV head of the first row of the batch needs, in the layer of the first call."""
        groups = self.shape.heads // self.shape.kv_heads
        mine = slice(head * groups, (head + 1) * groups)
        keys, values = (part[:1, head : head + 1, : self.case.keys] for part in self.layers[index])
        return self.query[:1, mine], keys, values, mine

    def check(self) -> Tensor:
        """The error of two heads of the last output; of layer 0, which was called alone."""
        assert self.out is not None
        errors = []
        for head in {0, self.shape.kv_heads - 1}:
            query, keys, values, mine = self._one_head(0, head)
            given = (query, keys, values, self.positions[:1], self.scaling)
            expected, lse = scattered_attention_reference(*given)
            errors.append(relative(self.out[0][:1, mine], expected))
            errors.append(relative(self.out[1][:1, mine], lse))
        return torch.stack(errors).max()

    def check_mass(self, rows: int, lse: Tensor) -> Tensor:
        assert self.mass is not None
        counted = last_rows(self.positions, rows)[:1]
        expected = torch.zeros(1, self.case.keys, device=counted.device)
        for head in range(self.shape.kv_heads):
            query, keys, _, mine = self._one_head(0, head)
            given = (query, keys, counted, lse[:1, mine], self.scaling)
            expected += attention_mass_reference(*given) / self.shape.kv_heads
        return relative(self.mass[:1, : self.case.keys], expected)


def attention_plans(case: Case, groups: int, chosen: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Tiles, warps and stages to try, with the splits that the plan has."""
    splits = chosen[2]
    tiles = [
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4),
        (128, 32, 8, 4), (64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2), (64, 128, 8, 2),
    ]  # fmt: skip
    fitting = [tile for tile in tiles if tile[0] <= max(64, 2 * case.rows * groups)]
    return [(lines, keys, splits, warps, stages) for lines, keys, warps, stages in fitting]


def measure_attention(bench: Bench, shape: Shape, case: Case) -> None:
    attending, what = Attending(shape, case, bench.device), f"attention {case}"
    work = attending.work
    if bench.kernels:
        bench.time(what, "plan", attending.kernel(), attending.check, **work)
    else:
        bench.time(what, "twin", attending.twin(), **work)
    if case.capacity == case.keys:
        for name, backend in (
            ("cuDNN, no mask", SDPBackend.CUDNN_ATTENTION),
            ("flash, no mask", SDPBackend.FLASH_ATTENTION),
        ):
            if bench.device == "cuda":
                bench.time(what, name, attending.torch_unmasked(backend), **work)
        bench.time(what, "torch under a mask", attending.torch_masked(), **work)
    if bench.kernels and attending.out is not None:
        attending.kernel()[0]()  # the log-sum-exp of layer 0
        counted, lse = case.query, attending.out[1]
        calls = attending.mass_kernel(counted, lse, None)
        check = lambda: attending.check_mass(counted, lse)  # noqa: E731
        bench.time(f"mass of {counted} of {case}", "plan", calls, check)


def try_attention(bench: Bench, shape: Shape, case: Case, tiles: int | None) -> None:
    """Variants: tiles at the plan's splits, then splits at the best tile."""
    from picache.kernels.scattered_attention_triton import plan, processors_of

    attending, what = Attending(shape, case, bench.device), f"attention {case}"
    groups = shape.heads // shape.kv_heads
    keys = attending.layers[0][0]
    sizes = (case.capacity, shape.dim, shape.dim, 2)
    lines = case.rows * groups
    chosen = plan(case.batch * shape.kv_heads, lines, *sizes, processors_of(keys))
    best, least = tuple(chosen), float("inf")
    name = "lines, keys, splits, warps, stages"
    for variant in attention_plans(case, groups, chosen)[:tiles]:
        if not bench.late():
            calls = attending.kernel(variant)
            us = bench.time(what, f"{name} {variant}", calls, attending.check, **attending.work)
            best, least = (variant, us) if us < least else (best, least)
    several = sorted({max(1, round(best[2] * f)) for f in (0.25, 0.5, 0.75, 1.5, 2, 3, 4)})
    for splits in several[:tiles]:
        if not bench.late():
            variant = (*best[:2], splits, *best[3:])
            calls = attending.kernel(variant)
            bench.time(what, f"{name} {variant}", calls, attending.check, **attending.work)


def try_mass(bench: Bench, shape: Shape, case: Case, tiles: int | None) -> None:
    attending = Attending(shape, case, bench.device)
    attending.kernel()[0]()
    assert attending.out is not None
    counted, lse = case.query, attending.out[1]
    check = lambda: attending.check_mass(counted, lse)  # noqa: E731
    plans = [(64, 128, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2), (128, 128, 8, 2)]
    for variant in plans[:tiles]:
        if not bench.late():
            calls = attending.mass_kernel(counted, lse, variant)
            arm = f"lines, keys, warps, stages {variant}"
            bench.time(f"mass of {counted} of {case}", arm, calls, check)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=None, help="JSON, written as results come")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small sizes, to rehearse")
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--seconds", type=float, default=240, help="after which variants are left")
    parser.add_argument("--only", nargs="*", choices=["place", "attention"], default=None)
    args = parser.parse_args()
    only = args.only or ["attention", "place"]
    torch.manual_seed(0)
    bench = Bench(args.out, args.device, args.seconds)
    bench.record["configuration"] = {k: str(v) for k, v in vars(args).items() if k != "out"}
    print(bench.record["environment"], flush=True)
    shape, lengths = Shape(), [4096, 32768]
    cases = [
        Case(320, 32768, 32768),
        Case(96, 4096, 4096),
        Case(1088, 131072, 131072, chunks=64),
        Case(320, 32768, 32768, at_the_end=True),
        Case(88, 4096, 4096, chunks=8, batch=8),
        Case(96, 4096, 131072),
    ]
    if args.tiny:
        shape, lengths = Shape(2, 4, 2, 64), [64]
        cases = [
            Case(12, 150, 150, chunks=3),
            Case(9, 70, 300, chunks=5),
            Case(5, 80, 80, batch=2, at_the_end=True),
        ]
    tiles = 1 if args.tiny else None
    # A copy that a CUDA graph replays is slower by a third than the one that torch launches.
    copy = copy_bandwidth(torch.device(args.device)) / 1e6
    bench.record["copy_bytes_a_second"] = 1e6 * copy
    variants = args.variants and bench.kernels
    if "attention" in only:
        for case in cases:
            bench.part(measure_attention, shape, case)
    if "place" in only:
        for tokens in lengths:
            bench.part(measure_place, shape, tokens, copy, variants and not args.tiny)
    if "attention" in only and variants:
        for case in cases[:5]:
            bench.part(try_attention, shape, case, tiles)
        bench.part(try_mass, shape, cases[0], tiles)
    bench.table()
    wrong = [row for row in bench.record["rows"] if not row.get("right", True)]
    failed = [row for row in bench.record["rows"] if "failed" in row]
    print(f"{len(bench.record['rows'])} rows, {len(wrong)} wrong, {len(failed)} failed")
    for row in wrong:
        print("WRONG", row)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
