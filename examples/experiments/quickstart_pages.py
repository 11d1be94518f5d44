"""What README and docs show of the quickstart's records, as Markdown."""

from collections.abc import Callable

import numpy as np
from quickstart_tables import LINKING, SCHEDULING, retention_columns, shown

LINKED = {"full", "naive", "random-4", "LegoLink-4", "LegoLink-4, 4 dummies", "CacheBlend 15 %"}
RETAINED = {"dense", "random", "StreamingLLM", "H2O", "Quest", "RaaS"}
SCHEDULED = {
    ("hermes", "FCFS"),
    ("hermes", "ClassMean"),
    ("hermes", "Gittins"),
    ("bimodal", "ClassMean"),
    ("bimodal", "SERPT"),
    ("bimodal", "Gittins"),
}


def markdown(rows: list[dict], columns: dict[str, str]) -> str:
    """Rows as a Markdown table; `columns` maps a heading to a format string over the row."""
    lines = [list(columns), ["---", *["---:"] * (len(columns) - 1)]]
    lines += [[text.format(**row) for text in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _beneath(record: dict) -> str:
    where = record["environment"]
    return (
        f"{where['hardware']}, {where['threads']} threads, torch {where['torch']}, transformers "
        f"{where['transformers']}."
    )


def _linking(record: dict, wanted: Callable[[dict], bool]) -> str:
    rows = shown(record["linking"])
    about = (
        f"{rows[0]['problems']} questions, each on passages of a prompt of "
        f"{rows[0]['prompt_tokens']:.0f} tokens (mean), compiled one by one before; NLL of the "
        "right answer in nats a token, with its 95 % interval; time to the first token."
    )
    return f"{about}\n\n{markdown([row for row in rows if wanted(row)], LINKING)}"


def _retention(record: dict, wanted: Callable[[dict], bool]) -> str:
    rows, asked = shown(record["retention"]), record["configuration"]
    along = (
        f"{rows[0]['texts']} texts of {asked['tokens']} tokens, {asked['prompt_tokens']} of them "
        "the prompt"
    )
    if "accuracy" in rows[0]:
        along = f"{rows[0]['texts']} chains of thought behind {rows[0]['prompt_tokens']:.0f} tokens"
    about = f"{along}; a budget of {asked['budget']} tokens a KV head in every layer."
    kept = [row for row in rows if wanted(row)]
    return f"{about}\n\n{markdown(kept, retention_columns(rows))}"


def _scheduling(record: dict, wanted: Callable[[dict], bool]) -> str:
    rows = record["scheduling"]
    about = (
        f"Completion time at load {rows[0]['load']}, {rows[0]['jobs']} jobs, mean of "
        f"{rows[0]['seeds']} seeds."
    )
    return f"{about}\n\n{markdown([row for row in rows if wanted(row)], SCHEDULING)}"


def _everything(row: dict) -> bool:
    return bool(row)


def six_rows_linking(record: dict) -> str:
    """For the README."""
    return _linking(record, lambda row: row["arm"] in LINKED)


def six_rows_retention(record: dict) -> str:
    """For the README."""
    return _retention(record, lambda row: row["arm"] in RETAINED)


def six_rows_scheduling(record: dict) -> str:
    """For the README."""
    table = _scheduling(record, lambda row: (row["mix"], row["arm"]) in SCHEDULED)
    return f"{table}\n\n{_beneath(record)}"


def whole(record: dict) -> str:
    """Every table of a record."""
    parts = (_linking, _retention, _scheduling)
    return "\n\n".join([*(part(record, _everything) for part in parts), _beneath(record)])


def answers(record: dict) -> str:
    """The first questions, and what some arms answered."""
    arms = ("full", "naive", "LegoLink-4", "LegoLink-4, 4 dummies")
    columns = {"question": "{question} {lead} ...", "right": "{answer}"}
    columns |= {arm: f"{{said[{arm}]}}" for arm in arms}
    return markdown(record["answers"], columns)


def sinks(record: dict) -> str:
    """Attention on the chunks' first tokens, by arm: mean over layers, and the largest layer."""
    rows = [
        {"arm": arm, "mean": np.mean(layers), "largest": max(layers)}
        for arm, layers in record["attention_on_first_tokens"].items()
    ]
    columns = {"arm": "{arm}", "mean of layers": "{mean:.1%}", "largest layer": "{largest:.1%}"}
    count = record["configuration"]["sink_problems"]
    return f"{markdown(rows, columns)}\n\n{count} questions, spread over the passages."
