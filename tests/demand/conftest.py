"""What tests of the transformers adapter share; imported only where it is asked for."""

import pytest


@pytest.fixture(scope="module")
def model():
    from tests.helpers import tiny_model

    return tiny_model("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def shared(model):
    """One engine for the tests that leave it as they found it."""
    from tests.demand.continuous import config
    from tests.demand.serving import serve

    with serve(model, config=config(max_queue_size=0)) as batching:
        yield batching
