"""What the two formats of coding-agent sessions share: how calls become spans."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

from demand.traces.fields import Fields
from demand.traces.schema import Span

APPLICATION = "coding_agent"


@dataclass(frozen=True)
class Form:
    """The names that one of the two formats gives to the same fields.

    Args:
        api: seconds in the model.
        think: seconds of tool or human time before a call.
        subagent: the calls of a sub-agent.
        own_clock: whether a sub-agent's clock always starts at its entry; if not, it does where
            its first time lies before that of its entry, and is the session's otherwise.
        block_tokens: tokens of one hashed block of a prompt; 0 if there are no hashes.
    """

    api: str
    think: str
    subagent: str
    own_clock: bool
    block_tokens: int = 0


@final
@dataclass
class AgentSpans:
    """Collects the spans of a session; those of a sub-agent stand where it was launched."""

    form: Form
    spans: list[Span] = field(default_factory=list)

    def add(
        self,
        calls: Sequence[Fields],
        prefix: str = "",
        begins: float = 0.0,
        parents: tuple[int, ...] = (),
    ) -> None:
        """Append the spans of one agent, whose clock starts at second `begins`."""
        latest = 0.0
        before: tuple[int, ...] = ()
        for call in calls:
            at = call.number("t")
            if at < latest:
                raise call.malformed("t", "time goes backwards", f"seen: {at} after {latest}")
            latest = at
            if call.has(self.form.subagent):
                inner = call.records(self.form.subagent)
                launched = begins + at
                own = self.form.own_clock or (inner and inner[0].number("t") < launched)
                self.add(inner, "subagent_", launched if own else 0.0, parents)
                continue
            parents = self._wait(call, prefix, begins + at, parents)
            blocks = call.integers("hash_ids")
            self.spans.append(
                Span(
                    f"{prefix}llm",
                    "llm",
                    begins + at,
                    call.seconds(self.form.api),
                    input_tokens=call.tokens("in"),
                    output_tokens=call.tokens("out"),
                    cached_tokens=self._cached_tokens(call, blocks, before),
                    parents=parents,
                )
            )
            before, parents = blocks, (len(self.spans) - 1,)

    def _wait(
        self, call: Fields, prefix: str, until: float, parents: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Append the wait before a call, and return what the call follows."""
        seconds = call.seconds(self.form.think)
        if seconds == 0.0 or (seconds is None and not parents):
            return parents
        tool = call.has("input_types") and "tool_result" in call.texts("input_types")
        self.spans.append(
            Span(
                f"{prefix}{'tool' if tool else 'think'}",
                "tool" if tool else "human",
                None if seconds is None else max(until - seconds, 0.0),
                seconds,
                parents=parents,
            )
        )
        return (len(self.spans) - 1,)

    def _cached_tokens(
        self, call: Fields, blocks: tuple[int, ...], before: tuple[int, ...]
    ) -> float | None:
        if not self.form.block_tokens:
            return None
        pairs = zip(blocks, before, strict=False)
        same = next((at for at, (ours, theirs) in enumerate(pairs) if ours != theirs),
                    min(len(blocks), len(before)))  # fmt: skip
        return min(same * self.form.block_tokens, call.tokens("in"))
