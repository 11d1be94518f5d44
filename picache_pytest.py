"""The pytest plugin: a model, its tokenizer, problems and texts for tests of accuracy.

Options ``--kv-model``, ``--kv-problems``, ``--kv-limit``; session fixtures `kv_model`,
`kv_tokenizer`, `link_problems`, `reasoning_problems`, `reasoning_texts`. What is learnt from them
is asserted with `picache.testing.assert_within`; docs/testing.md has a test in ten lines.

pytest imports its plugins in every run, related or not, and `picache` and `sparsity` import torch.
So this is a module beside the packages, not in one, and imports the rest when a fixture is used.
"""

import argparse
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    import sparsity
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
        metavar="[DATASET:]FILE",
        action="append",
        default=[],
        help="problems (JSON, JSON Lines) of the fixture link_problems, or texts (.txt, or JSON "
        'with "texts") of the fixture reasoning_texts; or a data set, from a file of its format '
        "(hotpotqa:dev.json) or by its name alone from the hub, of the fixtures link_problems and "
        "reasoning_problems (gsm8k, math500, aime); may be given several times",
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
    """The problems on documents of every ``--kv-problems``, the first ``--kv-limit``."""
    from picache import datasets
    from picache.problem_file import load_problems

    return _found(pytestconfig, "link_problems", "problems", load_problems, datasets)


@pytest.fixture(scope="session")
def reasoning_problems(pytestconfig: pytest.Config) -> "tuple[sparsity.Problem, ...]":
    """The problems of every ``--kv-problems`` of reasoning, the first ``--kv-limit``."""
    from sparsity import datasets

    return _found(pytestconfig, "reasoning_problems", "reasoning", None, datasets)


@pytest.fixture(scope="session")
def reasoning_texts(pytestconfig: pytest.Config) -> tuple[str, ...]:
    """The texts of every ``--kv-problems`` that holds texts, the first ``--kv-limit``."""
    from picache.problem_file import load_texts

    return _found(pytestconfig, "reasoning_texts", "texts", load_texts, None)


def _found(
    config: pytest.Config,
    fixture: str,
    kind: str,
    load_file: Callable[[str], tuple[Any, ...]] | None,
    datasets: ModuleType | None,
) -> tuple[Any, ...]:
    """What the options of the fixture's kind give, in their order.

    Args:
        kind: "problems", "reasoning" or "texts".
        load_file: reads a file that is no data set's; None where there are none of the kind.
        datasets: the package of the data sets of the kind; None where there are none.
    """
    from picache import PICacheError
    from sparsity import SparsityError

    limit = config.getoption("--kv-limit")
    found: list[Any] = []
    try:
        for given in config.getoption("--kv-problems"):
            name, _, path = given.partition(":")
            if _kind(given) != kind:
                continue
            if datasets is not None and name in datasets.DATASETS:
                found += datasets.load(name, path=path or None, limit=limit)
            elif load_file is not None:
                found += load_file(given)
    except (PICacheError, SparsityError) as error:
        pytest.fail(str(error), pytrace=False)
    if not found:
        needs, form = f"a file of {kind}", "FILE"
        if kind == "reasoning":
            needs, form = "a data set of reasoning", "gsm8k:FILE"
        pytest.fail(
            f"{fixture} needs {needs}: pytest --kv-problems {form} (docs/testing.md has its form)",
            pytrace=False,
        )
    return tuple(found[:limit])


def _kind(given: str) -> str:
    """Of what a ``--kv-problems`` gives: "problems", "reasoning" or "texts"."""
    from picache.datasets import DATASETS
    from picache.problem_file import holds_texts
    from sparsity.datasets import DATASETS as REASONING

    name = given.partition(":")[0]
    if name in REASONING:
        return "reasoning"
    return "texts" if name not in DATASETS and holds_texts(given) else "problems"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _not_loaded(what: str, name: str, error: Exception) -> str:
    """One line: transformers' own message often fills a screen."""
    cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"the {what} of --kv-model {name!r} cannot be loaded: {cause}"
