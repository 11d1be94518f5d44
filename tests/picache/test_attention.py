"""Scattered attention against its slow twin and against a loop over single rows."""

import pytest
import torch

import picache.hf.attention
from picache import LegoLink
from picache.hf.attention import attend_reference, mask_blocks, scattered_attention
from picache.hf.sparse_pass import ScatterMask
from tests.helpers import assert_close
from tests.picache.helpers import compiled, pic_of, prompt_parts


def causal(query, key):
    return key[None, :] <= query[:, None]


def sliding(query, key):
    return causal(query, key) & (key[None, :] > query[:, None] - 5)


def tensors(rows, n, heads, kv_heads, head_dim, value_dim):
    generator = torch.Generator().manual_seed(rows * 1000 + n)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    positions = torch.randperm(n, generator=generator)[:rows].sort().values
    return (
        draw(2, heads, rows, head_dim),
        draw(2, kv_heads, n, head_dim),
        draw(2, kv_heads, n, value_dim),
        positions,
    )


@pytest.mark.parametrize("mask", [causal, sliding])
@pytest.mark.parametrize(
    ("rows", "n", "heads", "kv_heads", "value_dim"),
    [(1, 1, 2, 2, 8), (7, 63, 4, 1, 8), (13, 75, 4, 2, 8), (75, 75, 8, 2, 6), (3, 200, 6, 3, 8)],
)
@pytest.mark.parametrize(("elements", "gap"), [(2**22, 2**10), (2**22, 1), (300, 20), (1, 1)])
def test_equals_reference(mask, rows, n, heads, kv_heads, value_dim, elements, gap, monkeypatch):
    bounds = picache.hf.attention._Bounds(64, elements, gap)
    monkeypatch.setitem(picache.hf.attention._BOUNDS, "cpu", bounds)
    query, key, value, positions = tensors(rows, n, heads, kv_heads, 8, value_dim)
    allowed = mask(positions, torch.arange(n))
    expected = attend_reference(query, key, value, allowed, 0.3)
    assert_close("out", scattered_attention(query, key, value, positions, mask, 0.3), expected)
    sinks = torch.randn(heads)
    expected = attend_reference(query, key, value, allowed, 0.3, 2.0, sinks)
    actual = scattered_attention(query, key, value, positions, mask, 0.3, 2.0, sinks)
    assert_close("softcap and sinks", actual, expected)


def test_a_block_ends_where_it_is_full_and_before_a_gap(monkeypatch):
    monkeypatch.setitem(
        picache.hf.attention._BOUNDS, "cpu", picache.hf.attention._Bounds(4, 2**22, 20)
    )
    # A gap of 9 behind two queries, 18 scores, is bridged; one of 10, 20 scores, is not.
    positions = torch.tensor([0, 1, 11, 12, 13, 14, 25, 26, 27, 28, 29])
    blocks = list(mask_blocks(positions, positions, causal, 30, torch.float32))
    assert [positions[block.rows].tolist() for block in blocks] == [
        [0, 1, 11, 12],
        [13, 14],
        [25, 26, 27, 28],
        [29],
    ]
    for block in blocks:
        rows = positions[block.rows]
        assert torch.equal(block.allowed, causal(rows, torch.arange(int(rows[-1]) + 1)))
        assert torch.equal(block.added.exp().bool(), block.allowed)


def test_reference_by_hand():
    """One row that sees two of three keys: weights 1/4 and 3/4, worked out on paper."""
    query = torch.tensor([[[[1.0]]]])
    key = torch.tensor([[[[0.0], [torch.log(torch.tensor(3.0)).item()], [9.0]]]])
    value = torch.tensor([[[[4.0], [8.0], [1e6]]]])
    allowed = torch.tensor([[True, True, False]])
    assert attend_reference(query, key, value, allowed, 1.0).item() == pytest.approx(7.0)
    sink = torch.log(torch.tensor([4.0]))
    half = attend_reference(query, key, value, allowed, 1.0, None, sink)
    assert half.item() == pytest.approx(3.5)


def test_what_lies_behind_a_row_is_never_read():
    query, key, value, positions = tensors(5, 40, 2, 1, 8, 8)
    positions = torch.tensor([3, 9, 10, 11, 20])
    key[:, :, 21:] = value[:, :, 21:] = torch.nan
    out = scattered_attention(query, key, value, positions, causal, 0.3)
    assert not out.isnan().any()


def test_a_pass_evaluates_a_small_mask_once_for_all_layers_of_a_kind(monkeypatch):
    asked = []
    original = ScatterMask.__call__

    def counted(self, query, key):
        asked.append(len(query))
        return original(self, query, key)

    monkeypatch.setattr(ScatterMask, "__call__", counted)
    documents, query = prompt_parts((8, 9, 12))
    for family, kinds in (("llama", 1), ("gemma3", 2)):  # full layers, and sliding ones too
        pic = pic_of(family)
        chunks = compiled(pic, documents)
        asked.clear()
        first = pic.link(chunks, query, LegoLink(2)).logits
        assert sum(asked) == kinds * (2 + 2 + len(query))
        bounds = picache.hf.attention._Bounds(64, 1, 2**10)
        with monkeypatch.context() as patch:  # too large to keep: a row at a time, in every layer
            patch.setitem(picache.hf.attention._BOUNDS, "cpu", bounds)
            asked.clear()
            again = pic.link(chunks, query, LegoLink(2)).logits
        assert len(asked) == len(pic.hf.rotations) * (2 + 2 + len(query))
        assert_close("logits", again, first)
