"""Short tables of the how-to pages, as Markdown: rows of records that other pages show whole."""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # scripts, not a package
import decode_tables
import link_tables
from demand_tables import grid

AT = 0.15
"""The budget of linking, a share of the prompt, at which methods are set side by side."""
LENGTH = 32_768
"""The tokens of a prompt at which times are."""
TEXT_BUDGET, CHAIN_BUDGET = 256, 512
"""The tokens kept of a long text, and of a chain of thought, at which policies are compared."""
CHAINS = (
    "dense",
    "Quest",
    "H2O, prompt pinned",
    "R-KV, prompt pinned",
    "TOVA, prompt pinned",
    "Quest on the prompt, RaaS behind",
    "ShareRaaS, prompt pinned",
    "RaaS, prompt pinned",
    "random, a quarter at a time, prompt pinned",
    "R-KV, 4 sinks",
    "random, prompt pinned",
    "SnapKV, decoding too, 4 sinks",
    "RaaS, 4 sinks",
    "random, 4 sinks",
    "ShareRaaS, 4 sinks",
    "H2O, 4 sinks",
)
ON_AN_ENGINE = ("random", "request FCFS", "FCFS", "class mean", "SERPT", "Gittins")


def _interval(values: list[float], form: str = ".2f") -> str:
    mean, low, high = (format(value, form) for value in values)
    return f"{mean} [{low}, {high}]"


def linking(record: dict) -> str:
    """Of link_evidence.json: full prefill, reuse, and the best of each kind at one budget."""
    best = record["best"]
    wanted = [row for row in best if row["budget"] == 0] + [
        row for row in best if row["budget"] == AT
    ]
    shown = {row["arm"]: row for row in wanted if row["questions"] == wanted[0]["questions"]}
    rows = [["full prefill", "100%", "0", f"{wanted[0]['accuracy_full']:.0%}"]]
    for row in sorted(shown.values(), key=lambda row: row["kl"][0]):
        kl, right = _interval(row["kl"]), row["accuracy"][0]
        rows.append([row["arm"], f"{row['recomputed']:.1%}", kl, f"{right:.0%}"])
    return grid(["arm", "recomputed besides the query", "KL to full prefill", "right"], rows)


def linking_budgets(record: dict) -> str:
    """Of link_evidence.json: the distance to full prefill by budget."""
    among = {
        "random": "random",
        "LegoLink": "LegoLink",
        "ProphetKV": "ProphetKV",
        "any, no system prompt": "the best behind nothing or dummies",
        "any": "the best, the system prompt among it",
    }
    found = {(row["budget"], row["among"]): row["kl"][0] for row in record["best"]}
    naive = found[0, "any, behind nothing"]
    rows = [["0%", *[f"{naive:.2f}"] * 3, *(f"{found[0, kind]:.2f}" for kind in list(among)[3:])]]
    rows += [
        [f"{budget:.0%}", *(f"{found[budget, kind]:.2f}" for kind in among)]
        for budget in sorted({budget for budget, _ in found} - {0.0})
    ]
    rows.append(["100%: full prefill", *["0"] * len(among)])
    return grid(["recomputed at most", *among.values()], rows)


def linking_times(record: dict) -> str:
    """Of link.json: time to the first token at one length, a single prompt."""
    rows = [
        [
            link_tables.label(row),
            f"{1e3 * row['first_token_seconds']:.0f} ms",
            f"{row['recomputed']:,.0f}" if "recomputed" in row else "",
        ]
        for row in link_tables.measured(record)
        if (row["tokens"], row["batch"]) == (LENGTH, 1) and row["arm"] != "floor"
    ]
    where = record["environment"]
    beneath = f"{where['hardware']}, torch {where['torch']}, {record['configuration']['shape']}."
    return f"{grid(['arm', 'first token', 'tokens recomputed'], rows)}\n\n{beneath}"


def long_texts(record: dict) -> str:
    """Of retention_evidence.json: each policy in its best setting, at one budget."""
    rows = [["dense", "0", "everything"]]
    rows += [
        [row["arm"], _interval(row["extra_nll"], "+.3f"), f"{row['budget']:,} tokens"]
        for row in sorted(record["chosen"], key=lambda row: row["extra_nll"][0])
        if row["budget"] == TEXT_BUDGET
    ]
    return grid(["policy", "nats a token above dense", "attends to"], rows)


def text_budgets(record: dict) -> str:
    """Of retention_evidence.json: each policy in its best setting, by budget."""
    found = {(row["policy"], row["budget"]): row["extra_nll"] for row in record["chosen"]}
    budgets = sorted({budget for _, budget in found})
    named = {policy for policy, _ in found}
    policies = sorted(
        named, key=lambda one: [found.get((one, budget), [math.inf])[0] for budget in budgets]
    )
    rows = [
        [one, *(f"{found[one, b][0]:+.3f}" if (one, b) in found else "" for b in budgets)]
        for one in policies
    ]
    tokens = record["configuration"]["tokens"]
    heads = [f"{budget:,} of {tokens:,}" for budget in budgets]
    return grid(["policy, nats a token above dense", *heads], rows)


def chains(record: dict) -> str:
    """Of reasoning_accuracy.json: chains of thought written to their end as taught."""
    found = {row["arm"]: row for row in record["rows"] if row["budget"] in (0, CHAIN_BUDGET)}
    rows = [
        [
            arm,
            _interval(found[arm]["solved_in_common"]),
            f"{found[arm]['lines_right_in_common'][0]:.2f}",
        ]
        for arm in CHAINS
    ]
    on = min(found[arm]["in_common"] for arm in CHAINS)  # dense is of no budget, and takes all
    beneath = f"Of the {on} problems that every policy takes: a pinned prompt has to fit."
    return f"{grid(['policy', 'chains written as taught', 'lines right'], rows)}\n\n{beneath}"


def step_times(record: dict) -> str:
    """Of decode.json: a step at one length of context, batch 1, compiled or densely."""
    rows = [
        [
            decode_tables.label(row),
            f"{row['step_ms']:.1f} ms",
            f"{row['held_bytes'] / 2**20:,.0f} MiB",
        ]
        for row in decode_tables.measured(record)
        if (row["batch"], row["context"]) == (1, LENGTH)
        and row["arm"] in ("dense static", "ours compiled")
    ]
    where = record["calls"][0]["environment"]
    beneath = f"{where['hardware']}, torch {where['torch']}, batch 1, {LENGTH:,} tokens of context."
    return f"{grid(['cache', 'a token', 'held'], rows)}\n\n{beneath}"


def knowing(record: dict) -> str:
    """Of knowing_demand.json: what knowing demand is worth with the best labels and without any."""
    load = record["configuration"]["loads"][-1]
    named = ("random", "FCFS", "LAS", "SERPT", "Gittins", "oracle")
    rows, labelled = [], set()
    for found in record["found"]:
        if found["load"] != load or (found["mix"] in labelled and found["labels"] != "none"):
            continue  # of each mix the best labels, which come first, and none
        labelled.add(found["mix"])
        of = [found["rows"][name]["mean_seconds_over_class mean"]["estimate"] for name in named]
        seconds = found["rows"]["class mean"]["mean_seconds"]["estimate"]
        rows.append(
            [f"{found['mix']}; {found['labels']}", f"{seconds:,.0f} s", *(f"{x:.2f}" for x in of)]
        )
    return grid(["jobs; labels", "class mean", *named], rows)


def displacing(record: dict) -> str:
    """Of recomputation.json: the engine that displaces nobody, and the one that recomputes."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for row in record["rows"]:
        policy = row["policy"].split(",")[0]
        if policy not in (*ON_AN_ENGINE, "oracle") or "hysteresis" in row["policy"]:
            continue
        ratio = row["mean_over_fcfs"]["estimate"]
        rows.setdefault((row["mix"], row["policy"]), {})[row["engine"]] = f"{ratio:.2f}"
    engines = ("displaces nobody", "displaces")
    return grid(
        ["mix, policy", *engines],
        [
            [f"{mix}, {policy}", *(by[name] for name in engines)]
            for (mix, policy), by in rows.items()
        ],
    )
