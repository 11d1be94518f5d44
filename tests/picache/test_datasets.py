"""Rows of every published format, local files of each kind, and what is said where one lacks."""

import builtins
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from picache import PICacheError, Problem
from picache.datasets import DATASETS, among, load, needles

DATA = Path(__file__).parents[3] / "shared" / "data"

PAIRS = [["Anna", ["Anna sings.", " She is from Rome."]], ["Ben", ["Ben sleeps."]]]
COLUMNS = {"title": ["Anna", "Ben"], "sentences": [parts for _, parts in PAIRS]}
HOP = {"question": "Where is Anna from?", "answer": "Rome"}
FACTS = ("Anna: Anna sings. She is from Rome.", "Ben: Ben sleeps.")
PARAGRAPHS = [{"idx": 0, "title": "Ben", "paragraph_text": "Ben sleeps.", "is_supporting": True}]
MUSIQUE = {"id": "1", "paragraphs": PARAGRAPHS, "question": "Who sleeps?", "answer": "Ben"}
QUESTION = {"id": "1", "question": "Who sleeps?", "answers": [{"text": "Ben", "answer_start": 0}]}
ARTICLE = {"title": "A", "paragraphs": [{"context": "Ben sleeps.", "qas": [QUESTION]}]}
LONG = {"_id": "1", "all_classes": None, "language": "en", "length": 9}
ASKED = ("Read the passages and answer the question.", "The answer is")

CASES = [
    ("squad", {"title": "A", "context": "Ben sleeps.", "question": "Who sleeps?",
               "answers": {"text": ["Ben", "Ben"], "answer_start": [0, 0]}},
     Problem(("Ben sleeps.",), "Who sleeps?", ("Ben", "Ben"), *ASKED)),
    ("squad", ARTICLE, Problem(("Ben sleeps.",), "Who sleeps?", ("Ben",), *ASKED)),
    ("hotpotqa", {**HOP, "id": "1", "context": COLUMNS, "type": "bridge", "level": "easy"},
     Problem(FACTS, HOP["question"], ("Rome",), *ASKED)),
    ("hotpotqa", {**HOP, "_id": "1", "context": PAIRS},
     Problem(FACTS, HOP["question"], ("Rome",), *ASKED)),
    ("hotpotqa", {"_id": "1", "question": HOP["question"], "context": PAIRS},  # the test split
     Problem(FACTS, HOP["question"], (), *ASKED)),
    ("2wikimqa", {**HOP, "context": PAIRS, "evidences": [["Anna", "from", "Rome"]]},
     Problem(FACTS, HOP["question"], ("Rome",), *ASKED)),
    ("musique", {**MUSIQUE, "answer_aliases": ["Benny"], "answerable": True},
     Problem(("Ben: Ben sleeps.",), "Who sleeps?", ("Ben", "Benny"), *ASKED)),
    ("samsum", {"id": "1", "dialogue": "Anna: hi\r\nBen: bye", "summary": "They meet."},
     Problem(("Anna: hi\r\nBen: bye",), "Summarize the dialogue above.", ("They meet.",), "",
             "Summary:")),
    ("multi_news", {"document": "One. \n ||||| Two. ||||| ", "summary": "\u2013 Both."},
     Problem(("One.", "Two."), "Summarize the news articles above.", ("Both.",), "", "Summary:")),
    ("longbench", {**LONG, "input": "Who?", "answers": ["Ben"], "dataset": "2wikimqa_e",
                   "context": "Passage 1:\nAnna\nsings.\nPassage 2:\nBen\nsleeps."},
     Problem(("Passage 1:\nAnna\nsings.", "Passage 2:\nBen\nsleeps."), "Who?", ("Ben",), *ASKED)),
]  # fmt: skip

SUMMARIES = {**LONG, "input": "", "answers": ["Short."], "context": "Long."}


def written(folder, rows, name="rows.jsonl"):
    path = folder / name
    lines = "\n".join(map(json.dumps, rows)) if ".jsonl" in name else json.dumps(rows)
    path.write_bytes(gzip.compress(lines.encode()) if name.endswith(".gz") else lines.encode())
    return path


@pytest.mark.parametrize(("name", "row", "problem"), CASES)
def test_a_row_of_each_format(tmp_path, name, row, problem):
    assert load(name, path=written(tmp_path, [row])) == (problem,)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"])
def test_files_of_each_kind_are_read_alike_and_to_the_limit(tmp_path, name):
    rows = [{"dialogue": f"d{i}", "summary": f"s{i}"} for i in range(3)]
    problems = load("samsum", path=written(tmp_path, rows, name))
    assert [p.documents for p in problems] == [("d0",), ("d1",), ("d2",)]
    assert load("samsum", path=tmp_path / name, limit=2) == problems[:2]


def test_the_object_of_squad_holds_its_rows_under_data(tmp_path):
    path = written(tmp_path, {"version": "1.1", "data": [ARTICLE, ARTICLE]}, "dev-v1.1.json")
    assert len(load("squad", path=path)) == 2


def test_rows_that_ask_nothing_are_left_out(tmp_path):
    unanswerable = {**QUESTION, "answers": [], "is_impossible": True}
    article = {"paragraphs": [{"context": "Ben sleeps.", "qas": [unanswerable, QUESTION]}]}
    assert len(load("squad", path=written(tmp_path, [article]))) == 1
    rows = [{**MUSIQUE, "answer_aliases": [], "answerable": known} for known in (False, True)]
    assert len(load("musique", path=written(tmp_path, rows))) == 1
    rows = [{"document": " ||||| ", "summary": "s"}, {"document": "d", "summary": "s"}]
    assert [p.documents for p in load("multi_news", path=written(tmp_path, rows))] == [("d",)]


@pytest.mark.parametrize(
    "subset",
    "narrativeqa qasper multifieldqa_en multifieldqa_zh hotpotqa 2wikimqa musique dureader "
    "gov_report qmsum multi_news vcsum trec triviaqa samsum lsht passage_count "
    "passage_retrieval_en passage_retrieval_zh lcc repobench-p".split(),
)
def test_longbench_asks_something_of_every_subset(tmp_path, subset):
    with_input = subset not in ("gov_report", "multi_news", "vcsum", "passage_count", "lcc")
    row = {**SUMMARIES, "dataset": subset, "input": "asked" if with_input else ""}
    (problem,) = load("longbench", path=written(tmp_path, [row]))
    assert problem.question.strip()
    assert problem.documents == ("Long.",)
    assert problem.question.startswith("asked") == with_input


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_tables_are_read_by_datasets(tmp_path, kind, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="pip install 'picache[datasets]'")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    made = datasets.Dataset.from_list([{"dialogue": "d", "summary": "s"}] * 2)
    getattr(made, f"to_{kind}")(tmp_path / f"a.{kind}")
    assert [p.answers for p in load("samsum", path=tmp_path / f"a.{kind}")] == [("s",)] * 2


def test_columns_of_hotpotqa_come_back_from_parquet(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="pip install 'picache[datasets]'")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_list([{**HOP, "context": COLUMNS}]).to_parquet(tmp_path / "a.parquet")
    assert load("hotpotqa", path=tmp_path / "a.parquet")[0].documents == FACTS


@pytest.mark.parametrize("name", DATASETS)
def test_the_hub_is_asked_for_what_the_table_says(monkeypatch, name):
    """`datasets` is stood in for: there may be no network."""
    asked = []

    class Stand:
        @staticmethod
        def load_dataset(*given, split):
            asked.append((*given, split))
            return [next(row for known, row, _ in CASES if known == name)]

    monkeypatch.setitem(sys.modules, "datasets", Stand)
    subset = {"subset": "2wikimqa"} if name == "longbench" else {}
    load(name, **subset)
    known = DATASETS[name]
    assert asked == [(known.repository, known.subset or subset.get("subset"), known.split)]
    load(name, split="train[:1]", subset="other")
    assert asked[1] == (known.repository, "other", "train[:1]")


def test_a_failure_of_the_hub_is_one_line(monkeypatch):
    class Stand:
        @staticmethod
        def load_dataset(*given, split):
            raise ConnectionError("no route\nand a screen of it")

    monkeypatch.setitem(sys.modules, "datasets", Stand)
    with pytest.raises(PICacheError, match=r"hub: give path=FILE.*ConnectionError: no route\)$"):
        load("squad")


def test_without_the_library_the_error_says_what_to_install(monkeypatch, tmp_path):
    found = builtins.__import__

    def missing(name, *rest):
        if name == "datasets":
            raise ImportError(name)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    for given in ({}, {"path": tmp_path / "a.parquet"}):
        with pytest.raises(PICacheError, match=r"^[^\n]*pip install 'picache\[datasets\]'$"):
            load("hotpotqa", **given)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", "{", "a.json cannot be read: JSONDecodeError"),
        ("a.json", "{}", "holds no rows"),
        ("a.json", "[1]", "holds no rows"),
        ("a.json.gz", "[]", "cannot be read: BadGzipFile"),
        ("a.txt", "a", "expected a file whose name ends with .json"),
        ("a.jsonl", "", "no row that asks anything"),
        ("a.jsonl", '{"dialogue": "d"}', "row 0, is no row of samsum (KeyError: 'summary'); expec"),
        ("a.jsonl", '{"dialogue": 1, "summary": "s"}', "row 0, is no row of samsum"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_so_is_named_in_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(PICacheError) as caught:
        load("samsum", path=tmp_path / name)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("context", ["text", [["Anna", "sings"]], [{"title": "a", "text": "b"}]])
def test_a_context_of_another_form_is_refused(tmp_path, context):
    with pytest.raises(PICacheError, match="is no row of hotpotqa"):
        load("hotpotqa", path=written(tmp_path, [{**HOP, "context": context}]))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("squid",), "no data set 'squid'; there are squad, "),
        (("longbench",), "longbench has subsets: give one"),
    ],
)
def test_what_is_not_to_be_had(given, said):
    with pytest.raises(PICacheError, match=said):
        load(*given)


@pytest.mark.parametrize("given", [{"split": "test"}, {"subset": "distractor"}])
def test_a_file_has_no_splits(given):
    with pytest.raises(PICacheError, match="one file: leave out"):
        load("hotpotqa", path="a.json", **given)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True])
def test_a_limit_that_is_no_count(limit):
    with pytest.raises(PICacheError, match="whole number as limit"):
        load("samsum", path="a.json", limit=limit)


@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("squad", "xquad_en/xquad.en.json", 607),
        ("hotpotqa", "hotpotqa/hotpotqa_train_100.jsonl.gz", 54),
        ("musique", "musique/musique_train_100.json.gz", 100),
    ],
)
def test_the_answer_stands_in_the_documents_where_that_is_promised(name, file, count):
    if not (DATA / file).exists():
        pytest.skip(f"the data set's file is not in {DATA}")
    assert DATASETS[name].answer_inside
    problems = load(name, path=DATA / file)
    assert len(problems) == count
    for problem in problems:
        assert problem.answers[0] in ("yes", "no") or any(
            problem.answers[0] in document for document in problem.documents
        )


def test_questions_among_the_documents_of_others():
    problems = [Problem((f"{word} is here",), "q", (word,)) for word in "ab cd ef gh ij".split()]
    mixed = among(problems, 3, seed=1)
    assert mixed == among(problems, 3, seed=1) != among(problems, 3, seed=2)
    assert mixed[:2] != among(problems[:3], 3, seed=1)[:2]  # drawn from other documents
    for problem, own in zip(mixed, problems, strict=True):
        assert len(set(problem.documents)) == 3
        assert [own.answers[0] in document for document in problem.documents].count(True) == 1
        assert own.documents[0] in problem.documents
    with pytest.raises(PICacheError, match="problem 0 has 1 documents and all together 5"):
        among(problems, 6)


def test_a_document_with_the_answer_is_not_added():
    texts = ("Ben", "ben too", "Anna", "Carl", "Dora")
    problems = [Problem((text,), "q", ("Ben",)) for text in texts]
    for seed in range(9):
        assert not {"Ben", "ben too"} & set(among(problems, 3, seed=seed)[2].documents)
    with pytest.raises(PICacheError, match="without those that hold its answer, documents=4"):
        among(problems, 4)


def test_a_needle_stands_in_each_document_and_one_answers():
    problems = needles(20, documents=5, repeats=2)
    assert problems == needles(30, documents=5, repeats=2)[:20]
    assert problems != needles(20, documents=5, repeats=2, seed=1)
    for problem in problems:
        key = problem.question.split()[7]
        (answer,) = problem.answers
        hits = [f"for {key} is: {answer}." in document for document in problem.documents]
        assert hits.count(True) == 1
        assert [document.count(" is: ") for document in problem.documents] == [1] * 5
        assert sum(answer in document for document in problem.documents) == 1
        assert key in problem.lead
    places = [hits.index(True) for p in problems
              for hits in [[p.answers[0] in d for d in p.documents]]]  # fmt: skip
    assert set(places) == set(range(5))


@pytest.mark.parametrize("given", [{"count": 0}, {"documents": 169}, {"repeats": 0}])
def test_needles_out_of_bounds(given):
    with pytest.raises(PICacheError):
        needles(**{"count": 1, **given})


def test_the_code_of_the_page_runs(monkeypatch, tmp_path):
    """With rows of the formats for the hub's, and a tokenizer of characters."""
    rows = {DATASETS[name].repository: row for name, row, _ in CASES}
    others = [
        {**CASES[0][1], "context": f"Text {i}.", "answers": {"text": [f"{i}."]}}
        for i in range(10, 30)
    ]
    hub = {
        **{repository: [row] for repository, row in rows.items()},
        "rajpurkar/squad": others,
        "HuggingFaceH4/MATH-500": [{"problem": "p", "answer": "1"}],
    }
    stand = SimpleNamespace(load_dataset=lambda repository, *rest, split: hub[repository])
    monkeypatch.setitem(sys.modules, "datasets", stand)
    monkeypatch.chdir(tmp_path)
    written(tmp_path, [{**HOP, "context": PAIRS}], "hotpot_dev_distractor_v1.json")
    characters = Tokenizer(models.WordLevel({"a": 0, ".": 1}, unk_token="a"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters)
    names = {"text": "A first line.\n\nA second. " * 50, "tokenizer": tokenizer}
    page = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "docs/datasets.md", "exec"), names)
    assert len(names["problems"]) == 100
    assert len(names["chunks"]) > 2
    assert all(f"| `{name}` | {known.repository}" in page for name, known in DATASETS.items())


def test_nothing_imports_the_library_before_it_is_needed():
    code = (
        "import sys, picache, sparsity, picache.datasets, sparsity.datasets, sparsity.grader\n"
        "assert not {'datasets', 'math_verify', 'sympy.parsing.latex'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
