"""What the package exports: the names, their documentation, and what the pages teach."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import picache
from tests.helpers import tiny_model

PAGES = ("README.md", "docs/picache.md", "docs/models.md", "docs/linking.md")
ROOT = Path(__file__).parents[2]


def test_public_names():
    assert sorted(picache.__all__) == [
        "A3",
        "APE",
        "Arm",
        "CacheBlend",
        "Chunk",
        "ChunkStore",
        "Combined",
        "Comparison",
        "CorruptChunk",
        "DummySinks",
        "Evidence",
        "FullRecompute",
        "Layout",
        "LegoLink",
        "LinkMethod",
        "LinkReport",
        "LinkedPrompt",
        "NaiveReuse",
        "OracleDeviation",
        "PIC",
        "PICacheError",
        "Problem",
        "ProphetKV",
        "RandomRecompute",
        "SharedPrefix",
        "StoreFull",
        "StoredChunk",
        "arms",
        "compare",
        "load_problems",
    ]


@pytest.mark.parametrize("name", picache.__all__)
def test_every_public_name_and_method_is_documented(name):
    public = getattr(picache, name)
    assert inspect.getdoc(public)
    for member, value in inspect.getmembers(public):
        if not member.startswith("_") and (callable(value) or isinstance(value, property)):
            assert inspect.getdoc(value), f"{name}.{member}"


@pytest.mark.parametrize("page", PAGES)
def test_dotted_names_on_a_page_exist(page):
    """Such as `picache.hf.rope.calibrate`; what moves takes its mention along."""
    for dotted in re.findall(r"`picache\.([\w.]+)", (ROOT / page).read_text()):
        *path, last = dotted.split(".")
        found = importlib.import_module(".".join(["picache", *path]))
        assert hasattr(found, last) or importlib.import_module(f"picache.{dotted}"), dotted


@pytest.mark.parametrize("page", PAGES)
def test_pages_import_from_the_package_itself(page):
    text = (ROOT / page).read_text()
    assert not re.findall(r"from picache\.[\w.]+ import \w+", text)
    for names in re.findall(r"from picache import ([\w, ]+)", text):
        assert {name.strip() for name in names.split(",")} <= set(picache.__all__)


def test_the_model_is_the_one_that_was_handed_in():
    model = tiny_model("llama")
    pic = picache.PIC(model)
    assert pic.model is model
    assert pic.hf.model is model


def test_a_full_store_raises_the_error_that_the_page_names():
    pic = picache.PIC(tiny_model("llama"), store=picache.ChunkStore(device_bytes=8))
    with pytest.raises(picache.StoreFull, match="does not fit a store of 8 bytes"):
        pic.compile([3, 4, 5])
