"""Mooncake request traces, JSONL (kvcache-ai/Mooncake, Apache-2.0)."""

import os

from demand.traces.fields import Fields
from demand.traces.schema import Request
from demand.traces.sources import json_lines
from demand.traces.trace import LINE_LIMIT, OneByOne, OnError, Trace

BLOCK_TOKENS = 512


def read_mooncake(
    path: str | os.PathLike[str], *, on_error: OnError = "raise", line_limit: int = LINE_LIMIT
) -> Trace[Request]:
    """Requests of `FAST25-release/traces/*.jsonl`: timestamp in milliseconds, input_length,
    output_length, and hash_ids of the prompt's blocks of 512 tokens.
    """
    return Trace(path, json_lines, lambda: OneByOne(_request), on_error, line_limit)


def _request(record: Fields) -> Request:
    return Request(
        record.arrival("timestamp", record.number("timestamp") / 1000.0),
        record.tokens("input_length"),
        record.tokens("output_length"),
        block_ids=record.integers("hash_ids"),
        block_tokens=BLOCK_TOKENS,
    )
