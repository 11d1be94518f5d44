"""The three packages import each other nowhere, and no file of one imports in a circle."""

import ast
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("picache", "sparsity", "demand")


def modules(root: Path, package: str) -> dict[str, Path]:
    """Files of a package by their dotted names; a folder goes by the name of the folder."""
    files = sorted((root / package).rglob("*.py"))
    dotted = {f: ".".join(f.relative_to(root).with_suffix("").parts) for f in files}
    return {name.removesuffix(".__init__"): file for file, name in dotted.items()}


def imports(root: Path, package: str) -> networkx.DiGraph:
    """Who imports whom: at the top, inside functions, and for types alone."""
    known = modules(root, package)
    graph = networkx.DiGraph()
    graph.add_nodes_from(known)
    for name, file in known.items():
        for node in ast.walk(ast.parse(file.read_text())):
            targets: list[str] = []
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name} imports relatively, which this walk does not follow"
                submodules = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [s if s in known else str(node.module) for s in submodules]
            graph.add_edges_from((name, t) for t in targets if t in known or t in PACKAGES)
    return graph


def circles(graph: networkx.DiGraph) -> list[set[str]]:
    loops = [{name} for name in networkx.nodes_with_selfloops(graph)]
    return loops + [c for c in networkx.strongly_connected_components(graph) if len(c) > 1]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_imports_in_a_circle(package):
    graph = imports(ROOT, package)
    assert graph.number_of_edges() > 50
    assert circles(graph) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_do_not_import_each_other(package):
    assert not set(imports(ROOT, package)) & (set(PACKAGES) - {package})


@pytest.mark.parametrize(
    "late",
    ["import demand.a\n", "def f():\n    from demand import a\n    return a\n",
     "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from demand.a import x\n"],
)  # fmt: skip
def test_the_walk_finds_a_circle_however_it_is_hidden(tmp_path, late):
    folder = tmp_path / "demand"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "a.py").write_text("from demand.b import y\nx = 1\n")
    (folder / "b.py").write_text(late + "y = 1\n")
    assert circles(imports(tmp_path, "demand")) == [{"demand.a", "demand.b"}]
