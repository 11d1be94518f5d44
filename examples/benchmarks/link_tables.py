"""What docs and the terminal show of `link.json`, as Markdown; every number comes from it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))  # scripts, not a package
from link_grid import COMPILED, FULL
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
    absent: dict[tuple[str, str], list[int]] = {}
    for row in record["rows"]:
        if "missing" in row:
            absent.setdefault((row["arm"], row["missing"]), []).append(row["tokens"])
    for (arm, why), tokens in sorted(absent.items()):
        prompts = ", ".join(f"{one:,}" for one in sorted(tokens))
        lines.append(f"{arm} was not measured on prompts of {prompts} tokens: {why}.")
    speed = call["copy_bytes_a_second"] / 1e12
    lines.append(
        f"{where['hardware']}, torch {where['torch']}, transformers {where['transformers']}, "
        f"{asked['shape']}, {asked['dtype']}, a query of {asked['query']} tokens, seed "
        f"{asked['seed']}; medians of {asked['repeats']} turns (three where one takes "
        f"{asked['slow']:.0f} s or more). A copy moves {speed:.2f} TB/s."
    )
    return "\n".join(lines)


def aims(record: dict) -> str:
    """What was aimed at on an H200, and what was measured, every call of it."""
    rows = {
        (r["arm"], r["tokens"], r["tier"], r["batch"], r["chunks"]): r for r in measured(record)
    }

    def taken(arm: str, tokens: int, tier: str = "device", batch: int = 1) -> list[float]:
        row = rows[arm, tokens, tier, batch, 16]
        return [e["first_token_seconds"] for e in (*row["earlier"], row)]

    def full(tokens: int) -> float:
        return min(r["first_token_seconds"] for k, r in rows.items() if k[:2] == (FULL[0], tokens))

    def ms(seconds: list[float]) -> str:
        return ", ".join(f"{1e3 * one:.1f}" for one in seconds)

    long, short, eight = 32768, 4096, {"batch": 8}
    lines = []
    for arm in ("LegoLink-16", COMPILED):
        at_long, at_short = taken(arm, long), taken(arm, short)
        times = ", ".join(f"{full(long) / one:.0f}" for one in at_long)
        lines += [
            {"what": f"{arm}, 32k, on the device", "aim": "30 ms", "found": f"{ms(at_long)} ms"},
            {"what": "the same, less than a full prefill", "aim": "45 times", "found": times},
            {"what": f"{arm}, 4k, on the device", "aim": "18 ms", "found": f"{ms(at_short)} ms"},
        ]
        ratio = min(taken(arm, short, **eight)) / min(at_short)
        lines += [{"what": f"{arm}, 8 prompts of 4k over one", "aim": "3", "found": f"{ratio:.1f}"}]
    blend = taken("CacheBlend 15 %", long)[-1] / taken("LegoLink-16", long)[-1]
    lines += [
        {"what": "CacheBlend at 15 % over LegoLink-16, 32k", "aim": "8", "found": f"{blend:.0f}"},
        {
            "what": "LegoLink-16, 32k, from host memory",
            "aim": "100 ms",
            "found": f"{ms(taken('LegoLink-16', long, 'host'))} ms",
        },
    ]
    return markdown(lines, {"": "{what}", "aim": "{aim}", "measured": "{found}"})


def kernels(record: dict) -> str:
    """What stands between the markers of link_kernels.json in docs/linking.md."""
    lines = [
        {
            "what": row["what"],
            "arm": {"plan": "ours"}.get(row["arm"], row["arm"]),
            "us": f"{row['us']:,.1f}",
            "rate": f"{row['TFLOP/s']:.0f}" if "TFLOP/s" in row else "",
            "copy": f"{row['of_copy']:.0%}" if "of_copy" in row else "",
        }
        for row in record["rows"]
    ]
    columns = {
        "kernel": "{what}",
        "by": "{arm}",
        "microseconds": "{us}",
        "TFLOP/s": "{rate}",
        "of copy": "{copy}",
    }
    where, speed = record["environment"], record["copy_bytes_a_second"] / 1e12
    beneath = (
        f"{where['hardware']}, torch {where['torch']}, bfloat16, at {where['commit'][:7]}; a copy "
        f"moves {speed:.2f} TB/s."
    )
    return f"{markdown(lines, columns)}\n\n{beneath}"
