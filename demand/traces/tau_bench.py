"""Trajectories of tau-bench, JSONL (sierra-research/tau-bench, MIT)."""

import json
import os
from functools import partial

from demand.traces.conversation import Conversation, check_characters_per_token
from demand.traces.fields import Fields
from demand.traces.schema import Session
from demand.traces.sources import json_lines
from demand.traces.trace import LINE_LIMIT, OneByOne, OnError, Trace

APPLICATION = "tau_bench"


def read_tau_bench(
    path: str | os.PathLike[str],
    *,
    characters_per_token: float = 4.0,
    on_error: OnError = "raise",
    line_limit: int = LINE_LIMIT,
) -> Trace[Session]:
    """Sessions of {task_id, trial, reward, traj}, one trajectory a line.

    The published `historical_trajectories/*.json` are one list a file: make lines of them with
    `jq -c '.[]'`. traj lists messages {role, content, tool_calls, name}.

    Units are `assistant` (kind "llm"), the name of each tool, and `user` (kind "human"; the first
    message of the user is the task and no span). The trace has no times, and text in place of
    tokens: tokens are characters over `characters_per_token`, and the schemas of the tools, which
    the model reads too, are not in it. Attributes are task, trial and reward.
    """
    check_characters_per_token(characters_per_token)
    parse = partial(_session, characters_per_token)
    return Trace(path, json_lines, lambda: OneByOne(parse), on_error, line_limit)


def _session(characters_per_token: float, record: Fields) -> Session:
    conversation = Conversation(characters_per_token)
    for message in record.records("traj"):
        role = message.text("role")
        text = message.text("content") if message.has("content") else ""
        if role == "assistant":
            calls = message.values.get("tool_calls")
            conversation.call("assistant", text + (json.dumps(calls) if calls else ""))
        elif role == "tool":
            conversation.answer(message.text("name"), "tool", text)
        elif role == "user" and conversation.spans:
            conversation.answer("user", "human", text)
        elif role in ("user", "system"):
            conversation.hear(text)
        else:
            raise message.malformed("role", "expected system, user, assistant or tool",
                                    f"seen: {role!r}")  # fmt: skip
    task, trial = record.identifier("task_id"), record.identifier("trial")
    return Session(
        f"task {task}, trial {trial}",
        APPLICATION,
        tuple(conversation.spans),
        attributes={"task": task, "trial": trial, "reward": record.number("reward")},
    )
