"""What docs and the terminal show of `decode.json`, as Markdown; every number comes from it."""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))  # scripts, not a package
from decode_grid import COMPILED
from quickstart_pages import markdown

DENSE = ("dense eager", "dense static")
FASTER = 1.05  # times the best dense arm, from which on a step is called faster
ARMS = ("no attention", *DENSE, "ours compiled", "ours eager", "kvpress")


def measured(record: dict) -> list[dict]:
    """Rows of decoding that were measured, in the order of the tables."""
    rows = [row for row in record["rows"] if "step_ms" in row]
    place = {arm: i for i, arm in enumerate(ARMS)}
    return sorted(
        rows,
        key=lambda r: (r["batch"], r["context"], place.get(r["arm"], len(place)), r["policy"]),
    )


def failures(record: dict, call: int | None = None) -> list[dict]:
    """Cells that raised, of one call or of all."""
    return [r for r in record["rows"] if "error" in r and call in (None, r["call"])]


def label(row: dict) -> str:
    """An arm as the tables name it: the policy, its budget, and how its step runs."""
    if not row["policy"]:
        return {"no attention": "no attention, compiled"}.get(row["arm"], row["arm"])
    budget = "" if row["budget"] is None else f"({row['budget']:,})"
    how = row["arm"].removeprefix("ours ")
    return f"{row['policy']}{budget}, {how}"


def best_dense(record: dict, row: dict) -> dict | None:
    """The faster dense arm at the context and batch of a row."""
    found = [
        r
        for r in measured(record)
        if r["arm"] in DENSE and (r["batch"], r["context"]) == (row["batch"], row["context"])
    ]
    return min(found, key=lambda r: r["step_ms"], default=None)


def share_of_copy(record: dict, row: dict) -> float | None:
    """Bytes a step must read, over its time, as a share of the copy bandwidth of its call."""
    if "bytes_a_step" not in row:
        return None
    rate = row["bytes_a_step"] / (row["step_ms"] / 1e3)
    return rate / record["calls"][row["call"]]["copy_bytes_a_second"]


def _shown(text: str, value: float | None) -> str:
    return "" if value is None else text.format(value)


def _line(record: dict, row: dict) -> dict[str, str]:
    dense = best_dense(record, row)
    ours = row["arm"] not in (*DENSE, "no attention")
    held, compiled = row.get("held_bytes"), row["arm"] in COMPILED
    return {
        "arm": label(row),
        "batch": str(row["batch"]),
        "context": f"{row['context']:,}" if row["context"] else "",
        "ms": f"{row['step_ms']:.2f}",
        "rate": f"{row['tokens_a_second']:,.0f}",
        "faster": _shown("{:.2f}", dense["step_ms"] / row["step_ms"] if dense and ours else None),
        "copy": _shown("{:.0%}", share_of_copy(record, row)),
        "held": _shown("{:,.0f}", held / 2**20 if held is not None else None),
        "first": _shown("{:.0f}", row.get("first_steps_seconds")) if compiled else "",
        "graphs": f"{row['graphs']} + {row['graphs_once_warm']}" if compiled else "",
    }


COLUMNS = {
    "arm": "{arm}",
    "batch": "{batch}",
    "context": "{context}",
    "ms a token": "{ms}",
    "tokens/s": "{rate}",
    "to best dense": "{faster}",
    "of copy": "{copy}",
    "held MiB": "{held}",
    "first steps s": "{first}",
    "graphs": "{graphs}",
}


def main_table(record: dict, wanted: Callable[[dict], bool] = lambda row: True) -> str:
    """Every cell measured, or those wanted."""
    rows = [_line(record, row) for row in measured(record) if wanted(row)]
    lines = [markdown(rows, COLUMNS)]
    lines += [f"{row['name']}: {row['error']}" for row in failures(record)]
    return "\n".join(lines)


def by_context(record: dict) -> str:
    """Milliseconds a token at batch 1: an arm a row, a context a column."""
    rows = [r for r in measured(record) if r["batch"] == 1 and r["context"]]
    seen: dict[str, dict[int, float]] = {}
    for row in rows:
        seen.setdefault(label(row), {})[row["context"]] = row["step_ms"]
    contexts = sorted({row["context"] for row in rows})
    several = {arm: by for arm, by in seen.items() if len(by) > 1}
    columns = {"ms a token": "{arm}"} | {f"{n:,}": f"{{at{n}}}" for n in contexts}
    lines = [
        {"arm": arm} | {f"at{n}": _shown("{:.2f}", by.get(n)) for n in contexts}
        for arm, by in several.items()
    ]
    return f"{markdown(lines, columns)}\n\n{_beneath(record)}"


def _beneath(record: dict) -> str:
    calls = record["calls"]
    where, asked = calls[0]["environment"], calls[0]["configuration"]
    speeds = sorted({f"{call['copy_bytes_a_second'] / 1e12:.2f}" for call in calls})
    copies = speeds[0] if len(speeds) == 1 else f"{speeds[0]} to {speeds[-1]}"
    floors = ", ".join(
        f"{row['step_ms']:.2f} ms at batch {row['batch']}"
        for row in measured(record)
        if row["arm"] == "no attention"
    )
    return (
        f"{where['hardware']}, torch {where['torch']}, transformers {where['transformers']}, "
        f"{asked['dtype']}, seed {asked['seed']}; medians of {asked['repeats']} windows; "
        f"{len(calls)} calls. A copy moves {copies} TB/s. The compiled forward without attention "
        f"takes {floors}."
    )


def spread(record: dict) -> str:
    """What each compiled arm took in all calls that measured it, where there were several."""
    lines = []
    for row in measured(record):
        calls = [*row.get("earlier", ()), row]
        if row["arm"] == "ours compiled" and len(calls) > 1:
            steps = sorted(call["step_ms"] for call in calls)
            at = f"batch {row['batch']}, {row['context']:,}: {steps[0]:.2f} to {steps[-1]:.2f} ms"
            lines.append(f"- {label(row)}, {at} in {len(calls)} calls.")
    return "\n".join(lines)


def batches(record: dict) -> str:
    """The cells of more than one row."""
    return main_table(record, lambda row: row["batch"] > 1 and row["context"] > 0)


def others(record: dict) -> str:
    """Every policy and budget where most of them were measured: batch 1, one context."""
    rows = [r for r in measured(record) if r["batch"] == 1 and r["context"]]
    counts = {n: sum(r["context"] == n for r in rows) for n in {r["context"] for r in rows}}
    most = max(counts, key=lambda n: counts[n])
    return main_table(record, lambda row: row["batch"] == 1 and row["context"] == most)


def kernels(record: dict) -> str:
    """Attention of one new token alone."""
    rows, absent = [], {}
    for row in record["rows"]:
        if "microseconds" in row:
            rate = row["bytes"] / (row["microseconds"] / 1e6)
            of_copy = rate / record["calls"][row["call"]]["copy_bytes_a_second"]
            rows.append(row | {"of_copy": of_copy})
        elif "missing" in row:
            absent.setdefault(row["kernel"], row["missing"])
    rows.sort(key=lambda r: (-r["batch"], r["tokens"], r["microseconds"]))
    columns = {
        "kernel": "{kernel}",
        "batch": "{batch}",
        "tokens held": "{tokens:,}",
        "microseconds": "{microseconds:.1f}",
        "of copy": "{of_copy:.0%}",
        "off float32": "{difference:.0e}",
    }
    lines = [markdown(rows, columns)]
    lines += [f"\n{kernel} was not measured: {why}." for kernel, why in absent.items()]
    return "\n".join(lines)


def when_it_pays(record: dict) -> str:
    """For each policy and batch: where its compiled step beats the best dense step, and where not.

    The sentences are written from the record; a policy that loses somewhere is said to.
    """
    found: dict[tuple, list[tuple[int, float]]] = {}
    for row in measured(record):
        dense = best_dense(record, row)
        if row["arm"] == "ours compiled" and dense is not None:
            key = (row["policy"], row["budget"], row["batch"])
            found.setdefault(key, []).append((row["context"], dense["step_ms"] / row["step_ms"]))
    lines = []
    for (policy, budget, batch), at in found.items():
        name = policy if budget is None else f"{policy}({budget:,})"
        shown = ", ".join(f"{ratio:.2f} at {context:,}" for context, ratio in sorted(at))
        wins = [context for context, ratio in sorted(at) if ratio >= FASTER]
        if len(wins) == len(at):
            verdict = "faster" if len(at) == 1 else "faster at every length measured"
        elif not wins:
            verdict = "not faster"
        else:
            verdict = f"faster from {wins[0]:,} on"
            if any(ratio < FASTER for context, ratio in at if context > wins[0]):
                verdict = "faster at " + ", ".join(f"{n:,}" for n in wins)
        beside = f"{shown} times the best dense arm measured"
        lines.append(f"- {name}, batch {batch}: {verdict} ({beside}).")
    return "\n".join(lines)


def profile_table(name: str, profile: dict, most: int = 25) -> str:
    """A step by kernel, the longest first, and what the GPU waits for."""
    columns = {
        "kernel": "{short}",
        "times a step": "{times:.1f}",
        "us a step": "{microseconds:.1f}",
    }
    rows = [k | {"short": k["kernel"].replace("|", "/")[:90]} for k in profile["kernels"][:most]]
    rest = sum(k["microseconds"] for k in profile["kernels"][most:])
    waits = profile["between_launches_us"]
    beneath = (
        f"{name}: {profile['step_us']:.0f} us a step under the profiler "
        f"({1e3 * profile['step_ms']:.0f} without), kernels {profile['busy_us']:.0f} of them, "
        f"{rest:.0f} in kernels not listed; {profile['graph_launches']:.1f} graphs a step"
        + ("" if waits is None else f", {waits:.0f} us from one launch to the next")
    )
    return f"{markdown(rows, columns)}\n\n{beneath}."


def profiles(record: dict) -> str:
    """Every cell of `decode_profile.json`."""
    return "\n\n".join(profile_table(name, cell, 16) for name, cell in record["cells"].items())


def on_the_clock(record: dict) -> str:
    """The first block of docs/retention.md: the verdicts, and what they rest on."""
    parts = (when_it_pays(record), by_context(record), spread(record))
    return "\n\n".join(part for part in parts if part)


def tables(record: dict) -> str:
    """All blocks of docs/retention.md, for the terminal."""
    return "\n\n".join(block(record) for block in BLOCKS)


BLOCKS: list[Callable[[dict], str]] = [on_the_clock, others, batches, kernels]
