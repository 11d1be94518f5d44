"""What a decoding step costs beside a dense one on a CPU, by policy, under SmolLM2.

    python examples/benchmarks/cpu_step.py --out docs/results --before PATH_OF_ANOTHER_CHECKOUT

Each policy decodes behind the same prompt. Dense and the policies take turns of `--steps` steps,
which hold a page's opening and an eviction each; a turn gives milliseconds a step and the ratio to
the dense turn beside it, and medians over the turns are reported. With `--before` the package of
that checkout takes turns with this one's, in a process of its own. Writes `cpu_step.json`.
"""

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import Cache, DynamicCache

import sparsity
from sparsity import (
    H2O,
    RKV,
    TOVA,
    Full,
    LazyEviction,
    Quest,
    RaaS,
    Random,
    SnapKV,
    SparseCache,
    StreamingLLM,
    VaSE,
)
from sparsity.policies.base import Policy

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples/experiments")]  # no packages
from beside import CLOCKS, asked, started  # noqa: E402
from environment import environment  # noqa: E402
from models import load  # noqa: E402

TEXT = ROOT / "docs/sparsity.md"


def policies(budget: int, every: int) -> dict[str, Policy]:
    """The policies at a budget of tokens; those that evict now and then do so every `every`."""
    return {
        "Full": Full(),
        "StreamingLLM": StreamingLLM(budget),
        "Random": Random(budget, pin_prompt=False),
        "Quest": Quest(budget),
        "RaaS": RaaS(budget, pin_prompt=False),
        "H2O": H2O(budget),
        "TOVA": TOVA(budget),
        "LazyEviction": LazyEviction(budget, sinks=0, evict_every=every, ties="age"),
        "SnapKV": SnapKV(budget, evict_every=every),
        "R-KV": RKV(budget, evict_every=every),
        "VaSE": VaSE(budget, evict_every=every),
    }


class Turns:
    """Caches that wait at the same text, and take turns at decoding it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.clock = CLOCKS[args.clock]
        model, tokenizer = load("smollm2")
        self.ids = tokenizer(TEXT.read_text(), return_tensors="pt").input_ids
        dense = DynamicCache(config=model.config)
        with torch.no_grad():  # read once: every cache goes on from it
            model(self.ids[:, : args.prompt], past_key_values=dense, logits_to_keep=1)
        shared = {id(p): p for p in model.parameters()}
        self.arms: dict[str, tuple[Any, Cache]] = {"dense": (copy.deepcopy(model, shared), dense)}
        for name, policy in policies(args.budget, args.steps).items():
            if args.only is None or name in args.only:
                self.arms[name] = (model, SparseCache(model, policy, past=dense))
        for name in reversed(self.arms):  # dense last, since the others take in what it holds
            self.take(name, 1)

    @torch.no_grad()
    def take(self, name: str, steps: int) -> list[float]:
        """Milliseconds of each of the next steps."""
        model, cache = self.arms[name]
        took = []
        for _ in range(steps):
            seen = cache.get_seq_length()
            at = seen % self.ids.shape[1]
            new, mask = self.ids[:, at : at + 1], torch.ones(1, seen + 1, dtype=torch.long)
            start = self.clock()
            model(new, attention_mask=mask, past_key_values=cache)  # a mask, as of `generate`
            took.append((self.clock() - start) * 1e3)
        return took


def serve(args: argparse.Namespace) -> None:
    """A process of one package: says that it is ready, then a line of numbers for each asked."""
    turns = Turns(args)
    print(json.dumps([str(Path(sparsity.__file__).parent), list(turns.arms)]), flush=True)
    for line in sys.stdin:
        print(json.dumps(turns.take(line.strip(), args.steps)), flush=True)


def summary(took: list[list[float]], dense: list[list[float]]) -> dict[str, float]:
    """Of turns of steps, in milliseconds: medians of steps, of turns, and of ratios to dense."""
    mean = [statistics.fmean(turn) for turn in took]
    middle = [statistics.median(turn) for turn in took]
    ratios = [a / statistics.fmean(b) for a, b in zip(mean, dense, strict=True)]
    plain = [a / statistics.median(b) for a, b in zip(middle, dense, strict=True)]
    return {
        "step_ms": statistics.median(mean),
        "ratio": statistics.median(ratios),
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
        "median_step_ms": statistics.median(middle),
        "median_step_ratio": statistics.median(plain),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Ratios to dense by policy, before and after, and what is left of the excess."""
    names = list(dict.fromkeys(row["policy"] for row in rows))
    found = {(row["policy"], row["package"]): row for row in rows}
    lines = ["| policy | ms | to dense | before | excess left |", "|---|---|---|---|---|"]
    for name in names:
        after, before = found[name, "after"], found.get((name, "before"))
        line = f"| {name} | {after['step_ms']:.1f} | {after['ratio']:.2f} |"
        if before is not None and name != "dense":
            left = max(0.0, after["ratio"] - 1) / max(1e-3, before["ratio"] - 1)
            line += f" {before['ratio']:.2f} | {left:.0%} |"
        else:
            line += "  |  |"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--before", type=Path, help="root of the checkout to compare with")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--steps", type=int, default=16, help="of a turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--only", nargs="+", help="names of policies")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args)
    given = [f"--{name}={getattr(args, name)}" for name in ("prompt", "budget", "steps", "clock")]
    given += ["--only", *args.only] if args.only else []
    roots = {"before": args.before, "after": ROOT}
    served = {
        name: started(__file__, root, given) for name, root in roots.items() if root is not None
    }
    ready = {name: asked(process) for name, process in served.items()}
    print({name: where for name, (where, _) in ready.items()})
    arms = ready["after"][1]
    took: dict[tuple[str, str], list[list[float]]] = {}
    for turn in tqdm(range(args.turns + 1), desc="turns"):
        for arm in arms:
            for name, process in served.items():
                steps = asked(process, arm)
                if turn:  # the first warms up
                    took.setdefault((name, arm), []).append(steps)
    for process in served.values():
        process.communicate()
    rows = [
        {"package": name, "policy": arm} | summary(turns, took[name, "dense"])
        for (name, arm), turns in took.items()
    ]
    kept = ("prompt", "budget", "steps", "turns", "clock")
    record = {
        "configuration": {name: getattr(args, name) for name in kept}
        | {"model": "smollm2", "dtype": "float32", "seed": "none: a fixed text"}
        | {"policies": {name: repr(p) for name, p in policies(args.budget, args.steps).items()}},
        "environment": environment(),
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "cpu_step.json").write_text(json.dumps(record, indent=1) + "\n")
    print(table(rows))
    return None


if __name__ == "__main__":
    main()
