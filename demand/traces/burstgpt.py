"""BurstGPT request traces, CSV (HPMLL/BurstGPT, CC-BY-4.0)."""

import os

from demand.traces.fields import Fields
from demand.traces.schema import Request
from demand.traces.sources import csv_rows
from demand.traces.trace import OneByOne, OnError, Trace

_COLUMNS = ("Timestamp", "Model", "Request tokens", "Response tokens")


def read_burstgpt(path: str | os.PathLike[str], *, on_error: OnError = "raise") -> Trace[Request]:
    """Requests of `BurstGPT_*.csv`: Timestamp in seconds, Model, Request tokens, Response tokens.

    Session ID is taken where the file has that column (files of the first release do not). A
    failed request has 0 response tokens; it is yielded like any other. The category of a request
    is its model.

    Never run on a real file: written from the published columns, and tried on small files of them.
    """
    return Trace(path, csv_rows(*_COLUMNS), lambda: OneByOne(_request), on_error)


def _request(row: Fields) -> Request:
    return Request(
        row.arrival("Timestamp", row.number("Timestamp")),
        row.tokens("Request tokens"),
        row.tokens("Response tokens"),
        session=row.identifier("Session ID") if row.has("Session ID") else None,
        category=row.text("Model"),
    )
