"""Coding-agent sessions, one a line: kv-cache-tester's traces without the hashes, JSONL."""

import os

from demand.traces.agent_calls import APPLICATION, AgentSpans, Form
from demand.traces.fields import Fields
from demand.traces.schema import Session
from demand.traces.sources import json_lines
from demand.traces.trace import LINE_LIMIT, OneByOne, OnError, Trace

_FORM = Form(api="api_s", think="think_s", subagent="subagent", own_clock=True)


def read_agent_sessions(
    path: str | os.PathLike[str], *, on_error: OnError = "raise", line_limit: int = LINE_LIMIT
) -> Trace[Session]:
    """Sessions of {session, calls}, where calls lists {t, in, out, api_s, think_s}.

    t is the second of the call from the start, in and out its prompt and output tokens, api_s the
    seconds in the model, think_s the seconds of tool or human time before it. An entry of {t,
    subagent} holds the calls of a sub-agent, on a clock that starts at t.

    Units are `llm` and `think` (kind "human": the trace does not tell tools from people), and
    `subagent_llm` and `subagent_think`. An agent that waits for a sub-agent thinks meanwhile, so
    counting both counts that time twice. Seconds are unknown where they are null (9 % of the
    calls of the published traces); cached tokens are unknown everywhere.
    """
    return Trace(path, json_lines, lambda: OneByOne(_session), on_error, line_limit)


def _session(record: Fields) -> Session:
    agent = AgentSpans(_FORM)
    agent.add(record.records("calls"))
    return Session(record.identifier("session"), APPLICATION, tuple(agent.spans))
