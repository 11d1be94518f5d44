"""Profiles of applications from the Hermes artifact, JSON (NephrenCake/Hermes, Apache-2.0)."""

import os
from collections.abc import Mapping

from demand.flow import flow_fault
from demand.traces.fields import Fields
from demand.traces.profiles import ApplicationProfile, StageProfile, is_count
from demand.traces.sources import json_members
from demand.traces.trace import OneByOne, OnError, Trace
from demand.units import END, START, Kind

_KINDS: Mapping[str, Kind] = {
    "llm": "llm", "docker": "container", "dnn": "model", "search": "search", "tool": "tool",
}  # fmt: skip


def read_hermes_artifact(
    path: str | os.PathLike[str], *, on_error: OnError = "raise"
) -> Trace[ApplicationProfile]:
    """Profiles of `pdgraphs.json`, one JSON document for all applications.

    {application: {stage: {type, input_len, output_len, exec_time, parallelism, next}}}: each a list
    of samples for itself. An llm stage has input_len and output_len, any other has exec_time in
    seconds. `type` (llm, docker, dnn, search) tells the kind; without it a stage with exec_time is
    a "tool". `next` (or `next_stages`) lists the stages that followed. Of the stage "start" that is
    all that counts; without it runs begin at the first stage of the file. A stage from which no
    "end" can be reached is malformed: runs would not end. Each application stands for itself: one
    that is malformed can be skipped.

    The older `task_models*.json` are refused: they know the llm stages alone, with probabilities
    in place of what followed, and keep no time of tools.

    Tried on the published `pdgraphs.json`.
    """
    return Trace(path, json_members, lambda: OneByOne(_profile), on_error)


def _profile(member: Fields) -> ApplicationProfile:
    (application,) = member.values
    record = member.record(application)
    if record.has("stage_list"):
        problem = "a profile of task_models, which has no times of tools: read pdgraphs.json"
        raise record.malformed("stage_list", problem)
    stages = {
        name: _stage(record.record(name)) for name in record.values if name not in (START, END)
    }
    if START in record.values:
        start = record.record(START)
        entries = start.texts(_next(start))
    else:
        entries = tuple(stages)[:1]
    fault = flow_fault(entries, {name: stage.successors for name, stage in stages.items()})
    if fault:
        field = _next(record.record(fault.unit)) if fault.unit in record.values else "next_stages"
        raise record.malformed(f"{fault.unit}.{field}", fault.problem, fault.seen)
    return ApplicationProfile(application, entries, stages)


def _next(stage: Fields) -> str:
    """The field that lists what followed a stage."""
    return "next" if stage.has("next") else "next_stages"


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
        if not is_count(calls):
            expected = "expected a whole number of at least 1"
            raise stage.malformed(f"parallelism[{at}]", expected, f"seen: {calls}")
    return StageProfile(
        kind,
        lists["input_len"],
        lists["output_len"],
        lists["exec_time"],
        lists["parallelism"],
        stage.texts(_next(stage)),
    )
