import pytest

import sparsity
from tests.helpers import tiny_model
from tests.sparsity.zoo import shallow_model


@pytest.fixture
def llama():
    model = tiny_model("llama")
    yield model
    sparsity.detach(model)


@pytest.fixture
def shallow():
    """Of two layers, for what happens to each layer alike."""
    model = shallow_model("llama")
    yield model
    sparsity.detach(model)
