"""The user's own files before the user's own question: what `quickstart.py --documents` runs."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from environment import environment
from quickstart_tables import LINKING, linking_rows, plain, shown

import picache

sys.path.insert(0, str(Path(__file__).parents[1]))
import models

COLUMNS = {name: LINKING[name] for name in ("linking", "KL", "recomputed", "first token")}


def text_of(path: Path) -> str:
    """What a file in UTF-8 says; nothing where it is in another encoding."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        return ""


def own_documents(
    name: str,
    methods: Mapping[str, picache.LinkMethod | picache.Arm],
    paths: list[Path],
    question: str,
    new_tokens: int,
    out: Path,
) -> None:
    """Link the files on any model: what each arm answers, costs, and how far it strays."""
    model, tokenizer = models.load(name)
    problem = picache.Problem(tuple(map(text_of, paths)), question)
    result = picache.compare(model, tokenizer, [problem], methods, new_tokens=new_tokens)
    for arm, (answer,) in result.settings["decoded"].items():
        print(f"\n{arm}: {answer.strip()!r}")
    rows = linking_rows(result)
    print(f"\n{plain(shown(rows), COLUMNS)}")
    record = {
        "configuration": {"model": name, "documents": list(map(str, paths)), "question": question},
        "environment": environment(),
        "linking": rows,
        "decoded": result.settings["decoded"],
    }
    path = out / "own_documents.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwrote {path}")
