"""Files of problems and of texts: the forms that are read, and what is said of others."""

import json
import re
from pathlib import Path

import pytest

from picache import PICacheError, Problem, load_problems
from picache.problem_file import holds_texts, load_texts

PASSAGES = Path(__file__).parents[2] / "examples" / "data" / "passages.json"
PLAIN = [
    {"documents": ["a", "b"], "question": "q", "answers": ["x", "y"], "instruction": "i"},
    {"documents": ["c"], "question": "r", "lead": "l", "source": "ignored"},
]
READ = (Problem(("a", "b"), "q", ("x", "y"), "i"), Problem(("c",), "r", (), "", "l"))


def written(folder, content, name="f.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_list_and_lines_are_the_same_problems(tmp_path):
    assert load_problems(written(tmp_path, PLAIN)) == READ
    lines = "\n\n".join(map(json.dumps, PLAIN)) + "\n"
    assert load_problems(str(written(tmp_path, lines, "f.jsonl"))) == READ


def test_every_question_on_passages_stands_with_its_own_passage_among_others():
    data = json.loads(PASSAGES.read_text())
    texts = [passage["text"] for passage in data["passages"]]
    problems = load_problems(PASSAGES, documents=5)
    assert len(problems) == len(data["questions"])
    places = []
    for problem, entry in zip(problems, data["questions"], strict=True):
        assert problem.question == entry["question"]
        assert problem.answers == (entry["answer"],)
        assert problem.lead == entry["lead"]
        assert len(set(problem.documents)) == len(problem.documents) == 5
        assert set(problem.documents) <= set(texts)
        places.append(problem.documents.index(texts[entry["passage"]]))
    assert set(places) == set(range(5))  # it is not always the first
    used = {text for problem in problems for text in problem.documents}
    assert used == set(texts)


def test_the_seed_draws_and_a_question_keeps_its_documents(tmp_path):
    assert load_problems(PASSAGES) == load_problems(PASSAGES)
    assert load_problems(PASSAGES) != load_problems(PASSAGES, seed=1)
    data = json.loads(PASSAGES.read_text())
    data["questions"] = data["questions"][:7]
    assert load_problems(written(tmp_path, data)) == load_problems(PASSAGES)[:7]
    alone = load_problems(PASSAGES, documents=1)
    assert all(len(problem.documents) == 1 for problem in alone)
    every = load_problems(PASSAGES, documents=len(data["passages"]))
    assert all(len(set(problem.documents)) == len(data["passages"]) for problem in every)


def test_an_instruction_stands_before_the_passages(tmp_path):
    question = {"passage": 1, "question": "q", "answer": "x"}
    passages = [{"text": "a"}, {"text": "b"}]
    data = {"instruction": "Read.", "passages": passages, "questions": [question]}
    path = written(tmp_path, data)
    assert load_problems(path, documents=1) == (Problem(("b",), "q", ("x",), "Read."),)


def passages(passage=0, question="q", answer="x", texts=("a", "b"), **fields):
    entry = {"passage": passage, "question": question, "answer": answer}
    return {"passages": [{"text": t} for t in texts], "questions": [entry, {**entry, **fields}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"f\.json is no JSON .*expected a list of"),
        ("[" * 100_000, r"f\.json is no JSON"),
        ([], r"f\.json holds an empty list; expected a list of"),
        ({}, r"f\.json holds an object with nothing; expected"),
        ({"texts": ["t"]}, r"f\.json holds an object with 'texts'; expected"),
        (3, r"f\.json holds 3; expected"),
        (["q"], r"f\.json, problem 0: expected an object with \"documents\" and .*, got 'q'"),
        ([PLAIN[0], {"documents": ["a"]}], r"problem 1: expected an object with \"documents\""),
        ([{"documents": "abc", "question": "q"}], r"0: expected \"documents\" to be a list"),
        ([{"documents": ["a"], "question": "q", "answers": "x"}], r"\"answers\" to be a list"),
        ([{"documents": [], "question": "q"}], r"f\.json, problem 0: .*at least one document"),
        ([{"documents": [1], "question": "q"}], r"f\.json, problem 0: documents must be a tuple"),
        ([{"documents": ["a"], "question": 1}], r"f\.json, problem 0: question must be a text"),
        ([{"documents": ["a"], "question": "q", "lead": 1}], r"problem 0: expected \"lead\" to be"),
        (passages(passage=2), r"question 0: expected \"passage\" to be .*0 to 1, got 2"),
        (passages(passage=True), r"question 0: expected \"passage\" .*got True"),
        (passages(passage="a"), r"question 0: expected \"passage\" .*got 'a'"),
        (passages(passage=-1), r"question 0: expected \"passage\" .*got -1"),
        (passages(answer=None), r"question 0: expected an object with a text \"answer\""),
        (passages(question=""), r"question 0: expected an object with a text \"question\""),
        (passages(lead=3), r"question 1: expected \"lead\" to be a text, got 3"),
        (passages(texts=("a", "")), r"passage 1: expected an object with a text \"text\""),
        ({"passages": [], "questions": []}, r"f\.json: expected a list of passages, got \[\]"),
        (passages(texts=("a",)), r"has 1 passages and documents=2 were asked for: give at most 1"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_problems_is_named(tmp_path, content, message):
    with pytest.raises(PICacheError, match=message):
        load_problems(written(tmp_path, content), documents=2)


def test_a_bad_line_is_named_by_its_number(tmp_path):
    path = written(tmp_path, json.dumps(PLAIN[0]) + "\n\n{", "f.jsonl")
    with pytest.raises(PICacheError, match=r"f\.jsonl, line 3 is no JSON"):
        load_problems(path)


@pytest.mark.parametrize("documents", [0, 1.5, "5", True])
def test_a_count_of_documents_is_a_whole_number(documents):
    with pytest.raises(PICacheError, match="whole number of documents"):
        load_problems(PASSAGES, documents=documents)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(PICacheError, match=r"none\.json cannot be read .*expected a list of"):
        load_problems(tmp_path / "none.json")
    with pytest.raises(PICacheError, match=re.escape(str(tmp_path))):
        load_problems(tmp_path)
    (tmp_path / "f.json").write_bytes(b"\xff\xfe[")
    with pytest.raises(PICacheError, match="cannot be read"):
        load_problems(tmp_path / "f.json")


def test_texts_are_read_from_either_form(tmp_path):
    listed = {"about": "ours", "texts": [{"title": "T", "source": "s", "text": "one"}, "two"]}
    assert load_texts(written(tmp_path, listed)) == ("one", "two")
    assert load_texts(written(tmp_path, "three\n\nmore", "f.txt")) == ("three\n\nmore",)


def test_a_file_of_texts_is_known_by_its_form(tmp_path):
    assert holds_texts(tmp_path / "need-not-be-read.txt")
    assert holds_texts(written(tmp_path, {"texts": []}))
    assert not holds_texts(written(tmp_path, PLAIN))
    assert not holds_texts(PASSAGES)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("f.txt", " \n", r"f\.txt is empty"),
        ("f.json", [], r"f\.json holds an empty list; expected \{\"texts\""),
        ("f.json", {"texts": []}, r"f\.json holds an object with 'texts'; expected"),
        ("f.json", {"texts": "abc"}, r"f\.json holds an object with 'texts'; expected"),
        ("f.json", {"texts": ["a", " "]}, r"f\.json, text 1: expected a text .*got ' '"),
        ("f.json", {"texts": [{"title": "a"}]}, r"f\.json, text 0: expected a text"),
    ],
)
def test_what_is_no_file_of_texts_is_named(tmp_path, name, content, message):
    with pytest.raises(PICacheError, match=message):
        load_texts(written(tmp_path, content, name))
