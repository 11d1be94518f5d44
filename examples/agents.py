"""All three packages in one run: pages linked, answers decoded in bounded memory, calls in order.

    python examples/agents.py [--device cuda] [--repeats 3 --out docs/results]

A stream of applications of several calls each is served eight times, with each of link, retention
and Gittins on or off. At most five minutes on two free cores; what it shows: docs/together.md.
"""

import argparse
import gzip
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import models
import torch
from serving.experiment import (
    BESIDE,
    EIGHT,
    LINK,
    SERVINGS,
    Setting,
    Way,
    compile_library,
    learn,
    run,
)
from serving.figure import draw
from serving.knowledge import Knowledge
from serving.loop import CLOCKS
from serving.prompts import document_ids
from serving.summary import summary
from serving.tables import text_of
from tqdm import tqdm

from picache import PIC, ChunkStore

sys.path.insert(0, str(Path(__file__).parent / "experiments"))
from environment import environment

SETTINGS = {
    "cpu": Setting(),
    "cuda": Setting(
        pages=24,
        sentences=100,
        applications=12,
        training=12,
        seconds_between=0.5,
        memory_pages=12,
        prefill_seconds=0.00003,
        decode_seconds=0.03,
    ),
}
"""What is served by default; on a GPU longer pages, and more applications."""
RAN = ("configuration", "environment", "compiled", "training")
"""What a record says beside its runs, before they are summed up."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2", help='"smollm2", "reference" or as of HF')
    parser.add_argument("--device", default="cpu", help='"cpu", "cuda" or as of torch')
    parser.add_argument("--setting", choices=SETTINGS, help="what is served; that of the device")
    parser.add_argument("--applications", type=int, help="in a stream")
    parser.add_argument("--training", type=int, help="applications that the graphs are learnt from")
    parser.add_argument("--seconds-between", type=float, help="mean, from arrival to arrival")
    parser.add_argument("--repeats", type=int, default=1, help="streams, each of other tasks")
    parser.add_argument("--clock", choices=CLOCKS, help="processor: on a machine that others use")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for agents.json and agents.png")
    parser.add_argument(
        "--first-repeat", type=int, default=0, help="number of the first stream, to run them apart"
    )
    parser.add_argument(
        "--again", type=Path, nargs="+", help="folders whose runs are to be summed up, together"
    )
    return parser.parse_args()


def setting_of(given: argparse.Namespace) -> Setting:
    """The setting of the device, with what was asked for."""
    named = given.setting or torch.device(given.device).type
    names = ("applications", "training", "seconds_between", "clock")
    asked = {name: getattr(given, name) for name in names}
    asked = {name: value for name, value in asked.items() if value is not None}
    return replace(SETTINGS[named], seed=given.seed, **asked)


def store_of(setting: Setting, model, tokenizer, folder: Path) -> ChunkStore:
    """All pages on disk, some of them in memory as well."""
    config = model.config
    heads = config.num_key_value_heads * config.head_dim
    token_bytes = 2 * config.num_hidden_layers * heads * model.dtype.itemsize
    longest = max(len(document_ids(page.text, tokenizer)) for page in setting.library())
    return ChunkStore(device_bytes=setting.memory_pages * longest * token_bytes, path=folder)


def measure(given: argparse.Namespace, setting: Setting, folder: Path) -> Iterator[dict]:
    """After each arm what was run so far, to be `summed`; each repeat has an order of its own."""
    if setting.clock == "processor":
        torch.set_num_threads(1)  # the seconds of several threads would be added up
    model, tokenizer = models.load(given.model, device=given.device)
    pic = PIC(model, tokenizer, store_of(setting, model, tokenizer, folder), sinks=LINK.sinks)
    runs = []
    repeats = range(given.first_repeat, given.first_repeat + given.repeats)
    served = setting.training * len(SERVINGS)
    served += len(repeats) * len(EIGHT + BESIDE) * setting.applications
    compiled = compile_library(pic, setting)
    with tqdm(total=served, unit="application", desc="training") as bar:
        knowledge = {
            way.name: learn(pic, setting, lambda one: bar.update(), way) for way in SERVINGS
        }
        about = {
            "configuration": {
                "model": given.model,
                "device": given.device,
                **asdict(setting),
                "link": repr(LINK),
                "policy": repr(setting.policy),
            },
            "environment": environment(),
            "compiled": compiled,
            "training": {name: known.record() for name, known in knowledge.items()},
        }
        for repeat in repeats:
            shuffle = random.Random(f"arms {given.seed} {repeat}")
            ways: list[Way] = shuffle.sample(EIGHT + BESIDE, len(EIGHT + BESIDE))
            for way in ways:
                bar.set_description(f"{way.name}, repeat {repeat + 1}")
                known = knowledge[way.serving]
                runs.append(run(way, pic, known, setting, repeat, lambda one: bar.update()))
                yield {**about, "runs": runs}


def summed(ran: dict) -> dict:
    """The whole record, of what `measure` gave."""
    asked = ran["configuration"]
    setting = Setting(**{name: asked[name] for name in Setting.__dataclass_fields__})
    knowledge = {
        name: Knowledge.of_record(trained, setting.cost)
        for name, trained in ran["training"].items()
    }
    graphs = {
        name: {application: str(graph) for application, graph in known.graphs.items()}
        for name, known in knowledge.items()
    }
    of_runs = summary(ran["runs"], setting, knowledge, ran["compiled"])
    return {**{name: ran[name] for name in RAN}, "graphs": graphs, **of_runs, "runs": ran["runs"]}


def again(folders: Sequence[Path]) -> dict:
    """One record of the runs that folders hold, of the same setting and of other repeats.

    Raises:
        ValueError: folders whose settings differ, or that hold the same repeat.
    """
    each = [json.loads((folder / "agents.json").read_text()) for folder in folders]
    runs = [
        json.loads(gzip.decompress((folder / "agents_runs.json.gz").read_bytes()))
        for folder in folders
    ]
    for folder, stored in zip(folders, each, strict=True):
        for name in ("configuration", "training"):
            if stored[name] != each[0][name]:
                raise ValueError(f"{folder} has another {name} than {folders[0]}; expected one")
    joined = list(chain.from_iterable(runs))
    if len({(run["arm"], run["repeat"]) for run in joined}) < len(joined):
        raise ValueError(f"{folders} hold an arm of a repeat twice; expected other repeats in each")
    return summed({**{name: each[0][name] for name in RAN}, "runs": joined})


def write(record: dict, folder: Path) -> None:
    """The record, and every call of every run in a file beside it; of a whole one the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = {name: each for name, each in record.items() if name != "runs"}
    (folder / "agents.json").write_text(json.dumps(shown, indent=1) + "\n")
    # No time in its header: the same runs are the same bytes.
    packed = gzip.compress(json.dumps(record["runs"]).encode(), mtime=0)
    (folder / "agents_runs.json.gz").write_bytes(packed)
    if "arms" in record:
        draw(record, folder / "agents.png")


def main() -> None:
    given = arguments()
    if given.again:
        write(again(given.again), given.out or given.again[0])
        return
    setting = setting_of(given)
    with tempfile.TemporaryDirectory() as folder:
        for ran in measure(given, setting, Path(folder)):
            if given.out:
                write(ran, given.out)
    record = summed(ran)
    print(text_of(record))
    if given.out:
        write(record, given.out)
        print(f"wrote {given.out / 'agents.json'}, agents_runs.json.gz and agents.png")


if __name__ == "__main__":
    main()
