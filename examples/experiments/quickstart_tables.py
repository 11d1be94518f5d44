"""The rows of the quickstart's tables, and the columns they are shown in."""

import numpy as np

from picache import Comparison as LinkComparison
from sparsity import Comparison as RetentionComparison

Row = dict[str, object]

LINKING = {
    "linking": "{arm}",
    "right": "{accuracy:.0%}",
    "NLL above full": "{extra_nll:.2f} [{extra_nll_interval[0]:.2f}, {extra_nll_interval[1]:.2f}]",
    "KL": "{kl:.2f}",
    "recomputed": "{recomputed:.1%}",
    "first token": "{seconds_text}",
    "of full": "{time_of_full:.2f}",
}
RETENTION = {
    "retention": "{arm}",
    "NLL above dense": "{extra_nll:.3f} [{extra_nll_interval[0]:.3f}, {extra_nll_interval[1]:.3f}]",
    "agreement": "{agreement:.1%}",
    "KV held": "{kept_bytes_text}",
    "step": "{milliseconds_a_step:.0f} ms",
}
CHAINS = {  # where the texts are problems with answers
    "retention": "{arm}",
    "right": "{accuracy:.0%}",
    **{name: text for name, text in RETENTION.items() if name != "retention"},
}
SCHEDULING = {
    "scheduling": "{mix}: {arm}",
    "mean": "{mean_seconds:.0f} s",
    "P95": "{p95_seconds:.0f} s",
    "mean / FCFS": "{mean_to_fcfs:.2f}",
    "P95 / FCFS": "{p95_to_fcfs:.2f}",
}


def linking_rows(result: LinkComparison) -> list[Row]:
    """A row an arm; its time also as a share of full prefill's, the median over problems."""
    full = result.measured[result.reference]["first_token_seconds"]
    rows = result.table
    for row in rows:
        seconds = result.measured[str(row["arm"])]["first_token_seconds"]
        row["first_token_seconds"] = float(np.median(seconds))
        row["time_of_full"] = float(np.median(seconds / full))
        row["problems"] = result.units
        row["prompt_tokens"] = float(np.mean(result.settings["prompt_tokens"]))
    return rows


def retention_rows(result: RetentionComparison) -> list[Row]:
    """A row an arm, and what the texts are."""
    about = {
        "texts": result.units,
        "prompt_tokens": float(np.mean(result.settings["prompt_tokens"])),
    }
    return [row | about for row in result.table]


def shown(rows: list[Row]) -> list[Row]:
    """Rows with what the columns show besides: times and bytes for reading."""
    made = []
    for row in rows:
        texts: Row = {}
        if "first_token_seconds" in row:
            seconds = float(row["first_token_seconds"])
            texts["seconds_text"] = (
                f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"
            )
        if "kept_bytes" in row:
            texts["milliseconds_a_step"] = 1e3 * float(row["step_seconds"])
            texts["kept_bytes_text"] = f"{float(row['kept_bytes']) / 2**20:.1f} MiB"
        made.append(row | texts)
    return made


def retention_columns(rows: list[Row]) -> dict[str, str]:
    return CHAINS if "accuracy" in rows[0] else RETENTION


def plain(rows: list[Row], columns: dict[str, str]) -> str:
    """Rows as aligned text; `columns` maps a heading to a format string over the row."""
    cells = [list(columns), *([text.format(**row) for text in columns.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = []
    for line in cells:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
