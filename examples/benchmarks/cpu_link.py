"""What a link takes on a CPU beside its arithmetic, under SmolLM2.

    python examples/benchmarks/cpu_link.py --out docs/results --before PATH_OF_ANOTHER_CHECKOUT

All arms read one text: a prompt of `--tokens`, cut into chunks that are compiled before and a query
of 64. "rows alone" is the model over as many tokens as LegoLink-16 recomputes, its attention left
out; "attention alone" is the kernel of PyTorch on those tokens' places in the prompt, layer by
layer, with masks made before. The two together are the arithmetic of that link. Arms take turns,
medians are reported, and of a link also what it takes over the arithmetic of the same turn. With
`--before` the package of that checkout takes turns with this one's, in a process of its own. Writes
`cpu_link.json`.
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface

import picache
from picache import PIC, LegoLink, LinkMethod, NaiveReuse

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples/experiments")]  # no packages
from beside import CLOCKS, asked, started  # noqa: E402
from environment import environment  # noqa: E402
from models import load  # noqa: E402

TEXT = ROOT / "docs/sparsity.md"
QUERY, RECOMPUTED = 64, 16
BLOCK = 64  # queries that attend in one call
METHODS: dict[str, LinkMethod] = {"LegoLink-16": LegoLink(RECOMPUTED), "naive": NaiveReuse()}
ARITHMETIC = ("rows alone", "attention alone")


def no_attention(module: Any, query: torch.Tensor, *rest: Any, **named: Any) -> tuple:
    """In place of attention: gives the queries out, in the shape of what attention gives."""
    return query.transpose(1, 2).contiguous(), None


class Arms:
    """What takes turns, each a function of no arguments, over one model and text."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.clock = CLOCKS[args.clock]
        self.model, tokenizer = load("smollm2")
        self.ids = tokenizer(TEXT.read_text(), return_tensors="pt").input_ids[:, : args.tokens]
        documents = self.ids[0, :-QUERY].tensor_split(args.chunks)
        self.pic, self.query = PIC(self.model), self.ids[0, -QUERY:]
        self.chunks = [self.pic.compile(document) for document in documents]
        starts = torch.tensor([len(document) for document in documents]).cumsum(0)[:-1]
        heads = starts[:, None] + torch.arange(RECOMPUTED)
        tail = torch.arange(args.tokens - QUERY, args.tokens)
        self.positions = torch.cat([heads.flatten(), tail])
        self.named: dict[str, Callable[[], object]] = {
            "rows alone": self.rows_alone(),
            "attention alone": self.attention_alone(),
        }
        for name, method in METHODS.items():
            self.named[name] = lambda method=method: self.pic.link(self.chunks, self.query, method)

    def rows_alone(self) -> Callable[[], None]:
        AttentionInterface.register("none", no_attention)
        AttentionMaskInterface.register("none", lambda *_, **__: None)
        weights = {id(p): p for p in self.model.parameters()}
        model = copy.deepcopy(self.model, weights)  # another model on the same weights
        model.set_attn_implementation("none")

        @torch.no_grad()
        def run() -> None:
            model(self.ids[:, self.positions], use_cache=False, logits_to_keep=1)

        return run

    def attention_alone(self) -> Callable[[], None]:
        config = self.model.config
        width = config.hidden_size // config.num_attention_heads
        query = torch.randn(1, config.num_attention_heads, len(self.positions), width)
        key, value = torch.randn(2, 1, config.num_key_value_heads, self.ids.shape[1], width)
        blocks = []
        # Runs of neighbours, so that few of the scores are masked.
        cuts = (self.positions.diff() > 1).nonzero().flatten() + 1
        for rows in torch.arange(len(self.positions)).tensor_split(cuts):
            for block in rows.split(BLOCK):
                where = self.positions[block]
                end = int(where[-1]) + 1
                hidden = torch.arange(end) > where[:, None]
                mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
                blocks.append((query[:, :, block], key[:, :, :end], value[:, :, :end], mask))

        def run() -> None:
            for _ in range(config.num_hidden_layers):
                for q, k, v, mask in blocks:
                    scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

        return run

    def take(self, name: str) -> float:
        """Milliseconds of one turn of an arm."""
        start = self.clock()
        self.named[name]()
        return 1e3 * (self.clock() - start)


def serve(args: argparse.Namespace) -> None:
    """A process of one package: says that it is ready, then a number for each arm asked for."""
    arms = Arms(args)
    where = str(Path(picache.__file__).parent)
    print(json.dumps([where, list(arms.named), len(arms.positions)]), flush=True)
    for line in sys.stdin:
        print(json.dumps(arms.take(line.strip())), flush=True)


def summary(took: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A row an arm: median milliseconds, and those over the arithmetic of the same turn."""
    arithmetic = [sum(turn) for turn in zip(*(took[name] for name in ARITHMETIC), strict=True)]
    rows = []
    for name, turns in took.items():
        row: dict[str, Any] = {"arm": name, "milliseconds": statistics.median(turns)}
        if name == f"LegoLink-{RECOMPUTED}":
            over = [a - b for a, b in zip(turns, arithmetic, strict=True)]
            row["over_arithmetic"] = statistics.median(over)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--before", type=Path, help="root of the checkout to compare with")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--chunks", type=int, default=6)
    parser.add_argument("--turns", type=int, default=31)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args)
    kept = ("tokens", "chunks", "clock")
    given = [f"--{name}={getattr(args, name)}" for name in kept]
    roots = {"before": args.before, "after": ROOT}
    served = {n: started(__file__, root, given) for n, root in roots.items() if root is not None}
    ready = {name: asked(process) for name, process in served.items()}
    print({name: where for name, (where, _, _) in ready.items()})
    took: dict[str, dict[str, list[float]]] = {name: {} for name in served}
    for turn in tqdm(range(args.turns + 1), desc="turns"):
        for arm in ready["after"][1]:
            for name, process in served.items():
                milliseconds = asked(process, arm)
                if turn:  # the first warms up
                    took[name].setdefault(arm, []).append(milliseconds)
    for process in served.values():
        process.communicate()
    rows = [{"package": name} | row for name, arms in took.items() for row in summary(arms)]
    record = {
        "configuration": {name: getattr(args, name) for name in (*kept, "turns")}
        | {"query": QUERY, "recomputed": ready["after"][2], "block": BLOCK}
        | {"model": "smollm2", "dtype": "float32", "seed": "none: a fixed text"},
        "environment": environment(),
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "cpu_link.json").write_text(json.dumps(record, indent=1) + "\n")
    for row in rows:
        over = f"{row['over_arithmetic']:9.1f}" if "over_arithmetic" in row else ""
        print(f"{row['package']:7} {row['arm']:16} {row['milliseconds']:9.1f} ms {over}")
    return None


if __name__ == "__main__":
    main()
