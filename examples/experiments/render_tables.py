"""Write the tables of docs/results/*.json into README.md and the pages of docs.

    python examples/experiments/quickstart.py --out docs/results
    python examples/experiments/render_tables.py

Any other script of `examples` that writes into docs/results stands for the first. A block begins
with the comment "tables of docs/results/X.json", and all of it is written here.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import answer_begins
import attained
import claims
import demand_tables
import engine_tables
import hermes_samples
import how_to_tables
import knowing_demand
import learning_loop
import link_evidence_pages
import milestone_maps
import past_trained_length
import predictors
import prewarming
import raas_stamps
import reasoning_accuracy_summary
import refinement
import replay_policies
import retention_evidence_summary
import schedule
import side_by_side
import sink_share
from cap import pages as cap_pages
from quickstart_pages import (
    answers,
    markdown,
    sinks,
    six_rows_linking,
    six_rows_retention,
    six_rows_scheduling,
    whole,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # scripts, not a package
import decode_tables
import drawing
import link_profile
import link_tables
import sweeps

sys.path.insert(0, str(Path(__file__).parents[1]))
from serving import tables as together

ROOT = Path(__file__).parents[2]
END = "<!-- end of the tables -->"


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


def cpu_step_table(record: dict) -> str:
    """What stands between the markers of cpu_step.json in docs/retention.md."""
    rows = {(row["package"], row["policy"]): row for row in record["rows"]}
    lines = ["| policy | before | after |", "| --- | ---: | ---: |"]
    for package, policy in rows:
        if package == "after" and policy != "dense":
            ratios = (rows[when, policy]["ratio"] for when in ("before", "after"))
            lines.append(f"| {policy} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return "\n".join(lines)


def cpu_link_table(record: dict) -> str:
    """What stands between the markers of cpu_link.json in docs/linking.md."""
    rows = {(row["package"], row["arm"]): row for row in record["rows"]}
    lines = ["| | before | after |", "| --- | ---: | ---: |"]

    def line(label: str, arm: str, measured: str) -> str:
        both = (rows[when, arm][measured] for when in ("before", "after"))
        return f"| {label} | " + " | ".join(f"{ms:,.0f} ms" for ms in both) + " |"

    for package, arm in rows:
        if package == "after":
            lines.append(line(arm, arm, "milliseconds"))
            if "over_arithmetic" in rows[package, arm]:
                lines.append(line(f"{arm} over its arithmetic", arm, "over_arithmetic"))
    return "\n".join([*lines, "", f"{record['environment']['hardware']}."])


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


def hashes_table(record: dict) -> str:
    """What stands between the markers of hashes.json in docs/picache.md."""
    rates = {
        (row["hash"], row["layer_bytes"], row["threads"]): row["gigabytes_a_second"]
        for row in record["rows"]
    }
    sizes, threads = (record["configuration"][name] for name in ("sizes", "threads"))
    columns = [(size, count) for size in sizes for count in threads]
    heads = (f"{size // 1024:,} KiB, {count} thread{'s' * (count > 1)}" for size, count in columns)
    lines = [f"| layers of | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(columns)]
    lines += [
        f"| {name} | " + " | ".join(f"{rates[name, *column]:.1f}" for column in columns) + " |"
        for name in dict.fromkeys(row["hash"] for row in record["rows"])
    ]
    where = record["environment"]
    beneath = (
        f"GB/s, best of {record['configuration']['repeats']}; {where['hardware']}, xxhash "
        f"{where['xxhash']}, blake3 {where['blake3']}."
    )
    return "\n".join([*lines, "", beneath])


def scenario(name: str) -> Callable[[dict], str]:
    """Every policy on one scenario of scheduling.json."""

    def shown(record: dict) -> str:
        return schedule.table(next(each for each in record["scenarios"] if each["name"] == name))

    return shown


PAGES: dict[str, dict[str, list[Callable[[dict], str]]]] = {
    "README.md": {"quickstart": [six_rows_linking, six_rows_retention, six_rows_scheduling]},
    "docs/real_model.md": {"quickstart": [answers, whole, sinks]},
    "docs/claims.md": {
        "link_evidence": [claims.of_questions],
        "retention_evidence": [claims.of_long_texts],
        "reasoning_accuracy": [claims.of_chains],
        "milestone_maps": [claims.of_heads],
        "quickstart": [claims.table],
    },
    "docs/cap.md": {
        "cap": [
            cap_pages.principle,
            cap_pages.map_table,
            cap_pages.verdict_table,
        ],
        "cap_gpu": [cap_pages.device_table],
        "cap_8b": [cap_pages.device_table],
    },
    "docs/how_to/choose_a_method.md": {
        "link_evidence": [how_to_tables.linking],
        "link": [how_to_tables.linking_times],
        "retention_evidence": [how_to_tables.long_texts],
        "reasoning_accuracy": [how_to_tables.chains],
        "knowing_demand": [how_to_tables.knowing],
    },
    "docs/how_to/choose_a_budget.md": {
        "link_evidence": [how_to_tables.linking_budgets],
        "decode": [how_to_tables.step_times],
        "retention_evidence": [how_to_tables.text_budgets],
    },
    "docs/how_to/behind_a_server.md": {"recomputation": [how_to_tables.displacing]},
    "docs/reference_model.md": {"quickstart_reference": [whole]},
    "docs/linking.md": {
        "link_evidence": [link_evidence_pages.best, link_evidence_pages.pairs],
        "link_evidence_small": [
            lambda small: link_evidence_pages.beside(small, record_of("link_evidence"))
        ],
        "link_evidence_colon": [
            lambda colon: link_evidence_pages.two_leads(colon, record_of("link_evidence_small"))
        ],
        "answer_begins": [answer_begins.table],
        "link_scaling": [scaling_table],
        "cpu_link": [cpu_link_table],
        "link": [link_tables.tables, link_tables.aims],
        "link_kernels": [link_tables.kernels],
        "link_profile": [link_profile.table],
    },
    "docs/how_to/many_machines.md": {"sweeps": [sweeps.table]},
    "docs/picache.md": {"hashes": [hashes_table], "store": [store_table]},
    "docs/retention.md": {
        "retention_evidence": [retention_evidence_summary.tables],
        "retention_evidence_small": [
            lambda small: retention_evidence_summary.beside(small, record_of("retention_evidence"))
        ],
        "reasoning_accuracy": [reasoning_accuracy_summary.tables],
        "milestone_maps": [milestone_maps.table],
        "past_trained_length": [past_trained_length.table],
        "replay": [replay_policies.table],
        "raas_stamps": [raas_stamps.table],
        "raas_stamps_long": [raas_stamps.table],
        "sink_share": [sink_share.table],
        "cpu_step": [cpu_step_table],
        "decode": decode_tables.BLOCKS,
        "decode_profile": [decode_tables.profiles],
    },
    "docs/demand.md": {
        "ranks": [demand_tables.ranks],
        "rank_noise": [demand_tables.rank_noise],
    },
    "docs/demand_graphs.md": {
        "estimator": [demand_tables.estimator],
        "refinement": [lambda found: refinement.markdown(found["results"])],
    },
    "docs/learning.md": {
        "learning_loop": [learning_loop.markdown],
        "predictors": [predictors.markdown],
    },
    "docs/scheduling.md": {
        "attained": [attained.markdown],
        "simulator": [demand_tables.simulator, demand_tables.simulator_servers],
        "drawing": [drawing.table],
    },
    "docs/engine.md": {
        "engine": [demand_tables.engine],
        "engine_speed": [demand_tables.engine_speed],
        "engine_requests": [demand_tables.engine_requests],
        "recomputation": [engine_tables.recomputation],
        "prefix_reuse": [engine_tables.prefix_reuse],
    },
    "docs/routing.md": {
        "routing": [engine_tables.routing],
        "routing_speed": [engine_tables.routing_speed],
    },
    "docs/prewarming.md": {"prewarming": [prewarming.tables]},
    "docs/transformers_scheduler.md": {
        "continuous_batching": [demand_tables.continuous_batching],
    },
    "docs/side_by_side.md": {
        "side_by_side": [
            side_by_side.gains_table,
            side_by_side.orders_table,
            side_by_side.foreseen_table,
            side_by_side.deadlines_table,
        ]
    },
    "docs/traces.md": {
        "hermes_samples": [
            hermes_samples.demand_table,
            hermes_samples.claim_table,
            hermes_samples.gains_table,
        ]
    },
    "docs/knowing_demand.md": {
        "knowing_demand": [
            lambda found: knowing_demand.tables(found)[1],
            knowing_demand.worth,
            knowing_demand.tails,
            lambda found: knowing_demand.tables(found)[0],
        ]
    },
    "docs/together.md": {
        "agents": [
            together.arms_table,
            together.answers_table,
            together.compiling_table,
            together.contributions_table,
            together.replays_table,
        ]
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
    for path in PAGES:
        (ROOT / path).write_text(rendered(path))


if __name__ == "__main__":
    main()
