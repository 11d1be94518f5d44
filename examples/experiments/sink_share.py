"""How much of its attention a model gives to the first four tokens of a text, by its length.

    python examples/experiments/sink_share.py --data FOLDER --out docs/results

The last query of prompts of several lengths, the beginnings of the same texts, is weighed over all
keys before it, as `sparsity.hf.sink_warning` does: the mean over layers and heads. Beside a real
model two without sinks, our reference model and one with random weights. Writes `sink_share.json`.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from environment import environment
from layer_by_layer import Texts, through
from loaded import loaded
from quickstart_pages import markdown
from retention_texts import texts
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsity.hf.sink_warning import SHARE
from sparsity.retention.attention import attend, attention_weights
from sparsity.retention.query_weights import FIRST

MODELS = ("smollm2", "reference", "reference, random weights")
LENGTHS = (64, 128, 256, 512)


def shares(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Share of the query at the end of each of `LENGTHS` that goes to the first `FIRST` tokens.

    Args:
        model: as `layer_by_layer.through` takes it.
        ids: int64 `[texts, tokens]`.

    Returns:
        float64 `[lengths, texts]`, means over layers and heads.
    """
    found: list[list[Tensor]] = [[] for _ in LENGTHS]

    def dense(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        for at, stop in zip(found, LENGTHS, strict=True):
            newest = query[:, :, stop - 1 : stop]
            weights = attention_weights(newest, key[:, :, :stop], None, scaling)
            at.append(weights[..., :FIRST].sum(-1).flatten(1).mean(1))
        return attend(query, key, value, None, scaling, causal=True)

    through(model, Texts(ids, ids.shape[1]), dense)
    return torch.stack([torch.stack(at).mean(0) for at in found]).double()


def measured(name: str, data: Path | None, count: int, seed: int) -> list[dict]:
    """A row for each of `LENGTHS`: the mean over texts, and the least and the most of one."""
    model, tokenizer = loaded(name.partition(",")[0])
    if name.endswith("random weights"):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(model.config).to(model.device).eval()
    ids = texts(tokenizer, data, count, LENGTHS[-1], seed).to(model.device)
    return [
        {"model": name, "tokens": tokens, "mean": sum(of_texts) / count}
        | {"least": min(of_texts), "most": max(of_texts)}
        for tokens, of_texts in zip(LENGTHS, shares(model, ids).tolist(), strict=True)
    ]


def table(record: dict) -> str:
    """What stands between the markers of sink_share.json in docs/retention.md."""
    rows = [row | {"share": f"{row['least']:.2f} to {row['most']:.2f}"} for row in record["rows"]]
    columns = {
        "model": "{model}",
        "tokens": "{tokens}",
        "mean": "{mean:.2f}",
        "of single texts": "{share}",
    }
    return markdown(rows, columns)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the data sets' files")
    parser.add_argument("--texts", type=int, default=12, help="of both kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    begun = time.perf_counter()
    record = {
        "configuration": {"texts": args.texts, "seed": args.seed, "threshold": SHARE},
        "environment": environment(),
        "rows": [
            row for name in MODELS for row in measured(name, args.data, args.texts, args.seed)
        ],
    }
    record["seconds"] = time.perf_counter() - begun
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "sink_share.json").write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
