"""All three packages in one run: the loop, its applications, what fails, and what a seed fixes."""

import inspect
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from demand import FCFS, CostModel, Execution, Gittins, Unit
from picache import PIC, ChunkStore, DummySinks, FullRecompute, LegoLink
from sparsity import StreamingLLM, detach
from tests.helpers import tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import agents
from serving import experiment, tables
from serving.applications import MIX, Call, Task, contents, is_right, steps, stream
from serving.factorial import effects, over_repeats, share_interval
from serving.knowledge import Knowledge
from serving.library import pages, question, search
from serving.loop import VirtualClock, serve_stream
from serving.model_server import ModelServer, Served
from serving.prompts import document_ids, pieces
from serving.replay import replays

SETTING = experiment.Setting(
    pages=6,
    sentences=1,
    applications=2,
    training=2,
    seconds_between=1e-9,  # all there at once, so that order is not up to time
    budget=64,
    prefill_seconds=1e-6,  # a unit is shorter than a prefetch, which then begins with it
    decode_seconds=1e-5,
    replayed=4,
    seed=2,
)
LIBRARY = SETTING.library()
COST = CostModel(0.01, 0.1)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word, of the words that the library and its questions use."""
    texts = [page.text for page in LIBRARY] + [contents(LIBRARY)]
    texts += [q.text + " " + q.lead for p in LIBRARY for f in p.facts for q in [question(p, f)]]
    split = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: place for place, word in enumerate(["<unk>", "<bos>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_model("llama", vocab_size=512, max_position_embeddings=1024)


@pytest.fixture
def pic(model, tmp_path) -> Iterator[PIC]:
    """Of a store with room for two pages in memory, and all on disk."""
    tokenizer = word_tokenizer()
    longest = max(len(document_ids(page.text, tokenizer)) for page in LIBRARY)
    token_bytes = 2 * 4 * 2 * 16 * 4  # keys and values of 4 layers, 2 heads of 16 in fp32
    store = ChunkStore(device_bytes=2 * (longest + 4) * token_bytes, path=tmp_path)
    yield PIC(model, tokenizer, store, DummySinks(4), flops_per_byte=None)
    detach(model)


def knowing() -> Knowledge:
    """A lookup takes 2 or 3 seconds, a brief 20, a checked answer 5."""
    runs = {
        name: [[Execution(Unit("answer", "llm"), 100, tokens)] for tokens in of]
        for name, of in {"lookup": (10, 20), "brief": (190,), "checked": (40,)}.items()
    }
    return Knowledge(runs, COST)


def right_words(call: Call) -> str:
    """What a model that finds everything would write."""
    for page in LIBRARY:
        for fact in page.facts:
            asked = question(page, fact)
            if call.lead == asked.lead:
                return f" {asked.answer}."
    towns = [page.town for page in LIBRARY if any(page.text == text for text in call.documents)]
    return towns[0] if towns else "nothing"


def written(text: str) -> Served:
    return Served(text, 100, 100, 10, 0.5, 1.0, 1.0, 1.0, 0)


def by_a_perfect_model(running, at_token) -> Served:
    at_token()
    return written(right_words(running.call))


def lookup(number: int, place: int = 0) -> Task:
    return Task(number, "lookup", (question(LIBRARY[place], "river"),), f"{number}")


def brief(number: int, towns: int = 3) -> Task:
    asked = tuple(question(page, "month") for page in LIBRARY[:towns])
    return Task(number, "brief", asked, f"{number}")


# What is asked


def test_a_page_tells_each_fact_and_is_found_by_its_town():
    for page in LIBRARY:
        for fact in page.facts:
            asked = question(page, fact)
            assert f"{asked.lead} {asked.answer}".split()[-1] in page.text
            assert search(LIBRARY, asked.text, 3)[0] == page
    assert pages(6, 1, 2) == LIBRARY != pages(6, 1, 1)
    with pytest.raises(ValueError, match="25 pages are asked for, and there are 24"):
        pages(25, 1, 0)


def test_a_stream_has_every_application_and_is_fixed_by_its_seed():
    tasks = stream(LIBRARY, 12, "a")
    assert {task.application for task in tasks} == set(MIX)
    assert tasks == stream(LIBRARY, 12, "a") != stream(LIBRARY, 12, "b")
    assert all(2 <= len(t.questions) <= 4 for t in tasks if t.application == "brief")


def test_an_answer_is_right_by_its_first_words():
    assert is_right(" Ellen Marsh, a miller.", "Ellen Marsh")
    assert not is_right("Ellen Frost", "Ellen Marsh")
    assert not is_right("", "June")


def units_of(task: Task, write) -> tuple[list[str], list[str]]:
    """The units that an application goes through, and its answers."""
    application, units = steps(task, LIBRARY), []
    call = next(application)
    while True:
        units.append(call.unit)
        try:
            call = application.send(write(call))
        except StopIteration as ended:
            return units, ended.value


def test_applications_are_of_several_calls_and_right_where_the_model_is():
    assert units_of(lookup(0), right_words)[0] == ["retrieve", "answer"]
    units, notes = units_of(brief(0), right_words)
    assert units == ["retrieve", "read"] * 3 + ["answer"]
    assert all(map(is_right, notes, brief(0).expected))


def test_a_checked_answer_is_asked_back_at_most_three_times():
    task = replace(lookup(0), application="checked")
    town = task.questions[0].town

    def doubting(call: Call) -> str:
        return "Atlantis" if call.unit == "check" else right_words(call)

    def sure(call: Call) -> str:
        return town if call.unit == "check" else right_words(call)

    assert units_of(task, sure)[0] == ["retrieve", "answer", "check"]
    assert units_of(task, doubting)[0] == ["retrieve"] + ["answer", "check"] * 3


# The loop


def test_order_is_the_policys_and_time_the_clocks():
    tasks = [(0.0, brief(0)), (0.5, lookup(1)), (0.5, lookup(2))]

    def completions(policy) -> list[float]:
        done = serve_stream(tasks, LIBRARY, by_a_perfect_model, policy, knowing(), VirtualClock())
        assert all(all(map(is_right, one.answers, one.task.expected)) for one in done)
        return [one.completion for one in done]

    # The brief takes 7 seconds; the first of them passes before the others come.
    assert completions(FCFS()) == [7.0, 8.5, 10.5]
    assert completions(Gittins()) == [11.0, 2.5, 4.5]


def test_a_call_that_raises_ends_its_application_and_no_other():
    tasks = [(0.0, brief(0)), (0.0, lookup(1)), (0.0, lookup(2))]

    def serve(running, at_token) -> Served:
        if running.task.number == 1 and len(running.served) == 1:
            raise ConnectionError("the server is gone")
        return by_a_perfect_model(running, at_token)

    done = serve_stream(tasks, LIBRARY, serve, Gittins(), knowing(), VirtualClock())
    assert [one.error for one in done] == ["", "ConnectionError: the server is gone", ""]
    assert [len(one.answers) for one in done] == [3, 0, 1]
    assert done[1].completion > 0.0


def test_replays_bring_the_recorded_answers_and_an_oracle_is_ahead():
    recorded = {}
    for arm, speed in (("slow", 1.0), ("fast", 0.25)):
        calls = serve_stream(
            [(0.0, brief(0)), (0.0, lookup(1))],
            LIBRARY,
            by_a_perfect_model,
            FCFS(),
            knowing(),
            VirtualClock(),
        )
        recorded[arm] = [
            (one.task, [replace(served, processor_seconds=speed) for served, _, _ in one.served])
            for one in calls
        ]
    rows = replays(recorded, LIBRARY, knowing(), [0.9], applications=40, seeds=2)
    means = {(row["arm"], row["order"]): sum(row["means"]) for row in rows}
    assert means["slow", "oracle"] <= means["slow", "Gittins"] < means["slow", "FCFS"]
    assert means["fast", "FCFS"] < means["slow", "FCFS"]


# On a model


def texts(server: ModelServer, calls: list[Call]) -> list[str]:
    return [server.serve(call).text for call in calls]


def some_calls() -> list[Call]:
    calls = []
    units_of(brief(0, towns=2), lambda call: calls.append(call) or right_words(call))
    return calls


def test_linked_in_full_and_kept_whole_is_the_full_prompt(pic):
    calls = some_calls()[:2]
    dense = texts(ModelServer(pic), calls)
    assert all(dense)
    assert texts(ModelServer(pic, FullRecompute()), calls) == dense
    assert texts(ModelServer(pic, FullRecompute(), StreamingLLM(600)), calls) == dense
    assert texts(ModelServer(pic, LegoLink(0), StreamingLLM(40)), calls) != dense


def test_a_prompt_is_its_pieces(pic):
    call = some_calls()[1]
    first, documents, query = pieces(call, pic.tokenizer)
    assert len(documents) == len(call.documents) == 4
    served = ModelServer(pic, LegoLink(2)).serve(call)
    assert served.prompt_tokens == len(first) + sum(map(len, documents)) + len(query)
    assert served.computed_tokens < served.prompt_tokens
    assert served.compiled == 4
    assert 0.0 < served.first_token_seconds < served.seconds


def test_the_same_seed_gives_the_same_run_in_any_order_but_for_time(pic):
    ended = []
    knowledge = experiment.learn(pic, SETTING, ended.append)
    assert len(ended) == SETTING.training
    assert all(not one.error for one in ended)
    ways = [experiment.Way(), experiment.Way(), experiment.Way(order="FCFS", prewarming=False)]
    runs = [experiment.run(way, pic, knowledge, SETTING, 0, ended.append) for way in ways]
    assert len(ended) == SETTING.training + 3 * SETTING.applications

    def untimed(run: dict) -> list:
        return [
            [one["number"], one["error"], one["answers"]]
            + [(call["unit"], call["text"], call["computed_tokens"]) for call in one["calls"]]
            for one in run["applications"]
        ]

    def order(run: dict) -> list[int]:
        begun = [(c["begun"], one["number"]) for one in run["applications"] for c in one["calls"]]
        return [number for _, number in sorted(begun)]

    assert untimed(runs[0]) == untimed(runs[1]) == untimed(runs[2])
    assert order(runs[0]) == order(runs[1])
    assert order(runs[0]) != order(runs[2])
    assert runs[0]["prewarming_counts"]["brought"] > 0
    assert runs[2]["prewarming_counts"] == {}


def test_a_chunk_file_damaged_while_serving_is_compiled_again(pic, tmp_path, monkeypatch):
    knowledge, way = knowing(), experiment.Way(prewarming=False)
    whole = experiment.run(way, pic, knowledge, SETTING, 0, lambda running: None)
    serve, served = ModelServer.serve, []

    def damaging(self, call, at_token):
        served.append(call)
        if len(served) == 3:
            for file in tmp_path.rglob("*.safetensors"):
                data = bytearray(file.read_bytes())
                data[-8] ^= 255
                file.write_bytes(data)
        return serve(self, call, at_token)

    monkeypatch.setattr(ModelServer, "serve", damaging)
    run = experiment.run(way, pic, knowledge, SETTING, 0, lambda running: None)
    calls = [call for one in run["applications"] for call in one["calls"]]
    assert sum(call["damaged"] for call in calls) > 0
    for one, other in zip(run["applications"], whole["applications"], strict=True):
        assert one["error"] == ""
        assert one["answers"] == other["answers"]


# What is made of it


def test_effects_of_times_that_multiply():
    factors = dict(zip(("link", "retention", "order"), (0.25, 1.5, 0.5), strict=True))
    times = {
        on: 8.0 * math.prod(f for f, is_on in zip(factors.values(), on, strict=True) if is_on)
        for on in product((False, True), repeat=3)
    }
    found = effects(times)
    for part, factor in factors.items():
        assert found[part] == pytest.approx(math.log(factor))
        assert found[f"{part} alone"] == pytest.approx(math.log(factor))
    assert found["measured"] == pytest.approx(math.log(0.25 * 1.5 * 0.5))
    assert found["left over"] == pytest.approx(0.0)
    times[True, True, True] *= 2.0
    found = effects(times)
    assert found["left over"] == pytest.approx(math.log(2.0))
    assert found["link x order"] == pytest.approx(math.log(2.0) / 2)


def test_intervals():
    entry = over_repeats([math.log(2.0), math.log(0.5), 0.0])
    assert entry["factor"] == pytest.approx(1.0)
    assert math.log(entry["interval"][1]) == pytest.approx(4.303 * math.log(2.0) / math.sqrt(3))
    assert over_repeats([0.0])["interval"] is None
    assert share_interval(8, 10) == pytest.approx([0.490, 0.943], abs=1e-3)


def test_a_summary_has_a_row_an_arm_and_can_be_made_again(tmp_path):
    small = replace(SETTING, applications=3)
    knowledge = knowing()

    def ran(way: experiment.Way, seconds: float) -> dict:
        clock = VirtualClock()
        done = serve_stream(
            small.arrivals(0),
            LIBRARY,
            lambda running, at_token: replace(
                by_a_perfect_model(running, at_token), seconds=seconds, processor_seconds=seconds
            ),
            experiment.ORDERS[way.order],
            knowledge,
            clock,
        )
        records = [experiment.record_of(one) for one in done]
        return {"arm": way.name, "repeat": 0, "prewarming_counts": {}, "applications": records}

    runs = [ran(way, 1.0 - 0.5 * way.link) for way in experiment.EIGHT]
    random.Random(0).shuffle(runs)
    about = {
        "configuration": {**asdict(small), "repeats": 1},
        "environment": dict.fromkeys(("hardware", "threads", "torch", "transformers"), "any"),
    }
    record = agents.summed(about, knowledge.record(), runs)
    agents.write(record, tmp_path)
    assert (tmp_path / "agents.png").stat().st_size > 0
    assert agents.again(tmp_path) == record
    link = record["contributions"]["mean completion"]["link"]
    assert link["factor"] == pytest.approx(0.5)
    assert all(row["right"] == row["answers"] == row["equal"] for row in record["arms"])
    text = tables.text_of(record)
    assert all(f"| {way.name} |" in text for way in experiment.EIGHT)


def test_continuous_batching_of_transformers_takes_token_ids_alone():
    """Why there is a loop of ours. Where this fails, a linked prompt may have found a way in."""
    takes = inspect.signature(ContinuousBatchingManager.add_request).parameters
    assert "input_ids" in takes
    assert not [name for name in takes if any(w in name for w in ("past", "cache", "kv", "embed"))]
