"""Bailian (Qwen) request traces, JSONL (alibaba-edu/qwen-bailian-usagetraces-anon, Apache-2.0)."""

import os
from typing import final

from demand.traces.fields import Fields
from demand.traces.schema import Request
from demand.traces.sources import json_lines
from demand.traces.trace import OnError, Trace

BLOCK_TOKENS = 16
NO_PARENT = "-1"


def read_bailian(path: str | os.PathLike[str], *, on_error: OnError = "raise") -> Trace[Request]:
    """Requests of `qwen_*_blksz_16.jsonl`: chat_id, parent_chat_id (-1 for none), timestamp in
    seconds, input_length, output_length, type, and hash_ids of the prompt's blocks of 16 tokens.

    A chat belongs to the session of its parent; where the file does not have the parent, to one
    of the parent's name. One id a chat is kept in memory for it.

    Never run on a real file: written from the published columns, and tried on small files of them.
    """
    return Trace(path, json_lines, _Chats, on_error)


@final
class _Chats:
    def __init__(self) -> None:
        self._sessions: dict[str, str] = {}

    def feed(self, record: Fields) -> tuple[Request]:
        chat = record.identifier("chat_id")
        parent = record.identifier("parent_chat_id")
        first = parent == NO_PARENT
        session = chat if first else self._sessions.get(parent, parent)
        request = Request(
            record.arrival("timestamp", record.number("timestamp")),
            record.tokens("input_length"),
            record.tokens("output_length"),
            id=chat,
            session=session,
            parent=None if first else parent,
            category=record.text("type"),
            block_ids=record.integers("hash_ids"),
            block_tokens=BLOCK_TOKENS,
        )
        self._sessions[chat] = session
        return (request,)

    def finish(self) -> tuple[()]:
        return ()
