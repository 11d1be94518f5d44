"""OpenTelemetry GenAI spans, OTLP JSON a line (as the collector's file exporter writes them)."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import final

from demand.arguments import whole_number
from demand.traces.fields import Fields
from demand.traces.schema import Session, Span
from demand.traces.sources import json_lines
from demand.traces.trace import OnError, Trace
from demand.units import Kind

_KINDS: Mapping[str, Kind] = {
    "chat": "llm",
    "text_completion": "llm",
    "generate_content": "llm",
    "execute_tool": "tool",
    "embeddings": "model",
}
_NAMELESS = "unknown_service"  # what the conventions call a service without a name


def read_opentelemetry(
    path: str | os.PathLike[str], *, wait_lines: int = 1000, on_error: OnError = "raise"
) -> Trace[Session]:
    """Sessions of spans of the GenAI semantic conventions, one session a trace id.

    A line is {resourceSpans: [{resource, scopeSpans: [{spans}]}]}. A span counts by its
    gen_ai.operation.name: chat, text_completion and generate_content are llm units named by
    operation, execute_tool is a tool named by gen_ai.tool.name, embeddings a model; other spans
    (invoke_agent, HTTP) enclose work and are not units. Tokens are gen_ai.usage.input_tokens,
    output_tokens and cache_read.input_tokens; gen_ai.latency.time_in_queue, in seconds, is the
    wait before service. The application is the service.name of the resource, if it has one. An
    llm span without its input and output tokens is malformed (calls that failed often are): it
    would count as no work.

    Spans are exported as they end, children before parents, and several traces at a time. A
    session is complete `wait_lines` lines after its root span, or at the end; a span that comes
    later is malformed. That many lines' spans are kept in memory.

    Never run on a real file: written from the published columns, and tried on small files of them.
    """
    wait_lines = whole_number("wait_lines", wait_lines, least=0)
    return Trace(path, json_lines, partial(_Traces, wait_lines), on_error)


@dataclass(frozen=True)
class _Ended:
    """A span as it was exported; `span` counts from its own start, `None` if it is no unit."""

    trace: str
    service: str
    root: bool
    conversation: str | None
    begin: int  # Unix nanoseconds
    span: Span | None


@dataclass
class _Open:
    """A trace whose spans are still coming."""

    spans: list[_Ended] = field(default_factory=list)
    root_line: int | None = None


@final
class _Traces:
    def __init__(self, wait_lines: int) -> None:
        self._wait = wait_lines
        self._open: dict[str, _Open] = {}
        self._done: set[str] = set()
        self._lines = 0

    def feed(self, record: Fields) -> Iterator[Session]:
        self._lines += 1
        for ended in list(self._spans(record)):
            trace = self._open.setdefault(ended.trace, _Open())
            trace.spans.append(ended)
            if ended.root:
                trace.root_line = self._lines
        return self._complete(
            name
            for name, trace in self._open.items()
            if trace.root_line is not None and self._lines - trace.root_line >= self._wait
        )

    def finish(self) -> Iterator[Session]:
        return self._complete(self._open)

    def _spans(self, record: Fields) -> Iterator[_Ended]:
        for resource in record.records("resourceSpans"):
            service = (
                _service(resource.record("resource")) if resource.has("resource") else _NAMELESS
            )
            for scope in resource.records("scopeSpans"):
                for span in scope.records("spans"):
                    if span.text("traceId") in self._done:
                        problem = "comes after its trace was over: raise wait_lines"
                        raise span.malformed("traceId", problem)
                    yield _ended(span, service)

    def _complete(self, names: Iterable[str]) -> Iterator[Session]:
        for name in list(names):
            trace = self._open.pop(name)
            self._done.add(name)
            if any(ended.span for ended in trace.spans):
                yield _session(name, trace.spans)


def _service(resource: Fields) -> str:
    attributes = _attributes(resource)
    return attributes.text("service.name") if attributes.has("service.name") else _NAMELESS


def _nanoseconds(record: Fields, name: str) -> int:
    number = record.integer(name)
    if not 0 <= number < 2**64:
        expected = "expected Unix nanoseconds, from 0 to below 2**64"
        raise record.malformed(name, expected, f"seen: {number!r:.60}")
    return number


def _ended(record: Fields, service: str) -> _Ended:
    attributes = _attributes(record)
    begin, end = _nanoseconds(record, "startTimeUnixNano"), _nanoseconds(record, "endTimeUnixNano")
    if end < begin:
        raise record.malformed("endTimeUnixNano", "time goes backwards", f"seen: {end}")
    talk = "gen_ai.conversation.id"
    operation = "gen_ai.operation.name"
    named = attributes.text(operation) if attributes.has(operation) else ""
    return _Ended(
        record.text("traceId"),
        service,
        not record.has("parentSpanId"),
        attributes.text(talk) if attributes.has(talk) else None,
        begin,
        _unit(named, attributes, (end - begin) / 1e9) if named in _KINDS else None,
    )


def _unit(operation: str, attributes: Fields, seconds: float) -> Span:
    kind = _KINDS[operation]
    tokens = {
        name: attributes.tokens(field) if attributes.has(field) or needed else None
        for name, field, needed in (
            ("input", "gen_ai.usage.input_tokens", kind == "llm"),
            ("output", "gen_ai.usage.output_tokens", kind == "llm"),
            ("cached", "gen_ai.usage.cache_read.input_tokens", False),
        )
    }
    queued = attributes.seconds("gen_ai.latency.time_in_queue") or 0.0
    tool = operation == "execute_tool"
    return Span(
        attributes.text("gen_ai.tool.name") if tool else operation,
        kind,
        0.0,
        max(seconds - queued, 0.0),
        queued,
        tokens["input"] or 0,
        tokens["output"] or 0,
        tokens["cached"],
    )


def _session(name: str, ended: list[_Ended]) -> Session:
    begins = min(each.begin for each in ended)
    spans: list[Span] = []
    for each in sorted(ended, key=lambda each: each.begin):
        if each.span is not None:
            span = replace(each.span, submit_seconds=(each.begin - begins) / 1e9)
            spans.append(replace(span, parents=_waited_for(span, spans)))
    talks = [each.conversation for each in ended if each.conversation is not None]
    return Session(
        name,
        ended[0].service,
        tuple(spans),
        begins / 1e9,
        {"conversation": talks[0]} if talks else {},
    )


def _waited_for(span: Span, before: list[Span]) -> tuple[int, ...]:
    """Positions of the spans that ended by the submission of `span`, less those that another of
    them can have waited for in turn.
    """
    assert span.submit_seconds is not None
    over = [
        (at, other.submit_seconds or 0.0, end)
        for at, other in enumerate(before)
        if (end := other.end_seconds) is not None and end <= span.submit_seconds
    ]
    latest = max((submitted for _, submitted, _ in over), default=0.0)
    return tuple(at for at, _, end in over if end > latest)


def _attributes(record: Fields) -> Fields:
    """The list of {key, value: {stringValue | intValue | ...}} as one record."""
    values: dict[str, object] = {}
    for attribute in record.records("attributes") if record.has("attributes") else []:
        value = attribute.record("value")
        values[attribute.text("key")] = next(iter(value.values.values()), None)
    return record.within("attributes", values)
