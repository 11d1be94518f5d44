"""Write the tables of docs/results/quickstart.json into README.md, between its markers.

python examples/quickstart.py --out docs/results && python examples/render_tables.py
"""

import json
from pathlib import Path

from quickstart import LINKING, RETENTION, SCHEDULING, prepare

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- tables of docs/results/quickstart.json -->", "<!-- end of the tables -->"


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
    return "\n\n".join(
        [
            (
                f"Lookup in 8 documents, {link[0]['problems']} problems; the long prompt has 112 "
                "documents, all compiled before."
            ),
            markdown(link, LINKING),
            (
                f"Reasoning, {kept[0]['problems']} problems, budget {kept[0]['budget']} tokens of "
                f"about {kept[0]['prompt_tokens'] + kept[0]['decoded_tokens']:.0f}, batch "
                f"{kept[0]['batch_size']}; peak KV of one row."
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


def main() -> None:
    record = json.loads((ROOT / "docs" / "results" / "quickstart.json").read_text())
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{tables(record)}\n{END}{after}")


if __name__ == "__main__":
    main()
