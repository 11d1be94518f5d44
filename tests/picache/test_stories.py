"""A real trained model that this project did not make: stories260K, with real stories text."""

from functools import cache

import pytest
import torch

from picache import PIC, FullRecompute, LegoLink, LinkMethod, NaiveReuse
from tests.stories260k import (
    StoriesTokenizer,
    golden,
    load_model,
    needs_stories,
    published_stories,
)

pytestmark = needs_stories
CHUNK = 24


@cache
def pic() -> PIC:
    return PIC(load_model())


def next_token_loss(story: str, method: LinkMethod) -> tuple[float, int]:
    """Mean NLL of the second half of a story, its first half linked from chunks; rows computed."""
    ids = [1, *StoriesTokenizer().encode(story)]
    half = len(ids) // 2 // CHUNK * CHUNK
    chunks = [pic().compile(ids[i : i + CHUNK]) for i in range(0, half, CHUNK)]
    rest = torch.tensor(ids[half:])
    prompt = pic().link(chunks, rest[:1], method)
    with torch.no_grad():
        logits = pic().model(rest[None, :-1], past_key_values=prompt["past_key_values"])
    loss = torch.nn.functional.cross_entropy(logits.logits[0], rest[1:])
    return loss.item(), prompt.report.tokens_recomputed


def test_greedy_text_is_the_published_one():
    ids, text = golden()
    out = pic().model.generate(torch.tensor([[1]]), max_new_tokens=len(ids) - 1, do_sample=False)
    assert out[0].tolist() == ids
    assert StoriesTokenizer().decode(ids) == text
    assert StoriesTokenizer().encode(text) == ids[1:]


@pytest.mark.parametrize("story", [0, 1])
def test_next_token_loss_of_full_naive_and_legolink(story):
    """Full linking equals a plain prefill; every arm stays near it on this very local model."""
    text = published_stories()[story]
    ids = torch.tensor([1, *StoriesTokenizer().encode(text)])
    half = len(ids) // 2 // CHUNK * CHUNK
    with torch.no_grad():
        logits = pic().model(ids[None, :-1]).logits[0, half:]
    plain = torch.nn.functional.cross_entropy(logits, ids[half + 1 :]).item()
    full, _ = next_token_loss(text, FullRecompute())
    naive, _ = next_token_loss(text, NaiveReuse())
    lego, rows = next_token_loss(text, LegoLink(4))
    assert full == pytest.approx(plain, abs=1e-5)
    assert rows == 4 * (half // CHUNK - 1) + 1
    assert abs(lego - full) < 0.02
    assert abs(naive - full) < 0.05
