"""A model that torch compiles, before or after it is attached: the tokens of the plain model."""

import pytest
import torch

from sparsity import RaaS, SparseCache, StreamingLLM, detach
from tests.helpers import random_ids, tiny_model

POLICY = RaaS(16, page_size=4, pin_prompt=False, alpha=0.15)


def generate(model, policy):
    ids, cache = random_ids(12, 1), SparseCache(model, policy)
    return model.generate(ids, max_new_tokens=9, do_sample=False, past_key_values=cache)


@pytest.fixture
def model():
    torch._dynamo.reset()
    yield tiny_model("llama", num_hidden_layers=1)
    torch._dynamo.reset()


def compile_model(model, backend):
    model.compile(backend=backend)


def compile_forward(model, backend):
    model.forward = torch.compile(model.forward, backend=backend)


CASES = [
    (compile_model, "eager", "before", POLICY),
    pytest.param(compile_model, "eager", "after", StreamingLLM(8), marks=pytest.mark.compiled),
    pytest.param(compile_forward, "eager", "after", POLICY, marks=pytest.mark.compiled),
    (compile_forward, "aot_eager", "before", POLICY),
]


@pytest.mark.parametrize(("compiled", "backend", "when", "policy"), CASES)
def test_a_compiled_model_decodes_as_the_plain_one(compiled, backend, when, policy, model):
    expected = generate(model, policy)
    if when == "before":
        detach(model)
    compiled(model, backend)
    # Nothing of a cache is in the guards: else each token would be compiled for, up to the limit.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        assert torch.equal(generate(model, policy), expected)
    detach(model)
