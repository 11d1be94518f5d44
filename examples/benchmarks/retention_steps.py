"""Time of a decoding step and KV held, by policy and length of the context, on a random model.

    python examples/benchmarks/retention_steps.py --out docs/results --device cuda

What a policy costs and saves, not what it gets wrong: weights are random. Each cell reads a prompt
of the length and decodes; the policies take turns at every length. A step is timed on the clock,
medians, and by what the GPU computes in it (on a CPU the same). Writes `retention_steps.json`.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel

from sparsity import Quest, RaaS, SnapKV, SparseCache, StreamingLLM
from sparsity.policies.base import Policy

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))  # scripts, not a package
from environment import environment
from render_tables import steps_table
from shapes import SHAPES, build_model


def policies(budget: int) -> dict[str, Policy | None]:
    """The policies at a budget of tokens; None is the model's own cache."""
    return {
        "dense": None,
        f"StreamingLLM({budget})": StreamingLLM(budget),
        f"Quest({budget})": Quest(budget),
        f"RaaS({budget})": RaaS(budget, pin_prompt=False),
        f"SnapKV({budget})": SnapKV(budget),
    }


def seconds(device: str) -> float:
    """The clock, once what was queued on the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def busy_seconds(model: PreTrainedModel, logits: torch.Tensor, cache: Cache) -> float:
    """Seconds of a step in which the GPU computes, however long it waits for what is next."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(2):  # what is recorded takes far longer to read than to compute
            logits = model(logits[:, -1:].argmax(-1), past_key_values=cache).logits
    return sum(event.self_device_time_total for event in profile.key_averages()) / 2 / 1e6


@torch.no_grad()
def measure(
    model: PreTrainedModel, policy: Policy | None, context: int, batch: int, steps: int
) -> dict[str, float]:
    """Seconds to read a prompt, milliseconds of a step behind it, MiB of KV held at the end."""
    device = model.device.type
    generator = torch.Generator().manual_seed(context)
    ids = torch.randint(3, model.config.vocab_size, (batch, context), generator=generator)
    ids = ids.to(device)
    cache = DynamicCache(config=model.config) if policy is None else SparseCache(model, policy)
    start = seconds(device)
    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    prompt, took = seconds(device) - start, []
    for _ in range(steps):
        start = seconds(device)
        logits = model(logits[:, -1:].argmax(-1), past_key_values=cache).logits
        took.append(seconds(device) - start)
    step = statistics.median(took)
    busy = busy_seconds(model, logits, cache) if device == "cuda" else step
    held = (
        sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        if policy is None
        else cache.report().num_bytes
    )
    return {
        "prompt_seconds": prompt,
        "step_ms": step * 1e3,
        "busy_ms": busy * 1e3,
        "kv_mib": held / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--most-tokens", type=int, default=1 << 17, help="context times batch")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=16)
    args = parser.parse_args()
    model = build_model(args.shape, 0, args.device, args.dtype)
    arms = policies(args.budget)
    for policy in arms.values():  # what is compiled and allocated once
        measure(model, policy, args.budget + 128, 1, 4)
    rows = []
    cells = [(b, n) for b in args.batches for n in args.contexts if b * n <= args.most_tokens]
    for batch, context in tqdm(cells, desc="cells"):
        for name, policy in arms.items():
            row = measure(model, policy, context, batch, args.steps)
            rows.append({"policy": name, "batch": batch, "context": context} | row)
    record = {
        "configuration": {k: v for k, v in vars(args).items() if k != "out"},
        "environment": environment(),
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "retention_steps.json").write_text(json.dumps(record, indent=1) + "\n")
    print(steps_table(record))


if __name__ == "__main__":
    main()
