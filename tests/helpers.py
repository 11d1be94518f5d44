"""What tests share: a tolerance by root-mean-square error, a zoo of tiny random models, a port."""

import ast
import socket
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import transformers
from torch import Tensor

SHAPE = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    tie_word_embeddings=False,
)
_HYBRID = ["sliding_attention", "full_attention"] * 2

CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=16),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=None, head_dim=16),
    "mistral_sliding": lambda: transformers.MistralConfig(**SHAPE, sliding_window=16, head_dim=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SHAPE,
        head_dim=16,
        sliding_window=16,
        query_pre_attn_scalar=16,
        layer_types=list(_HYBRID),
    ),
    "phi3": lambda: transformers.Phi3Config(**SHAPE),
}
FAMILIES = tuple(name for name in CONFIGS if name != "mistral_sliding")


def tiny_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides):
    """A tiny random model of a family: 4 layers, 4 query heads on 2 KV heads, head size 16.

    Every matrix is drawn wide enough that attention is far from uniform, so that a wrong mask or
    a lost token shows in the logits.
    """
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    for key, value in overrides.items():
        setattr(config, key, value)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                scale = 0.5 if "embed" in parameter_name else 0.12
                parameter.copy_((noise * scale).to(dtype))
            else:  # norm weights of all ones would hide a norm applied in the wrong place
                parameter.add_((noise * 0.1).to(dtype))
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def random_ids(length: int, batch: int | None = None, seed: int = 1) -> Tensor:
    """Random token ids in [3, 128): ``[length]``, or ``[batch, length]``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (length,) if batch is None else (batch, length)
    return torch.randint(3, 128, shape, generator=generator)


def assert_close(name: str, actual: Tensor, expected: Tensor, ratio: float = 1e-5) -> None:
    """Fail when the RMS error exceeds `ratio` of the RMS of `expected`, or on any NaN."""
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape} != {expected.shape}"
    actual, expected = actual.double(), expected.double()
    assert not actual.isnan().any(), f"{name}: NaN in the result"
    assert not expected.isnan().any(), f"{name}: NaN in the reference"
    error = (actual - expected).square().mean().sqrt().item()
    scale = expected.square().mean().sqrt().item()
    assert error <= ratio * scale + 1e-7, (
        f"{name}: RMS error {error:.3e} is {error / max(scale, 1e-30):.3e} of the reference, "
        f"more than {ratio:.1e}"
    )


def files_importing(name: str, package: ModuleType) -> set[str]:
    """Files of a package that import `name` at run time, not for types alone."""
    root, found = Path(str(package.__file__)).parent, set()
    for path in root.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for_types = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in set(ast.walk(tree)) - for_types:
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if any(imported.split(".")[0] == name for imported in names):
                found.add(path.relative_to(root).as_posix())
    return found
