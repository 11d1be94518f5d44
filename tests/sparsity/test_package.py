"""What importing the package does, and what it exports."""

import subprocess
import sys

import sparsity
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
        "Full",
        "H2O",
        "LazyEviction",
        "PyramidKV",
        "Quest",
        "QuestRaaS",
        "RKV",
        "RaaS",
        "Random",
        "Replay",
        "Report",
        "SnapKV",
        "SparseCache",
        "SparsityError",
        "StreamingLLM",
        "TOVA",
        "Then",
        "Trace",
        "VaSE",
        "attach",
        "detach",
        "milestone_map",
        "record",
        "replay",
    ]
    for name in sparsity.__all__:
        assert getattr(sparsity, name).__doc__


def test_transformers_is_touched_in_files_that_say_so():
    found = files_importing("transformers", sparsity)
    assert found
    assert all(name.startswith("hf/") for name in found)
