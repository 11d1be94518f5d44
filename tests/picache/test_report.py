"""What a link reports: counts that add up, estimates, and the fall to a full prefill."""

import pytest
import torch

from picache import PIC, CacheBlend, FullRecompute, LegoLink, LinkReport, NaiveReuse, PICacheError
from tests.helpers import assert_close, random_ids, tiny_model
from tests.picache.helpers import chunks_of

LENGTHS = (7, 20, 33, 1, 18)


def link(pic, method, query=9):
    chunks = chunks_of(pic, *LENGTHS)
    return pic.link(chunks, random_ids(query), method)


def test_counts_add_up():
    pic = PIC(tiny_model("llama"))
    report = link(pic, LegoLink(3)).report
    assert report.tokens_recomputed_per_layer == (19, 19, 19, 19)
    assert (
        report.tokens_total == sum(LENGTHS) + 9 == report.tokens_recomputed + report.tokens_reused
    )
    assert report.bytes_loaded == 2 * 4 * 4 * 2 * 16 * sum(LENGTHS)  # K, V; layers; fp32; heads
    assert report.chunk_hits == (True,) * 5
    parts = ("look_up", "compile", "load", "rotate", "choose", "capture", "recompute")
    assert set(report.seconds) == {*parts, "first_token"}
    assert sum(report.seconds[part] for part in parts) <= report.seconds["first_token"]


def test_flops_are_those_of_the_matrices_and_the_pairs():
    """Against the operations that torch's own counter sees in a full prefill."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_model("llama")
    pic = PIC(model)
    ids = random_ids(64)[None]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.set_attn_implementation("eager")
        model(ids, logits_to_keep=1)
    estimated = pic.hf.flops([torch.arange(64)] * 4)
    # The counter sees the whole square of scores, the estimate what causality leaves of it.
    square = 4 * 4 * 4 * 16 * (64 * 64 - 64 * 65 / 2)
    assert abs(estimated + square - counter.get_total_flops()) < 0.01 * estimated


def test_a_link_that_saves_nothing_is_a_full_prefill_and_says_so():
    model = tiny_model("llama")
    falling, linking = PIC(model), PIC(model, flops_per_byte=None)
    prompt = link(falling, FullRecompute())
    ids = prompt["input_ids"]
    with torch.no_grad():
        assert_close("logits", prompt.logits, model(ids).logits[:, -1], 1e-6)
    assert "linking would cost 1." in prompt.report.full_prefill
    assert "full prefill" in str(prompt.report)
    assert prompt.report.tokens_reused == prompt.report.bytes_loaded == 0
    assert link(linking, FullRecompute()).report.full_prefill == ""
    assert link(falling, LegoLink(3)).report.full_prefill == ""
    assert link(falling, CacheBlend(1.0)).report.full_prefill == "", "it chooses by layer"
    assert (
        "linking would cost"
        in link(PIC(model, flops_per_byte=1e4), NaiveReuse()).report.full_prefill
    )
    out = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert out.tolist() == model.generate(ids, max_new_tokens=5, do_sample=False).tolist()


def test_a_batch_says_how_many_rows_fell():
    pic = PIC(tiny_model("llama"), flops_per_byte=60)
    long = chunks_of(pic, 3, 40)
    short = chunks_of(pic, 1, 6)
    batch = pic.link([long, short], [random_ids(2)] * 2, LegoLink(6))
    assert batch.report.full_prefill.startswith("1 of 2 rows: linking would cost")
    single = pic.link(long, random_ids(2), LegoLink(6))
    assert_close("the linked row", batch.logits[:1], single.logits)


def test_a_report_reads_well():
    report = link(PIC(tiny_model("llama")), CacheBlend(0.3, schedule="single")).report
    text = str(report)
    assert "tokens: 88, " in text
    assert "by layer: 0-1: 81, 2-3: 30" in text
    assert "5 hits, 0 misses" in text
    html = report._repr_html_()
    assert html.startswith("<table><caption>CacheBlend(")
    assert "&#x27;single&#x27;" in html, "markup in a name is escaped"
    assert isinstance(report, LinkReport)


@pytest.mark.parametrize("price", [-1.0, float("nan")])
def test_a_negative_price_is_refused(price):
    with pytest.raises(PICacheError, match="flops_per_byte must be at least 0 or None"):
        PIC(tiny_model("llama"), flops_per_byte=price)
