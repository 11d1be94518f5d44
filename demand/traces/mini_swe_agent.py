"""Trajectories of mini-swe-agent, one JSON document each (SWE-agent/mini-swe-agent, MIT)."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, final

from demand.traces.conversation import Conversation, check_characters_per_token, content_text
from demand.traces.fields import Fields
from demand.traces.schema import Session
from demand.traces.sources import nested_documents
from demand.traces.trace import LINE_LIMIT, OneByOne, OnError, Trace

APPLICATION = "mini_swe_agent"
_ENDINGS = (".traj.json", ".traj.json.gz")
_BLOCK = re.compile(r"```(?:mswea_bash_command|bash)\s*\n(.*?)```", re.DOTALL)


def read_mini_swe_agent(
    path: str | os.PathLike[str],
    *,
    characters_per_token: float = 4.0,
    on_error: OnError = "raise",
    line_limit: int = LINE_LIMIT,
) -> Trace[Session]:
    """Sessions of `<instance>.traj.json`; a folder is read with the folders inside it.

    {info: {exit_status}, instance_id, messages: [{role, content, extra: {timestamp, actions,
    response: {created, usage}}}]}. A session is named by instance_id, else after its file.

    Units are `agent` (kind "llm") and the first word of each command (kind "container"): of
    extra.actions, or of the block of bash in what the model wrote. Tokens are those of `usage`,
    cached ones included where it says (prompt_tokens_details.cached_tokens: of the provider's
    cache, not only of this run's last prompt); a call without usage has characters over
    `characters_per_token`, and can have had cached what it had read and written before.

    Every message has the second at which it was complete: a call or a command lasts from the
    message before it, the first call from the provider's `created`, which is a whole second. Files
    without timestamps know no seconds. The last command, which submits, leaves no answer and is no
    span. Attributes are exit_status.

    Tried on the beginning and the end of a published run (format 1.1).
    """
    check_characters_per_token(characters_per_token)
    parse = partial(_session, characters_per_token)
    source = nested_documents(*_ENDINGS)
    return Trace(path, source, lambda: OneByOne(parse), on_error, line_limit)


def _session(characters_per_token: float, record: Fields) -> Session:
    messages = _Messages(Conversation(characters_per_token))
    for message in record.records("messages"):
        messages.take(message)
    spans = messages.conversation.spans
    if not spans:
        raise record.malformed("messages", "no call of the model among them")
    info = record.record("info") if record.has("info") else None
    status = info.text("exit_status") if info and info.has("exit_status") else None
    file = record.file.name.removesuffix(".gz").removesuffix(".traj.json")
    return Session(
        record.text("instance_id") if record.has("instance_id") else file,
        APPLICATION,
        tuple(spans),
        messages.begun,
        {"exit_status": status},
    )


@final
@dataclass
class _Messages:
    """What the messages so far make of a session.

    Attributes:
        begun: Unix second of its start; `None` until it is known.
        until: at which the last message was complete.
        commands: that the model has asked for and that have not been answered.
    """

    conversation: Conversation
    begun: float | None = None
    until: float | None = None
    commands: list[str] = field(default_factory=list)

    def take(self, message: Fields) -> None:
        """The next message."""
        role, text = message.text("role"), content_text(message)
        extra = message.record("extra") if message.has("extra") else message.within("extra", {})
        if role == "assistant":
            self._call(message, extra, text)
        elif role in ("user", "tool", "system"):
            if self.commands and role != "system":
                self.conversation.answer(self.commands.pop(0), "container", text)
                self._timed(extra)
            else:
                self.conversation.hear(text)
        elif role != "exit":
            expected = "expected system, user, assistant, tool or exit"
            raise message.malformed("role", expected, f"seen: {role!r}")

    def _call(self, message: Fields, extra: Fields, text: str) -> None:
        tools = message.values.get("tool_calls")
        self.conversation.call("agent", text + (json.dumps(tools) if tools else ""))
        response = extra.record("response") if extra.has("response") else None
        if response is not None and response.has("usage"):
            usage = response.record("usage")
            self._latest(
                input_tokens=usage.tokens("prompt_tokens"),
                output_tokens=usage.tokens("completion_tokens"),
                cached_tokens=_cached(usage),
            )
        if self.until is None and response is not None and response.has("created"):
            self.begun = self.until = response.number("created")
        self._timed(extra)
        named = [action.text("command") for action in _listed(extra, "actions")]
        self.commands = [_word(command) for command in named or _BLOCK.findall(text)]

    def _timed(self, extra: Fields) -> None:
        """When the latest span was asked for and how long it took, as far as it is known."""
        if not extra.has("timestamp"):
            return
        now = extra.number("timestamp")
        if self.until is not None and self.begun is not None:
            if now < self.until:
                raise extra.malformed("timestamp", "time goes backwards", f"seen: {now}")
            self._latest(submit_seconds=self.until - self.begun, seconds=now - self.until)
        else:
            self.begun = now
        self.until = now

    def _latest(self, **changes: Any) -> None:
        self.conversation.spans[-1] = replace(self.conversation.spans[-1], **changes)


def _cached(usage: Fields) -> int | None:
    if not usage.has("prompt_tokens_details"):
        return None
    details = usage.record("prompt_tokens_details")
    return details.tokens("cached_tokens") if details.has("cached_tokens") else None


def _listed(extra: Fields, name: str) -> Sequence[Fields]:
    return extra.records(name) if extra.has(name) else ()


def _word(command: str) -> str:
    return next(iter(command.split(maxsplit=1)), "command")
