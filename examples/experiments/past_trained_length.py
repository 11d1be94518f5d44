"""Loss on a text longer than a model was trained for, under positions inside the cache and not.

    python examples/experiments/past_trained_length.py --out docs/results

After StreamingLLM (arXiv 2309.17453, sections 3.2 and 4.1): stories260K was trained on 512 tokens.
It writes stories of 200 tokens, one after another, and reads them as one text, `--chunk` tokens a
forward. Writes `past_trained_length.json` and `.png`. The checkpoint is not part of the repository:
`PICACHE_DATA` names the folder that holds it (see tests/stories260k.py).
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from environment import environment
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel

from sparsity import Random, SparseCache, StreamingLLM, detach

STORY_TOKENS = 200
# A cache by the model and the budget in tokens.
ARMS: dict[str, Callable[[PreTrainedModel, int], Cache | SparseCache]] = {
    "full": lambda model, budget: DynamicCache(),
    "random": lambda model, budget: SparseCache(model, Random(budget, pin_prompt=False)),
    "window, no sinks": lambda model, budget: SparseCache(model, StreamingLLM(budget, sinks=0)),
    "StreamingLLM": lambda model, budget: SparseCache(model, StreamingLLM(budget)),
    "StreamingLLM, absolute positions": lambda model, budget: SparseCache(
        model, StreamingLLM(budget, positions="absolute")
    ),
}


def checkpoint() -> PreTrainedModel:
    """The model, by the loader of the tests."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from stories260k import FOLDER, load_model

    if not FOLDER.is_dir():
        raise SystemExit(f"no stories260k checkpoint in {FOLDER}: set PICACHE_DATA")
    return load_model()


def stories(model: PreTrainedModel, tokens: int, temperature: float, seed: int) -> Tensor:
    """Stories that the model writes, each from its BOS: ids, int64 `[tokens]`."""
    torch.manual_seed(seed)
    bos = torch.full((-(-tokens // STORY_TOKENS), 1), model.config.bos_token_id)
    text = model.generate(
        bos,
        attention_mask=torch.ones_like(bos),
        max_new_tokens=STORY_TOKENS - 1,
        do_sample=True,
        temperature=temperature,
        top_k=0,
    )
    return text.flatten()[:tokens]


@torch.no_grad()
def losses(model: PreTrainedModel, cache: Cache | SparseCache, ids: Tensor, chunk: int) -> Tensor:
    """Negative log-likelihood of each token but the first, in nats: `[tokens - 1]`."""
    logits = [model(part[None], past_key_values=cache).logits[0] for part in ids.split(chunk)]
    return torch.nn.functional.cross_entropy(torch.cat(logits)[:-1], ids[1:], reduction="none")


def table(record: dict) -> str:
    """Mean loss by method and stretch of the text, as Markdown."""
    edges = record["configuration"]["edges"]
    spans = [f"{a:,} to {b:,}" for a, b in pairwise(edges)]
    lines = [f"| policy | {' | '.join(spans)} |", "| --- |" + " ---: |" * len(spans)]
    for row in record["rows"]:
        cells = [
            f"{sum(each) / len(each):.2f} ({min(each):.2f} to {max(each):.2f})"
            for each in row["loss"]
        ]
        lines.append(f"| {row['arm']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(record: dict, path: Path) -> None:
    """Loss along the text, the mean over the texts in steps of 200 tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for row in record["rows"]:
        x = [STORY_TOKENS * (i + 0.5) for i in range(len(row["curve"]))]
        axes.plot(x, row["curve"], label=row["arm"], linewidth=1.2)
    axes.axvline(record["trained_tokens"], color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="token (dotted: the length trained on)", ylabel="nats a token", ylim=(0, None))
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--edges", type=int, nargs="+", default=[0, 512, 1000, 2000, 4000, 8000])
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=32, help="tokens a forward")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the stories")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one text each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.perf_counter()
    model = checkpoint()
    texts = [stories(model, args.edges[-1], args.temperature, seed) for seed in args.seeds]
    rows = []
    for name, make in tqdm(ARMS.items(), desc="policies"):
        measured = [losses(model, make(model, args.budget), ids, args.chunk) for ids in texts]
        spans = pairwise(args.edges)
        mean = torch.stack(measured).mean(0)
        rows.append(
            {
                "arm": name,
                "loss": [[float(each[a:b].mean()) for each in measured] for a, b in spans],
                "curve": [float(part.mean()) for part in mean.split(STORY_TOKENS)],
            }
        )
    detach(model)
    record = {
        "configuration": {key: value for key, value in vars(args).items() if key != "out"},
        "model": "karpathy/tinyllamas, stories260K",
        "trained_tokens": model.config.max_position_embeddings,
        "environment": environment(),
        "rows": rows,
        "seconds": time.perf_counter() - begun,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "past_trained_length.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    figure(record, path.with_suffix(".png"))
    print(table(record))
    print(f"\n{record['seconds']:.0f} s; wrote {path} and .png")


if __name__ == "__main__":
    main()
