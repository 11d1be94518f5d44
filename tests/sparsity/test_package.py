"""What importing the package does, and what it exports."""

import importlib
import inspect
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import sparsity
from sparsity import SparseCache
from tests.helpers import files_importing

CODE = """
import sys
import sparsity
from sparsity import RaaS, record, replay
RaaS(budget=64)
assert "torch" in sys.modules
loaded = [n for n in ("transformers", "picache", "demand") if n in sys.modules]
assert not loaded, loaded
from sparsity import SparseCache, attach  # a subclass of transformers' Cache
from transformers import Cache
assert issubclass(SparseCache, Cache)
loaded = [n for n in ("picache", "demand") if n in sys.modules]
assert not loaded, loaded
"""


def test_import_loads_no_transformers_and_no_other_package():
    subprocess.run([sys.executable, "-c", CODE], check=True)


def test_public_names():
    assert sorted(sparsity.__all__) == [
        "Comparison",
        "Evicting",
        "Full",
        "H2O",
        "LazyEviction",
        "Needs",
        "PageView",
        "Policy",
        "Problem",
        "PyramidKV",
        "Quest",
        "QuestRaaS",
        "RKV",
        "RaaS",
        "Random",
        "Replay",
        "Report",
        "ShareRaaS",
        "SnapKV",
        "SparseCache",
        "SparsityError",
        "StreamingLLM",
        "TOVA",
        "Then",
        "Thresholds",
        "Trace",
        "VaSE",
        "attach",
        "compare",
        "detach",
        "milestone_map",
        "record",
        "replay",
    ]
    for name in sparsity.__all__:
        assert getattr(sparsity, name).__doc__
        assert name in dir(sparsity)


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("sparsity.knobs", ["Evicting"]),
        ("sparsity.policy", ["Needs", "PageView", "Policy"]),
        ("sparsity.milestones", ["Thresholds"]),
    ],
)
def test_the_paths_that_the_docs_had_still_work_and_warn(path, names):
    module = importlib.import_module(path)
    for name in names:
        with pytest.warns(DeprecationWarning, match=rf"{path}.{name} is now sparsity.{name}"):
            assert getattr(module, name) is getattr(sparsity, name)
    with pytest.raises(AttributeError, match="has no attribute 'Unknown'"):
        module.Unknown  # noqa: B018


def test_help_shows_what_a_cache_is_made_of():
    """One class, however late it is loaded: its own signature and docstring."""
    names = ["model", "policy", "past", "max_tokens", "static"]
    assert list(inspect.signature(sparsity.SparseCache).parameters) == names
    assert "keeps what a policy keeps" in pydoc.render_doc(sparsity.SparseCache)
    assert sparsity.SparseCache is SparseCache


@pytest.mark.slow
def test_type_checkers_see_the_names_that_are_loaded_late(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from sparsity import RaaS, SparseCache, attach, detach\nSparseCache(1, RaaS(1))\n"
    )
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=pyproject.toml", str(script)],
        capture_output=True,
        text=True,
        cwd=Path(sparsity.__file__).parents[1],
    )
    assert 'incompatible type "int"; expected "PreTrainedModel"' in found.stdout, found
    assert "Found 1 error" in found.stdout, found


def test_transformers_is_touched_in_files_that_say_so():
    found = files_importing("transformers", sparsity)
    assert found
    assert all(name.startswith("hf/") for name in found)
