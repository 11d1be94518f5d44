"""Names and numbers as a table of HTML, for a notebook."""

import math
from collections.abc import Sequence
from html import escape


def html_table(caption: str, rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, escaped; the first row and the first column are headings."""
    lines = []
    for number, row in enumerate(rows):
        kinds = ["th" if not number or not column else "td" for column in range(len(row))]
        cells = (f"<{k}>{escape(text)}</{k}>" for k, text in zip(kinds, row, strict=True))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><caption>{escape(caption)}</caption>{''.join(lines)}</table>"


def cell(value: str | float) -> str:
    """A text as it is, a count with its thousands, any other number with four digits, NaN "-"."""
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if math.isnan(value) else f"{value:.4g}"
