"""What the comparisons run on: SmolLM2 and data of this repository, where no option says other."""

import pytest

from picache import PICacheError
from picache.problem_file import holds_texts, load_texts
from tests.accuracy.needles import DATA, needles


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """A real model, unlike the tiny ones of the other tests, runs faster on all threads."""


@pytest.fixture(scope="session")
def kv_model_name(pytestconfig):
    """As the plugin's, and the names of examples/models.py, of which "smollm2" is the default."""
    named = pytestconfig.getoption("--kv-model")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(pytestconfig.rootpath / "examples"))
        from models import REFERENCE_MODEL, ModelMissingError, smollm2_folder
    if named not in (None, "smollm2"):
        return str(REFERENCE_MODEL) if named == "reference" else named
    try:
        return str(smollm2_folder())
    except ModelMissingError as error:
        if named is None:
            pytest.skip(str(error))
        pytest.fail(str(error), pytrace=False)


def texts_are_in(config):
    """Of each file that is named, whether it holds texts; an error of one line where none is."""
    try:
        return [holds_texts(file) for file in config.getoption("--kv-problems")]
    except PICacheError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def link_problems(request, pytestconfig):
    """As the plugin's; without a file of problems, needles in the passages of examples/data."""
    if not all(texts_are_in(pytestconfig)):
        return request.getfixturevalue("link_problems")
    return needles()[: pytestconfig.getoption("--kv-limit")]


@pytest.fixture(scope="session")
def reasoning_texts(request, pytestconfig):
    """As the plugin's; without a file of texts, six of examples/data: they take a while."""
    if any(texts_are_in(pytestconfig)):
        return request.getfixturevalue("reasoning_texts")
    return load_texts(DATA / "texts.json")[:6][: pytestconfig.getoption("--kv-limit")]
