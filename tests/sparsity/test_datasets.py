"""Rows of the published formats of GSM8K, MATH-500 and AIME, and their local files."""

import json
import sys
from pathlib import Path

import pytest

from sparsity import Problem, SparsityError
from sparsity.datasets import DATASETS, load
from sparsity.datasets.table import ASK
from sparsity.grader import plainly
from sparsity.problem import final_answer

DATA = Path(__file__).parents[3] / "shared" / "data"
LATEX = r"\frac{1}{2}"
CASES = [
    ("gsm8k", {"question": "q", "answer": "1 + 1234 = <<1+1234=1235>>1235\n#### 1,235"}, "1235"),
    ("math500", {"problem": "q", "solution": "s", "answer": LATEX, "subject": "Algebra",
                 "level": 1, "unique_id": "u"}, LATEX),
    ("aime", {"id": 60, "problem": "q", "solution": "s", "answer": "025", "url": "", "year": 2024},
     "025"),
    ("aime", {"ID": "2024-I-1", "Problem": "q", "Solution": "s", "Answer": 25}, "25"),
    ("aime", {"prompt": f"q\n{ASK}", "answer": 25}, "25"),
]  # fmt: skip


def written(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize(("name", "row", "answer"), CASES)
def test_a_row_of_each_format(tmp_path, name, row, answer):
    assert load(name, path=written(tmp_path, [row])) == (Problem(f"q\n{ASK}", (answer,)),)


def test_the_limit_and_json_as_a_list(tmp_path):
    rows = [CASES[0][1]] * 3
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert len(load("gsm8k", path=tmp_path / "rows.json")) == 3
    assert len(load("gsm8k", path=tmp_path / "rows.json", limit=2)) == 2


def test_parquet_is_read_by_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="pip install 'picache[datasets]'")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_list([CASES[1][1]]).to_parquet(tmp_path / "a.parquet")
    assert load("math500", path=tmp_path / "a.parquet")[0].answers == (LATEX,)


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
    known = DATASETS[name]
    load(name)
    load(name, split="train[:1]")
    assert asked == [
        (known.repository, known.subset, split) for split in (known.split, "train[:1]")
    ]


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("gsm8k", [], "has no rows"),
        ("gsm8k", [{"question": "q"}], "row 0, is no row of gsm8k (KeyError: 'answer'); expected"),
        ("gsm8k", [{"question": "q", "answer": "5"}], "no #### in the answer '5'"),
        ("aime", [{"question": "q", "answer": "5"}], "(KeyError: 'problem'); expected the columns"),
        ("math500", [{"problem": 5, "answer": "5"}], "row 0, is no row of math500"),
    ],
)
def test_a_file_that_is_not_so_is_named_in_one_line(tmp_path, name, rows, said):
    with pytest.raises(SparsityError) as caught:
        load(name, path=written(tmp_path, rows))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_not_to_be_had(monkeypatch):
    with pytest.raises(SparsityError, match="no data set 'math'; there are gsm8k, math500, aime"):
        load("math")
    with pytest.raises(SparsityError, match="leave out split"):
        load("aime", path="a.json", split="train")
    with pytest.raises(SparsityError, match="limit"):
        load("aime", path="a.json", limit=0)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SparsityError, match=r"give path=FILE.*pip install 'picache\[datasets\]'$"):
        load("aime")


@pytest.mark.parametrize(
    ("name", "file", "solution", "count"),
    [
        ("gsm8k", "gsm8k/test.jsonl", "answer", 801),
        ("math500", "math500/test.jsonl", "solution", 304),
        ("aime", "aime/aime24.jsonl", None, 30),
    ],
)
def test_the_data_sets_own_solutions_are_right(name, file, solution, count):
    if not (DATA / file).exists():
        pytest.skip(f"the data set's file is not in {DATA}")
    problems = load(name, path=DATA / file)
    rows = [json.loads(line) for line in (DATA / file).read_text().splitlines()]
    assert len(problems) == len(rows) == count
    for problem, row in zip(problems, rows, strict=True):
        (answer,) = problem.answers
        assert problem.prompt.count(r"\boxed{}") == 1
        if solution:
            assert plainly(final_answer(row[solution]), answer) is True
        else:
            assert 0 <= int(answer) <= 999
