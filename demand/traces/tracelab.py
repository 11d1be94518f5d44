"""TraceLab coding-agent rounds, JSONL (uw-syfi/TraceLab, data CC-BY-4.0)."""

import os
from dataclasses import dataclass
from typing import final

from demand.traces.fields import Fields
from demand.traces.schema import Session, Span
from demand.traces.sources import json_lines
from demand.traces.trace import OnError, Trace

APPLICATION = "coding_agent"
_INPUT_EVENTS = frozenset({"user_message", "tool_result"})
_OUTPUT_EVENTS = frozenset({"text", "reasoning", "tool_call"})


def read_tracelab(path: str | os.PathLike[str], *, on_error: OnError = "raise") -> Trace[Session]:
    """Sessions of rounds, one llm call and its tools a line; the lines of a session together.

    A line has session_id, input_tokens_total, prefix_tokens (of them, cached by the engine),
    output_tokens, timing_events {event_type, timestamp} and tools {tool_name, emitted_at,
    tool_wall_latency_ms}.

    A call is submitted at its last input event (user_message or tool_result) and lasts until its
    last output event (text, reasoning or tool_call); the trace measures no latency itself, and
    without an output event the seconds are unknown. Units are `llm`, each tool by name, and
    `user` (kind "human"), the wait before a round that a user_message began. Rounds are put in
    order of submission, which round_index does not always follow. Sub-agents are sessions of
    their own, as in the file. A skipped line leaves a gap in its session.

    Never run on a real file: written from the published columns, and tried on small files of them.
    """
    return Trace(path, json_lines, _Rounds, on_error)


@dataclass(frozen=True)
class _Round:
    submitted: float
    seconds: float | None
    by_user: bool
    tokens: tuple[int, int, int]  # input, output, cached
    tools: tuple[tuple[str, float, float], ...]  # name, emitted at, seconds


@final
class _Rounds:
    def __init__(self) -> None:
        self._id: str | None = None
        self._rounds: list[_Round] = []
        self._done: set[str] = set()

    def feed(self, record: Fields) -> tuple[Session, ...]:
        name, read = record.identifier("session_id"), _round(record)
        if name in self._done:
            raise record.malformed(
                "session_id", "the lines of a session are not together: sort the file by session"
            )
        complete = () if name == self._id else self.finish()
        self._id = name
        self._rounds.append(read)
        return complete

    def finish(self) -> tuple[Session, ...]:
        if self._id is None:
            return ()
        name, rounds = self._id, sorted(self._rounds, key=lambda read: read.submitted)
        self._done.add(name)
        self._id, self._rounds = None, []
        return (_session(name, rounds),)


def _round(record: Fields) -> _Round:
    times: dict[str, list[float]] = {"in": [], "out": []}
    inputs: list[tuple[float, str]] = []
    for event in record.records("timing_events"):
        named = event.text("event_type")
        if named in _INPUT_EVENTS:
            inputs.append((event.time("timestamp"), named))
        elif named in _OUTPUT_EVENTS:
            times["out"].append(event.time("timestamp"))
    if not inputs and not times["out"]:
        raise record.malformed("timing_events", "no event of input or output to date the round by")
    submitted, began = max(inputs) if inputs else (min(times["out"]), "")
    seconds = max(max(times["out"]) - submitted, 0.0) if times["out"] else None
    tools = tuple(
        (
            tool.text("tool_name"),
            tool.time("emitted_at"),
            tool.number("tool_wall_latency_ms") / 1000.0,
        )
        for tool in (record.records("tools") if record.has("tools") else [])
    )
    inputs_total, cached = record.tokens("input_tokens_total"), record.tokens("prefix_tokens")
    if cached > inputs_total:
        seen = f"seen: {cached} of {inputs_total}"
        raise record.malformed("prefix_tokens", "expected at most input_tokens_total", seen)
    tokens = (inputs_total, record.tokens("output_tokens"), cached)
    return _Round(submitted, seconds, began == "user_message", tokens, tools)


def _session(name: str, rounds: list[_Round]) -> Session:
    begins = rounds[0].submitted
    spans: list[Span] = []
    before: tuple[int, ...] = ()
    idle_since = begins
    for read in rounds:
        at = read.submitted - begins
        waited = read.submitted - idle_since
        if read.by_user and before and waited > 0.0:
            spans.append(Span("user", "human", idle_since - begins, waited, parents=before))
            before = (len(spans) - 1,)
        inputs, outputs, cached = read.tokens
        spans.append(
            Span("llm", "llm", at, read.seconds, 0.0, inputs, outputs, cached, parents=before)
        )
        call = len(spans) - 1
        for tool, emitted, seconds in read.tools:
            spans.append(Span(tool, "tool", max(emitted - begins, 0.0), seconds, parents=(call,)))
        before = tuple(range(call + 1, len(spans))) or (call,)
        idle_since = max(
            [read.submitted + (read.seconds or 0.0), *(at + took for _, at, took in read.tools)]
        )
    return Session(name, APPLICATION, tuple(spans), begins)
