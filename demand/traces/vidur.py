"""Request traces in the form of Vidur, CSV (microsoft/vidur, MIT)."""

import os

from demand.traces.fields import Fields
from demand.traces.schema import Request
from demand.traces.sources import csv_rows
from demand.traces.trace import OneByOne, OnError, Trace

_COLUMNS = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")


def read_vidur(path: str | os.PathLike[str], *, on_error: OnError = "raise") -> Trace[Request]:
    """Requests of `processed_traces/*.csv`: arrived_at in seconds, num_prefill_tokens,
    num_decode_tokens.

    Never run on a real file: written from the published columns, and tried on small files of them.
    """
    return Trace(path, csv_rows(*_COLUMNS), lambda: OneByOne(_request), on_error)


def _request(row: Fields) -> Request:
    return Request(
        row.arrival("arrived_at", row.number("arrived_at")),
        row.tokens("num_prefill_tokens"),
        row.tokens("num_decode_tokens"),
    )
