"""A model linked in one thread and used in another: served right or refused, never wrong."""

import threading
import time
from contextlib import suppress

import pytest
import torch

from picache import PIC, LegoLink, PICacheError
from sparsity import RaaS, SparseCache, SparsityError, attach, detach
from tests.helpers import random_ids, tiny_model

POLICY = RaaS(32, page_size=4, pin_prompt=False)


@pytest.fixture
def model():
    model = tiny_model("llama")
    yield model
    detach(model)


def link(pic):
    chunks = [pic.compile(random_ids(12, seed=seed)) for seed in (1, 2, 3)]
    return pic.link(chunks, random_ids(7, seed=4), LegoLink(2)).logits


def generate(model, cache=None):
    ids = random_ids(20, batch=1, seed=5)
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
    )


def test_a_model_is_not_attached_while_it_links(model):
    pic = PIC(model, flops_per_byte=None)
    expected = link(pic)
    refused = pytest.raises(SparsityError, match=r"attends by 'picache_scattered'.*share a lock")
    with pic.hf.attention.scattered(), refused:
        SparseCache(model, POLICY)
    attach(model)
    with pic.hf.attention.scattered():
        for change in (attach, detach):
            with pytest.raises(SparsityError, match="which picache"):
                change(model)
    assert generate(model, SparseCache(model, POLICY)).shape[1] == 26
    torch.testing.assert_close(link(pic), expected)
    detach(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("when", ["before the mask is made", "between two layers"])
@pytest.mark.parametrize("to", ["sdpa", "eager"])
def test_attention_changed_in_the_middle_of_a_link_is_refused(model, when, to):
    pic = PIC(model, flops_per_byte=None)
    expected = link(pic)
    decoder = model.get_decoder()
    place = decoder if when == "before the mask is made" else decoder.layers[1]
    hook = place.register_forward_pre_hook(lambda *_: model.set_attn_implementation(to))
    with pytest.raises(PICacheError, match="another thread changed it meanwhile"):
        link(pic)
    hook.remove()
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(link(pic), expected)


@pytest.mark.parametrize("sparse", [False, True], ids=["plain", "SparseCache"])
def test_what_is_not_refused_is_right(model, sparse):
    """Two threads of each kind for three seconds, the store emptied every few links."""
    pic = PIC(model, flops_per_byte=None)
    if sparse:
        attach(model)
    expected_link, seen, wrong = link(pic), {"linked": 0, "refused": 0}, []
    expected = generate(model, SparseCache(model, POLICY) if sparse else None)
    end = time.monotonic() + 3.0

    def use():
        while time.monotonic() < end:
            try:
                out = generate(model, SparseCache(model, POLICY) if sparse else None)
            except (PICacheError, SparsityError):
                seen["refused"] += 1
            except BaseException as error:
                wrong.append(error)
            else:
                if not torch.equal(out, expected):
                    wrong.append(out)

    def keep_linking():
        while time.monotonic() < end:
            try:
                if seen["linked"] % 5 == 0:
                    with suppress(PICacheError):  # the other thread's link uses its chunks
                        pic.store.clear()
                logits = link(pic)
            except BaseException as error:
                wrong.append(error)
            else:
                seen["linked"] += 1
                if not torch.allclose(logits, expected_link, atol=1e-5):
                    wrong.append(logits)

    threads = [threading.Thread(target=work) for work in (use, use, keep_linking, keep_linking)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert seen["linked"]
    assert seen["refused"]
    torch.testing.assert_close(link(pic), expected_link)
