"""What a release says of itself in several places is the same in each of them."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

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
    (newest, date), *released = versions
    assert bool(date) == (newest != "Unreleased")
    assert all(date for _, date in released)
    if newest == "Unreleased":  # after a release its version stays until the next one's is known
        assert all(Version(PROJECT["version"]) >= Version(one) for one, _ in released)
    else:
        assert newest == PROJECT["version"]


def modules():
    """Of the packages and what stands beside them: name and text of each module."""
    files = [ROOT / "picache_pytest.py"]
    for package in ("picache", "sparsity", "demand"):
        files += sorted((ROOT / package).rglob("*.py"))
    for file in files:
        yield ".".join(file.relative_to(ROOT).with_suffix("").parts), file.read_text()


def calls_of(function):
    """Module and arguments of every call of `function` in the packages, as they stand there."""
    for module, text in modules():
        if function in text:
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == function:
                    yield module, node.args


def renamed_keywords():
    """Old keyword, name of the function as the changelog has it, and new keyword."""
    renamed = [
        (inner.__qualname__, old, new)
        for inner, names in _RENAMED.values()
        for old, new in names.items()
    ]
    for _, arguments in calls_of("warn_renamed"):
        if all(isinstance(one, ast.Constant) for one in arguments):  # else: the decorator itself
            renamed.append(tuple(one.value for one in arguments))
    for function, old, new in renamed:
        owner, _, method = function.removesuffix(".__init__").rpartition(".")
        # `fit` and `remaining` stand for those of all refinements.
        of_refinement = method in ("fit", "remaining") and owner != "PDGraph"
        yield old, method if of_refinement else function.removesuffix(".__init__"), new


def moved_names():
    """Old place of what a module gives with a warning, and its new one."""
    for module, text in modules():
        if "_MOVED:" in text:
            former = module.removesuffix(".__init__")
            for name, (place, _) in importlib.import_module(former)._MOVED.items():
                yield f"{former}.{name}", place
    for module, (_, _, names) in calls_of("names_moved"):
        for name in ast.literal_eval(names):
            yield f"{module}.{name}", f"sparsity.{name}"
    for name in ("arms", "Arm"):
        yield f"picache.presets.{name}", f"picache.{name}"


def renamed_methods():
    for _, arguments in calls_of("warn_renamed_method"):
        owner, old, new = (one.value for one in arguments)
        yield f"{owner}.{old}", f"{owner}.{new}"
    yield "DemandEstimator.demand", "DemandEstimator.parallel_calls"


def test_names_warn_only_where_the_test_below_looks():
    assert {module for module, text in modules() if "DeprecationWarning," in text} == {
        "demand.arguments",
        "demand.refine.estimator",  # DemandEstimator.demand
        "picache.presets",  # arms and Arm
        "sparsity.former_paths",
    }


def test_the_changelog_has_the_old_names_that_warn_and_no_others():
    keywords, names = set(), set()  # of the changelog
    for row in DEPRECATED:
        old, new = row.strip("|").split("|")[1:]
        of_keywords, _, others = old.rpartition("; the attribute ") if ";" in old else (old, "", "")
        if "=`" not in old:
            of_keywords, others = "", old
        renamed, _, functions = of_keywords.partition(" of ")
        for keyword in re.findall(r"`(\w+)=`", renamed):
            for function in re.findall(r"`([\w.]+)`", functions):
                keywords.add((keyword, function, *re.findall(r"`(\w+)=`", new)))
        places = re.findall(r"`([\w.]+)`", new)
        names |= set(zip(re.findall(r"`([\w.]+)`", others), places, strict=True))
    assert ("demand", "CostModel.seconds", "parallel_calls") in keywords
    assert ("demand.policies.Quantum", "demand.policies.TimeSlice") in names
    assert keywords == set(renamed_keywords())
    assert names == {*moved_names(), *renamed_methods()}


@pytest.fixture
def checkout(tmp_path):
    """A repository with the release script and what it reads first; it looks for no real Python."""

    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/release", tmp_path / ".ci/release")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "picache"\nversion = "0.1.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [0.1.0] - 2027-01-31\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")

    def release(**environment):
        return subprocess.run(
            ["bash", ".ci/release"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONS": "2.0"} | environment,
            capture_output=True,
            text=True,
            check=False,
        ).stderr

    return tmp_path, git, release


def test_a_release_is_built_of_what_is_committed(checkout):
    path, _, release = checkout
    past_the_checks = "no interpreter with ensurepip for Python 2.0"
    (path / "untracked.txt").write_text("not in the sdist's list")
    assert past_the_checks in release()
    (path / "pyproject.toml").write_text((path / "pyproject.toml").read_text() + "\n")
    said = release()
    assert "pyproject.toml" in said
    assert "not committed" in said
    assert past_the_checks not in said
    assert past_the_checks in release(REHEARSAL="1")


@pytest.mark.parametrize("top", ["[Unreleased]", "[0.1.0]", "[0.2.0] - 2027-01-31"])
def test_a_release_has_its_version_and_date_on_top_of_the_changelog(checkout, top):
    path, git, release = checkout
    (path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {top}\n\n## [0.1.0] - 2027-01-31\n")
    git("commit", "-qam", "changelog")
    assert f"begins with '## {top}'; expected '## [0.1.0] - DATE'" in release()
    assert "no interpreter" in release(REHEARSAL="1")


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / ".ci").iterdir() if not p.suffix))
def test_every_script_of_ci_is_named_where_one_looks_for_it(script):
    assert f"`.ci/{script}`" in (ROOT / "CONTRIBUTING.md").read_text()
