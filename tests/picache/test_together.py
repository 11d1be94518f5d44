"""Layers side by side in one piece of memory: laid out, read, moved, and in which groups."""

import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from picache import ChunkStore
from picache.kernels.placing import Resident
from picache.kernels.tables import ALIGNED
from picache.store import together
from picache.store.quantize import FP8, encode
from picache.store.together import Form, Packed, _packed, layer_groups, moved, to_host
from tests.picache.disk_chunks import chunk

META = torch.device("meta")


def encoded(layers, tokens=3, head_dim=8, dtype=torch.bfloat16):
    shape = (1, 2, tokens, head_dim)
    names = ("keys", "values")
    return [{name: torch.randn(shape).to(dtype) for name in names} for _ in range(layers)]


def packed(layers):
    """The same layers in one piece of memory."""
    forms = [
        Form(index, name, part.dtype, tuple(part.shape))
        for index, layer in enumerate(layers)
        for name, part in layer.items()
    ]
    one = Packed.empty(forms)
    for layer, copy in zip(layers, one.layers(), strict=True):
        for name, part in layer.items():
            copy[name].copy_(part)
    return one


def assert_equal(layers, others):
    for layer, other in zip(layers, others, strict=True):
        assert set(layer) == set(other)
        for name, part in layer.items():
            assert part.dtype == other[name].dtype
            assert torch.equal(part, other[name])


def test_tensors_lie_one_behind_the_other():
    one = Packed.empty(
        [
            Form(1, "scale", torch.float32, (2, 3)),
            Form(0, "keys", torch.bfloat16, (5,)),
            Form(1, "keys", FP8, (3, 1)),
        ]
    )
    assert one.memory.nbytes == 24 + 10 + 3
    first, second = one.layers()
    begins = [
        part.data_ptr() - one.memory.data_ptr() for part in (*first.values(), *second.values())
    ]
    assert begins == [24, 0, 34]
    assert (first["keys"].shape, first["keys"].dtype) == ((5,), torch.bfloat16)
    assert (second["keys"].shape, second["keys"].dtype) == ((3, 1), FP8)
    assert all(part.is_contiguous() for part in second.values())


@contextmanager
def copies_elsewhere():
    """How many bytes each copy to another device moves; other memory stands for that device."""
    copies = []

    def counted(self, *args, **kwargs):
        copies.append(self.nbytes)
        return self.clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", counted)
        yield copies


@given(
    layers=st.integers(1, 5),
    tokens=st.integers(1, 9),
    head_dim=st.sampled_from([1, 2, 8, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    first=st.integers(0, 4),
    last=st.integers(1, 5),
)
def test_what_lies_side_by_side_is_moved_by_one_copy(layers, tokens, head_dim, dtype, first, last):
    held = encoded(layers, tokens, head_dim, dtype)
    first = min(first, layers - 1)
    whole = packed(held)
    some = whole.layers()[first : max(first + 1, last)]
    nbytes = sum(part.nbytes for layer in some for part in layer.values())
    with copies_elsewhere() as copies:
        assert_equal(moved(some, META), held[first : max(first + 1, last)])
        assert copies == [nbytes]
        assert_equal(moved(whole, META), held)
        assert copies == [nbytes, whole.memory.nbytes]
    assert_equal(moved(some, None), some)
    assert_equal(moved(whole, None), held)


def apart(layers):
    return layers


def with_a_gap(layers):
    layers = packed(layers).layers()
    return [*layers[:1], *layers[2:]]


def strided(layers):
    layers = packed(layers).layers()
    layers[0]["keys"] = layers[0]["keys"].transpose(1, 2)
    return layers


@pytest.mark.parametrize("change", [apart, with_a_gap, strided])
def test_what_does_not_is_moved_by_one_copy_a_tensor(change):
    layers = change(encoded(4, tokens=4))
    with copies_elsewhere() as copies:
        assert_equal(moved(layers, META), layers)
    assert copies == [part.nbytes for layer in layers for part in layer.values()]


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None])
@pytest.mark.parametrize("some", [slice(None), slice(1, 3), slice(3, None)])
def test_what_is_there_already_stays_as_it_is(some, device):
    """Some layers of a longer piece, too, as those of a chunk that was promoted."""
    held = encoded(4, tokens=4)
    layers = packed(held).layers()[some]
    there = moved(layers, device)
    assert_equal(there, held[some])
    assert all(there[i][name] is layer[name] for i, layer in enumerate(layers) for name in layer)
    assert_equal(_packed(layers).to("cpu").layers(), held[some])


def test_layers_of_several_pieces_are_moved_by_one_copy_a_piece():
    held = encoded(7, tokens=4)
    layers = [*packed(held[:3]).layers(), *packed(held[3:6]).layers(), held[6]]
    with copies_elsewhere() as copies:
        assert_equal(moved(layers[1:], META), held[1:])
    each = held[0]["keys"].nbytes
    assert copies == [4 * each, 6 * each, each, each]


@pytest.mark.parametrize("storage", ["exact", "int8"])
def test_what_moves_to_the_host_lies_there_in_groups(storage, monkeypatch):
    monkeypatch.setattr(together, "MOST_LAYERS", 3)
    layers = [encode(kv, storage) for kv in chunk() * 3][:5]
    nowhere = [{name: Elsewhere(part) for name, part in layer.items()} for layer in layers]
    held = to_host(nowhere)
    assert_equal(held, layers)
    assert len({layer["keys"].untyped_storage().data_ptr() for layer in held}) == 2
    with copies_elsewhere() as copies:
        assert_equal(moved(held, META), layers)
    assert len(copies) == 2


class Elsewhere(torch.Tensor):
    """A tensor that says it is on another device."""

    device = META

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        plain = [arg.as_subclass(torch.Tensor) if isinstance(arg, cls) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


def test_what_is_on_the_host_stays_as_it_is():
    layers = encoded(2)
    held = to_host(layers)
    assert all(held[i][name] is layers[i][name] for i in (0, 1) for name in ("keys", "values"))


def test_a_file_whose_smaller_elements_stand_first_is_read_right(tmp_path):
    """As another writer may lay them out: in memory the larger stand first."""
    store = ChunkStore(device_bytes=1, path=tmp_path, storage="int8")
    store.put("a", chunk())
    expected = moved(store.get("a").encoded(range(len(chunk()))), None)
    file = store._disk.open("a").file
    last = max(place.end for place in file._places.values())
    end = {name: last - place.end for name, place in file._places.items()}  # back to front
    data, first = tmp_path.rglob("a*.safetensors").__next__().read_bytes(), min(end.values())
    assert first == 0
    begin = min(place.begin for place in file._places.values())
    turned = bytearray(data)
    for name, place in file._places.items():
        at = begin + end[name] + 1  # and at odd places
        turned[at : at + place.nbytes] = data[place.begin : place.end]
        file._places[name] = type(place)(at, place.dtype, place.shape)
    copy = tmp_path / "turned"
    copy.write_bytes(turned)
    with copy.open("rb", buffering=0) as raw:
        file._file = raw
        assert_equal(file.layers(range(len(chunk()))).layers(), expected)


@given(layers=st.integers(1, 200), nbytes=st.integers(0, 2**40))
def test_groups_are_all_layers_in_order_and_no_larger_than_they_may_be(layers, nbytes):
    found = layer_groups(layers, nbytes)
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
    some = moved(found.encoded(range(1, len(kv))), None)
    assert len(reads) == {"exact": 1}.get(storage, 2)  # 8 bits: the scales stand in front
    assert sum(reads) == sum(part.nbytes for layer in some for part in layer.values())
    single = [one_by_one.encoded(range(index, index + 1)) for index in range(1, len(kv))]
    assert_equal(some, [layer for one in single for layer in moved(one, None)])


@pytest.mark.parametrize("layers", [range(0), range(1, 9), range(-1, 1), range(0, 2, 2)])
def test_layers_that_are_not_there_are_refused(layers):
    store = ChunkStore(device_bytes=math.inf)
    store.put("a", chunk())
    with pytest.raises(IndexError, match=rf"of a chunk of {len(chunk())} layers"):
        store.get("a").layers(layers)


@pytest.mark.parametrize("tokens", [3, 4, 5])
def test_kernels_are_given_tensors_that_begin_where_they_may(tokens):
    """In memory that others fill up to an odd place, as chunks of few or narrow heads do."""
    held = encoded(3, tokens=tokens, head_dim=2)
    kv = [(layer["keys"], layer["values"]) for layer in packed(held).layers()]
    resident = Resident.of(kv)
    assert not (resident.begins % ALIGNED).any()
    for layer, (keys, values) in zip(held, resident.layers, strict=True):
        assert torch.equal(layer["keys"], keys)
        assert torch.equal(layer["values"], values)
