"""`model.generate(custom_generate=...)` from a local folder."""

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

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
        ({"policy": "H2O"}, "H2O needs budget: give it in policy_arguments, such as"),
        ({"policy": RaaS}, "policy is the class RaaS, and not an object of it"),
        ({"policy": RaaS(16), "past_key_values": ((torch.ones(1),) * 2,)}, "past is .*expected a"),
    ],
)
def test_bad_input_is_refused(model, given, says):
    with pytest.raises(SparsityError, match=says):
        shim(model, **given)
    assert not is_attached(model)


def test_a_cache_that_is_given_is_gone_on_from(model):
    """It is read, not written to; one that has a policy already is refused by its name."""
    ids, past = random_ids(13, 2), DynamicCache()
    expected = shim(model, policy=RaaS(64))
    with torch.no_grad():
        model(input_ids=ids[:, :9], past_key_values=past)
    assert torch.equal(shim(model, policy=RaaS(64), past_key_values=past), expected)
    assert past.get_seq_length() == 9
    assert torch.equal(shim(model, policy=RaaS(64), past_key_values=DynamicCache()), expected)
    cache = SparseCache(model, RaaS(64))
    with pytest.raises(SparsityError, match=r"SparseCache.*without custom_generate"):
        shim(model, policy=RaaS(64), past_key_values=cache)
    detach(model)


def test_an_attached_model_stays_attached(model):
    SparseCache(model, RaaS(32))
    shim(model, policy="Full")
    assert is_attached(model)
    detach(model)
