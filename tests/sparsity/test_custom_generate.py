"""`model.generate(custom_generate=...)` from a local folder."""

from pathlib import Path

import pytest
import torch

from sparsity import RaaS, SparseCache, SparsityError, detach
from sparsity.hf.attach import is_attached
from tests.helpers import random_ids, tiny_model

FOLDER = str(Path(__file__).parents[2] / "examples" / "custom_generate")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def shim(model, **arguments):
    inputs = {"input_ids": random_ids(13, 2), "max_new_tokens": 20, "do_sample": False}
    return model.generate(**(inputs | arguments), custom_generate=FOLDER, trust_remote_code=True)


def test_it_generates_as_the_cache_does_and_detaches(model):
    policy = RaaS(32, page_size=4, alpha=0.15)
    expected = model.generate(
        random_ids(13, 2),
        past_key_values=SparseCache(model, policy),
        max_new_tokens=20,
        do_sample=False,
    )
    detach(model)
    dense = shim(model, policy="Full")
    for given in (
        {"policy": policy},
        {"policy_arguments": {"budget": 32, "page_size": 4, "alpha": 0.15}},
    ):
        assert torch.equal(shim(model, **given), expected)
        assert not is_attached(model)
    assert torch.equal(dense, model.generate(random_ids(13, 2), max_new_tokens=20, do_sample=False))


def test_beams_and_masks_go_through(model):
    mask = torch.ones(2, 13, dtype=torch.int64)
    mask[0, :4] = 0
    given = {"attention_mask": mask, "num_beams": 2, "num_return_sequences": 2}
    dense = model.generate(random_ids(13, 2), **given, max_new_tokens=20, do_sample=False)
    assert torch.equal(shim(model, policy="Full", **given), dense)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"policy": "Nothing"}, "policy='Nothing' is no policy: give one of Full, H2O"),
        ({"policy": "H2O", "policy_arguments": {"budgt": 3}}, "H2O takes no argument budgt"),
        ({"policy": RaaS(16), "policy_arguments": {"budget": 3}}, "has its arguments already"),
        ({"policy": "H2O", "policy_arguments": {"budget": 0}}, r"H2O\(budget=0\)"),
    ],
)
def test_bad_input_is_refused(model, given, says):
    with pytest.raises(SparsityError, match=says):
        shim(model, **given)
    assert not is_attached(model)


def test_an_attached_model_stays_attached(model):
    SparseCache(model, RaaS(32))
    shim(model, policy="Full")
    assert is_attached(model)
    detach(model)
