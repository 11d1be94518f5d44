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
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import models
import torch
from serving.experiment import BESIDE, EIGHT, LINK, Setting, Way, learn, run
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
        sentences=40,
        applications=24,
        training=24,
        seconds_between=0.5,
        memory_pages=12,
        prefill_seconds=0.0001,
        decode_seconds=0.02,
    ),
}
"""What is served by default; on a GPU longer pages, and more applications."""


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
    parser.add_argument("--again", type=Path, help="a folder whose runs are to be summed up anew")
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
    """After each repeat, in which all arms are run in an order of their own, the record so far."""
    model, tokenizer = models.load(given.model, device=given.device)
    pic = PIC(model, tokenizer, store_of(setting, model, tokenizer, folder), sinks=LINK.sinks)
    shuffle, runs = random.Random(given.seed), []
    served = setting.training + given.repeats * len(EIGHT + BESIDE) * setting.applications
    with tqdm(total=served, unit="application", desc="training") as bar:
        knowledge = learn(pic, setting, lambda running: bar.update())
        for repeat in range(given.repeats):
            ways: list[Way] = shuffle.sample(EIGHT + BESIDE, len(EIGHT + BESIDE))
            for way in ways:
                bar.set_description(f"{way.name}, repeat {repeat + 1}")
                runs.append(run(way, pic, knowledge, setting, repeat, lambda one: bar.update()))
            configuration = {
                "model": given.model,
                "device": given.device,
                "repeats": repeat + 1,
                **asdict(setting),
                "link": repr(LINK),
                "policy": repr(setting.policy),
            }
            where, trained = environment(), knowledge.record()
            yield summed({"configuration": configuration, "environment": where}, trained, runs)


def summed(about: dict, trained: dict, runs: list[dict]) -> dict:
    """The whole record, of what was run, of the training stream and of the runs of all arms."""
    asked = about["configuration"]
    setting = Setting(**{name: asked[name] for name in Setting.__dataclass_fields__})
    knowledge = Knowledge.of_record(trained, setting.cost)
    graphs = {name: str(graph) for name, graph in knowledge.graphs.items()}
    of_runs = summary(runs, setting, knowledge)
    return {**about, "graphs": graphs, **of_runs, "training": trained, "runs": runs}


def again(folder: Path) -> dict:
    """The record of a folder once more, of the runs that it holds."""
    stored = json.loads((folder / "agents.json").read_text())
    runs = json.loads(gzip.decompress((folder / "agents_runs.json.gz").read_bytes()))
    about = {name: stored[name] for name in ("configuration", "environment")}
    return summed(about, stored["training"], runs)


def write(record: dict, folder: Path) -> None:
    """The record and its picture; every call of every run in a file beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = {name: each for name, each in record.items() if name != "runs"}
    (folder / "agents.json").write_text(json.dumps(shown, indent=1) + "\n")
    # No time in its header: the same runs are the same bytes.
    packed = gzip.compress(json.dumps(record["runs"]).encode(), mtime=0)
    (folder / "agents_runs.json.gz").write_bytes(packed)
    draw(record, folder / "agents.png")


def main() -> None:
    given = arguments()
    if given.again:
        write(again(given.again), given.again)
        return
    setting = setting_of(given)
    with tempfile.TemporaryDirectory() as folder:
        for record in measure(given, setting, Path(folder)):
            if given.out:
                write(record, given.out)
    print(text_of(record))
    if given.out:
        print(f"wrote {given.out / 'agents.json'}, agents_runs.json.gz and agents.png")


if __name__ == "__main__":
    main()
