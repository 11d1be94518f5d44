"""The code of every page of docs runs as written, block by block, and files it names are there.

Two comments in a page, right in front of a block, speak to these tests:

- ``<!-- given: model, tokenizer -->``: the block begins with these names, of which the page says
  what they are; `tests.docs_given` makes them, tiny. A name with a dot is a file.
- ``<!-- not run: needs vLLM -->``: the block is not run here, for that reason. It is compiled, what
  it imports is imported, its names are there, and calls of the library's own fit the signatures.
"""

import ast
import asyncio
import builtins
import importlib
import inspect
import json
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from picache import load_problems
from tests.docs_given import GIVEN

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
OURS = ("picache", "sparsity", "demand")
REASONS = ("needs a GPU", "needs a network", "needs a server", "needs SmolLM2", "needs vLLM")
_MARK = re.compile(r"<!-- (given|not run): (.*?) -->")
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its code, where it begins, and what the comment in front of it says."""

    page: Path
    line: int
    language: str
    code: str
    given: tuple[str, ...]
    not_run: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.code)

    def compiled(self) -> Any:
        """Code that may await at its top, as a notebook's."""
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        return compile("\n" * (self.line - 1) + self.code, str(self), "exec", flags=flags)


def blocks_of(page: Path) -> list[Block]:
    text, blocks, end = page.read_text(), [], 0
    for found in _FENCE.finditer(text):
        between = text[end : found.start()].rstrip().rsplit("\n\n", 1)[-1]
        marks = dict(_MARK.findall(between))
        given = tuple(name.strip() for name in marks.get("given", "").split(",") if name.strip())
        line = text.count("\n", 0, found.start()) + 2
        reason = marks.get("not run", "")
        blocks.append(Block(page, line, found[2], found[3], given, reason))
        end = found.end()
    return blocks


BLOCKS = {page: blocks_of(page) for page in PAGES}
PYTHON = {
    page: [block for block in blocks if block.language == "python"]
    for page, blocks in BLOCKS.items()
}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT / "docs").with_suffix("").as_posix()


def defined(tree: ast.Module) -> set[str]:
    """Names that code binds, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return found


def imported(block: Block, names: dict[str, Any]) -> None:
    """Do a block's imports, but for those of what its reason names."""
    for node in ast.walk(block.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            if f"needs {module}".lower() != block.not_run.lower():
                exec(compile(ast.Module([node], []), str(block), "exec"), names)


def unfit_calls(block: Block, names: dict[str, Any]) -> list[str]:
    """Calls of the library's own classes and functions whose arguments do not fit."""
    unfit = []
    for node in ast.walk(block.tree):
        if not isinstance(node, ast.Call):
            continue
        try:
            called = eval(ast.unparse(node.func), names) if _plain(node.func) else None
        except (NameError, AttributeError):
            continue  # of an object that only a run makes
        if str(getattr(called, "__module__", None)).split(".")[0] not in OURS:
            continue
        arguments = [None for _ in node.args]
        keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
        open_ended = any(isinstance(a, ast.Starred) for a in node.args) or any(
            keyword.arg is None for keyword in node.keywords
        )
        signature = inspect.signature(called)
        try:
            (signature.bind_partial if open_ended else signature.bind)(*arguments, **keywords)
        except TypeError as error:
            unfit.append(f"{ast.unparse(node)}: {error}")
    return unfit


def _plain(node: ast.expr) -> bool:
    """Whether an expression is a name, or names with dots."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def used(block: Block) -> set[str]:
    """Names that a block reads."""
    return {
        node.id
        for node in ast.walk(block.tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }


def run(block: Block, names: dict[str, Any]) -> None:
    made = eval(block.compiled(), names)
    if inspect.iscoroutine(made):
        asyncio.run(asyncio.wait_for(made, 30.0))


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """Where a reader of a page is: in a checkout, with a home; files are written elsewhere."""
    for name in ("examples", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # as the pages do that import from there
    return tmp_path


QUICK = {
    *("index", "demand", "picache", "scheduling", "side_by_side", "testing", "traces", "vllm"),
    *("how_to/share_a_store", "how_to/add_a_method"),
}
"""Pages whose code takes little; that of the others is run by .ci/docs (``-m docs``)."""


def pages() -> list[Any]:
    """Those with code, the slow ones marked."""
    names = {name_of(page): page for page in PAGES if PYTHON[page]}
    slow = {name: () if name in QUICK else (pytest.mark.docs,) for name in names}
    return [pytest.param(page, marks=slow[name], id=name) for name, page in names.items()]


@pytest.mark.parametrize("page", pages())
def test_blocks_of_a_page_run(page, reader):
    names: dict[str, Any] = {"__name__": "page"}
    above: dict[str, Any] = {}  # what blocks that were not run would have made
    for block in PYTHON[page]:
        made = {name: GIVEN[name]() for name in block.given}
        names.update({name: thing for name, thing in made.items() if "." not in name})
        if block.not_run:
            imported(block, names)
            assert not unfit_calls(block, names), block
            above |= dict.fromkeys(defined(block.tree))
        else:
            run(block, names)


@pytest.mark.parametrize("page", [page for page in PAGES if PYTHON[page]], ids=name_of)
def test_every_name_of_a_page_is_made_on_it_or_given(page):
    above: set[str] = {"__name__"}
    for block in PYTHON[page]:
        block.compiled()
        above |= {*block.given, *defined(block.tree)}
        assert not (used(block) - above - {*vars(builtins)}), block


def test_the_comments_of_pages_are_right():
    """Each is read as a mark of a block, gives a known reason, and gives what is used below it."""
    for page, blocks in BLOCKS.items():
        marks = len(_MARK.findall(page.read_text()))
        assert marks == sum(bool(b.given) + bool(b.not_run) for b in blocks), page
        for i, block in enumerate(blocks):
            assert not block.not_run or block.not_run in REASONS, block
            code = "".join(below.code for below in blocks[i:])
            for name in block.given:
                assert re.search(rf"\b{re.escape(name)}\b", code), f"{block}: {name}"


def test_every_language_of_a_block_is_looked_at():
    """Python is run; JSON is read; what stands in a shell names files that are there (below)."""
    assert {block.language for blocks in BLOCKS.values() for block in blocks} <= {
        "python",
        "json",
        "bash",
    }


def test_files_of_problems_are_as_the_page_shows_them(tmp_path):
    """The block of JSON, which stands for a file of problems, is one."""
    for block in (b for blocks in BLOCKS.values() for b in blocks if b.language == "json"):
        path = tmp_path / "mine.json"
        path.write_text(block.code)
        assert len(load_problems(path)) == len(json.loads(block.code))


def shown_code(described: Any) -> list[str]:
    """The code in a docstring: indented paragraphs that are Python."""
    found = []
    for paragraph in re.split(r"\n\n(?=\S)", inspect.getdoc(described) or ""):
        for part in re.findall(r"\n\n((?:    .*\n?|\n)+)", paragraph):
            try:
                ast.parse(textwrap.dedent(part))
            except SyntaxError:
                continue  # what a tool prints, for instance
            found.append(textwrap.dedent(part))
    return found


@pytest.mark.parametrize("package", OURS)
def test_code_in_docstrings_fits_the_library(package):
    """What the reference shows: its imports are there, its calls are of what there is, and fit."""
    page = (ROOT / "docs" / "reference" / f"{package}.md").read_text()
    public = dict(inspect.getmembers(importlib.import_module(package)))
    modules = [importlib.import_module(name) for name in re.findall(r"^::: (\S+)", page, re.M)]
    described = {id(thing): thing for thing in (*modules, *public.values()) if callable(thing)}
    described |= {id(module): module for module in modules}
    described |= {id(x): x for module in modules for x in vars(module).values() if callable(x)}
    codes = [code for thing in described.values() for code in shown_code(thing)]
    assert codes, package
    names = {name: thing for module in modules for name, thing in vars(module).items()} | public
    names |= {name: importlib.import_module(name) for name in OURS}
    for code in codes:
        block = Block(ROOT / "docs" / "reference", 1, "python", code, (), "needs a run")
        imported(block, names)
        called = {n.func.id for n in ast.walk(block.tree) if isinstance(n, ast.Call) and _named(n)}
        made = {*names, *defined(block.tree), *vars(builtins)}
        assert called <= made, code
        assert not unfit_calls(block, names), code


def _named(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_are_there(page):
    named = re.findall(r"(?<![\w/.-])(?:examples|tests|\.ci)/[\w/.-]*\w", page.read_text())
    missing = [name for name in named if not any(ROOT.glob(f"{name}*"))]
    assert not missing, page


def test_a_block_that_is_wrong_is_found():
    """The tests above see a name that nobody made, and a call that does not fit."""

    def block(code: str) -> Block:
        return Block(PAGES[0], 1, "python", code, (), "needs a GPU")

    assert used(block("print(mode)")) == {"print", "mode"}
    names: dict[str, Any] = {}
    wrong = block("from sparsity import RaaS\nRaaS(64, pages=16)")
    imported(wrong, names)
    (unfit,) = unfit_calls(wrong, names)
    assert "unexpected keyword argument 'pages'" in unfit
    with pytest.raises(ImportError, match="NoPolicy"):
        imported(block("from sparsity import NoPolicy"), names)
