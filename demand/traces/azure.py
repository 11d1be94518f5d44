"""Azure LLM inference traces 2023 and 2024, CSV (AzurePublicDataset, CC-BY-4.0)."""

import os

from demand.traces.fields import Fields
from demand.traces.schema import Request
from demand.traces.sources import csv_rows
from demand.traces.trace import LINE_LIMIT, OneByOne, OnError, Trace

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def read_azure(
    path: str | os.PathLike[str], *, on_error: OnError = "raise", line_limit: int = LINE_LIMIT
) -> Trace[Request]:
    """Requests of `AzureLLMInferenceTrace_*.csv`: TIMESTAMP, ContextTokens, GeneratedTokens.

    A folder is one trace on one clock. The code and the conversation file of a release cover the
    same hours and are two traces: a folder that has both is refused, read them one by one.
    """
    return Trace(path, csv_rows(*_COLUMNS), lambda: OneByOne(_request), on_error, line_limit)


def _request(row: Fields) -> Request:
    return Request(
        row.arrival("TIMESTAMP", row.time("TIMESTAMP")),
        row.tokens("ContextTokens"),
        row.tokens("GeneratedTokens"),
    )
