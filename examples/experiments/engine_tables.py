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
