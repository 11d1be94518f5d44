"""The calls of an llm unit as requests of an engine, with whole numbers of tokens."""

from collections.abc import Sequence

from demand.arguments import instances_of
from demand.errors import DemandError
from demand.simulation.engine.engine import Engine
from demand.units import CostModel, Execution, check_waits


def call_groups(execution: Execution) -> list[tuple[int, int, int]]:
    """(how many, input tokens, output tokens) of the calls of an llm execution, in order.

    Tokens are whole and at least 1. All calls are alike, unless the longest is known: it is then
    the first, and the others share the rest evenly.

    Raises:
        DemandError: an execution measured in seconds alone.
    """
    calls = execution.parallelism
    if not execution.input_tokens and not execution.output_tokens:
        raise DemandError(
            f"unit {execution.unit.name!r} is an llm known by its seconds alone; an engine needs "
            'input_tokens and output_tokens: give them, or make the unit of kind "model"'
        )
    given, made = _whole(execution.input_tokens), _whole(execution.output_tokens)
    longest = execution.longest_output_tokens
    if longest is None or calls == 1:
        return [(calls, given, made)]
    others = (calls * execution.output_tokens - longest) / (calls - 1)
    return [(1, given, _whole(longest)), (calls - 1, given, _whole(others))]


def shared_tokens(execution: Execution) -> int:
    """Whole prompt tokens that each call of an llm execution shares with the last one."""
    return 0 if execution.shared_tokens is None else int(execution.shared_tokens)


def execution_seconds(execution: Execution, cost: CostModel) -> float:
    """Seconds of service of an execution; those of an llm by the whole tokens that are served."""
    if execution.unit.kind != "llm":
        return cost.seconds(execution)
    given = made = 0
    for calls, each_given, each_made in call_groups(execution):
        given += calls * each_given
        made += calls * each_made
    return given * cost.prefill_seconds_per_token + made * cost.decode_seconds_per_token


def check_run(index: int, run: Sequence[Execution], engine: Engine) -> None:
    """Raise `DemandError` unless `run` is a list of executions, of requests the engine can hold.

    Each waits for what is before it.
    """
    if not instances_of(f"the run of job {index}", run, Execution):
        raise DemandError(f"the run of job {index} is empty; give the units it executes")
    check_waits(f"the run of job {index}", run)
    for execution in run:
        if execution.unit.kind != "llm":
            continue
        for _, given, made in call_groups(execution):
            needed = engine.blocks_for(given + made - 1)
            if needed > engine.blocks:
                raise DemandError(
                    f"unit {execution.unit.name!r} of job {index} has a request of {given} input "
                    f"and {made} output tokens, whose KV takes {needed} blocks of "
                    f"{engine.block_tokens} tokens; the engine has {engine.blocks}: give it more "
                    "blocks or leave the job out"
                )


def _whole(tokens: float) -> int:
    return int(tokens + 0.5) or 1  # half up; tokens are not negative
