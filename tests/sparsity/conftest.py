import pytest
import torch
from torch._dynamo.utils import counters

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


@pytest.fixture
def fresh():
    """Nothing compiled before, nor left for the next test; a recompilation too many is an error."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()
