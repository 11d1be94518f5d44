"""ReAct trajectories of FireAct, JSONL (anchen1011/FireAct, MIT)."""

import os
import re
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from operator import itemgetter

from demand.traces.conversation import Conversation, check_characters_per_token
from demand.traces.fields import Fields
from demand.traces.schema import Session
from demand.traces.sources import json_lines
from demand.traces.trace import LINE_LIMIT, OneByOne, OnError, Trace
from demand.units import Kind

APPLICATION = "react"
_ACTION = re.compile(r"^\s*Action:\s*(\w+)", re.MULTILINE)
_TURN = re.compile(r"^(?=Thought:|Observation:)", re.MULTILINE)


def read_fireact(
    path: str | os.PathLike[str],
    *,
    characters_per_token: float = 4.0,
    on_error: OnError = "raise",
    line_limit: int = LINE_LIMIT,
) -> Trace[Session]:
    """Sessions of {idx, reward, traj}, one trajectory a line.

    traj is a list of messages {role, content}, or one text of "Thought: ... Action: search[...]
    Observation: ..." after a prompt; both forms are read. The published files are one JSON
    document each: make lines of its values first.

    Units are `thought` (kind "llm": all that the model writes up to an observation), and the
    actions by name, `search` of kind "search" and others of kind "tool"; `finish` ends the run
    and is no span. Where the model goes on by itself and writes several actions in one turn, the
    first is the one that was executed. The trace has no times, and text in place of tokens:
    tokens are characters over `characters_per_token`. Attributes are task and reward.
    """
    check_characters_per_token(characters_per_token)
    parse = partial(_session, characters_per_token)
    return Trace(path, json_lines, lambda: OneByOne(parse), on_error, line_limit)


def _session(characters_per_token: float, record: Fields) -> Session:
    conversation = Conversation(characters_per_token)
    text_form = isinstance(record.values.get("traj"), str)
    action = None
    for speaker, text in _merged(_text_turns(record) if text_form else _message_turns(record)):
        if speaker == "model":
            conversation.call("thought", text)
            action = _ACTION.search(text)
        elif action is None:
            conversation.hear(text)
        elif action[1] != "finish":
            kind: Kind = "search" if action[1] == "search" else "tool"
            conversation.answer(action[1], kind, text)
    task = record.identifier("idx")
    return Session(
        task,
        APPLICATION,
        tuple(conversation.spans),
        attributes={"task": task, "reward": record.values.get("reward")},
    )


def _merged(turns: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for speaker, group in groupby(turns, key=itemgetter(0)):
        yield speaker, "".join(text for _, text in group)


def _message_turns(record: Fields) -> Iterator[tuple[str, str]]:
    speakers = {"assistant": "model", "user": "world", "system": "world"}
    for message in record.records("traj"):
        role = message.text("role")
        if role not in speakers:
            expected = "expected system, user or assistant"
            raise message.malformed("role", expected, f"seen: {role!r}")
        yield speakers[role], message.text("content")


def _text_turns(record: Fields) -> Iterator[tuple[str, str]]:
    prompt, *turns = _TURN.split(record.text("traj"))
    yield "world", prompt
    for turn in turns:
        yield ("model" if turn.startswith("Thought:") else "world"), turn
