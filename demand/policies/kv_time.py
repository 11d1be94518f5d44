"""What a run costs by the KV it holds: the cost of Justitia."""

from collections.abc import Sequence

from demand.arguments import instances_of
from demand.units import Execution


def kv_time(run: Sequence[Execution]) -> float:
    """Tokens of KV that the calls of a run hold, summed over their decoding steps.

    The cost of an agent in Justitia (arXiv 2510.17015), which counts memory held over time. A call
    of I input and O output tokens that decodes without being interrupted holds I tokens as its
    first token is made and one more in each step that follows, the last token having no KV: that
    is I O + O (O - 1) / 2 token-steps. Calls made side by side add up. Where the longest of them is
    known, the others share the rest evenly. Units that are not llm hold none.

    Departures: the sum is over whole steps; a request that an engine pauses holds its KV longer,
    which nobody knows beforehand; and a prefix that calls share counts for each.

    Args:
        run: the executions of one run.

    Raises:
        DemandError: what is no list of executions.
    """
    total = 0.0
    for execution in instances_of("run", run, Execution):
        if execution.unit.kind != "llm":
            continue
        given, made, calls = execution.input_tokens, execution.output_tokens, execution.parallelism
        longest = execution.longest_output_tokens
        if longest is None or calls == 1:
            total += calls * _held(given, made)
        else:
            others = (calls * made - longest) / (calls - 1)
            total += _held(given, longest) + (calls - 1) * _held(given, others)
    return total


def _held(given: float, made: float) -> float:
    return given * made + made * (made - 1.0) / 2.0 if made > 1.0 else given * made
