"""When the time stamps of RaaS tell pages apart: on the attention of a real model along real texts.

    python examples/experiments/raas_stamps.py --data FOLDER --out docs/results
    python examples/experiments/raas_stamps.py --data FOLDER --out docs/results --workers 2 \\
        --name raas_stamps_long --texts 2 --tokens 8000 --budgets 1024 2048

Some layers' queries and keys of a dense forward; RaaS then keeps pages of them with one threshold
or another, page size and budget, without the model. Of the pages held: the share that carries the
newest stamp (where it is near 1, the oldest page goes, whatever it holds), how old they are,
whether the text's first token is among them, and the share of the dense attention that they have.
Given `--budgets`, three thresholds at these in place of the grid. Writes `raas_stamps.json`, or of
another `--name`.
"""

import argparse
import json
import time
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from environment import environment
from layer_by_layer import PLAIN, Texts, through
from loaded import loaded
from parallel import spread
from quickstart_pages import markdown
from retention_texts import texts
from torch import Tensor
from transformers import PreTrainedModel
from workers import add_workers

from sparsity import RaaS, ShareRaaS
from sparsity.retention.attention import attend, attention_weights
from sparsity.retention.batch_rows import BatchRows, plan
from sparsity.retention.layer import LayerRetention

Seen = dict[int, tuple[Tensor, Tensor, Tensor, float]]
"""By layer: queries, keys and values `[rows, heads, tokens, head_dim]`, and the scaling."""

EVERY = 10
"""Steps from one look at the pages to the next, in the second half of the text."""


def arms() -> list[tuple[str, RaaS]]:
    """Thresholds at the paper's page size and at smaller ones, by exact scores, and by budget."""
    found: list[tuple[str, RaaS]] = []
    for size in (16, 4, 1):
        found += [
            (f"{alpha:g}", RaaS(256, size, pin_prompt=False, alpha=alpha))
            for alpha in (1e-4, 1e-3, 1e-2, 1e-1)
        ]
        found.append(("top half", RaaS(256, size, pin_prompt=False, top_ratio=0.5)))
        found.append(("1 / pages", ShareRaaS(256, size, sinks=0)))
    for size in (16, 4):
        found.append(("0.0001, ties by score", RaaS(256, size, pin_prompt=False, ties="score")))
        found.append(("0.0001, exact scores", RaaS(256, size, pin_prompt=False, score="exact")))
        found.append(("1 / pages, exact scores", ShareRaaS(256, size, sinks=0, score="exact")))
        for budget in (64, 512):
            found.append(("0.0001", RaaS(budget, size, pin_prompt=False)))
            found.append(("1 / pages", ShareRaaS(budget, size, sinks=0)))
    return found


def at_budgets(budgets: Sequence[int]) -> list[tuple[str, RaaS]]:
    """The paper's two settings and an equal share, at every page size."""
    return [
        arm
        for budget in budgets
        for size in (16, 4, 1)
        for arm in (
            ("0.0001", RaaS(budget, size, pin_prompt=False)),
            ("top half", RaaS(budget, size, pin_prompt=False, top_ratio=0.5)),
            ("1 / pages", ShareRaaS(budget, size, sinks=0)),
        )
    ]


class Setting(NamedTuple):
    """What all arms share."""

    model: str
    data: Path
    texts: int
    tokens: int
    prompt: int
    layers: int
    seed: int


@cache
def seen_by(setting: Setting) -> Seen:
    """What the layers of a dense forward attend with, once in a process."""
    model, tokenizer = loaded(setting.model)
    ids = texts(tokenizer, setting.data, setting.texts, setting.tokens, setting.seed)
    return recorded(model, ids.to(model.device), layers_of(setting))


def layers_of(setting: Setting) -> list[int]:
    """The layers that are looked at."""
    depth = loaded(setting.model)[0].config.num_hidden_layers
    return [(i + 1) * depth // setting.layers - 1 for i in range(setting.layers)]


def row_of(setting: Setting, arm: tuple[str, RaaS]) -> dict:
    """The means of all looks at one arm's pages."""
    (label, policy), seen = arm, seen_by(setting)
    found = [look for layer in seen for look in looks(policy, seen, layer, setting.prompt)]
    means = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
    row = {"arm": label, "page_size": policy.page_size, "budget": policy.budget}
    return row | dict(zip(MEASURES, means, strict=True))


def recorded(model: PreTrainedModel, ids: Tensor, layers: list[int]) -> Seen:
    """What some layers of a dense forward attend with."""
    seen: Seen = {}

    def dense(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        if layer in layers:
            seen[layer] = query, key, value, scaling
        return attend(query, key, value, None, scaling, causal=True)

    through(model, Texts(ids, ids.shape[1]), dense)
    return seen


def looks(policy: RaaS, seen: Seen, layer: int, prompt: int) -> list[list[float]]:
    """The numbers of `MEASURES` at each look, means over rows and heads."""
    query, key, value, scaling = seen[layer]
    retention, rows, tokens = LayerRetention(policy, layer), BatchRows(), query.shape[2]
    found = []
    for first in [0, *range(prompt, tokens)]:
        stop = first + 1 if first else prompt
        new = (whole[:, :, first:stop] for whole in (query, key, value))
        step = plan(rows, policy, query.shape[0], stop - first, None, query.device)
        retention.attend(*new, step, PLAIN, scaling)
        rows = step.then
        if first >= tokens // 2 and first % EVERY == 0:
            pool = retention.pool
            assert pool is not None
            used = pool.start >= 0
            newest = (pool.stamp == first) & used
            age = (first - pool.start) * used
            weights = attention_weights(query[:, :, first:stop], key[:, :, :stop], None, scaling)
            slots = pool.slots.long()
            held = torch.zeros(*slots.shape[:2], stop + 1, dtype=torch.bool)
            held.scatter_(2, slots.masked_fill(slots < 0, stop), True)
            kept = (weights[:, :, :, 0].mean(2) * held[..., :stop]).sum(-1)
            found.append(
                [
                    float((newest.sum(-1) / used.sum(-1)).mean()),
                    float((age.sum(-1) / used.sum(-1)).mean()),
                    float((pool.start == 0).any(-1).float().mean()),
                    float(kept.mean()),
                ]
            )
    return found


MEASURES = {
    "newest_stamp": "share of the pages held that carry the newest stamp",
    "age": "tokens since a page held began, mean",
    "first_held": "share of the heads that hold the text's first token",
    "attention_kept": "share of the dense attention that falls on what is held",
}


def table(record: dict) -> str:
    """What stands between the markers of raas_stamps.json in docs/retention.md."""
    columns = {
        "threshold": "{arm}",
        "page": "{page_size}",
        "budget": "{budget}",
        "newest stamp": "{newest_stamp:.2f}",
        "age": "{age:.0f}",
        "first token held": "{first_held:.2f}",
        "attention kept": "{attention_kept:.3f}",
    }
    return markdown(record["rows"], columns)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="a model of examples/models.py")
    parser.add_argument("--data", type=Path, help="folder of the data sets' files")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--layers", type=int, default=6, help="how many, evenly apart")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--budgets", type=int, nargs="+", help="three thresholds at these")
    add_workers(parser)
    parser.add_argument("--name", default="raas_stamps", help="of the file in --out")
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    begun = time.perf_counter()
    setting = Setting(
        args.model, args.data, args.texts, args.tokens, args.prompt, args.layers, args.seed
    )
    every = arms() if args.budgets is None else at_budgets(args.budgets)
    rows = list(spread(partial(row_of, setting), every, args.workers, "thresholds"))
    shown = {name: value for name, value in setting._asdict().items() if name != "data"}
    record = {
        "configuration": shown | {"layers": layers_of(setting)},
        "environment": environment(),
        "measures": MEASURES,
        "rows": rows,
        "seconds": time.perf_counter() - begun,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    import raas_stamps  # workers import what they run, which __main__ cannot be

    raas_stamps.main()
