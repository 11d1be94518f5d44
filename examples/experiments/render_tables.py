"""Write the tables of docs/results/*.json into README.md and the pages of docs.

    python examples/experiments/quickstart.py --out docs/results
    python examples/experiments/render_tables.py

Any other script of `examples` that writes into docs/results stands for the first. A block begins
with the comment "tables of docs/results/X.json", and all of it is written here.
"""

import json
from collections.abc import Callable
from pathlib import Path

import demand_tables
import link_accuracy
import past_trained_length
import prewarming
import refinement
import replay_policies
import retention_accuracy
import schedule
from quickstart import LINKING, RETENTION, SCHEDULING, prepare

ROOT = Path(__file__).parents[2]
END = "<!-- end of the tables -->"


def markdown(rows: list[dict], columns: dict[str, str]) -> str:
    """Rows as a Markdown table; `columns` maps a heading to a format string over the row."""
    lines = [list(columns), ["---", *["---:"] * (len(columns) - 1)]]
    lines += [[text.format(**row) for text in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(record: dict) -> str:
    """What stands between the markers."""
    results = prepare(record)
    link, kept, jobs = (results[name] for name in ("linking", "retention", "scheduling"))
    where = record["environment"]
    tokens = kept[0]["prompt_tokens"] + kept[0]["decoded_tokens"]
    return "\n\n".join(
        [
            (
                f"Lookup in 8 documents whose text is cut into chunks of {link[0]['chunk_tokens']} "
                f"tokens, {link[0]['problems']} problems; the long prompt has 112 documents, all "
                "compiled before. Every method on this and on whole documents: "
                "[docs/linking.md](docs/linking.md)."
            ),
            markdown(link, LINKING),
            (
                f"Reasoning, {kept[0]['problems']} problems of about {tokens:.0f} tokens, at "
                f"two budgets, batch {kept[0]['batch_size']}; peak KV of one row."
            ),
            markdown(kept, RETENTION),
            (
                f"Completion time at load {jobs[0]['load']}, {jobs[0]['jobs']} jobs, mean of "
                f"{jobs[0]['seeds']} seeds."
            ),
            markdown(jobs, SCHEDULING),
            (
                f"From `docs/results/quickstart.json`: {where['hardware']}, "
                f"{where['threads']} threads, torch {where['torch']}, "
                f"transformers {where['transformers']}."
            ),
        ]
    )


def scaling_table(record: dict) -> str:
    """What stands between the markers of link_scaling.json in docs/linking.md."""
    lines = [
        "| prompt | recomputed | full prefill | naive | LegoLink-16 | of full | a token |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['prompt_tokens']} | {row['tokens_recomputed']} | {row['full_seconds']:.2f} s "
        f"| {row['naive_seconds']:.2f} s | {row['legolink_16_seconds']:.2f} s "
        f"| {row['legolink_16_share_of_full']:.1%} "
        f"| {row['legolink_16_microseconds_a_token']:.0f} us |"
        for row in record["rows"]
    ]
    return "\n".join(lines)


def steps_table(record: dict) -> str:
    """Of retention_steps.json: a step by policy and length of the context."""
    columns = {
        "policy": "{policy}",
        "batch": "{batch}",
        "context": "{context:,}",
        "prompt s": "{prompt_seconds:.2f}",
        "step ms": "{step_ms:.0f}",
        "GPU busy ms": "{busy_ms:.1f}",
        "KV MiB": "{kv_mib:,.0f}",
    }
    return markdown(record["rows"], columns)


def tiers_table(record: dict) -> str:
    """What stands between the markers of link_tiers_cuda.json in docs/linking.md."""
    lines = [
        "| prompt | method | chunks in | first token | times faster | load | rotate |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in record["rows"]:
        parts = [
            f"{1e3 * row['parts'][name]:.0f} ms" for name in ("load", "rotate") if row["parts"]
        ]
        lines.append(
            f"| {row['prompt_tokens']} | {row['arm']} | {row['tier']} "
            f"| {1e3 * row['first_token_seconds']:.0f} ms | {row['times_faster_than_full']:.1f} "
            f"| {' | '.join(parts or ['', ''])} |"
        )
    where = record["environment"]
    beneath = (
        f"{where['hardware']}, torch {where['torch']}, transformers {where['transformers']}, "
        f"{record['configuration']['dtype']}, {record['parameters'] / 1e9:.1f} billion parameters."
    )
    lines += ["", beneath]
    return "\n".join(lines)


def store_table(record: dict) -> str:
    """Of store.json: milliseconds of each operation by the chunks a store holds."""
    columns = {
        "chunks": "{chunks:,}",
        "memory: hit": "{milliseconds[memory_get]:.4f}",
        "put, one leaves": "{milliseconds[memory_put_evicting]:.3f}",
        "disk: open": "{milliseconds[disk_open]:.2f}",
        "hit, read": "{milliseconds[disk_get]:.2f}",
        "put, others leave": "{milliseconds[disk_put_evicting]:.2f}",
        "counters": "{milliseconds[disk_stats]:.2f}",
        "index made anew": "{milliseconds[disk_first_look]:,.0f}",
    }
    configuration, where = record["configuration"], record["environment"]
    beneath = (
        f"Milliseconds, medians of {configuration['repeats']}; files in {configuration['folder']}; "
        f"{where['hardware']}."
    )
    return f"{markdown(record['rows'], columns)}\n\n{beneath}"


CAP = """# Where each method stands: context, accuracy, performance

The CAP principle (arXiv 2405.11299): serving context (C), accuracy (A) and performance (P) trade
off. What each method does to the three, from `docs/results/quickstart.json` (the reference model,
generated tasks; see the README for the conditions).

| method | C: tokens served | A: exact match | P: cost against the first row of its kind |
| --- | ---: | ---: | ---: |
{rows}

Linking is placed on the long prompt, accuracy on 8 documents. Scheduling changes no context and no
answer; its P is the mean completion time on the bimodal mix.
"""


def cap_page(record: dict) -> str:
    """docs/cap.md."""
    rows = []
    full = record["linking"][0]["long_first_token_seconds"]
    for row in record["linking"]:
        ratio = row["long_first_token_seconds"] / full
        cells = (row["long_prompt_tokens"], f"{row['accuracy']:.3f}", f"{ratio:.2f} of the time")
        rows.append((f"link: {row['arm']}", *cells))
    full = record["retention"][0]["peak_kv_bytes"]
    for row in record["retention"]:
        tokens = f"{row['prompt_tokens'] + row['decoded_tokens']:.0f}"
        ratio = row["peak_kv_bytes"] / full
        cells = (tokens, f"{row['accuracy']:.3f}", f"{ratio:.2f} of the bytes")
        budget = f" at {row['budget']}" if row["budget"] else ""
        rows.append((f"retain: {row['arm']}{budget}", *cells))
    for row in record["scheduling"]:
        if row["mix"] == "bimodal":
            ratio = f"{row['mean_to_fcfs']:.2f} of the time"
            rows.append((f"schedule: {row['arm']}", "same", "same", ratio))
    return CAP.format(rows="\n".join(f"| {' | '.join(map(str, row))} |" for row in rows))


def scenario(name: str) -> Callable[[dict], str]:
    """Every policy on one scenario of scheduling.json."""

    def shown(record: dict) -> str:
        return schedule.table(next(each for each in record["scenarios"] if each["name"] == name))

    return shown


PAGES: dict[str, dict[str, list[Callable[[dict], str]]]] = {
    "README.md": {"quickstart": [tables]},
    "docs/linking.md": {
        "link_accuracy": [link_accuracy.tables],
        "link_scaling": [scaling_table],
        "link_tiers_cuda": [tiers_table],
    },
    "docs/picache.md": {"store": [store_table]},
    "docs/retention.md": {
        "retention_accuracy": [retention_accuracy.table],
        "past_trained_length": [past_trained_length.table],
        "replay": [replay_policies.table],
        "retention_steps": [steps_table],
    },
    "docs/demand.md": {
        "ranks": [demand_tables.ranks],
        "rank_noise": [demand_tables.rank_noise],
    },
    "docs/demand_graphs.md": {"refinement": [lambda found: refinement.markdown(found["results"])]},
    "docs/scheduling.md": {
        "simulator": [demand_tables.simulator, demand_tables.simulator_servers],
    },
    "docs/engine.md": {"engine": [demand_tables.engine, demand_tables.engine_speed]},
    "docs/prewarming.md": {"prewarming": [prewarming.tables]},
    "docs/transformers_scheduler.md": {
        "continuous_batching": [demand_tables.continuous_batching],
    },
    "docs/when_gittins_helps.md": {
        "scheduling": [
            lambda found: schedule.claims_table(found["claims"]),
            lambda found: schedule.gains_table(found["scenarios"]),
            scenario("hermes"),
            scenario("hermes_deadlines"),
        ]
    },
}
"""The blocks of a page: for each record of docs/results, what stands in its blocks in turn."""


def record_of(result: str) -> dict:
    return json.loads((ROOT / "docs" / "results" / f"{result}.json").read_text())


def fill(page: str, result: str, texts: list[str]) -> str:
    """The page with `texts` in its blocks of a result, one after the other.

    Raises:
        ValueError: where there are more or fewer blocks than texts.
    """
    begin = f"<!-- tables of docs/results/{result}.json -->"
    before, *blocks = page.split(begin)
    if len(blocks) != len(texts):
        raise ValueError(f"{len(blocks)} blocks of {result}.json on a page, {len(texts)} texts")
    for block, text in zip(blocks, texts, strict=True):
        before += f"{begin}\n{text.strip()}\n{END}{block.split(END, 1)[1]}"
    return before


def rendered(path: str) -> str:
    """A page of `PAGES` with the tables of the records as they are."""
    page = (ROOT / path).read_text()
    for result, shown in PAGES[path].items():
        record = record_of(result)
        page = fill(page, result, [text(record) for text in shown])
    return page


def main() -> None:
    (ROOT / "docs" / "cap.md").write_text(cap_page(record_of("quickstart")))
    for path in PAGES:
        (ROOT / path).write_text(rendered(path))


if __name__ == "__main__":
    main()
