"""Time to the first token: full prefill, prefix caching, and linking by every method and tier.

    python examples/benchmarks/link.py --out docs/results
    python examples/benchmarks/link.py --out docs/results --only "LegoLink-16, 32768 .*device"
    python examples/benchmarks/link.py --out rehearsal --tiny --device cpu

One H200 and a Llama of 8 billion random weights. Chunks are compiled before; a link is timed as
`PIC.link` takes it, to the logits of the first new token, after one that is not counted: the first
of its size captures a CUDA graph, and that time stands beside. The arms of a length take turns;
medians. Each length has a floor: the rows that LegoLink recomputes through the captured forward
without attention, and the keys and values copied once. `link.json` is written anew after every
length, and a later call adds to it or replaces what it measures again; `link_figure.py` draws it.
"""

import argparse
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from picache import PIC

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))  # scripts, not a package
from decode import Results
from decode_arms import without_attention
from decode_kernels import copy_bandwidth
from first_token import first_token_seconds
from link_grid import COMPILED, FULL, METHODS, PREFIX, Cell, grid, store_of, texts
from link_tables import tables
from shapes import SHAPES, build_model

FLASH = ("flash_attention_4", "flash_attention_3", "flash_attention_2")


class Arms:
    """The arms of one model, and what they share: compiled chunks by tier, and a folder.

    Args:
        model: that is timed.
        query: tokens of a query.
        seed: of all token ids.
        folder: for chunks on disk.
        scale: what "k" stands for.
    """

    def __init__(
        self, model: PreTrainedModel, query: int, seed: int, folder: Path, scale: int
    ) -> None:
        self.model, self.query, self.seed, self.folder = model, query, seed, folder
        self.scale = scale
        self._pics: dict[str, PIC] = {}

    def forget(self) -> None:
        """Free the compiled chunks; what was captured stays."""
        for pic in self._pics.values():
            pic.store.clear()

    def ready(self, cell: Cell) -> Callable[[], tuple[float, dict]]:
        """Prepare a cell; what is returned gives the seconds of one turn, and what was reported."""
        chunks, queries = texts(cell, self.query, self.model.config.vocab_size, self.seed)
        if cell.arm in FULL:
            rows = [torch.cat([*row, q]) for row, q in zip(chunks, queries, strict=True)]
            ids = torch.stack(rows).to(self.model.device)
            return lambda: self._full(cell, ids)
        pic = self._pic(cell)
        method = METHODS[{PREFIX: "naive", COMPILED: "LegoLink-16"}.get(cell.arm, cell.arm)]
        compiled = [[pic.compile(part) for part in row] for row in chunks]
        given = (compiled, queries) if cell.batch > 1 else (compiled[0], queries[0])

        def turn() -> tuple[float, dict]:
            begun = time.perf_counter()
            report = pic.link(*given, method).report
            seconds = time.perf_counter() - begun
            return seconds, {
                "recomputed": report.tokens_recomputed,
                "parts": report.seconds,
                "pass": report.recompute_pass,
            }

        return turn

    def _pic(self, cell: Cell) -> PIC:
        """One for each tier, and one whose passes are compiled, which takes a minute or two."""
        kind = cell.arm if cell.arm == COMPILED else cell.tier
        if kind not in self._pics:
            pic = self._pics[kind] = PIC(self.model, store=store_of(cell.tier, self.folder))
            if cell.arm == COMPILED:
                each = 5 * self.scale  # for 8 prompts of 4k, or one of 40k
                pic.warm_up(tokens=each, rows=15 * 16 + self.query, batch=8, compile=True)
        return self._pics[kind]

    def _full(self, cell: Cell, ids: torch.Tensor) -> tuple[float, dict]:
        with ExitStack() as stack:
            if cell.arm == FULL[1]:
                stack.enter_context(_flash(self.model))
            return first_token_seconds(self.model, ids), {}


@contextmanager
def _flash(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model attends by the newest flash attention that is installed.

    Raises:
        ImportError: where there is none.
    """
    before = model.config._attn_implementation  # noqa: SLF001, as transformers names it
    for name in FLASH:
        with suppress(ImportError):
            model.set_attn_implementation(name)
            break
    else:
        raise ImportError("no flash attention is installed")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def floor_seconds(model: PreTrainedModel, rows: int, repeats: int) -> float:
    """The median of the forward of `rows` tokens without attention: on a GPU, of its CUDA graph."""
    ids = torch.ones((1, rows), dtype=torch.long, device=model.device)

    def forward() -> None:
        model(ids, use_cache=False, logits_to_keep=1)

    with without_attention(model):
        for _ in range(2):
            forward()
        run, taken = forward, []
        if ids.is_cuda:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                forward()
            run = graph.replay
        for _ in range(repeats):
            begun = time.perf_counter()
            run()
            if ids.is_cuda:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - begun)
        return statistics.median(taken)


def measure(arms: Arms, cells: list[Cell], args: argparse.Namespace) -> list[dict]:
    """A row for each cell of one length and batch; the arms take turns."""
    ready, rows, taken = {}, [], {}
    for cell in cells:
        try:
            ready[cell] = arms.ready(cell)
            first, _ = ready[cell]()
            ready[cell]()  # in a graph that was captured, if one was
            taken[cell] = [], first
        except ImportError as error:
            rows.append(cell.asdict() | {"missing": str(error)})
            ready.pop(cell, None)
        except Exception as error:
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}".split("\n")[0][:400]
            rows.append(cell.asdict() | {"error": said})
            ready.pop(cell, None)
    for turn in range(args.repeats):
        for cell, run in ready.items():
            samples, first = taken[cell]
            if turn < 3 or first < args.slow:  # what takes seconds is measured three times
                samples.append(run())
    for cell, (samples, first) in taken.items():
        seconds, reported = sorted(samples, key=lambda sample: sample[0])[len(samples) // 2]
        found = {"first_token_seconds": seconds, "first_turn_seconds": first}
        found["all_seconds"] = [seconds for seconds, _ in samples]
        rows.append(cell.asdict() | found | reported)
    return rows


def floor_row(model: PreTrainedModel, tokens: int, args: argparse.Namespace, rate: float) -> dict:
    """The floor of LegoLink-16 on 16 chunks: rows through the model, and all KV copied once."""
    config = model.config
    rows = min(tokens, 15 * 16 + args.query)
    head = config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    moved = 2 * 2 * config.num_hidden_layers * head * (tokens - args.query)  # read and written
    forward = floor_seconds(model, rows, args.repeats)
    return Cell("floor", tokens).asdict() | {
        "first_token_seconds": forward + moved / rate,
        "forward_seconds": forward,
        "copy_seconds": moved / rate,
        "recomputed": rows,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--only", default="", help="a regular expression that cells' names match")
    parser.add_argument("--list", action="store_true", help="print the cells and do nothing")
    parser.add_argument("--seconds", type=float, default=540, help="begin no length after these")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="rehearse: small model, lengths / 16")
    parser.add_argument("--query", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--slow", type=float, default=1.0, help="seconds of an arm timed thrice")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.began = time.perf_counter()
    if args.tiny:
        args.shape, args.dtype, args.query = "llama-tiny-4", "float32", 16
    return args


def main() -> None:
    args = arguments()
    scale = 64 if args.tiny else 1024
    cells = [c for c in grid(scale) if re.search(args.only, c.name)]
    if args.device == "cpu":  # where no pass is captured
        cells = [c for c in cells if c.arm != COMPILED]
    if args.list:
        print(*(cell.name for cell in cells), sep="\n")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    rate = copy_bandwidth(torch.device(args.device))
    results = Results(args.out / "link.json", args, rate)
    model = build_model(args.shape, args.seed, args.device, args.dtype)
    sizes = list(dict.fromkeys((cell.tokens, cell.batch) for cell in cells))
    with tempfile.TemporaryDirectory() as folder:
        arms = Arms(model, args.query, args.seed, Path(folder), scale)
        for tokens, batch in tqdm(sizes, desc="lengths", mininterval=10):
            wanted = [cell for cell in cells if (cell.tokens, cell.batch) == (tokens, batch)]
            if time.perf_counter() - args.began > args.seconds:
                print("no time left for:", *(cell.name for cell in wanted), sep="\n  ")
                continue
            for row in measure(arms, wanted, args):
                results.add(row)
            if batch == 1:
                results.add(floor_row(model, tokens, args, rate))
            arms.forget()
    print(tables(results.record))
    if any("error" in row and row["call"] == results.call for row in results.record["rows"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
