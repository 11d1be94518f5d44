"""The tables of `demand` as Markdown, from the records of docs/results; no number is written here.

Each function takes the record that a script wrote and gives what stands on the page. Rows and
columns are those of the record.
"""

from collections.abc import Iterable, Sequence
from functools import partial

RANK_ROWS = {
    "one rank": "one rank",
    "one rank, ten stops in a loop": "one rank, ten stops in a loop (as the artifact does)",
    "one rank, definition in a loop": "one rank, the definition as a double loop",
    "one table": "a table of all ages",
    "one table, one rank an atom": "a table as one rank an atom",
    "{running} running, tables": "{running:,} running jobs of nine applications ranked anew",
    "{running} running, one rank each": "the same, one rank each",
    "RankTable.at": "`RankTable.at`, one age",
    "RankTable.next_above": "`RankTable.next_above`",
}
"""What the page calls a row; one that is not here keeps its name."""
RANK_VARIANTS = ("one table, mean", "one table, shifted", "one table, quantum and cost",
                 "one table, bucketed", "RankTable.at, quantum and cost")  # fmt: skip
"""Only in the record."""


def grid(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first `left` columns are text, the others numbers."""
    lines = [heads, ["---"] * left + ["---:"] * (len(heads) - left), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def micros(value: float) -> str:
    return f"{value:.1f} µs" if value < 1000.0 else f"{value / 1000.0:.2f} ms"


def ranks(record: dict) -> str:
    """Of ranks.json."""
    ran = record["configuration"]
    said = {name.format(**ran): text.format(**ran) for name, text in RANK_ROWS.items()}
    rows = [
        (
            said.get(row["what"], row["what"]),
            micros(row["median_microseconds"]),
            micros(row["fastest_microseconds"]),
        )
        for row in record["rows"]
        if row["what"] not in RANK_VARIANTS
    ]
    return grid([f"at {ran['atoms']:,} atoms", "median", "fastest"], rows)


def rank_noise(record: dict) -> str:
    """Of rank_noise.json."""
    rows: dict[tuple[str, int], dict[str, float]] = {}
    for row in record["rows"]:
        rows.setdefault((row["demand"], row["samples"]), {})[row["rank"]] = row["factor"]
    variants = list(next(iter(rows.values())))
    return grid(
        ["off by a factor of", "samples", *(f'`"{rank}"`' for rank in variants)],
        [
            [demand, str(samples), *(f"{found[rank]:.2f}" for rank in variants)]
            for (demand, samples), found in rows.items()
        ],
    )


def simulator(record: dict) -> str:
    """Of simulator.json: thousands of events a second, and seconds beside re-sorting."""
    by_jobs = partial(_events_by, record, "jobs", heading="mix, load")
    beside = record["beside_resorting"]
    return "\n\n".join(
        [
            by_jobs(record["growth"], memory=True),
            (
                "The same jobs, due 1.5 times their demand after they arrive and in three classes "
                "of priority:"
            ),
            by_jobs(record["others"], named="`{}`"),
            grid(
                [
                    f"mix, {beside[0]['jobs']} jobs",
                    "policy",
                    "seconds",
                    "re-sorting everyone, seconds",
                    "ratio",
                ],
                [
                    [
                        row["mix"],
                        row["policy"],
                        f"{row['processor_seconds']:.4f}",
                        f"{row['resorting_processor_seconds']:.4f}",
                        f"{row['ratio']:.1f}",
                    ]
                    for row in beside
                ],
                left=2,
            ),
        ]
    )


def simulator_servers(record: dict) -> str:
    """Of simulator.json: thousands of events a second by the number of servers."""
    rows = record["several"]
    heading = f"mix, load, {rows[0]['jobs']:,} jobs"
    return _events_by(record, "servers", rows, heading=heading)


def _events_by(
    record: dict, by: str, rows: list[dict], heading: str, named: str = "{}", memory: bool = False
) -> str:
    """Thousands of events a second, the median and the fastest run, with a column to each `by`."""
    load = record["configuration"]["load"]
    columns = sorted({row[by] for row in rows})
    cells: dict[tuple[str, str], dict[int, dict]] = {}
    for row in rows:
        cells.setdefault((row["mix"], row["policy"]), {})[row[by]] = row
    return grid(
        [heading, "policy", *(f"{n:,} {by}" for n in columns), *["MiB"] * memory],
        [
            [
                f"{mix}, {load[mix]}",
                named.format(policy),
                *(_events(at[n]) if n in at else "-" for n in columns),
                *[f"{at[max(at)]['added_mebibytes']:.0f}"] * memory,
            ]
            for (mix, policy), at in cells.items()
        ],
        left=2,
    )


def _events(row: dict) -> str:
    median, fastest = row["events_per_second"], row["fastest_events_per_second"]
    return f"{median / 1000:.0f} ({fastest / 1000:.0f})"


def engine(record: dict) -> str:
    """Of engine.json: every policy with ample KV, and ways to preempt with scarce KV."""

    def completion(row: dict) -> list[str]:
        ratio = row["mean_over_fcfs"]
        return [
            f"{row['mean_seconds']['estimate']:.1f}",
            f"{ratio['estimate']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
            f"{row['p95_seconds']['estimate']:.0f}",
        ]

    ran = record["configuration"]
    return "\n\n".join(
        [
            grid(
                ["policy", "mean s", "over request FCFS", "P95 s", "batch", "preemptions a job"],
                [
                    [
                        row["policy"],
                        *completion(row),
                        f"{row['mean_batch']:.1f}",
                        f"{row['preemptions_per_job']:.1f}",
                    ]
                    for row in record["policies"]
                ],
            ),
            (
                f"Then with {ran['scarce_blocks']:,} blocks of {ran['engine']['block_tokens']} "
                f"tokens, which {ran['width']} requests of this mix do not fit into:"
            ),
            grid(
                [
                    "scheduling, preemption, policy",
                    "mean s",
                    "over request FCFS, ample KV",
                    "P95 s",
                    "tokens prefilled again a job",
                    "blocks swapped a job",
                ],
                [
                    [
                        f"{row['scheduling']}, {row['preemption']}, {row['policy']}",
                        *completion(row),
                        f"{row['prefilled_again_per_job']:.0f}",
                        f"{row['swapped_blocks_per_job']:.0f}",
                    ]
                    for row in record["modes"]
                ],
            ),
        ]
    )


def engine_speed(record: dict) -> str:
    """Of engine_speed.json: what the simulator does in a second of processor time."""
    headings = ["batch", "decisions/s", "steps/s", "tokens/s", "events/s", "fastest"]

    def figures(row: dict) -> list[str]:
        return [
            f"{row['mean_batch']:.1f}",
            f"{row['looks_per_second']:,.0f}",
            f"{row['steps_per_second']:,.0f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['events_per_second']:,.0f}",
            f"{row['fastest_events_per_second']:,.0f}",
        ]

    by_load = [
        [f"{r['load']:.0f}, {r['jobs']:,}, {r['policy']}", *figures(r)] for r in record["speed"]
    ]
    by_jobs = [[f"{r['jobs']:,}, {r['policy']}", *figures(r)] for r in record["growth"]]
    load = record["configuration"]["growth_load"]
    return "\n\n".join(
        [
            grid(["load, jobs, policy", *headings], by_load),
            f"With more jobs, at load {load:.0f}:",
            grid(["jobs, policy", *headings], by_jobs),
        ]
    )


def estimator(record: dict) -> str:
    """Of estimator.json: milliseconds before and after, by refinement."""
    measured = {
        "observe": "observe a run",
        "between_units": "ask between units",
        "mid_unit": "in mid-unit",
    }
    ran, where = record["configuration"], record["environment"]
    head = ["ms, before and after"]
    for name in measured.values():
        head += [name, ""]
    rows = []
    for row in record["rows"]:
        cells = [f"`{row['refinement']}`"]
        for what in measured:
            cells += [f"{row['before'][what]:.2f}", f"{row['after'][what]:.2f}"]
        rows.append(cells)
    beneath = (
        f"Coding agents: {ran['learned']} runs are known, {ran['observed']} more are observed one "
        f"by one (before: the first {ran['observed_before']}); means over these, what is prepared "
        f"anew counted with the observations, and median of the questions in mid-unit; medians of "
        f"{ran['turns']} turns of processor time, {where['hardware']}."
    )
    return f"{grid(head, rows)}\n\n{beneath}"


def engine_requests(record: dict) -> str:
    """Of engine_requests.json: all policies over seeds, then two by application, of one seed."""
    ran = record["configuration"]

    def interval(row: dict, name: str) -> str:
        return "{estimate:.3g} ({low:.3g} to {high:.3g})".format(**row[name])

    def quantiles(row: dict, name: str) -> str:
        cells = (row[f"p{percent}_{name}_seconds"] for percent in (50, 95, 99))
        found = (cell["estimate"] if isinstance(cell, dict) else cell for cell in cells)
        return " / ".join(f"{seconds:.3g}" for seconds in found)

    heads = ["TTFT s, P50 / P95 / P99", "TBT s, P50 / P95 / P99"]
    bounds = f"TTFT {ran['ttft_seconds']:g} s, TBT {ran['tbt_seconds']:g} s"
    policies = grid(
        [
            "policy",
            *heads,
            f"requests a second within {bounds}",
            "jobs a second in time",
            "KV block-seconds a job",
        ],
        [
            [
                row["policy"],
                quantiles(row, "ttft"),
                quantiles(row, "tbt"),
                interval(row, "requests_per_second"),
                interval(row, "deadline_jobs_per_second"),
                f"{row['kv_block_seconds_per_job']['estimate']:,.0f}",
            ]
            for row in record["policies"]
        ],
    )
    applications = grid(
        ["seed 0: policy, application", "requests", *heads, "KV block-seconds"],
        [
            [
                f"{row['policy']}, {row['application']}",
                f"{row['requests']:,}",
                quantiles(row, "ttft"),
                quantiles(row, "tbt"),
                f"{row['kv_block_seconds']:,.0f}",
            ]
            for row in record["applications"]
        ],
    )
    return f"{policies}\n\n{applications}"


def continuous_batching(record: dict) -> str:
    """Of continuous_batching.json: measured in transformers, and simulated."""
    where = record["environment"]
    rows = [
        [
            row["kv"],
            row["policy"],
            f"{row['measured_mean_steps']:.1f}",
            f"{row['simulated_mean_steps']:.1f}",
            f"{row['measured_share_of_fifo']:.3f}",
            f"{row['simulated_share_of_fifo']:.3f}",
            f"{row['jobs_alike']:.0%}",
        ]
        for row in record["table"]
    ]
    heads = ["KV", "policy", "measured", "simulated", "share of FIFO, measured",
             "share of FIFO, simulated", "alike"]  # fmt: skip
    beneath = (
        f"From `docs/results/continuous_batching.json`: {where['hardware']}, "
        f"torch {where['torch']}, transformers {where['transformers']}."
    )
    return f"{grid(heads, rows, left=2)}\n\n{beneath}"
