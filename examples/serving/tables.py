"""The tables of a record of `agents.py`, in Markdown."""

import math
import statistics

from serving.factorial import PARTS, over_streams


def _factor(entry: dict) -> str:
    """A factor with its interval."""
    text = f"{entry['factor']:.2f}"
    if entry["interval"]:
        text += " [{:.2f}, {:.2f}]".format(*entry["interval"])
    return text


def arms_table(record: dict) -> str:
    """Times of every arm on the clock, in Markdown."""
    lines = [
        "| on | mean | P95 | " + " | ".join(_kinds(record)) + " | a call | first token of a call "
        "| with its wait | its P95 |",
        "| --- |" + " ---: |" * (6 + len(_kinds(record))),
    ]
    lines += [
        f"| {row['arm']} | {statistics.fmean(row['mean_seconds']):.1f} s "
        f"| {row['p95_seconds']:.1f} s | "
        + " | ".join(f"{row['by_application'][kind]:.1f} s" for kind in _kinds(record))
        + f" | {row['call_seconds']:.2f} s | {row['first_token_mean']:.2f} s "
        f"| {row['waited_first_token_mean']:.1f} s | {row['waited_first_token_p95']:.1f} s |"
        for row in record["arms"]
    ]
    noise = record["noise"]
    floor = (
        f"No order can change what a call takes: arms that serve identical calls differ by up to "
        f"{noise['largest']:.2f} in the mean of a call, which is noise."
    )
    return "\n".join([*lines, "", _beneath(record), floor])


def answers_table(record: dict) -> str:
    """What the arms answer and hold, in Markdown."""
    heads = (
        "on",
        "right",
        "lost, gained",
        "as with none",
        "tokens written a call",
        "prompt computed",
        "KV held a call",
        "chunks from disk",
        "brought before",
    )
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    lines += [
        f"| {row['arm']} | {_share(row, 'right')} | {row['lost']}, {row['gained']} "
        f"| {_share(row, 'equal')} "
        f"| {row['new_tokens']:.1f} | {row['computed_share']:.0%} "
        f"| {row['kv_bytes'] / 2**20:.1f} MiB | {row['from_disk']} | {row['brought']} |"
        for row in record["arms"]
    ]
    answers = record["arms"][0]["answers"]
    beneath = (
        f"{answers} answers an arm; 95 % intervals of shares by Wilson. Lost: right with nothing "
        "on and wrong here; gained: the other way round."
    )
    return "\n".join([*lines, "", beneath])


def compiling_table(record: dict) -> str:
    """What compiling the pages took and when it is paid back, in Markdown."""
    of, rows = record["compiling"], {row["arm"]: row for row in record["arms"]}
    uses = of["uses_to_pay_back"]
    lines = [
        ("compiling", ""),
        ("---", "---:"),
        ("documents compiled", f"{of['documents']}"),
        ("tokens", f"{of['tokens']:,}"),
        ("seconds", f"{of['seconds']:.1f}"),
        ("seconds that a use of a page saves", f"{of['saved_seconds_a_use']:.2f}"),
        ("uses of a page that pay it back", "never" if uses is None else f"{uses:.1f}"),
        ("share of prompts computed with link", f"{rows['link']['computed_share']:.0%}"),
        ("the same with compiling counted", f"{of['computed_share_with_compiling']:.0%}"),
    ]
    return "\n".join(f"| {head} | {cell} |" for head, cell in lines)


def _share(row: dict, what: str) -> str:
    """A share of the answers of an arm with its interval."""
    low, high = row[f"{what}_interval"]
    return f"{row[what] / row['answers']:.0%} [{low:.0%}, {high:.0%}]"


def contributions_table(record: dict) -> str:
    """What each part does to each time as a factor, in Markdown."""
    found = record["contributions"]
    keys = [
        *((part, f"{part}, mean over the others") for part in PARTS),
        *((f"{part} alone", f"{part} alone") for part in PARTS),
        ("sum", "all three, if they added up"),
        ("measured", "all three, measured"),
        ("left over", "measured over added up"),
        *((f"{a} x {b}", f"{a} x {b}") for a, b in ((PARTS[0], PARTS[1]), (PARTS[0], PARTS[2]))),
        (f"{PARTS[1]} x {PARTS[2]}", f"{PARTS[1]} x {PARTS[2]}"),
    ]
    heads = {"call": "a call", "first token": "first token with its wait"}
    lines = [
        "| part | " + " | ".join(heads.get(name, name) for name in found) + " |",
        "| --- |" + " ---: |" * len(found),
    ]
    lines += [
        f"| {label} | " + " | ".join(_factor(found[name][key]) for name in found) + " |"
        for key, label in keys
    ]
    return "\n".join(lines)


def replays_table(record: dict) -> str:
    """Mean completion of every order in replays, in Markdown."""
    orders = list(dict.fromkeys(row["order"] for row in record["replays"]))
    lines = [
        "| load of none | on | its own load | FCFS | "
        + " | ".join(f"{o} / FCFS" for o in orders[1:])
        + " |",
        "| ---: | --- |" + " ---: |" * (len(orders) + 1),
    ]
    for load, arm in dict.fromkeys((row["load"], row["arm"]) for row in record["replays"]):
        means = {
            row["order"]: row["means"]
            for row in record["replays"]
            if (row["load"], row["arm"]) == (load, arm)
        }
        (own,) = {r["own_load"] for r in record["replays"] if (r["load"], r["arm"]) == (load, arm)}
        ratios = []
        for order in orders[1:]:
            each = [a / b for a, b in zip(means[order], means["FCFS"], strict=True)]
            ratios.append(_factor(over_streams([math.log(ratio) for ratio in each])))
        fcfs = statistics.fmean(means["FCFS"])
        lines.append(f"| {load} | {arm} | {own:.2f} | {fcfs:.1f} s | " + " | ".join(ratios) + " |")
    return "\n".join(lines)


def _kinds(record: dict) -> list[str]:
    return list(record["arms"][0]["by_application"])


def _beneath(record: dict) -> str:
    asked, where = record["configuration"], record["environment"]
    served = record["arms"][0]["applications"]
    return (
        f"{served} applications an arm in {len(record['repeats'])} streams, "
        f"{record['arms'][0]['calls']} calls with nothing on; seconds by the "
        f"{asked['clock']} clock; {where['hardware']}, {where['threads']} threads, "
        f"torch {where['torch']}, transformers {where['transformers']}, seed {asked['seed']}."
    )


def text_of(record: dict) -> str:
    """All tables, for a terminal."""
    tables = (arms_table, answers_table, compiling_table, contributions_table, replays_table)
    return "\n\n".join(table(record) for table in tables)
