"""Profiles of applications from the Hermes artifact, JSON (NephrenCake/Hermes, Apache-2.0)."""

import math
import os
from collections.abc import Mapping

from demand.flow import flow_fault
from demand.traces.fields import Fields
from demand.traces.profiles import ApplicationProfile, StageProfile, is_count
from demand.traces.sources import json_members
from demand.traces.trace import LINE_LIMIT, OneByOne, OnError, Trace
from demand.units import END, START, Kind

_KINDS: Mapping[str, Kind] = {
    "llm": "llm", "docker": "container", "dnn": "model", "search": "search", "tool": "tool",
}  # fmt: skip


def read_hermes_artifact(
    path: str | os.PathLike[str], *, on_error: OnError = "raise", line_limit: int = LINE_LIMIT
) -> Trace[ApplicationProfile]:
    """Profiles of `pdgraphs.json` or of `task_models*.json`, one JSON document for all of them.

    `pdgraphs.json`: {application: {stage: {type, input_len, output_len, exec_time, parallelism,
    next}}}, each a list of samples for itself. An llm stage has input_len and output_len, any other
    has exec_time in seconds. `type` (llm, docker, dnn, search) tells the kind; without it a stage
    with exec_time is a "tool". `next` (or `next_stages`) lists the stages that followed. Of the
    stage "start" that is all that counts; without it runs begin at the first stage of the file.

    `task_models*.json`: {application: {stage_list, stage: {input_len, output_len, parallelism,
    stage_gap, loops, next_stages}}}, llm stages alone, of which `stage_list` names the first one
    first. `stage_gap` is the milliseconds between what came before and the stage, in which a tool
    or, in multi-turn conversations, a person was at work: `StageProfile.gap_seconds`. `loops` says
    how often the stage ran in a run, 0 where it was left out, and `next_stages` with what
    probability each stage followed; what is left to 1 is the end. They say the same twice: whether
    a run comes to a stage is taken from `next_stages`, and how often it then repeats from the
    `loops` above 0. What runs after the last llm stage, such as the code of factool_code, is not in
    it.

    A stage from which no "end" can be reached is malformed: runs would not end. Each application
    stands for itself: one that is malformed can be skipped.

    Tried on the published `pdgraphs.json` and `task_models_skewnorm.json`: all nine applications of
    the paper are in both, and multi-turn conversations in the latter.
    """
    return Trace(path, json_members, lambda: OneByOne(_profile), on_error, line_limit)


def _profile(member: Fields) -> ApplicationProfile:
    (application,) = member.values
    record = member.record(application)
    if record.has("stage_list"):
        names = record.texts("stage_list")
        stages = {name: _task_stage(record.record(name), name) for name in names}
        entries = names[:1]
    else:
        names = tuple(name for name in record.values if name not in (START, END))
        stages = {name: _stage(record.record(name)) for name in names}
        entries = names[:1]
        if START in record.values:
            start = record.record(START)
            entries = start.texts(_next(start))
    after = {name: stage.possible_successors for name, stage in stages.items()}
    fault = flow_fault(entries, after)
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
    _check_counts(stage, "parallelism", lists["parallelism"])
    return StageProfile(
        kind,
        lists["input_len"],
        lists["output_len"],
        lists["exec_time"],
        lists["parallelism"],
        stage.texts(_next(stage)),
    )


def _task_stage(stage: Fields, name: str) -> StageProfile:
    given = ("parallelism", "loops", "stage_gap")
    parallelism, loops, gap = (
        tuple(stage.numbers(field)) if stage.has(field) else () for field in given
    )
    _check_counts(stage, "parallelism", parallelism)
    rounds = tuple(count for count in loops if count)  # runs without the stage have no rounds
    _check_counts(stage, "loops", rounds)
    following = stage.record("next_stages")
    chances = {to: following.number(to) for to in following.values}
    total = math.fsum(chances.values())
    if total > 1.0 + 1e-6:
        raise stage.malformed("next_stages", "probabilities of more than 1", f"seen: {total}")
    if 1.0 - total > 1e-6:
        chances[END] = chances.get(END, 0.0) + 1.0 - total
    if rounds:
        chances.pop(name, None)
    if not any(chances.values()):
        chances = {END: 1.0}
    total = math.fsum(chances.values())
    return StageProfile(
        "llm",
        tuple(stage.numbers("input_len")),
        tuple(stage.numbers("output_len")),
        (),
        parallelism,
        tuple(chances),
        tuple(chance / total for chance in chances.values()),
        rounds,
        tuple(milliseconds / 1000.0 for milliseconds in gap),
    )


def _check_counts(stage: Fields, field: str, samples: tuple[float, ...]) -> None:
    for at, count in enumerate(samples):
        if not is_count(count):
            expected = "expected a whole number of at least 1"
            raise stage.malformed(f"{field}[{at}]", expected, f"seen: {count}")
