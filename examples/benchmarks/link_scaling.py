"""Link time against full prefill as the prompt grows, on a random model of 100 million parameters.

    python examples/benchmarks/link_scaling.py --out docs/results

16 chunks and a query of 64 tokens, compiled before, so that what is timed is what a request waits
for. Arms take turns in one run; medians. Writes `link_scaling.json` with the measured times, the
share of full prefill, and the most memory that one attention mask took.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM

import picache.hf.attention_functions
from picache import PIC, LegoLink, LinkMethod, NaiveReuse

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))  # scripts, not a package
from environment import environment
from first_token import first_token_seconds
from shapes import build_model


class MaskWatch:
    """The largest mask that attention was given while inside, in elements."""

    def __enter__(self) -> "MaskWatch":
        self.most, self.before = 0, picache.hf.attention_functions.attend_blocks
        picache.hf.attention_functions.attend_blocks = self._attend
        return self

    def __exit__(self, *error: object) -> None:
        picache.hf.attention_functions.attend_blocks = self.before

    def _attend(self, query, key, value, blocks, *rest):
        return self.before(query, key, value, map(self._counted, blocks), *rest)

    def _counted(self, block):
        self.most = max(self.most, block.allowed.numel())
        return block


def measure(
    model: LlamaForCausalLM, length: int, chunks: int, query: int, repeats: int
) -> dict[str, float | int]:
    """Seconds of each arm, arms in turn, the first turn for warming up."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, model.config.vocab_size, (length,), generator=generator)
    pic = PIC(model)
    compiled = [pic.compile(part) for part in ids[:-query].tensor_split(chunks)]
    arms: dict[str, LinkMethod] = {"naive": NaiveReuse(), "legolink_16": LegoLink(16)}
    samples: dict[str, list[float]] = {name: [] for name in ("full", *arms)}
    rows, parts = 0, {}
    with MaskWatch() as masks:
        for repeat in range(repeats + 1):
            for name, method in arms.items():
                begun = time.perf_counter()
                report = pic.link(compiled, ids[-query:], method).report
                if repeat:
                    samples[name].append(time.perf_counter() - begun)
                rows, parts = report.tokens_recomputed, report.seconds
    for _ in range(max(1, repeats // 2)):
        samples["full"].append(first_token_seconds(model, ids[None]))
    median = {name: statistics.median(values) for name, values in samples.items()}
    return {
        "prompt_tokens": length,
        "tokens_recomputed": rows,
        "full_seconds": median["full"],
        "naive_seconds": median["naive"],
        "legolink_16_seconds": median["legolink_16"],
        "legolink_16_share_of_full": median["legolink_16"] / median["full"],
        "legolink_16_microseconds_a_token": 1e6 * median["legolink_16"] / length,
        "legolink_16_parts": parts,
        "largest_mask_elements": masks.most,
        "square_mask_elements": length * length,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--query", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = build_model("llama-100m", args.seed)
    rows = [
        measure(model, length, args.chunks, args.query, args.repeats)
        for length in tqdm(args.lengths, desc="prompt lengths")
    ]
    record = {
        "configuration": {k: v for k, v in vars(args).items() if k != "out"},
        "parameters": sum(p.numel() for p in model.parameters()),
        "environment": environment(),
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "link_scaling.json").write_text(json.dumps(record, indent=1) + "\n")
    print("tokens  recomputed  full ms  LegoLink-16 ms  share  us a token  largest mask")
    for row in rows:
        print(
            f"{row['prompt_tokens']:6}  {row['tokens_recomputed']:10}  "
            f"{1e3 * row['full_seconds']:7.0f}  {1e3 * row['legolink_16_seconds']:14.0f}  "
            f"{row['legolink_16_share_of_full']:5.3f}  "
            f"{row['legolink_16_microseconds_a_token']:10.1f}  {row['largest_mask_elements']:12,}"
        )


if __name__ == "__main__":
    main()
