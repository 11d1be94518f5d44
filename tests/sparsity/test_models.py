"""Through the real model: a sparse step equals a dense step masked to the kept set."""

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

import sparsity
from sparsity import RaaS, SparseCache
from tests.helpers import FAMILIES, SHAPE, assert_close, random_ids, tiny_model
from tests.sparsity import helpers
from tests.sparsity.twins import Twin
from tests.sparsity.zoo import AMPLE, SCORES, TIGHT

# Every policy on one family, and one policy of a kind on all.
CASES = [("llama", policy) for policy in TIGHT if not policy.needs.moved]
CASES += [(family, TIGHT[i]) for family in FAMILIES[1:] for i in (4, 6, 10, 13)]
PROMPT, PADS, STEPS = 13, 4, 21


class Oracle:
    """Attention over the full K/V of a plain cache, masked to what the twin keeps."""

    def __init__(self, policy, padding, layers):
        self.policy, self.padding, self.layers, self.twins = policy, padding, layers, {}

    def attend(self, module, query, key, value, attention_mask, scaling, **kwargs):
        batch, heads, total = key.shape[:3]
        width, group = query.shape[2], query.shape[1] // heads
        first, index = total - width, module.layer_idx
        allowed = torch.ones(total, total, dtype=torch.bool).tril()[first:]
        allowed = allowed & self.padding[:, None, None, :total]
        if attention_mask is not None:
            allowed = allowed & attention_mask
        allowed = allowed.expand(-1, heads, -1, -1).clone()
        types = getattr(module.config, "layer_types", None)
        full = types is None or types[index] == "full_attention"
        if full and index >= self.policy.dense_layers:
            policy = self.policy.at_layer(index, self.layers)
            for b in range(batch):
                real = self.padding[b, :total].nonzero()[:, 0]
                before = int(self.padding[b, :first].sum())
                twin = self.twins.setdefault((index, b), Twin(policy, index, heads, scaling))
                asked = query[b][:, self.padding[b, first:total]]
                attended, _ = twin.forward(
                    key[b][:, real], value[b][:, real], asked, before, len(real), width == 1
                )
                for h in range(heads):
                    keep = torch.zeros(total, dtype=torch.bool)
                    keep[real[sorted(attended[h])]] = True
                    allowed[b, h] &= keep
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = query @ key.mT * scaling
        scores = scores.masked_fill(~allowed.repeat_interleave(group, 1), -1e30)
        return (scores.softmax(-1) @ value).transpose(1, 2), None


ORACLE = "retention_test_oracle"


def run(model, cache, ids, padding):
    """Logits of every forward: the prompt, then the rest one token at a time."""
    return helpers.run(model, cache, ids, padding, [PROMPT, *[1] * STEPS])


def batch(pads=(PADS, 0)):
    return helpers.padded_ids(PROMPT + STEPS, *pads)


@pytest.mark.parametrize(("family", "policy"), CASES, ids=str)
def test_sparse_equals_dense_masked_to_the_kept_set(family, policy):
    ids, padding = batch()
    model = tiny_model(family)
    cache = SparseCache(model, policy)
    sparse = run(model, cache, ids, padding)
    if policy.evicts and family != "gemma3":
        assert sum(cache.report().evictions) > 0
    sparsity.detach(model)
    oracle = Oracle(policy, padding, len(cache.layers))
    AttentionInterface.register(ORACLE, oracle.attend)
    AttentionMaskInterface.register(ORACLE, sdpa_mask)
    model.set_attn_implementation(ORACLE)
    expected = run(model, DynamicCache(), ids, padding)
    assert_close("logits", sparse, expected, 1e-5)


@pytest.mark.parametrize("policy", TIGHT, ids=str)
def test_a_padded_row_equals_its_run_alone(policy, shallow):
    ids, padding = batch((PADS, 9, 0))
    together = run(shallow, SparseCache(shallow, policy), ids, padding)
    for b, pads in ((0, PADS), (1, 9), (2, 0)):
        cache, logits = SparseCache(shallow, policy), []
        with torch.no_grad():
            for first, stop in [(pads, PROMPT)] + [(i, i + 1) for i in range(PROMPT, ids.shape[1])]:
                out = shallow(input_ids=ids[b : b + 1, first:stop], past_key_values=cache)
                logits.append(out.logits[:, -1])
        assert_close(f"row {b}", together[b : b + 1], torch.stack(logits, 1), 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_attached_with_a_plain_cache_equals_dense_and_detach_restores(family):
    ids, padding = batch()
    model = tiny_model(family)
    config, hooks = model.config.to_dict(), len(model.get_decoder()._forward_hooks)
    implementation = model.config._attn_implementation
    before = run(model, DynamicCache(config=model.config), ids, padding)
    sparsity.attach(model)
    sparsity.attach(model)
    attached = run(model, DynamicCache(config=model.config), ids, padding)
    assert_close("attached", attached, before, 1e-5)
    no_cache = model(input_ids=ids[1:], use_cache=False).logits
    sparsity.detach(model)
    sparsity.detach(model)
    assert_close("without a cache", no_cache[:, PROMPT - 1 :], before[1:], 1e-5)
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == implementation
    decoder = model.get_decoder()
    assert len(decoder._forward_hooks) == hooks
    assert len(decoder._forward_pre_hooks) == 0
    assert torch.equal(run(model, DynamicCache(config=model.config), ids, padding), before)


def test_bfloat16_runs(llama):
    model = llama.to(torch.bfloat16)
    ids, padding = batch()
    assert run(model, SparseCache(model, TIGHT[6]), ids, padding).isfinite().all()


def test_a_model_of_sliding_windows_alone_is_left_to_transformers():
    model = tiny_model("mistral", sliding_window=16)
    cache = SparseCache(model, RaaS(16))
    ids = random_ids(40, 2)
    got = model.generate(ids, max_new_tokens=9, past_key_values=cache)
    report = cache.report()
    sparsity.detach(model)
    assert torch.equal(got, model.generate(ids, max_new_tokens=9))
    assert report.managed == (False,) * 4
    assert "decides nothing" in str(report)
    assert report.num_bytes > 0


@pytest.mark.parametrize("name", SCORES)
def test_softcap_and_sinks_through_the_model(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHAPE | SCORES[name])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.eval()
    ids, padding = batch()
    dense = run(model, DynamicCache(config=model.config), ids, padding)
    for policy in AMPLE:
        assert_close(
            f"{name}, {policy}", run(model, SparseCache(model, policy), ids, padding), dense
        )
