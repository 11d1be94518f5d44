"""The kvpress rows of decode.py, in a process of their own: kvpress pins another transformers.

decode.py starts this with the folder of `.ci/peers` in front of PYTHONPATH, sends cells in and
reads rows, one JSON object a line. A prompt of random tokens goes through the model, compressed as
kvpress does it, and is decoded inside the same `generate` under the same clock.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from decode_clock import Clock
from decode_grid import EVICT_EVERY, Cell, random_kv, window_of
from shapes import build_model
from transformers import DynamicCache, LogitsProcessorList


def peer_rows(cells: list[Cell], args: argparse.Namespace) -> Iterator[dict]:
    """Rows of the cells, as the other process measures them.

    Raises:
        RuntimeError: where that process fails as a whole.
    """
    if not cells:
        return
    asked = {
        "cells": [{k: v for k, v in c.asdict().items() if k != "name"} for c in cells],
        **{k: getattr(args, k) for k in ("device", "shape", "dtype", "seed", "window", "repeats")},
    }
    folders = [str(args.peers.resolve()), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
    command = [sys.executable, __file__, json.dumps(asked)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
    if process.returncode:
        raise RuntimeError(f"{Path(__file__).name} exited with {process.returncode}")


def press_of(cell: Cell) -> Any:
    """kvpress's own object: the prompt is cut to the budget, while decoding only where asked."""
    import kvpress

    ratio, budget = max(0.0, 1 - (cell.budget or 0) / cell.context), cell.budget
    if cell.policy == "Knorm while decoding":
        again = kvpress.DecodingPress(
            kvpress.KnormPress(), compression_interval=EVICT_EVERY, target_size=budget
        )
        return kvpress.PrefillDecodingPress(kvpress.KnormPress(ratio), again)
    made = {
        "Knorm": kvpress.KnormPress,
        "StreamingLLM": kvpress.StreamingLLMPress,
        "SnapKV": kvpress.SnapKVPress,
    }
    return made[cell.policy](compression_ratio=ratio)


def measure(model: Any, cell: Cell, asked: dict) -> dict:
    """One row, with the same names as decode.py's."""
    import kvpress

    clock = Clock(model.device, window_of(cell, asked["window"]), asked["repeats"])
    gc.collect()
    cuda = model.device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    cache = DynamicCache(config=model.config)
    if cell.arm != "kvpress":
        generator = torch.Generator(model.device).manual_seed(asked["seed"])
        random_kv(model, cache, cell.batch, cell.context - 1, generator)
    ids = torch.randint(3, model.config.vocab_size, (cell.batch, cell.context))
    with press_of(cell)(model) if cell.arm == "kvpress" else nullcontext():
        model.generate(
            ids.to(model.device),
            attention_mask=torch.ones_like(ids, device=model.device),
            past_key_values=cache,
            max_new_tokens=clock.new_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([clock]),
        )
    gc.collect()
    row = cell.asdict() | clock.row()
    row["held_bytes"] = torch.cuda.memory_allocated() - before if cuda else None
    row["tokens_kept"] = cache.layers[0].keys.shape[2]
    row["tokens_a_second"] = 1e3 * cell.batch / row["step_ms"]
    versions = dict(transformers=transformers.__version__, kvpress=version_of(kvpress))
    return row | versions


def version_of(module: Any) -> str:
    from importlib.metadata import version

    return version(module.__name__)


def main() -> None:
    asked = json.loads(sys.argv[1])
    model = build_model(asked["shape"], asked["seed"], asked["device"], asked["dtype"])
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    for given in asked["cells"]:
        cell = Cell(**given)
        try:
            row = measure(model, cell, asked)
        except Exception as error:
            traceback.print_exc()
            row = cell.asdict() | {"error": f"{type(error).__name__}: {error}".split("\n")[0]}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
