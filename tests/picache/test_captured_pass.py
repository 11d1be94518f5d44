"""The pass of fixed shape, run as it would be captured: what the eager pass gives, to rounding."""

import copy
import pickle

import pytest
import torch
from torch import nn

from picache import (
    A3,
    APE,
    PIC,
    CacheBlend,
    ChunkStore,
    FullRecompute,
    LegoLink,
    NaiveReuse,
    PICacheError,
    ProphetKV,
    RandomRecompute,
)
from picache.hf import captured_pass, padded_pass, recorders
from picache.hf.arena import Arena
from picache.hf.due import nothing_due
from picache.hf.padded_pass import window_of
from picache.hf.reading_back import RefuseReadingBack
from picache.hf.size_class import classes_up_to, size_class
from picache.hf.sparse_pass import CannotCapture
from picache.kernels import check
from picache.kernels.available import KernelError
from picache.kernels.scattered_attention import scattered_attention
from picache.linking.sources import LoadedOnce
from tests.helpers import assert_close, random_ids, tiny_model
from tests.picache.captured import (
    TAKEN,
    assert_same,
    assert_same_kv,
    families,
    linked_in_threads,
    pic_and_parts,
)
from tests.picache.helpers import compiled, prompt_parts


@pytest.mark.parametrize("family", TAKEN)
def test_every_family_gives_what_the_eager_pass_gives(family, captured, eagerly):
    try:
        model = families.build(family)
    except AttributeError as error:
        pytest.skip(f"this transformers has no such family: {error}")
    pic, chunks, query = pic_and_parts(model)
    prompt = pic.link(chunks, query, LegoLink(3))
    assert prompt.report.recompute_pass == "captured, 19 rows in a class of 32"
    assert_same(prompt, eagerly(pic, chunks, query, LegoLink(3)))


@pytest.mark.parametrize(
    "method",
    [
        NaiveReuse(),
        NaiveReuse(force_query=False),
        RandomRecompute(3),
        A3(0.3),
        ProphetKV(0.3, value_norm=True),
        FullRecompute(),
    ],
    ids=str,
)
def test_every_method_that_keeps_its_rows_is_captured(method, captured, eagerly):
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    prompt = pic.link(chunks, query, method)
    assert prompt.report.recompute_pass.startswith("captured")
    expected = eagerly(pic, chunks, query, method)
    assert_same(prompt, expected)
    ours, theirs = prompt.report, expected.report
    assert ours.tokens_recomputed_per_layer == theirs.tokens_recomputed_per_layer
    assert (ours.flops, ours.bytes_loaded) == (theirs.flops, theirs.bytes_loaded)


@pytest.mark.parametrize(
    ("method", "reason"),
    [(CacheBlend(0.3), "chooses again in each layer"), (APE(), "side by side")],
    ids=str,
)
def test_other_methods_stay_eager_and_say_so(method, reason, captured):
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    report = pic.link(chunks, query, method).report
    assert report.recompute_pass.startswith("eager: ")
    assert reason in report.recompute_pass
    assert reason in str(report)


def test_on_a_cpu_nothing_is_captured():
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    report = pic.link(chunks, query).report
    assert report.recompute_pass == "eager: nothing is captured on a cpu"
    assert report.seconds["capture"] == 0


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("Llama 4", "neither causal nor a sliding window"),
        ("Llama (dynamic NTK)", "follow the length"),
    ],
)
def test_a_model_that_cannot_be_captured_is_linked_eagerly(family, reason, captured, eagerly):
    pic, chunks, query = pic_and_parts(families.build(family))
    for _ in range(2):  # the reason is remembered
        prompt = pic.link(chunks, query, LegoLink(3))
        assert reason in prompt.report.recompute_pass
    assert_same(prompt, eagerly(pic, chunks, query, LegoLink(3)))


def test_a_hook_of_the_users_is_called_at_every_link(captured):
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    calls = []
    handle = pic.hf.decoder.layers[1].register_forward_hook(lambda *_: calls.append(1))
    report = pic.link(chunks, query).report
    assert "a forward hook on model.layers.1" in report.recompute_pass
    assert calls
    handle.remove()
    assert pic.link(chunks, query).report.recompute_pass.startswith("captured")


def test_a_capture_that_fails_is_said_and_leaves_the_model_as_it_was(monkeypatch, eagerly):
    class Failing(recorders.RunAgain):
        def record(self, forward):
            forward(nothing_due)
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setitem(recorders.RECORDERS, "cpu", Failing)
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    before = pic.hf.attention.own
    prompt = pic.link(chunks, query, LegoLink(3))
    reason = "eager: capturing failed (RuntimeError: operation not permitted when stream is capt"
    assert prompt.report.recompute_pass.startswith(reason)
    assert pic.hf.attention.own == before
    assert_same(prompt, eagerly(pic, chunks, query, LegoLink(3)))
    with pytest.raises(PICacheError, match="capturing failed"):
        pic.warm_up(tokens=64, rows=16)


@pytest.mark.parametrize(
    ("off", "said"), [(1.0, "eager: the captured pass gave numbers"), (0.0, "captured, ")]
)
def test_a_recording_that_gives_something_else_is_not_used(off, said, monkeypatch, eagerly):
    class Recorder(recorders.RunAgain):
        def record(self, forward):
            return recorders.Proven(lambda due: forward(due) + off, forward, torch.float32)

    monkeypatch.setitem(recorders.RECORDERS, "cpu", Recorder)
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    for _ in range(2):
        prompt = pic.link(chunks, query, LegoLink(3))
        assert prompt.report.recompute_pass.startswith(said)
    assert_same(prompt, eagerly(pic, chunks, query, LegoLink(3)))


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32])
def test_padding_of_any_width_changes_nothing(rows, captured, eagerly):
    pic, chunks, query = pic_and_parts(tiny_model("gemma3"), (7, 40), query=rows)
    assert_same(pic.link(chunks, query, NaiveReuse()), eagerly(pic, chunks, query, NaiveReuse()))


def test_what_lies_behind_a_prompt_is_not_read(captured, eagerly):
    """Garbage of earlier prompts, NaN included, in an arena far longer than this one."""
    pic, chunks, query = pic_and_parts(tiny_model("mistral_sliding"))
    pic.warm_up(tokens=300, rows=32, progress=False)
    for keys, values in pic.passes.arena.places(1):
        keys.fill_(torch.nan)
        values.fill_(torch.nan)
    assert_same(pic.link(chunks, query, LegoLink(3)), eagerly(pic, chunks, query, LegoLink(3)))


def test_a_prompt_may_fill_the_arena_to_its_end(captured, eagerly):
    pic, chunks, query = pic_and_parts(tiny_model("llama"), (100, 200, 200), query=12)
    assert len(query) + 500 == pic.hf.max_length
    pic.warm_up(tokens=512, rows=32, progress=False)
    arena = pic.passes.arena
    assert_same(pic.link(chunks, query, LegoLink(2)), eagerly(pic, chunks, query, LegoLink(2)))
    assert pic.passes.arena is arena


def test_a_batch_goes_through_one_pass(captured, eagerly):
    pic, chunks, query = pic_and_parts(tiny_model("gemma3"))
    rows, queries = [chunks, chunks[:2], chunks[2:]], [query, query[:3], query[:1]]
    batch = pic.link(rows, queries, LegoLink(3))
    assert batch.report.recompute_pass == "captured, 19 rows in a class of 32, 3 prompts at once"
    assert_same(batch, eagerly(pic, rows, queries, LegoLink(3)))
    for report, row, question in zip(batch.reports, rows, queries, strict=True):
        alone = eagerly(pic, row, question, LegoLink(3)).report
        assert report.tokens_recomputed_per_layer == alone.tokens_recomputed_per_layer
        assert report.bytes_loaded == alone.bytes_loaded


def test_a_batch_of_equal_lengths_stays_where_it_was_linked(captured, eagerly):
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    rows, queries = [chunks, [chunks[0], *chunks[:0:-1]]], [query, query.flip(0)]
    batch = pic.link(rows, queries, LegoLink(3))
    places = pic.passes.arena.places(2)
    lies = batch.past_key_values.layers[1].values
    assert lies.data_ptr() == places[1][1].data_ptr()
    assert_same(batch, eagerly(pic, rows, queries, LegoLink(3)))


def ids_of(batch, row):
    """The ids of a row, without its padding, ``[1, tokens]``."""
    return batch.input_ids[row, batch.attention_mask[row].bool()][None]


def test_a_row_of_a_batch_may_be_prefilled_in_full(captured):
    pic, chunks, query = pic_and_parts(tiny_model("llama"), (1, 90, 7))
    pic.flops_per_byte = 100.0
    batch = pic.link([chunks[:2], chunks[::2]], [query, query], LegoLink(8))
    linked, full = batch.reports
    assert (linked.full_prefill, full.recompute_pass) == ("", "")
    assert linked.recompute_pass.startswith("captured")
    assert "as much" in full.full_prefill
    ids = ids_of(batch, 1)
    with torch.no_grad():
        expected = pic.model(ids).logits[:, -1]
    assert_close("logits", batch.logits[1:], expected, 1e-5)
    assert batch.past_key_values.is_compileable
    run = dict(max_new_tokens=6, do_sample=False)
    together = pic.model.generate(**batch, **run)
    for index, row in enumerate((ids_of(batch, 0), ids)):
        prompt = pic.link([chunks[:2], chunks[::2]][index], query, LegoLink(8))
        alone = pic.model.generate(**prompt, **run)
        assert torch.equal(prompt.input_ids, row)
        assert torch.equal(together[index, -6:], alone[0, -6:])


@pytest.mark.parametrize("recorded", [True, False])
def test_a_shared_chunk_is_loaded_once(recorded, request, tmp_path, monkeypatch):
    from picache.store.stored import StoredChunk

    if recorded:
        request.getfixturevalue("captured")
    model = tiny_model("llama")
    pic = PIC(model, store=ChunkStore(device_bytes=1, path=tmp_path), flops_per_byte=None)
    documents, query = prompt_parts()
    chunks = compiled(pic, documents)
    read, original = [], StoredChunk.layers

    def counted(self, layers, *args):
        read.extend((id(self), layer) for layer in layers)
        return original(self, layers, *args)

    monkeypatch.setattr(StoredChunk, "layers", counted)
    pic.link([chunks, chunks, [chunks[0], chunks[1], chunks[1]]], [query] * 3, LegoLink(3))
    assert len(read) == len(set(read)) == 5 * 4


def test_layers_are_let_go_when_all_places_have_them():
    asked = []
    once = LoadedOnce(lambda layers: asked.append(layers) or [*layers], places=3)
    some, others = range(2), range(2, 3)
    for layers in (some, others, some, others, range(2)):
        assert once(layers) == [*layers]
    assert asked == [some, others]
    assert list(once._held) == [others]


def test_an_earlier_prompt_stays_right_when_the_next_one_is_linked(captured, eagerly):
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    expected = eagerly(pic, chunks, query, LegoLink(3))
    run = dict(max_new_tokens=6, do_sample=False)
    answer = pic.model.generate(**expected, **run)
    prompt = pic.link(chunks, query, LegoLink(3))
    fork = prompt.past_key_values
    other = pic.link(chunks[:2], query.flip(0), LegoLink(3))
    assert_same(prompt, expected)
    assert_same_kv(fork, expected.past_key_values)
    assert torch.equal(pic.model.generate(**prompt, **run), answer)
    assert_same(other, eagerly(pic, chunks[:2], query.flip(0), LegoLink(3)))


def test_an_arena_that_nobody_reads_is_used_again_without_a_copy(captured):
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    first = pic.link(chunks, query).past_key_values.layers[0].keys.data_ptr()
    arena = pic.passes.arena
    assert pic.link(chunks, query).past_key_values.layers[0].keys.data_ptr() == first
    assert pic.passes.arena is arena


def test_tensors_that_somebody_took_are_never_written_to(captured):
    """As a cache does that goes on from a linked one and keeps its tensors."""
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    taken = [layer.keys.detach() for layer in pic.link(chunks, query).past_key_values.layers]
    before = [keys.clone() for keys in taken]
    pic.link(chunks[::-1], query)
    assert all(map(torch.equal, taken, before))


def test_a_copy_of_a_prompt_holds_no_more_than_the_prompt(captured):
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    pic.warm_up(tokens=500, rows=16, progress=False)
    prompt = pic.link(chunks, query)
    for twin in (copy.deepcopy(prompt), pickle.loads(pickle.dumps(prompt))):
        assert_same_kv(twin.past_key_values, prompt.past_key_values, bound=0)
        stored = twin.past_key_values.layers[0].keys.untyped_storage().nbytes()
        assert stored == prompt.past_key_values.layers[0].keys.nbytes


def test_two_threads_take_turns(captured, eagerly):
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    asked = [(chunks, query), (chunks[:3], query.flip(0))]
    expected = [eagerly(pic, *one, LegoLink(3)) for one in asked]
    found = linked_in_threads(pic, asked, LegoLink(3), 6)
    for which, prompts in found.items():
        assert len(prompts) == 6
        for prompt in prompts:
            assert_same(prompt, expected[which])


def changed_weights(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight * 2)


def changed_settings(model):
    model.config.rms_norm_eps = 0.5


def changed_module(model):
    wide = nn.Linear(64, 96, bias=True)
    model.model.layers[1].mlp.up_proj = wide.eval()


class Adapted(nn.Linear):
    """A layer with an adapter that is switched as peft switches its own."""

    _disable_adapters = True

    def forward(self, x):
        return super().forward(x) * (1 if self._disable_adapters else 3)


def changed_adapter(model):
    model.model.layers[0].mlp.up_proj._disable_adapters = False


def changed_attention(model):
    model.set_attn_implementation("eager")


@pytest.mark.parametrize(
    "change",
    [changed_weights, changed_settings, changed_module, changed_adapter, changed_attention],
)
def test_a_model_that_changed_is_captured_anew(change, captured, eagerly):
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.__class__ = Adapted
    pic, chunks, query = pic_and_parts(model)
    pic.link(chunks, query, LegoLink(3))
    assert pic.link(chunks, query, LegoLink(3)).report.seconds["capture"] == 0
    change(model)
    documents, question = prompt_parts()
    again = compiled(pic, documents)
    prompt = pic.link(again, question, LegoLink(3))
    assert prompt.report.seconds["capture"] > 0
    assert_same(prompt, eagerly(pic, again, question, LegoLink(3)))


def test_warming_up_leaves_nothing_to_capture(captured):
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    pic.warm_up(tokens=128, rows=40, batch=2, progress=False)
    for method in (NaiveReuse(), LegoLink(3), LegoLink(6)):
        assert pic.link(chunks, query, method).report.seconds["capture"] == 0
        assert pic.link([chunks, chunks[:2]], [query, query], method).report.seconds["capture"] == 0
    assert pic.link(chunks, query, LegoLink(16)).report.seconds["capture"] > 0


@pytest.mark.parametrize("method", [A3(0.3), ProphetKV(0.3, value_norm=True)], ids=str)
def test_warming_up_for_a_method_captures_what_it_chooses_by(method, captured):
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    pic.warm_up(tokens=128, rows=48, progress=False)
    assert pic.link(chunks, query, method).report.seconds["capture"] > 0
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    pic.warm_up(tokens=128, rows=48, batch=2, progress=False, method=method)
    assert pic.link(chunks, query, method).report.seconds["capture"] == 0
    prompt = pic.link([chunks, chunks[:2]], [query, query[:3]], method)
    assert prompt.report.seconds["capture"] == 0


@pytest.mark.parametrize(
    ("method", "reason"), [(CacheBlend(), "in each layer"), (APE(), "side by side")], ids=str
)
def test_warming_up_refuses_methods_that_are_never_captured(method, reason, captured):
    pic, _, _ = pic_and_parts(tiny_model("llama"))
    with pytest.raises(PICacheError, match=reason):
        pic.warm_up(tokens=64, rows=16, method=method)
    with pytest.raises(PICacheError, match="LegoLink"):
        pic.warm_up(tokens=64, rows=16, method=LegoLink)


def test_warming_up_refuses_what_cannot_be(captured, monkeypatch):
    pic = PIC(tiny_model("llama"))
    with pytest.raises(PICacheError, match=r"tokens=513.*positions for 512"):
        pic.warm_up(tokens=513, rows=16)
    with pytest.raises(PICacheError, match=r"rows=65.*prompts of 64"):
        pic.warm_up(tokens=64, rows=65)
    with pytest.raises(PICacheError, match="whole number of tokens"):
        pic.warm_up(tokens=0, rows=1)
    monkeypatch.setattr(captured_pass, "_free_bytes", lambda device: 1000)
    needed = 4 * 65 * pic.hf.bytes_per_token
    with pytest.raises(PICacheError, match=f"need {needed:,} bytes on cpu, and 1,000 are free"):
        pic.warm_up(tokens=64, rows=16, batch=4)
    chunks = compiled(pic, prompt_parts()[0])
    assert "bytes" in pic.link(chunks, random_ids(4)).report.recompute_pass


def test_warming_up_on_a_cpu_says_that_nothing_is_captured_there():
    with pytest.raises(PICacheError, match="nothing is captured on a cpu"):
        PIC(tiny_model("llama")).warm_up(tokens=64, rows=16)


def test_very_many_rows_are_not_captured_unasked(captured, monkeypatch):
    monkeypatch.setattr(captured_pass, "MOST_ROWS", 16)
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    report = pic.link(chunks, query, LegoLink(3)).report
    assert report.recompute_pass == "eager: 19 rows would hold too much memory in a graph"
    pic.warm_up(tokens=128, rows=32, progress=False)
    assert pic.link(chunks, query, LegoLink(3)).report.recompute_pass.startswith("captured")


def test_classes_are_few_and_close():
    assert classes_up_to(40) == [16, 32, 48]
    for size in range(1, 5000):
        found = size_class(size)
        assert found >= size
        assert found % 16 == 0
        assert found - size < max(16, size / 8)
        assert size_class(found) == found
    assert len(classes_up_to(512)) <= 24


@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_of_a_padded_pass_is_attention_of_each_row(heads, window, softcap, sinks):
    """Against scores written out for one row at a time; NaN where nobody may look."""
    generator = torch.Generator().manual_seed(0)
    many, few = heads
    query = torch.randn(2, many, 70, 8, generator=generator)
    key, value = (torch.randn(2, few, 90, d, generator=generator) for d in (8, 6))
    lengths, counts = (83, 40), (70, 11)
    positions = torch.full((2, 70), -1)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        chosen = torch.randperm(length - 1, generator=generator)[: count - 1]
        positions[row, 70 - count :] = torch.cat([chosen.sort()[0], torch.tensor([length - 1])])
        key[row, :, length:], value[row, :, length:] = torch.nan, torch.nan
    extra = torch.randn(many, generator=generator) if sinks else None
    out, _ = scattered_attention(query, key, value, positions, 0.3, window, softcap, extra)
    for row in range(2):
        for index, at in enumerate(positions[row].tolist()):
            first = 0 if window is None else max(0, at + 1 - window)
            for head in range(many):
                if at < 0:
                    assert not out[row, head, index].any()
                    continue
                keys = key[row, head * few // many, first : at + 1]
                scores = keys @ query[row, head, index] * 0.3
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                if extra is not None:
                    scores = torch.cat([scores, extra[head, None]])
                weights = scores.softmax(0)[: len(keys)]
                expected = weights @ value[row, head * few // many, first : at + 1]
                torch.testing.assert_close(out[row, head, index], expected, rtol=1e-4, atol=1e-5)


def test_the_window_of_a_mask_is_found():
    def sliding(_, __, q, k):
        return (k <= q) & (k > q - 16)

    def chunked(_, __, q, k):
        return (k <= q) & (k // 16 == q // 16)

    assert window_of(lambda _, __, q, k: k <= q, 100) is None
    assert window_of(sliding, 100) == 16
    assert window_of(sliding, 16) is None
    assert window_of(chunked, 16) is None
    for places in range(17, 60):
        with pytest.raises(CannotCapture, match="neither"):
            window_of(chunked, places)


@pytest.mark.parametrize(
    "reads",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x[int(x.argmax()) :],
        lambda x: torch.equal(x, x),
        lambda x: torch.unique(x),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x.to("meta"),  # stands for another device
        lambda x: torch.empty(3, device="meta").copy_(x),
    ],
)
def test_what_waits_for_the_device_is_found_before_it_is_captured(reads):
    x = torch.tensor([1.0, 0.0, 2.0])
    with pytest.raises(CannotCapture, match=r"back|between"), RefuseReadingBack("cpu"):
        reads(x)
    with RefuseReadingBack("cuda"):
        reads(x)


def test_what_does_not_wait_is_let_through():
    model = tiny_model("gemma3")
    ids = random_ids(9, 1)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        with RefuseReadingBack("cuda"):
            assert torch.equal(model(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_arena_is_divided_without_overlap(dtype):
    one = [(torch.zeros(1, 3, 1, 5, dtype=dtype), torch.zeros(1, 3, 1, 2, dtype=dtype))] * 3
    arena = Arena(one, tokens=11)
    tensors = [tensor for layer in arena.places(2) for tensor in layer]
    assert [tuple(tensor.shape) for tensor in tensors[:2]] == [(2, 3, 5, 5), (2, 3, 5, 2)]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert all((tensor == number).all() for number, tensor in enumerate(tensors))


def test_kernels_are_tried_before_a_model_is_captured(monkeypatch):
    """Here against themselves: what is tried is the same on a device."""
    model = tiny_model("gemma3")
    one_token = PIC(model).hf.one_token
    assert "no CUDA device" in check.why_no_kernels(one_token, 2)
    monkeypatch.setattr(check, "why_not", lambda *_: None)
    assert check.why_no_kernels(one_token, 2) == ""

    def off(*given):
        out, lse = scattered_attention(*given)
        return out + 1, lse

    monkeypatch.setattr(check, "scattered_attention", off)
    assert "scattered_attention does not give" in check.why_no_kernels(one_token, 2)

    def fails(*_):
        raise KernelError("the Triton kernel place could not be built: no C compiler")

    monkeypatch.setattr(check, "place_layers", fails)
    assert "no C compiler" in check.why_no_kernels(one_token, 2)


def test_a_kernel_that_fails_leaves_the_eager_pass(captured, eagerly, monkeypatch):
    def fails(*args):
        raise KernelError("the Triton kernel scattered_attention could not be built: no compiler")

    monkeypatch.setattr(padded_pass, "scattered_attention", fails)
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    for _ in range(2):
        prompt = pic.link(chunks, query, LegoLink(3))
        assert "no compiler" in prompt.report.recompute_pass
    assert_same(prompt, eagerly(pic, chunks, query, LegoLink(3)))


def test_an_arena_that_finds_no_memory_leaves_the_eager_pass(captured, eagerly, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(captured_pass, "Arena", full)
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    prompt = pic.link(chunks, query, LegoLink(3))
    assert "bytes on cpu, which are not free" in prompt.report.recompute_pass
    assert_same(prompt, eagerly(pic, chunks, query, LegoLink(3)))
    with pytest.raises(PICacheError, match="bytes on cpu"):
        pic.warm_up(tokens=50, rows=16, progress=False)
