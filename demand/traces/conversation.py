"""What trajectories of text share: a growing conversation, and tokens estimated from its length."""

from dataclasses import dataclass, field
from typing import final

from demand.errors import DemandError
from demand.traces.fields import Fields
from demand.traces.schema import Span
from demand.units import Kind


@final
@dataclass
class Conversation:
    """Collects the spans of a conversation whose every llm call reads all that was said before.

    Args:
        characters_per_token: tokens are counted as characters over this.
    """

    characters_per_token: float
    spans: list[Span] = field(default_factory=list)
    said: int = 0  # characters so far
    read: int = 0  # characters that the latest llm call has read or written

    def hear(self, text: str) -> None:
        """Text that enters the context without a span of its own, such as a system prompt."""
        self.said += len(text)

    def call(self, unit: str, text: str) -> None:
        """An llm call that reads the context so far and writes `text`."""
        self.spans.append(
            Span(
                unit,
                "llm",
                input_tokens=self._tokens(self.said),
                output_tokens=self._tokens(len(text)),
                cached_tokens=self._tokens(self.read),
                parents=self._last(),
            )
        )
        self.said += len(text)
        self.read = self.said

    def answer(self, unit: str, kind: Kind, text: str, seconds: float | None = None) -> None:
        """What a tool or a person answers, which enters the context; `seconds` as in a span."""
        tokens = self._tokens(len(text))
        self.spans.append(
            Span(unit, kind, seconds=seconds, output_tokens=tokens, parents=self._last())
        )
        self.hear(text)

    def _last(self) -> tuple[int, ...]:
        return (len(self.spans) - 1,) if self.spans else ()

    def _tokens(self, characters: int) -> float:
        return characters / self.characters_per_token


def content_text(message: Fields) -> str:
    """The text of a message, which is a string or a list of parts; images count nothing."""
    if isinstance(message.values.get("content"), list):
        parts = message.records("content")
        return "".join(part.text("text") for part in parts if part.has("text"))
    return message.text("content") if message.has("content") else ""


def check_characters_per_token(characters_per_token: float) -> None:
    """Raise `DemandError` unless it is positive."""
    if not characters_per_token > 0.0:
        raise DemandError(
            f"characters_per_token is {characters_per_token}; expected a positive number, "
            "about 4 for English"
        )
