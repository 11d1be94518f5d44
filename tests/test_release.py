"""What a release says of itself in several places is the same in each of them."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import demand
from demand.arguments import _RENAMED

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
DEPRECATED = [
    row for row in CHANGELOG.splitlines() if re.match(r"\| `(picache|sparsity|demand)` ", row)
]


def pinned(lines):
    return dict(line.split("==") for line in lines if "==" in line and ";" not in line)


def test_the_citation_is_of_the_version_that_is_built():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


def test_hooks_run_the_versions_that_ci_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    in_hooks = [pin for hook in hooks for pin in hook["additional_dependencies"]]
    in_dev = pinned(PROJECT["optional-dependencies"]["dev"])
    known_good = pinned((ROOT / "constraints.txt").read_text().splitlines())
    assert set(pinned(in_hooks)) == {"ruff", "mypy"}
    for pin in in_hooks:
        name, version = pin.split("==")
        assert version == in_dev[name] == known_good[name]


def test_the_changelog_begins_with_what_is_built_next():
    versions = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", CHANGELOG, re.MULTILINE)
    assert len(versions) == len(re.findall(r"^## ", CHANGELOG, re.MULTILINE))
    (newest, _), *released = versions
    assert all(date for _, date in released)
    if newest == "Unreleased":  # its text names the version that the next release will have
        body = CHANGELOG.split("## [Unreleased]")[1].split("\n## ")[0]
        assert PROJECT["version"] in body
    else:
        assert newest == PROJECT["version"]


def renamed_keywords():
    for inner, names in _RENAMED.values():
        assert inner.__module__.startswith("demand.")
        for old, new in names.items():
            yield inner.__qualname__, old, new


def test_every_old_keyword_that_warns_is_in_the_changelog():
    asked = set(renamed_keywords())
    assert ("simulate", "refine", "estimator") in asked
    for function, old, new in asked:
        owner, _, method = function.rpartition(".")
        # `fit` and `remaining` stand for those of all refinements.
        of_refinement = method in ("fit", "remaining") and owner != "PDGraph"
        name = f"`{method}`" if of_refinement else f"`{function.removesuffix('.__init__')}`"
        assert any(
            f"`{old}=`" in row and name in row and f"`{new}=`" in row for row in DEPRECATED
        ), f"{function}: {old}= is now {new}="


def calls_of(function):
    """Arguments of every call of `function` in the packages, as they stand there."""
    for package in ("picache", "sparsity", "demand"):
        for file in sorted((ROOT / package).rglob("*.py")):
            text = file.read_text()
            if function in text:
                for node in ast.walk(ast.parse(text)):
                    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == function:
                        yield file, node.args


def test_every_old_method_and_place_that_warns_is_in_the_changelog():
    old_names = [
        f"{arguments[0].value}.{arguments[1].value}"
        for _, arguments in calls_of("warn_renamed_method")
    ]
    assert "Job.learn" in old_names
    old_names += [f"demand.{name}" for name in demand._MOVED] + ["demand.refine.Refine"]
    formers = list(calls_of("names_moved"))
    assert len(formers) == 3
    for file, arguments in formers:
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        old_names += [f"{module}.{name}" for name in ast.literal_eval(arguments[2])]
    for name in old_names:
        assert any(f"`{name}`" in row.rsplit("|", 2)[0] for row in DEPRECATED), name


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / ".ci").iterdir() if not p.suffix))
def test_every_script_of_ci_is_named_where_one_looks_for_it(script):
    assert f"`.ci/{script}`" in (ROOT / "CONTRIBUTING.md").read_text()
