"""Tensors side by side in one piece of memory: laid out, read, moved, and in which groups."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from picache import ChunkStore
from picache.store import together
from picache.store.quantize import FP8
from picache.store.together import groups, moved, side_by_side, to_host
from tests.picache.disk_chunks import chunk

META = torch.device("meta")


def encoded(layers, tokens=3, head_dim=8, dtype=torch.bfloat16):
    shape = (1, 2, tokens, head_dim)
    return [{"keys": torch.randn(shape).to(dtype), "values": torch.randn(shape).to(dtype)}
            for _ in range(layers)]  # fmt: skip


def in_one_piece(layers):
    """The same layers in one piece of memory."""
    parts = [part for layer in layers for part in layer.values()]
    _, copies = side_by_side([(part.shape, part.dtype) for part in parts])
    copies = iter([copy.copy_(part) for copy, part in zip(copies, parts, strict=True)])
    return [{name: next(copies) for name in layer} for layer in layers]


def test_tensors_lie_one_behind_the_other():
    forms = [((2, 3), torch.float32), ((5,), torch.bfloat16), ((3, 1), FP8)]
    memory, tensors = side_by_side(forms)
    assert memory.nbytes == 24 + 10 + 3
    begins = [tensor.data_ptr() - memory.data_ptr() for tensor in tensors]
    assert begins == [0, 24, 34]
    assert [(tensor.shape, tensor.dtype) for tensor in tensors] == [
        (torch.Size(shape), dtype) for shape, dtype in forms
    ]


def copies_of(monkeypatch):
    """How many bytes each copy to another device moves."""
    copies, to = [], torch.Tensor.to

    def counted(self, *args, **kwargs):
        copies.append(self.nbytes)
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", counted)
    return copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_what_lies_side_by_side_is_moved_by_one_copy(dtype, monkeypatch):
    layers = in_one_piece(encoded(3, tokens=4, dtype=dtype))
    copies = copies_of(monkeypatch)
    there = moved(layers, META)
    assert copies == [sum(part.nbytes for layer in layers for part in layer.values())]
    for layer, copy in zip(layers, there, strict=True):
        assert list(layer) == list(copy)
        for name, part in layer.items():
            assert (copy[name].shape, copy[name].dtype) == (part.shape, part.dtype)
            assert copy[name].device == META


def apart(layers):
    return layers


def with_a_gap(layers):
    return [*layers[:1], *layers[2:]]


def misaligned(layers):
    return in_one_piece([{"first": torch.zeros(1, dtype=torch.bfloat16)}, *layers])


def strided(layers):
    layers[0]["keys"] = layers[0]["keys"].transpose(1, 2)
    return layers


@pytest.mark.parametrize("change", [apart, with_a_gap, misaligned, strided])
def test_what_does_not_is_moved_by_one_copy_a_tensor(change, monkeypatch):
    layers = encoded(4, tokens=4)
    layers = change(layers if change is apart else in_one_piece(layers))
    copies = copies_of(monkeypatch)
    moved(layers, META)
    assert copies == [part.nbytes for layer in layers for part in layer.values()]


@given(
    layers=st.integers(1, 5),
    tokens=st.integers(1, 9),
    head_dim=st.sampled_from([1, 2, 8, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    first=st.integers(0, 4),
)
def test_a_move_changes_nothing(layers, tokens, head_dim, dtype, first):
    there = encoded(layers, tokens, head_dim, dtype)
    some = in_one_piece(there)[first:]

    with pytest.MonkeyPatch.context() as patch:  # other memory stands for another device
        patch.setattr(torch.Tensor, "to", lambda self, *_, **__: self.clone())
        copies = moved(some, torch.device("cpu"))
    for layer, copy in zip(there[first:], copies, strict=True):
        assert all(torch.equal(layer[name], copy[name]) for name in layer)


def test_what_is_on_the_host_stays_as_it_is():
    layers = encoded(2)
    held = to_host(layers)
    assert all(held[i][name] is layers[i][name] for i in (0, 1) for name in ("keys", "values"))


@given(layers=st.integers(1, 200), nbytes=st.integers(0, 2**40))
def test_groups_are_all_layers_in_order_and_no_larger_than_they_may_be(layers, nbytes):
    found = groups(layers, nbytes)
    assert [layer for group in found for layer in group] == [*range(layers)]
    for group in found:
        assert len(group) == 1 or len(group) * nbytes <= together.AT_ONCE * layers
        assert len(group) <= together.MOST_LAYERS
    if len(found) > 1:  # nor smaller
        more = len(found[0]) + 1
        assert more > together.MOST_LAYERS or more * nbytes > together.AT_ONCE * layers


@pytest.mark.parametrize("storage", ["exact", "int8", "fp8"])
def test_a_file_is_read_in_as_few_pieces_as_its_layers_lie_in(storage, tmp_path, monkeypatch):
    store = ChunkStore(device_bytes=1, path=tmp_path, storage=storage)
    kv = chunk()
    store.put("a", kv)
    found, one_by_one = store.get("a"), store.get("a")
    reads, file = [], store._disk.open("a").file
    read = type(file)._read

    def counted(self, begin, into):
        reads.append(len(into))
        return read(self, begin, into)

    monkeypatch.setattr(type(file), "_read", counted)
    some = found.encoded(range(1, len(kv)))
    assert len(reads) == {"exact": 1}.get(storage, 2)  # 8 bits: the scales stand in front
    assert sum(reads) == sum(part.nbytes for layer in some for part in layer.values())
    for index, layer in enumerate(some, 1):
        (expected,) = one_by_one.encoded(range(index, index + 1))
        assert list(layer) == list(expected)
        assert all(torch.equal(layer[name], expected[name]) for name in layer)


@pytest.mark.parametrize("layers", [range(0), range(1, 9), range(-1, 1), range(0, 2, 2)])
def test_layers_that_are_not_there_are_refused(layers, tmp_path):
    store = ChunkStore(device_bytes=math.inf)
    store.put("a", chunk())
    with pytest.raises(IndexError, match=rf"of a chunk of {len(chunk())} layers"):
        store.get("a").layers(layers)
