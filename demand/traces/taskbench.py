"""Plans of tools of TaskBench, JSONL (microsoft/JARVIS taskbench, arXiv 2311.18760)."""

import json
import os
import re
from functools import partial
from graphlib import CycleError, TopologicalSorter

from demand.traces.conversation import check_characters_per_token
from demand.traces.fields import Fields
from demand.traces.schema import Session, Span
from demand.traces.sources import json_lines
from demand.traces.trace import LINE_LIMIT, OneByOne, OnError, Trace

APPLICATION = "taskbench"
_REFERENCE = re.compile(r"<node-(\d+)>")


def read_taskbench(
    path: str | os.PathLike[str],
    *,
    characters_per_token: float = 4.0,
    on_error: OnError = "raise",
    line_limit: int = LINE_LIMIT,
) -> Trace[Session]:
    """Sessions of one request a line: who plans, and the tools of the plan with what they wait for.

    Read are `data_*/data.json` ({id, type, user_request, task_steps, task_nodes, task_links}), the
    form on the Hugging Face hub (instruction, tool_steps, tool_nodes, tool_links, the lists as
    JSON in strings) and predictions of a model ({id, user_request, result: {task_steps,
    task_nodes}}, or without `result`). A node is {task, arguments}. It waits for the nodes that its
    arguments name ("<node-0>"), and, by `task_links` ({source, target}), for tools by name; a link
    whose source or target is in the plan more than once is left to the arguments. Where a node
    names itself or one that is not there, as the data do now and then, no argument of the plan is
    believed: its links alone are read, or the line is malformed if they do not tell all.

    Units are `plan` (kind "llm": reads the request, writes steps and nodes) and each tool by name,
    of kind "tool". Tools stand in an order in which each comes after what it waits for;
    `Span.parents` has that, so that what may run side by side can be told. The trace has no times:
    give `run(assumed_seconds={"tool": ...})`. Tokens are characters over `characters_per_token`;
    descriptions of the tools, which a planner reads too, are not in the file. Attributes are type
    (single, chain, dag) if the line says.

    Tried on files of this form that others published with tools of their own, on predictions of
    four kinds, and on lines of the three `data.json` (docs/traces.md has the counts); those files
    whole, and the hub's form, were never read.
    """
    check_characters_per_token(characters_per_token)
    parse = partial(_session, characters_per_token)
    return Trace(path, json_lines, lambda: OneByOne(parse), on_error, line_limit)


def _session(characters_per_token: float, record: Fields) -> Session:
    request = record.text("instruction" if record.has("instruction") else "user_request")
    plan = record.record("result") if record.has("result") else record
    of = "tool" if plan.has("tool_nodes") else "task"
    nodes = _records(plan, f"{of}_nodes")
    if not nodes:
        raise plan.malformed(f"{of}_nodes", "has no nodes")
    links = _records(plan, f"{of}_links") if plan.has(f"{of}_links") else []
    written = [plan.values.get(f"{of}_steps"), [node.values for node in nodes]]
    spans = [
        Span(
            "plan",
            "llm",
            input_tokens=len(request) / characters_per_token,
            output_tokens=len(json.dumps(written)) / characters_per_token,
        )
    ]
    after = _after(plan, f"{of}_nodes", nodes, links)
    try:
        order = list(TopologicalSorter(after).static_order())
    except CycleError as error:
        problem, seen = "tools wait for each other", f"nodes {error.args[1]}"
        raise plan.malformed(f"{of}_nodes", problem, seen) from None
    position = {node: at for at, node in enumerate(order, 1)}
    for node in order:
        parents = tuple(sorted(position[before] for before in after[node])) or (0,)
        spans.append(Span(nodes[node].text("task"), "tool", parents=parents))
    kind = record.text("type") if record.has("type") else None
    return Session(
        record.identifier("id"),
        APPLICATION,
        tuple(spans),
        attributes={} if kind is None else {"type": kind},
    )


def _records(plan: Fields, name: str) -> list[Fields]:
    """Records of a list that stands as it is, or as JSON in a string."""
    if not isinstance(plan.values.get(name), str):
        return plan.records(name)
    try:
        values = json.loads(plan.text(name))
    except ValueError:
        raise plan.malformed(name, "expected a list, or one as JSON") from None
    if not isinstance(values, list):
        raise plan.malformed(name, "expected a list, or one as JSON", f"seen: {values!r:.60}")
    return [plan.within(f"{name}[{at}]", value) for at, value in enumerate(values)]


def _after(
    plan: Fields, name: str, nodes: list[Fields], links: list[Fields]
) -> dict[int, set[int]]:
    """For each node, those it waits for."""
    named = [{int(found) for found in _REFERENCE.findall(json.dumps(n.values))} for n in nodes]
    linked: dict[int, set[int]] = {at: set() for at in range(len(nodes))}
    tools = [node.text("task") for node in nodes]
    all_told = len(nodes) == 1 or bool(links)  # whether links say what waits for what
    for link in links:
        ends = {side: link.text(side) for side in ("source", "target")}
        for side, tool in ends.items():
            if tool not in tools:
                raise link.malformed(side, "expected a tool of the plan", f"seen: {tool!r:.60}")
        if all(tools.count(tool) == 1 for tool in ends.values()):
            linked[tools.index(ends["target"])].add(tools.index(ends["source"]))
        else:
            all_told = False
    for at, before in enumerate(named):
        strangers = sorted(found for found in before if found >= len(nodes) or found == at)
        if strangers and not (all_told and plan.has(name.replace("nodes", "links"))):
            problem = f"waits for node {strangers[0]}, which is itself or none"
            raise plan.malformed(f"{name}[{at}].arguments", problem)
        if strangers:  # numbered in another way, from 1 perhaps
            return linked
    return {at: before | linked[at] for at, before in enumerate(named)}
