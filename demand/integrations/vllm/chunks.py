"""The chunks of a stream: their text, their tokens, and what a restarted stream repeats."""

from collections.abc import Iterable, Mapping
from typing import Any, final

from demand.integrations.vllm.failures import AttemptError

Chunk = dict[str, Any]
"""One event of a stream as the server sent it: a JSON object with a list of `choices`."""


def text_of(chunk: Chunk) -> str:
    """Text that `chunk` adds to the first choice; empty if it adds none."""
    return "".join(_text(choice) for choice in chunk["choices"] if choice.get("index", 0) == 0)


def prompt_of(body: Mapping[str, Any]) -> str | None:
    """The text of the prompt in the body of a request; `None` where it is no text.

    Messages of a chat are lines of "role: content"; parts of a content that are no text are left
    out.
    """
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return prompt
    messages = body.get("messages")
    if not isinstance(messages, list):
        return None
    lines = []
    for message in messages:
        if isinstance(message, dict):
            content = message.get("content")
            parts = content if isinstance(content, list) else [{"text": content}]
            texts = [part.get("text") for part in parts if isinstance(part, dict)]
            said = " ".join(text for text in texts if isinstance(text, str))
            lines.append(f"{message.get('role')}: {said}")
    return "\n".join(lines)


@final
class TokenCount:
    """Counts the tokens of one attempt while they arrive.

    The `usage` that a chunk carries holds. vLLM puts it into every chunk if `stream_options` asks
    for `continuous_usage_stats`, and any server into the last one if it asks for `include_usage`.
    A chunk without usage counts as one output token for each choice that it carries something
    generated of, be it text, reasoning or a piece of a tool call, and the prompt as none.

    Attributes:
        input_tokens: of the prompt.
        output_tokens: generated so far, over all choices.
    """

    def __init__(self) -> None:
        self.input_tokens = 0
        self.output_tokens = 0

    def add(self, chunk: Chunk) -> None:
        """Count the tokens of `chunk`, the next of the stream."""
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            self.input_tokens = _count(usage, "prompt_tokens", self.input_tokens)
            self.output_tokens = _count(usage, "completion_tokens", self.output_tokens)
        else:
            self.output_tokens += sum(bool(_generated(choice)) for choice in chunk["choices"])


@final
class Repetition:
    """Skips the beginning of a restarted stream, which must repeat what was handed over.

    Args:
        handed_over: the chunks of earlier attempts that the reader has. They may be cut
            differently from those of the new stream; only the text counts.

    Raises:
        AttemptError: one of them carries more than the text of one choice.
    """

    def __init__(self, handed_over: Iterable[Chunk]) -> None:
        self._left = "".join(map(_plain_text, handed_over))

    def beyond(self, chunk: Chunk) -> Chunk | None:
        """The part of `chunk` that the reader does not have yet; `None` if there is none.

        Raises:
            AttemptError: the text differs from what the reader has, or ends before it.
        """
        if not self._left:
            return chunk
        text = _plain_text(chunk)
        known = min(len(text), len(self._left))
        ended = any(choice.get("finish_reason") for choice in chunk["choices"])
        if text[:known] != self._left[:known] or (ended and known < len(self._left)):
            raise self._differs()
        self._left = self._left[known:]
        if known == len(text) and not ended:
            return None
        choice = chunk["choices"][0]
        if "text" in choice:
            return {**chunk, "choices": [{**choice, "text": text[known:]}]}
        delta = {**(choice.get("delta") or {}), "content": text[known:]}
        return {**chunk, "choices": [{**choice, "delta": delta}]}

    def check_over(self) -> None:
        """Check, at the end of the stream, that it repeated everything the reader has.

        Raises:
            AttemptError: it did not.
        """
        if self._left:
            raise self._differs()

    @staticmethod
    def _differs() -> AttemptError:
        return AttemptError("the restarted stream differs from what was handed over", again=False)


def _text(choice: dict[str, Any]) -> str:
    delta = choice.get("delta")
    text = delta.get("content") if isinstance(delta, dict) else choice.get("text")
    return text if isinstance(text, str) else ""


def _generated(choice: dict[str, Any]) -> set[str]:
    """Names of the fields in which `choice` carries what the model generated.

    Servers name the fields of a delta as they like ("reasoning", "reasoning_content", "tool_calls",
    "refusal"): of those that hold something, all but the role were generated.
    """
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return {"text"} if _text(choice) else set()
    return {name for name, value in delta.items() if value} - {"role"}


def _plain_text(chunk: Chunk) -> str:
    for choice in chunk["choices"]:
        more = _generated(choice) - {"content", "text"}
        if choice.get("index", 0) != 0 or more or choice.get("logprobs"):
            raise AttemptError(
                "what was handed over is more than the text of one choice, which cannot be "
                "compared with a restarted stream",
                again=False,
            )
    return text_of(chunk)


def _count(usage: dict[str, Any], name: str, before: int) -> int:
    count = usage.get(name)
    return count if isinstance(count, int) and count >= 0 else before
