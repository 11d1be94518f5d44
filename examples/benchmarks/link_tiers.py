"""First token of a linked prompt by where its chunks lie: device, host memory or disk.

    python examples/benchmarks/link_tiers.py --out docs/results
    python examples/benchmarks/link_tiers.py --out docs/results --shape llama-3.1-8b \
        --device cuda --dtype bfloat16 --lengths 4096 16384 32832

Chunks of equal length, a query of 64 tokens, all compiled before. "host" and "disk" are timed with
the next layer loaded beside the computation and without. A full prefill and CacheBlend run in the
same process; arms take turns; medians. Writes `link_tiers_<device>.json`.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import picache.linking.link
from picache import PIC, CacheBlend, ChunkStore, LegoLink, NaiveReuse
from picache.linking.linked_kv import LinkedKV

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))  # scripts, not a package
from environment import environment
from first_token import first_token_seconds
from shapes import SHAPES, build_model


def one_at_a_time(model, parts, skips, layout, ahead, parallel, memory):
    """`LinkedKV` that loads a layer only when it is asked for."""
    return LinkedKV(model, parts, skips, layout, None, parallel, memory)


def timed_link(pic, chunks, query, method, overlap=True) -> tuple[float, dict[str, float]]:
    """Seconds of one link, and its parts."""
    picache.linking.link.LinkedKV = LinkedKV if overlap else one_at_a_time
    try:
        begun = time.perf_counter()
        report = pic.link(chunks, query, method).report
        return time.perf_counter() - begun, report.seconds
    finally:
        picache.linking.link.LinkedKV = LinkedKV


def measure(model, length: int, args: argparse.Namespace, folder: Path) -> list[dict]:
    """One row an arm: median seconds to the first token, the parts of the median run."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, model.config.vocab_size, (length,), generator=generator)
    documents, query = ids[: -args.query].tensor_split(args.chunks), ids[-args.query :]
    stores = {
        "device": ChunkStore(),
        "host": ChunkStore(device_bytes=1, host_bytes=math.inf),
    }
    if args.disk_lengths is None or length in args.disk_lengths:
        stores["disk"] = ChunkStore(device_bytes=1, path=folder / str(length))
    pics = {tier: PIC(model, store=store) for tier, store in stores.items()}
    chunks = {tier: [pic.compile(d) for d in documents] for tier, pic in pics.items()}
    lego = LegoLink(16)
    whole = ids[None].to(model.device)
    arms = {("full prefill", ""): lambda: (first_token_seconds(model, whole), {})}
    for name, method, tier, overlap in (
        ("naive", NaiveReuse(), "device", True),
        ("LegoLink-16", lego, "device", True),
        ("CacheBlend 15 %", CacheBlend(0.15), "device", True),
        ("LegoLink-16", lego, "host", True),
        ("LegoLink-16, no overlap", lego, "host", False),
        ("LegoLink-16", lego, "disk", True),
        ("LegoLink-16, no overlap", lego, "disk", False),
    ):
        if tier not in pics:
            continue
        arms[name, tier] = partial(
            timed_link, pics[tier], chunks[tier], query, method, overlap=overlap
        )
    samples: dict[tuple[str, str], list] = {arm: [] for arm in arms}
    for repeat in range(args.repeats + 1):
        for arm, run in arms.items():
            sample = run()
            if repeat:  # the first turn warms up
                samples[arm].append(sample)
    full = statistics.median(seconds for seconds, _ in samples["full prefill", ""])
    rows = []
    for (name, tier), taken in samples.items():
        seconds, parts = sorted(taken, key=lambda sample: sample[0])[len(taken) // 2]
        rows.append(
            {
                "prompt_tokens": length,
                "arm": name,
                "tier": tier,
                "first_token_seconds": seconds,
                "times_faster_than_full": full / seconds,
                "parts": parts,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llama-100m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4160])
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--query", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--disk-lengths", type=int, nargs="*", help="of the lengths, those read from disk too; all"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = build_model(args.shape, args.seed, args.device, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row
            for length in tqdm(args.lengths, desc="prompt lengths")
            for row in measure(model, length, args, Path(folder))
        ]
    record = {
        "configuration": {k: v for k, v in vars(args).items() if k != "out"},
        "parameters": sum(p.numel() for p in model.parameters()),
        "environment": environment(),
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"link_tiers_{args.device}.json"
    (args.out / name).write_text(json.dumps(record, indent=1) + "\n")
    print("tokens  arm                      tier     first token ms  times faster")
    for row in rows:
        print(
            f"{row['prompt_tokens']:6}  {row['arm']:23}  {row['tier']:6}  "
            f"{1e3 * row['first_token_seconds']:14.1f}  {row['times_faster_than_full']:12.1f}  "
            + "  ".join(f"{k} {1e3 * v:.1f}" for k, v in row["parts"].items())
        )


if __name__ == "__main__":
    main()
