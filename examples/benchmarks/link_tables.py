"""What docs and the terminal show of `link.json`, as Markdown; every number comes from it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))  # scripts, not a package
from link_grid import FULL
from quickstart_pages import markdown


def measured(record: dict) -> list[dict]:
    """Rows that were measured, by batch and length, the fastest first."""
    rows = [row for row in record["rows"] if "first_token_seconds" in row]
    return sorted(rows, key=lambda r: (r["batch"], r["tokens"], r["first_token_seconds"]))


def full_of(record: dict, row: dict) -> dict | None:
    """The faster full prefill of the same prompts."""
    found = [
        r
        for r in measured(record)
        if r["arm"] in FULL and (r["tokens"], r["batch"]) == (row["tokens"], row["batch"])
    ]
    return min(found, key=lambda r: r["first_token_seconds"], default=None)


def label(row: dict) -> str:
    """An arm as the tables and the figure name it."""
    many = f", {row['chunks']} chunks" if row["chunks"] not in (0, 1, 16) else ""
    tier = f", {row['tier']}" if row["tier"] not in ("", "device") else ""
    return f"{row['arm']}{many}{tier}"


def _line(record: dict, row: dict) -> dict[str, str]:
    full = full_of(record, row)
    times = (
        "" if full is None else f"{full['first_token_seconds'] / row['first_token_seconds']:.1f}"
    )
    how = row.get("pass", "").split(",")[0].split(":")[0]
    return {
        "tokens": f"{row['tokens']:,}",
        "batch": str(row["batch"]),
        "arm": label(row),
        "ms": f"{1e3 * row['first_token_seconds']:.1f}",
        "times": times,
        "rows": f"{row['recomputed']:,.0f}" if "recomputed" in row else "",
        "pass": how,
    }


COLUMNS = {
    "prompt": "{tokens}",
    "prompts": "{batch}",
    "arm": "{arm}",
    "first token ms": "{ms}",
    "times faster than full": "{times}",
    "rows": "{rows}",
    "pass": "{pass}",
}


def tables(record: dict) -> str:
    """Every cell, what failed, and what it rests on."""
    call = record["calls"][-1]
    where, asked = call["environment"], call["configuration"]
    lines = [markdown([_line(record, row) for row in measured(record)], COLUMNS), ""]
    lines += [f"{r['name']}: {r['error']}" for r in record["rows"] if "error" in r]
    absent = {
        f"{r['arm']} was not measured: {r['missing']}." for r in record["rows"] if "missing" in r
    }
    lines += sorted(absent)
    speed = call["copy_bytes_a_second"] / 1e12
    lines.append(
        f"{where['hardware']}, torch {where['torch']}, transformers {where['transformers']}, "
        f"{asked['shape']}, {asked['dtype']}, a query of {asked['query']} tokens, seed "
        f"{asked['seed']}; medians of {asked['repeats']} turns (three where one takes "
        f"{asked['slow']:.0f} s or more). A copy moves {speed:.2f} TB/s."
    )
    return "\n".join(lines)
