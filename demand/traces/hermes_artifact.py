"""Profiles of the Hermes artifact, JSON (NephrenCake/Hermes, Apache-2.0)."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

import numpy as np

from demand.traces.fields import Fields
from demand.traces.schema import Session, Span
from demand.traces.sources import json_documents
from demand.traces.trace import OnError, Trace
from demand.units import END, START, Kind
from demand.without_end import without_end

_KINDS: Mapping[str, Kind] = {
    "llm": "llm", "docker": "container", "dnn": "model", "search": "search", "tool": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class StageProfile:
    """Samples of one stage, each list for itself: the artifact keeps marginals, no joint ones.

    Args:
        kind: of the unit.
        input_tokens: `[n]` prompt tokens per call, of an llm.
        output_tokens: `[n]` generated tokens per call, of an llm.
        seconds: `[n]` durations, of what is not an llm.
        parallelism: `[n]` calls made side by side.
        successors: `[n]` names of what followed, "end" among them.
    """

    kind: Kind
    input_tokens: tuple[float, ...]
    output_tokens: tuple[float, ...]
    seconds: tuple[float, ...]
    parallelism: tuple[float, ...]
    successors: tuple[str, ...]


@dataclass(frozen=True)
class ApplicationProfile:
    """The profile of one application; runs are drawn from it.

    Args:
        application: its name.
        entries: `[n]` names of stages that runs began with.
        stages: by name.
    """

    application: str
    entries: tuple[str, ...]
    stages: Mapping[str, StageProfile]

    def session(self, rng: np.random.Generator, name: str = "drawn") -> Session:
        """Draw a run as the artifact does: parallelism, then the lengths of each call on their
        own (their mean is kept), then what follows. The drawn run has no clock.
        """
        spans: list[Span] = []
        at = str(rng.choice(self.entries))
        while at != END:
            stage = self.stages[at]
            calls = int(rng.choice(stage.parallelism)) if stage.parallelism else 1
            spans.append(
                Span(
                    at,
                    stage.kind,
                    seconds=_mean(rng, stage.seconds, calls) if stage.seconds else None,
                    input_tokens=_mean(rng, stage.input_tokens, calls),
                    output_tokens=_mean(rng, stage.output_tokens, calls),
                    parallelism=calls,
                    parents=(len(spans) - 1,) if spans else (),
                )
            )
            at = str(rng.choice(stage.successors))
        return Session(name, self.application, tuple(spans))


def read_hermes_artifact(
    path: str | os.PathLike[str], *, on_error: OnError = "raise"
) -> Trace[ApplicationProfile]:
    """Profiles of `pdgraphs.json` or `task_models*.json`, one JSON document for all applications.

    {application: {stage: {input_len, output_len, exec_time, parallelism, next_stages}}}: an llm
    stage has input_len and output_len, any other has exec_time in seconds. `type` (llm, docker,
    dnn, search) tells the kind; without it a stage with exec_time is a "tool". The stage "start"
    has next_stages alone; without it runs begin at the first stage of the file. A stage from
    which no "end" can be reached is malformed: runs would not end.
    """
    return Trace(path, json_documents, _Profiles, on_error)


@final
class _Profiles:
    def feed(self, record: Fields) -> Iterator[ApplicationProfile]:
        for application in record.values:
            yield _profile(application, record.record(application))

    def finish(self) -> tuple[()]:
        return ()


def _profile(application: str, record: Fields) -> ApplicationProfile:
    stages = {
        name: _stage(record.record(name)) for name in record.values if name not in (START, END)
    }
    if not stages:
        raise record.malformed("", "an application without stages", f"seen: {application!r}")
    if START in record.values:
        entries = record.record(START).texts("next_stages")
    else:
        entries = (next(iter(stages)),)
    for name in [START, *stages]:
        after = entries if name == START else stages[name].successors
        strangers = set(after) - {*stages, END}
        if strangers or not after:
            raise record.malformed(
                f"{name}.next_stages", "expected names of stages, or end", f"seen: {sorted(after)}"
            )
    endless = without_end({name: stage.successors for name, stage in stages.items()})
    if endless:
        raise record.malformed(
            f"{endless[0]}.next_stages", "end cannot be reached", f"from any of: {endless}"
        )
    return ApplicationProfile(application, entries, stages)


def _stage(stage: Fields) -> StageProfile:
    if stage.has("type"):
        named = stage.text("type")
        if named not in _KINDS:
            expected = f"expected one of {', '.join(_KINDS)}"
            raise stage.malformed("type", expected, f"seen: {named!r}")
        kind = _KINDS[named]
    else:
        kind = "tool" if stage.has("exec_time") else "llm"
    lists = {
        name: tuple(stage.numbers(name)) if needed else ()
        for name, needed in (
            ("input_len", kind == "llm"),
            ("output_len", kind == "llm"),
            ("exec_time", kind != "llm"),
            ("parallelism", stage.has("parallelism")),
        )
    }
    for at, calls in enumerate(lists["parallelism"]):
        if calls < 1 or calls % 1:
            expected = "expected a whole number of at least 1"
            raise stage.malformed(f"parallelism[{at}]", expected, f"seen: {calls}")
    return StageProfile(
        kind,
        lists["input_len"],
        lists["output_len"],
        lists["exec_time"],
        lists["parallelism"],
        stage.texts("next_stages"),
    )


def _mean(rng: np.random.Generator, samples: tuple[float, ...], calls: int) -> float:
    return float(rng.choice(samples, size=calls).mean()) if samples else 0.0
