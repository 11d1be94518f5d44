"""LLMCompiler's stored runs, and the plans it writes (SqueezeAILab/LLMCompiler, MIT)."""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from demand.traces.conversation import check_characters_per_token
from demand.traces.fields import Clock, Fields, MalformedRecordError
from demand.traces.schema import Session, Span
from demand.traces.sources import Records, json_members, text_lines
from demand.traces.trace import LINE_LIMIT, OneByOne, OnError, Trace

APPLICATION = "llmcompiler"
REACT = "react"
_ACTION = re.compile(r"^\s*(\d+)\.\s*(\w+)\s*\((.*)")
_RESULT = re.compile(r"\$\{?(\d+)\}?")
_QUESTION = re.compile(r"^\s*Question:\s*(.*)")
_JOIN = "join"


def read_llmcompiler(
    path: str | os.PathLike[str], *, on_error: OnError = "raise", line_limit: int = LINE_LIMIT
) -> Trace[Session]:
    """Sessions of what `run_llm_compiler.py --store FILE --do_benchmark` writes, one document.

    {id: {question, label, answer, time, stats: {planner, executor, total}}}, where each of the
    stats has calls, input_tokens, output_tokens and all_times, the seconds of each call; `time` is
    the seconds of the question. A round is a call of the planner, the tools, and a call of the
    executor, which joins what they found and may ask for a new plan.

    Units are `plan` and `join` (kind "llm") and `tools` between (kind "tool"), what `time` leaves
    besides the calls: shared equally by the rounds, 0 where tools ran while the plan was streamed.
    Which tools a plan has is not in the file; `read_llmcompiler_plans` reads plans. Stored runs
    of ReAct (`--react`: stats of total alone) are sessions of application "react", of units
    `thought` and `action`, the last thought ending the run. Tokens are the mean of a session's
    calls of one unit: the file has their sums. Attributes are label and answer.

    Never run on a real file: no stored results are published, the data sets of the repository are
    questions alone. Written from the code that writes them.
    """
    return Trace(path, json_members, lambda: OneByOne(_session), on_error, line_limit)


def _session(member: Fields) -> Session:
    (name,) = member.values
    record = member.record(name)
    if not record.has("stats"):
        raise record.malformed("stats", "missing: store results with --do_benchmark")
    stats = record.record("stats")
    react = not stats.has("planner")
    units = {"thought": "total"} if react else {"plan": "planner", "join": "executor"}
    calls = {unit: _calls(stats.record(part), unit) for unit, part in units.items()}
    first, *_, last = [*calls.values(), *calls.values()]
    if len(last) > len(first):
        raise stats.malformed("executor.calls", f"more than {len(first)} calls of the planner")
    elsewhere = record.number("time") - sum(
        span.seconds or 0.0 for spans in calls.values() for span in spans
    )
    rounds = max(len(first) - react, 1)
    tool = Span("action" if react else "tools", "tool", seconds=max(elsewhere, 0.0) / rounds)
    spans: list[Span] = []
    for at, span in enumerate(first):
        spans.append(span)
        if not react or at + 1 < len(first):
            spans.append(tool)
        if not react and at < len(last):
            spans.append(last[at])
    label, answer = record.values.get("label"), record.values.get("answer")
    return Session(
        name,
        REACT if react else APPLICATION,
        _in_turn(spans),
        attributes={"label": label, "answer": answer},
    )


def _calls(part: Fields, unit: str) -> list[Span]:
    calls = part.tokens("calls")
    if not calls:
        if unit == _JOIN:
            return []  # the run failed before
        raise part.malformed("calls", "expected at least one call", "seen: 0")
    times = part.numbers("all_times") if part.values.get("all_times") != [] else []
    if len(times) > calls:
        raise part.malformed("all_times", f"expected at most {calls} times", f"seen: {len(times)}")
    seconds = [*times, *[None] * (calls - len(times))]
    tokens = [part.number(name) / calls for name in ("input_tokens", "output_tokens")]
    return [
        Span(unit, "llm", seconds=took, input_tokens=tokens[0], output_tokens=tokens[1])
        for took in seconds
    ]


def read_llmcompiler_plans(
    path: str | os.PathLike[str],
    *,
    characters_per_token: float = 4.0,
    on_error: OnError = "raise",
    line_limit: int = LINE_LIMIT,
) -> Trace[Session]:
    """Sessions of plans as the planner writes them, in text: logs, or examples of its prompts.

        Question: Which trench is deeper?
        1. search("Mariana Trench")
        2. search("Puerto Rico Trench")
        3. math("deeper of both?", ["$1", "$2"])
        4. join()<END_OF_PLAN>

    A plan is the numbered lines up to `join`, and belongs to the question before it, if there is
    one; other lines are passed over. A task waits for those whose results its arguments name ($1 or
    ${1}), and `join` for all.

    Units are `plan` (kind "llm": reads the question, writes the plan), each tool by name (kind
    "tool", `search` of kind "search") and `join` (kind "llm": reads question and plan; what the
    tools answered, and what it writes, is not in a plan). `Span.parents` says what may run side by
    side. Plans have no times; tokens are characters over `characters_per_token`. A folder is read
    by its .txt and .log files.

    Tried on the 17 example plans in the prompts of the repository.
    """
    check_characters_per_token(characters_per_token)
    parse = partial(_plan, characters_per_token)
    return Trace(path, _plans, lambda: OneByOne(parse), on_error, line_limit)


def _plans(path: Path, clock: Clock, line_limit: int) -> Records:
    """One record {question, plan} for each plan."""
    question, plan = "", ""
    begun: Fields | None = None  # the first line of a plan
    for line in text_lines(path, clock, line_limit):
        if isinstance(line, MalformedRecordError):
            yield line
            continue
        text = line.text("line")
        asked, action = _QUESTION.match(text), _ACTION.match(text)
        if asked:
            question, plan, begun = asked[1], "", None
        if not action:
            continue
        begun = begun or line
        plan += text.strip() + "\n"
        if action[2] == _JOIN:
            yield Fields({"question": question, "plan": plan}, begun.file, begun.line, clock)
            plan, begun = "", None
    if begun is not None:
        yield begun.malformed("plan", "ends before join()")


def _plan(characters_per_token: float, record: Fields) -> Session:
    question, plan = record.values["question"], record.text("plan")
    read, written = len(question) / characters_per_token, len(plan) / characters_per_token
    spans = [Span("plan", "llm", input_tokens=read, output_tokens=written)]
    position: dict[int, int] = {}
    for number, tool, arguments in _tasks(plan):
        if tool == _JOIN:
            parents = tuple(position.values()) or (0,)
            spans.append(Span(_JOIN, "llm", input_tokens=read + written, parents=parents))
            break
        named = sorted({int(found) for found in _RESULT.findall(arguments)})
        strangers = [found for found in named if found not in position]
        if strangers or number in position:
            problem = f"task {number} " + (
                f"waits for task {strangers[0]}, which is not before it"
                if strangers
                else "comes twice"
            )
            raise record.malformed("plan", problem)
        position[number] = len(spans)
        after = tuple(position[found] for found in named) or (0,)
        spans.append(Span(tool, "search" if tool == "search" else "tool", parents=after))
    return Session(f"line {record.line}", APPLICATION, tuple(spans), attributes={"task": question})


def _tasks(plan: str) -> Iterator[tuple[int, str, str]]:
    for line in plan.split("\n")[:-1]:
        found = _ACTION.match(line)
        assert found  # by `_plans`
        yield int(found[1]), found[2], found[3]


def _in_turn(spans: list[Span]) -> tuple[Span, ...]:
    """Each after the one before it."""
    return tuple(replace(span, parents=(at - 1,) if at else ()) for at, span in enumerate(spans))
