"""The one schema that every trace is read into: spans, sessions of spans, and bare requests."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from demand.arguments import whole_number
from demand.errors import DemandError
from demand.seconds import one_number, one_of_seconds
from demand.stages import in_stages
from demand.units import KINDS, Execution, Kind, Unit, is_sequence

_NOTHING: Mapping[str, float] = MappingProxyType({})
_NUMBERS = (
    *((name, one_of_seconds) for name in ("submit_seconds", "seconds", "queued_seconds")),
    *((name, one_number) for name in ("input_tokens", "output_tokens", "cached_tokens")),
)


@dataclass(frozen=True, slots=True)
class Span:
    """One execution of a unit, as a trace recorded it.

    Args:
        unit: name of the unit; what a demand graph calls a node.
        kind: of the unit, as `demand.Unit` has them.
        submit_seconds: when it was asked for, from the start of the session; `None` if the trace
            has no clock.
        seconds: how long it took per call, without the wait in `queued_seconds`; `None` if the
            trace does not say.
        queued_seconds: wait between submission and start, where it was recorded apart; a trace
            recorded at the client leaves it 0 and has the wait in `seconds`.
        input_tokens: prompt tokens per call, those found in a cache included.
        output_tokens: generated tokens per call.
        cached_tokens: of `input_tokens`, those a prefix cache can have held; `None` if unknown.
        parallelism: calls made side by side.
        parents: positions in the session of the spans it waited for, each before its own.

    Raises:
        DemandError: a number that is negative or not finite, a parallelism that is no count, or
            more cached than prompt tokens.
    """

    unit: str
    kind: Kind
    submit_seconds: float | None = None
    seconds: float | None = None
    queued_seconds: float = 0.0
    input_tokens: float = 0.0
    output_tokens: float = 0.0
    cached_tokens: float | None = None
    parallelism: int = 1
    parents: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, read in _NUMBERS:
            value = getattr(self, name)
            if value is None and name in ("submit_seconds", "seconds", "cached_tokens"):
                continue
            if type(value) is not int:
                value = read(f"{name} of span {self.unit!r}", value)
                object.__setattr__(self, name, value)
            if not 0.0 <= value < math.inf:
                raise DemandError(
                    f"{name} of span {self.unit!r} is {value}; expected a finite number of at "
                    "least 0: drop or repair the broken measurement"
                )
        calls = whole_number(f"parallelism of span {self.unit!r}", self.parallelism, least=1)
        object.__setattr__(self, "parallelism", calls)
        if self.cached_tokens is not None and self.cached_tokens > self.input_tokens:
            raise DemandError(
                f"span {self.unit!r} has {self.cached_tokens} cached of {self.input_tokens} prompt "
                "tokens; input_tokens counts all of the prompt, what was cached included"
            )

    @property
    def start_seconds(self) -> float | None:
        """When its service began, in seconds from the start of the session; `None` if unknown."""
        return None if self.submit_seconds is None else self.submit_seconds + self.queued_seconds

    @property
    def end_seconds(self) -> float | None:
        """When it ended, in seconds from the start of the session; `None` if unknown."""
        start = self.start_seconds
        return None if start is None or self.seconds is None else start + self.seconds


@dataclass(frozen=True, slots=True)
class Session:
    """One run of an application, as a trace recorded it.

    Args:
        id: of the session within its trace.
        application: class of the session; all of one class fit one demand graph.
        spans: in order of submission, a sub-agent's spans standing where it was launched.
        arrival_seconds: its start on the clock of the trace, if the trace has one.
        attributes: what else the trace says of it, such as task, reward or model.

    Raises:
        DemandError: no spans, or a parent that does not stand before its child.
    """

    id: str
    application: str
    spans: tuple[Span, ...]
    arrival_seconds: float | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.spans:
            raise DemandError(f"session {self.id!r} has no spans; leave out what never ran")
        for at, span in enumerate(self.spans):
            if not all(0 <= parent < at for parent in span.parents):
                raise DemandError(
                    f"span {at} of session {self.id!r} has parents {span.parents}; expected "
                    "positions before its own: put the spans in order of submission"
                )

    def with_growing_prompts(self) -> "Session":
        """The same session, with `cached_tokens` where they are unknown, as of a growing context.

        For chats and agents whose every prompt is the last one, what was answered and something
        new: a call then shares all that the last llm span of its unit had, prompt and answer,
        among those it follows (`Span.parents`). A prompt shorter than the last one was begun anew,
        by a summary say, and shares nothing, as far as is known; so does the first of a unit, such
        as that of a sub-agent. What is recorded stays.
        """
        spans: list[Span] = []
        for span in self.spans:
            if span.kind == "llm" and span.cached_tokens is None:
                last = self._last_like(span)
                grown = last is not None and span.input_tokens >= last.input_tokens
                had = last.input_tokens + last.output_tokens if last is not None and grown else 0.0
                span = replace(span, cached_tokens=min(had, span.input_tokens))
            spans.append(span)
        return replace(self, spans=tuple(spans))

    def _last_like(self, span: Span) -> Span | None:
        """The last llm span of the same unit among those that `span` follows."""
        seen: set[int] = set()
        ahead = list(span.parents)
        while ahead:
            at = max(ahead)
            ahead.remove(at)
            if at in seen:
                continue
            seen.add(at)
            if self.spans[at].unit == span.unit and self.spans[at].kind == "llm":
                return self.spans[at]
            ahead += self.spans[at].parents
        return None

    def run(
        self,
        *,
        leave_out: Collection[Kind] = (),
        llm: Literal["tokens", "measured"] = "tokens",
        prompt: Literal["whole", "fresh", "shared"] = "whole",
        assumed_seconds: Mapping[str, float] = _NOTHING,
        units: Literal["in_turn", "side_by_side"] = "in_turn",
    ) -> list[Execution]:
        """The session as `PDGraph.fit` takes it; its demand is the sum over what is kept.

        Every span counts by default, the time people took (kind "human") included: the sum is
        then the length of the session. For what a server has to do, leave "human" out, and
        "tool" too where tools run elsewhere.

        Args:
            leave_out: kinds that do not count.
            llm: "tokens" leaves the cost of llm spans to the cost model; "measured" takes their
                recorded seconds, as units of kind "model" that keep their tokens.
            prompt: "whole" counts all prompt tokens; "fresh" only those no prefix cache held;
                "shared" all, and says which those are (`Execution.shared_tokens`), for an engine
                that has such a cache.
            assumed_seconds: durations for spans without one, by unit or else by kind.
            units: "in_turn" lets each span wait for the one before it, whatever it waited for;
                "side_by_side" lets it wait for its parents (`Execution.after`), or where they are
                left out, for theirs.

        Raises:
            DemandError: a kind that does not exist, a span whose seconds or cached tokens are
                needed and unknown, or nothing left to count.
        """
        strangers = set(leave_out) - set(KINDS)
        if strangers:
            raise DemandError(f"leave_out has {sorted(strangers)}; kinds are {', '.join(KINDS)}")
        for name, value, known in (
            ("llm", llm, ("tokens", "measured")),
            ("prompt", prompt, ("whole", "fresh", "shared")),
            ("units", units, ("in_turn", "side_by_side")),
        ):
            if value not in known:
                raise DemandError(f"{name} is {value!r}; expected one of {', '.join(known)}")
        run: list[Execution] = []
        waits: list[set[int]] = []  # of each span: where in the run it is, or what it waits for
        for span in self.spans:
            before = set().union(*(waits[parent] for parent in span.parents))
            waits.append(before if span.kind in leave_out else {len(run)})
            if span.kind in leave_out:
                continue
            by_tokens = span.kind == "llm" and llm == "tokens"
            kind: Kind = "model" if span.kind == "llm" and not by_tokens else span.kind
            run.append(
                Execution(
                    Unit(span.unit, kind),
                    self._prompt_tokens(span, prompt),
                    span.output_tokens,
                    span.parallelism,
                    None if by_tokens else self._seconds(span, assumed_seconds),
                    shared_tokens=self._shared_tokens(span) if prompt == "shared" else None,
                    after=None if units == "in_turn" else tuple(before),
                )
            )
        if not run:
            raise DemandError(f"nothing of session {self.id!r} is left; leave out fewer kinds")
        return list(in_stages(run)) if is_sequence(run) else run

    def _prompt_tokens(self, span: Span, prompt: str) -> float:
        if prompt != "fresh" or span.kind != "llm":
            return span.input_tokens
        return span.input_tokens - self._cached_tokens(span)

    def _shared_tokens(self, span: Span) -> float | None:
        return self._cached_tokens(span) if span.kind == "llm" else None

    def _cached_tokens(self, span: Span) -> float:
        if span.cached_tokens is None:
            raise DemandError(
                f"session {self.id!r} does not say how much of a prompt of {span.unit!r} was "
                'cached; use prompt="whole", or derive it where contexts only grow: '
                "session.with_growing_prompts()"
            )
        return span.cached_tokens

    def _seconds(self, span: Span, assumed: Mapping[str, float]) -> float:
        if span.seconds is not None:
            return span.seconds
        for name in (span.unit, span.kind):
            if name in assumed:
                return assumed[name]
        raise DemandError(
            f"session {self.id!r} does not say how long {span.unit!r} of kind {span.kind!r} took; "
            f"leave out the kind, or give assumed_seconds={{{span.unit!r}: ...}}"
        )


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trace that knows no applications.

    Args:
        arrival_seconds: from the first request of the trace.
        input_tokens: prompt tokens.
        output_tokens: generated tokens; 0 where the trace marks a failure so.
        id: of the request, if it has one.
        session: what it belongs to (a conversation), if the trace says.
        parent: id of the request it follows in its session.
        category: what else it is told apart by (type, model), as the trace names it.
        block_ids: content hashes of the blocks of its prompt: equal ids, equal prefix.
        block_tokens: tokens of one block; 0 if there are no hashes.
    """

    arrival_seconds: float
    input_tokens: int
    output_tokens: int
    id: str | None = None
    session: str | None = None
    parent: str | None = None
    category: str | None = None
    block_ids: tuple[int, ...] = field(default=(), repr=False)
    block_tokens: int = 0

    def run(self) -> list[Execution]:
        """The request as an application of one llm unit, `llm`; its whole prompt counts.

        Raises:
            DemandError: a request without tokens.
        """
        return [Execution(Unit("llm", "llm"), self.input_tokens, self.output_tokens)]
