"""Coding-agent sessions of kv-cache-tester ("Weka traces"), JSON (Apache-2.0)."""

import os

from demand.traces.agent_calls import APPLICATION, AgentSpans, Form
from demand.traces.fields import Fields
from demand.traces.schema import Session
from demand.traces.sources import json_documents
from demand.traces.trace import OneByOne, OnError, Trace


def read_kv_cache_tester(
    path: str | os.PathLike[str], *, on_error: OnError = "raise"
) -> Trace[Session]:
    """Sessions of callanjfox/kv-cache-tester, `traces/trace_*.json`; give the folder or one file.

    A document has id, block_size and requests, a list of {t, in, out, hash_ids, input_types,
    api_time, think_time}; an entry of type "subagent" holds the requests of a sub-agent, whose
    times are the session's or, if the first lies before the entry's own, count from the entry.

    Units are those of `read_agent_sessions`, except that the wait before a request whose
    input_types name "tool_result" is `tool`, of kind "tool". Cached tokens are the blocks with
    which both a prompt and the one before it open.

    Never run on a real file: written from the published columns, and tried on small files of them.
    """
    return Trace(path, json_documents, lambda: OneByOne(_session), on_error)


def _session(record: Fields) -> Session:
    form = Form("api_time", "think_time", "requests", False, record.tokens("block_size"))
    agent = AgentSpans(form)
    agent.add(record.records("requests"))
    return Session(record.identifier("id"), APPLICATION, tuple(agent.spans))
