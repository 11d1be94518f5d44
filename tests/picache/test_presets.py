"""Fair arms see the same tokens and compute the query; the authors' differ as their code does."""

import pytest
import torch

from picache import PIC, DummySinks, LegoLink, PICacheError
from picache.methods.presets import Arm, arms
from tests.helpers import random_ids, tiny_model
from tests.picache.helpers import compiled

BOS = torch.tensor([1])


def linked(preset):
    model = tiny_model("llama")
    documents = [torch.cat([BOS, random_ids(n, seed=n)]) for n in (4, 20, 31)]
    query = torch.cat([BOS, random_ids(6, seed=6)]) if preset == "repo" else random_ids(6, seed=6)
    prompts = {}
    for name, arm in arms(preset, k=4, ratio=0.25).items():
        pic = PIC(model, sinks=arm.sinks, flops_per_byte=None)
        prompts[name] = pic.link(compiled(pic, documents), query, arm.method)
    return prompts


def test_fair_arms_run_on_one_token_list_with_one_bos():
    prompts = linked("fair")
    ids = {tuple(prompt["input_ids"][0].tolist()) for prompt in prompts.values()}
    assert len(ids) == 1
    assert next(iter(ids)).count(1) == 1
    assert all(p.report.tokens_recomputed_per_layer[-1] >= 6 for p in prompts.values())
    recomputed = {name: prompt.report.tokens_recomputed for name, prompt in prompts.items()}
    assert recomputed["LegoLink-4"] == recomputed["random"] == 4 + 4 + 6
    assert recomputed["LegoLink-4, 4 dummies"] == recomputed["LegoLink-4"]
    assert recomputed["random-ratio"] == int(0.25 * (20 + 31)) + 6
    assert recomputed["LegoLink-0"] == recomputed["naive"] == 6


def test_the_fair_arm_behind_dummies_is_legolink_behind_them():
    made = arms("fair", k=4)["LegoLink-4, 4 dummies"]
    assert made == Arm(LegoLink(4), DummySinks(4))
    assert list(arms("fair", k=4)) == [
        *("full", "naive", "random", "random-ratio", "LegoLink-0", "LegoLink-4"),
        *("LegoLink-4, 4 dummies", "CacheBlend"),
    ]
    prompts = linked("fair")
    behind, alone = prompts["LegoLink-4, 4 dummies"], prompts["LegoLink-4"]
    assert not torch.equal(behind.logits, alone.logits), "chunks saw the dummies"


def test_paper_arms_differ_in_the_dummies():
    fair, paper = linked("fair"), linked("paper")
    assert set(fair) - set(paper) == {"LegoLink-4, 4 dummies"}
    for name, prompt in paper.items():
        same = torch.equal(prompt.logits, fair[name].logits)
        assert same == (name != "LegoLink-0"), name


def test_repo_arms_keep_every_bos_and_reuse_the_query():
    prompts = linked("repo")
    assert prompts["full"]["input_ids"][0].tolist().count(1) == 4
    assert prompts["naive"].report.tokens_recomputed == 1
    assert prompts["LegoLink-4"].report.tokens_recomputed == 4 + 4 + 7, "k counts the BOS"
    share = int(0.25 * (21 + 32))
    last = prompts["CacheBlend"].report.tokens_recomputed_per_layer[-1]
    assert last in (share, share + 1), "the forced last token may be among the chosen"


def test_an_unknown_preset_is_refused():
    with pytest.raises(PICacheError, match="'fair', 'paper' or 'repo', got 'best'"):
        arms("best")
    with pytest.raises(PICacheError, match="'LegoLink-0' is an arm already"):
        arms("paper", k=0)
