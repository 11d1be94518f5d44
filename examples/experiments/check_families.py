"""Which model families link exactly: measured on tiny random models, one verdict each.

python examples/experiments/check_families.py

writes docs/results/families.json and the table of docs/models.md. Every model is handed to PIC,
whose own check may refuse it. One that is taken links chunks of ragged lengths, longer in all than
any attention window, with everything recomputed; logits and greedily generated tokens are compared
with a full prefill.
"""

import json
from collections import Counter
from pathlib import Path

import torch
import transformers
from environment import environment
from families import FAMILIES, build, random_ids
from tqdm import tqdm

from picache import PIC, FullRecompute, PICacheError

ROOT = Path(__file__).parents[2]
RESULT, PAGE = ROOT / "docs" / "results" / "families.json", ROOT / "docs" / "models.md"
BEGIN, END = "<!-- table of docs/results/families.json -->", "<!-- end of the table -->"
LENGTHS, QUERY, NEW_TOKENS, SEED = (7, 20, 33, 1, 18), 9, 16, 0
BOUND = 1e-5  # relative error of the logits, fp32


def verdict(family: str, seed: int = SEED) -> dict:
    """What became of one family: "exact", "refused" or, which is a bug, "deviates".

    Raises:
        AttributeError: when the installed transformers has no such family.
    """
    model = build(family, seed=seed)
    row = {"family": family, "model": type(model).__name__}
    try:
        pic = PIC(model)
    except PICacheError as error:
        return {**row, "verdict": "refused", "reason": str(error)}
    parts = [random_ids(n, seed=100 * seed + i) for i, n in enumerate((*LENGTHS, QUERY))]
    ids = torch.cat(parts)[None]
    prompt = pic.link([pic.compile(part) for part in parts[:-1]], parts[-1], FullRecompute())
    with torch.no_grad():
        logits = model(ids).logits[:, -1]
    error = float((prompt.logits - logits).norm() / logits.norm())
    run = dict(max_new_tokens=NEW_TOKENS, do_sample=False)
    same = torch.equal(model.generate(**prompt, **run), model.generate(ids, **run))
    exact = error <= BOUND and same
    return {
        **row,
        "verdict": "exact" if exact else "deviates",
        "logits_relative_error": error,
        "same_tokens": same,
        "rope": rotations(pic),
        "follows_length": pic.hf.rotary.follows_length,
    }


def rotations(pic: PIC) -> str:
    """What calibration found: layout, rotated of all dimensions, where, and in how many layers."""
    model = pic.hf
    kinds = Counter()
    for (keys, values), rotation in zip(
        model.prefill(torch.tensor([[3]])), model.rotations, strict=True
    ):
        if rotation is None:
            kinds["none (NoPE)"] += 1
            continue
        dim = (keys, values)[rotation.part].shape[-1]
        where = f" from {rotation.offset}" if rotation.offset else ""
        part = ", beside latents" if rotation.part else ""
        kinds[f"{rotation.pairing} {rotation.rotary_dim}/{dim}{where}{part}"] += 1
    if len(kinds) == 1:
        return next(iter(kinds))
    return "; ".join(f"{n} of {kinds.total()} layers {kind}" for kind, n in kinds.items())


def table(record: dict) -> str:
    """What stands between the markers of docs/models.md."""
    exact = [row for row in record["families"] if row["verdict"] == "exact"]
    refused = [row for row in record["families"] if row["verdict"] == "refused"]
    lines = [
        f"{len(exact)} families link exactly, {len(refused)} are refused.",
        "",
        "| links exactly | rotation: layout, rotated of all dimensions | error of the logits |",
        "| --- | --- | ---: |",
    ]
    for row in exact:
        follows = "; frequencies follow the length" if row["follows_length"] else ""
        lines.append(
            f"| {row['family']} | {row['rope']}{follows} | {row['logits_relative_error']:.0e} |"
        )
    lines += ["", "| refused | because |", "| --- | --- |"]
    lines += [f"| {row['family']} | {' '.join(row['reason'].split())} |" for row in refused]
    where = record["environment"]
    source = (
        f"From `docs/results/families.json`: seed {record['configuration']['seed']}, fp32, "
        f"{where['hardware']}, torch {where['torch']}, transformers {where['transformers']}. "
        "Errors are relative, in the Frobenius norm."
    )
    lines += ["", source]
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = [verdict(family) for family in tqdm(FAMILIES, unit="family")]
    if wrong := [row for row in rows if row["verdict"] == "deviates"]:
        raise SystemExit(f"linked without being exact: {wrong}")
    record = {
        "configuration": {
            "chunks": LENGTHS,
            "query": QUERY,
            "new_tokens": NEW_TOKENS,
            "seed": SEED,
            "bound": BOUND,
        },
        "environment": environment(),
        "families": rows,
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(record)}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
