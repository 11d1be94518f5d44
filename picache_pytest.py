"""The pytest plugin: a model, its tokenizer, problems and texts for tests of accuracy.

Options ``--kv-model``, ``--kv-problems``, ``--kv-limit``; session fixtures `kv_model`,
`kv_tokenizer`, `link_problems`, `reasoning_texts`. What is learnt from them is asserted with
`picache.testing.assert_within`; docs/testing.md has a test in ten lines.

pytest imports its plugins in every run, related or not, and `picache` and `sparsity` import torch.
So this is a module beside the packages, not in one, and imports the rest when a fixture is used.
"""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from picache import Problem


def pytest_addoption(parser: pytest.Parser) -> None:
    """The three options, in a group of their own."""
    group = parser.getgroup("kv", "accuracy of KV caches (picache, sparsity)")
    group.addoption(
        "--kv-model",
        metavar="NAME_OR_PATH",
        help="model of the fixtures kv_model and kv_tokenizer, as from_pretrained takes it",
    )
    group.addoption(
        "--kv-problems",
        metavar="FILE",
        action="append",
        default=[],
        help="problems (JSON, JSON Lines) of the fixture link_problems, or texts (.txt, or JSON "
        'with "texts") of the fixture reasoning_texts; may be given several times',
    )
    group.addoption(
        "--kv-limit",
        metavar="N",
        type=_positive,
        help="take the first N problems, and the first N texts",
    )


@pytest.fixture(scope="session")
def kv_model_name(pytestconfig: pytest.Config) -> str:
    """What ``--kv-model`` says; a conftest may override it with a name or a path of its own."""
    name: str | None = pytestconfig.getoption("--kv-model")
    if not name:
        pytest.fail("kv_model needs a model: pytest --kv-model NAME_OR_PATH", pytrace=False)
    return name


@pytest.fixture(scope="session")
def kv_model(kv_model_name: str) -> "PreTrainedModel":
    """The model, ready to answer: on the GPU in its own dtype, else on the CPU in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    on_gpu = torch.cuda.is_available()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            kv_model_name, dtype="auto" if on_gpu else torch.float32
        )
    except Exception as error:  # whatever is wrong with it, it is the model that was named
        pytest.fail(_not_loaded("model", kv_model_name, error), pytrace=False)
    return model.to("cuda" if on_gpu else "cpu").eval()


@pytest.fixture(scope="session")
def kv_tokenizer(kv_model_name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of the model."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(kv_model_name)
    except Exception as error:
        pytest.fail(_not_loaded("tokenizer", kv_model_name, error), pytrace=False)


@pytest.fixture(scope="session")
def link_problems(pytestconfig: pytest.Config) -> "tuple[Problem, ...]":
    """The problems of every ``--kv-problems`` that holds problems, the first ``--kv-limit``."""
    from picache.problem_file import load_problems

    return _from_files(pytestconfig, load_problems, "link_problems", texts=False)


@pytest.fixture(scope="session")
def reasoning_texts(pytestconfig: pytest.Config) -> tuple[str, ...]:
    """The texts of every ``--kv-problems`` that holds texts, the first ``--kv-limit``."""
    from picache.problem_file import load_texts

    return _from_files(pytestconfig, load_texts, "reasoning_texts", texts=True)


def _from_files(
    config: pytest.Config, load: Callable[[str], tuple[Any, ...]], fixture: str, *, texts: bool
) -> tuple[Any, ...]:
    """What the files of the fixture's kind hold, in their order."""
    from picache import PICacheError
    from picache.problem_file import holds_texts

    kind = "texts" if texts else "problems"
    try:
        files = [f for f in config.getoption("--kv-problems") if holds_texts(f) == texts]
        found = tuple(entry for file in files for entry in load(file))
    except PICacheError as error:
        pytest.fail(str(error), pytrace=False)
    if not found:
        pytest.fail(
            f"{fixture} needs a file of {kind}: pytest --kv-problems FILE (docs/testing.md has "
            "its form)",
            pytrace=False,
        )
    return found[: config.getoption("--kv-limit")]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _not_loaded(what: str, name: str, error: Exception) -> str:
    """One line: transformers' own message often fills a screen."""
    cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"the {what} of --kv-model {name!r} cannot be loaded: {cause}"
