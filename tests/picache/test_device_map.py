"""Models that accelerate places by a device map: hooks on every module, and what is refused."""

import pytest
import torch

from picache import PIC, CacheBlend, LegoLink, PICacheError, ProphetKV
from tests.helpers import random_ids, tiny_model

accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")


def test_hooks_on_every_module_change_nothing():
    plain, placed = tiny_model("llama"), tiny_model("llama")
    modules = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    modules += [f"model.layers.{i}" for i in range(len(placed.model.layers))]
    accelerate.dispatch_model(placed, dict.fromkeys(modules, "cpu"), force_hooks=True)
    assert all("AlignDevices" in type(one._hf_hook).__name__ for one in placed.model.layers)
    texts = [random_ids(11, seed=seed) for seed in range(3)]
    for method in (LegoLink(2), CacheBlend(0.3), ProphetKV(0.3)):
        found = []
        for model in (plain, placed):
            pic = PIC(model, flops_per_byte=None)
            chunks = [pic.compile(text) for text in texts]
            prompt = pic.link(chunks, random_ids(5, seed=9), method=method)
            out = model.generate(**prompt, max_new_tokens=4, do_sample=False)
            found.append((out.tolist(), prompt.logits, [chunk.key for chunk in chunks]))
        assert found[0][0] == found[1][0]
        assert torch.equal(found[0][1], found[1][1])
        assert found[0][2] == found[1][2]  # where a layer lies is no part of a key


def test_layers_on_disk_are_refused(tmp_path):
    model = tiny_model("llama")
    placed = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    placed |= {"lm_head": "cpu", "model.layers.0": "cpu"}
    rest = range(1, len(model.model.layers))
    placed |= {f"model.layers.{i}": "disk" for i in rest}
    accelerate.dispatch_model(model, placed, offload_dir=tmp_path, main_device="cpu")
    with pytest.raises(PICacheError, match=r"offloaded to disk or to the CPU .*load the whole mod"):
        PIC(model)
