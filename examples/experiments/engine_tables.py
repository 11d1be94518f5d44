"""Tables of the pages on the engine simulator, as Markdown, from their records."""

from demand_tables import grid


def recomputation(record: dict) -> str:
    """Of recomputation.json: a row a policy, for each mix and engine."""
    ran = record["configuration"]
    engines = list(ran["engines"])
    rows = {(row["mix"], row["policy"], row["engine"]): row for row in record["rows"]}
    names = list(dict.fromkeys((row["mix"], row["policy"]) for row in record["rows"]))

    def cells(mix: str, policy: str) -> list[str]:
        found = []
        for engine in engines:
            row = rows[mix, policy, engine]
            ratio, again = row["mean_over_fcfs"], row["prefilled_again_per_job"]["estimate"]
            found.append("{estimate:.2f} ({low:.2f} to {high:.2f})".format(**ratio))
            if engine != "displaces nobody":
                found.append(f"{again:,.0f}")
        return found

    heads = ["mix, policy"]
    for engine in engines:
        heads.append(engine)
        if engine != "displaces nobody":
            heads.append("tokens prefilled again a job")
    return grid(heads, [[f"{mix}, {policy}", *cells(mix, policy)] for mix, policy in names])


def prefix_reuse(record: dict) -> str:
    """Of prefix_reuse.json: a row a policy and rule of retention."""

    def number(row: dict, name: str, form: str = ",.0f") -> str:
        return format(row[name]["estimate"], form)

    def cells(row: dict) -> list[str]:
        ratio = row["mean_in_engine_over_lru"]
        return [
            f"{row['seconds_between_arrivals']:,.0f} s, {row['policy']}, {row['retention']}",
            number(row, "hit_rate", ".1%"),
            number(row, "of_findable", ".1%"),
            number(row, "mean_in_engine_seconds"),
            "{estimate:.2f} ({low:.2f} to {high:.2f})".format(**ratio),
            number(row, "p95_in_engine_seconds"),
            number(row, "mean_seconds"),
            number(row, "p95_seconds"),
            number(row, "p95_ttft_seconds", ",.1f"),
            number(row, "held_blocks"),
        ]

    heads = ["between arrivals, policy, retention", "prompt tokens found", "of those that could be",
             "mean s in the engine", "over LRU", "P95 s in the engine", "mean s", "P95 s",
             "P95 TTFT s", "blocks held"]  # fmt: skip
    return grid(heads, [cells(row) for row in record["rows"]])


def routing(record: dict) -> str:
    """Of routing.json: a row a mix, policy and router."""

    def number(row: dict, name: str, form: str = ",.0f") -> str:
        return format(row[name]["estimate"], form)

    def cells(row: dict) -> list[str]:
        ratio = row["mean_in_engines_over_random"]
        return [
            f"{row['mix']}, {row['policy']}, {row['router']}",
            number(row, "hit_rate", ".1%"),
            number(row, "mean_in_engines_seconds", ",.1f"),
            "{estimate:.2f} ({low:.2f} to {high:.2f})".format(**ratio),
            number(row, "p95_in_engines_seconds"),
            number(row, "mean_seconds"),
            number(row, "p95_seconds"),
            number(row, "p95_ttft_seconds", ",.1f"),
            number(row, "moved_share", ".0%"),
            number(row, "imbalance", ".2f"),
        ]

    heads = ["mix, policy, router", "prompt tokens found", "mean s in the engines", "over random",
             "P95 s in the engines", "mean s", "P95 s", "P95 TTFT s", "units moved",
             "busiest over mean"]  # fmt: skip
    return grid(heads, [cells(row) for row in record["rows"]])


def routing_speed(record: dict) -> str:
    """Of routing_speed.json: a row a policy, router and number of engines."""
    heads = ["policy, engines, router", "jobs", "decisions/s", "events/s", "over one engine"]
    rows = [
        [
            f"{row['policy']}, {row['engines']}, {row['router']}",
            f"{row['jobs']:,}",
            f"{row['decisions_per_second']:,.0f}",
            f"{row['events_per_second']:,.0f}",
            f"{row['over_one_engine']:.2f}",
        ]
        for row in record["rows"]
    ]
    return grid(heads, rows)
