"""Names and texts as a table of HTML, for a notebook."""

from collections.abc import Iterable
from html import escape

LEFT = 'style="text-align: left"'  # a notebook sets tables to the right


def html_table(caption: str, rows: Iterable[tuple[str, str]]) -> str:
    """A table of two columns, escaped; a row without a name goes over both."""
    cells = (
        f"<tr><th {LEFT}>{escape(name)}</th><td {LEFT}>{escape(text)}</td></tr>"
        if name
        else f'<tr><td colspan="2" {LEFT}>{escape(text)}</td></tr>'
        for name, text in rows
    )
    return f"<table><caption>{escape(caption)}</caption>{''.join(cells)}</table>"
