import pytest
import torch

import sparsity
from tests.helpers import tiny_model


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def llama():
    model = tiny_model("llama")
    yield model
    sparsity.detach(model)
