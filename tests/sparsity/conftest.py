import pytest

import sparsity
from tests.helpers import tiny_model


@pytest.fixture
def llama():
    model = tiny_model("llama")
    yield model
    sparsity.detach(model)
