"""Trajectories of SWE-agent, one JSON document each (SWE-agent/SWE-agent, MIT)."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from demand.traces.conversation import Conversation, check_characters_per_token, content_text
from demand.traces.fields import Fields
from demand.traces.schema import Session, Span
from demand.traces.sources import nested_documents
from demand.traces.trace import LINE_LIMIT, OneByOne, OnError, Trace

APPLICATION = "swe_agent"
_ENDINGS = (".traj", ".traj.gz")


def read_swe_agent(
    path: str | os.PathLike[str],
    *,
    characters_per_token: float = 4.0,
    on_error: OnError = "raise",
    line_limit: int = LINE_LIMIT,
) -> Trace[Session]:
    """Sessions of `<instance>.traj`; a folder is read with the folders inside it.

    {trajectory: [{response, action, observation, execution_time}], history: [{role, content}],
    info: {exit_status, model_stats: {tokens_sent, tokens_received}}}. A session is named after its
    file.

    Units are `agent` (kind "llm", one call a step) and the first word of each command, of kind
    "container": commands run in the one of the task, for `execution_time` seconds; files from
    before SWE-agent 1.0 do not say how long, and none says how long the model took. A step without
    a command (a format error, say) is a call alone. A command that stands in a tool call, and not
    in the response, was written too.

    The prompt of a step is what its `query` holds (since 1.1), of which what stands as it stood at
    the step before can have been cached; without that, all that was said, from the `history` before
    the first step on, although SWE-agent may have shortened old observations. Text stands in place
    of tokens: tokens are characters over `characters_per_token`, and where
    `model_stats` counts them, scaled so that their sums are those it gives. Attributes are
    exit_status, and tokens_sent and tokens_received if they are not 0.

    Tried on the 27 files of this form in the repository (demonstrations and tests), none of which
    has a query.
    """
    check_characters_per_token(characters_per_token)
    parse = partial(_session, characters_per_token)
    source = nested_documents(*_ENDINGS)
    return Trace(path, source, lambda: OneByOne(parse), on_error, line_limit)


def _session(characters_per_token: float, record: Fields) -> Session:
    steps = record.records("trajectory")
    if not steps:
        raise record.malformed("trajectory", "has no steps")
    conversation = Conversation(characters_per_token)
    if not _prompt(steps[0]):
        for message in record.records("history"):
            if message.text("role") == "assistant" and not message.values.get("is_demo"):
                break
            conversation.hear(content_text(message))
    before: list[str] = []  # messages of the latest prompt, and what was written on it
    for step in steps:
        before = _step(conversation, step, before)
    info = record.record("info")
    counted = _counted(info)
    status = info.text("exit_status") if info.has("exit_status") else None
    return Session(
        _name(record),
        APPLICATION,
        _scaled(conversation.spans, counted),
        attributes={"exit_status": status, **counted},
    )


def _step(conversation: Conversation, step: Fields, before: list[str]) -> list[str]:
    response, action = (
        step.text(name) if step.has(name) else "" for name in ("response", "action")
    )
    written = response if action.strip() in response else response + action
    prompt = _prompt(step)
    if prompt:
        same = 0
        while same < min(len(prompt), len(before)) and prompt[same] == before[same]:
            same += 1
        conversation.said = sum(map(len, prompt))
        conversation.read = sum(map(len, prompt[:same]))
    conversation.call("agent", written)
    observation = step.text("observation") if step.has("observation") else ""
    command = action.split(maxsplit=1)
    if command:
        seconds = step.seconds("execution_time")
        conversation.answer(command[0], "container", observation, seconds)
    else:
        conversation.hear(observation)
    return [*prompt, response]


def _prompt(step: Fields) -> list[str]:
    """Texts of the messages that a step showed to the model; none where it does not say."""
    if not step.has("query"):
        return []
    return [content_text(message) for message in step.records("query")]


def _name(record: Fields) -> str:
    return record.file.name.removesuffix(".gz").removesuffix(".traj")


def _counted(info: Fields) -> dict[str, Any]:
    """What the model counted over the session; demonstrations that were replayed count 0."""
    if not info.has("model_stats"):
        return {}
    stats = info.record("model_stats")
    counts = {name: stats.number(name) for name in ("tokens_sent", "tokens_received")}
    return {name: count for name, count in counts.items() if count}


def _scaled(spans: Sequence[Span], counted: dict[str, float]) -> tuple[Span, ...]:
    calls = [span for span in spans if span.kind == "llm"]
    read = sum(span.input_tokens for span in calls)
    written = sum(span.output_tokens for span in calls)
    sent = counted.get("tokens_sent", read) / read if read else 1.0
    received = counted.get("tokens_received", written) / written if written else 1.0
    return tuple(
        replace(
            span,
            input_tokens=span.input_tokens * sent,
            output_tokens=span.output_tokens * received,
            cached_tokens=None if span.cached_tokens is None else span.cached_tokens * sent,
        )
        if span.kind == "llm"
        else span
        for span in spans
    )
