"""On a CUDA device: captured passes give what eager ones give, for every prompt and batch."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from picache import A3, PIC, ChunkStore, LegoLink, NaiveReuse, PICacheError, ProphetKV
from picache.hf import graph_pieces, padded_forward, recorders
from picache.hf.model import HFModel
from picache.kernels import attention_operator
from picache.kernels.scattered_attention import scattered_attention
from picache.linking.linked_kv import LinkedKV
from picache.store import together as store_together
from tests.helpers import CONFIGS, assert_close, random_ids, tiny_model
from tests.picache.captured import TAKEN, families, linked_in_threads
from tests.picache.helpers import chunks_of, compiled, prompt_parts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _one_layer_a_graph(monkeypatch):
    """These models have four layers, which would be one graph."""
    monkeypatch.setattr(graph_pieces, "LAYERS", 1)


LENGTHS = (7, 60, 33, 1, 90)
ABSOLUTE = 1e-5
MAY_BE_EAGER = ("GPT-OSS", "DeepSeek V3")  # experts may be chosen in Python
RUN = dict(max_new_tokens=12, do_sample=False)


def pic_and_parts(model, **options):
    pic = PIC(model.to("cuda"), flops_per_byte=None, **options)
    documents, query = prompt_parts(LENGTHS)
    return pic, compiled(pic, documents), query


def eagerly(pic, *args):
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(recorders.RECORDERS, "cuda")
        prompt = pic.link(*args)
    assert prompt.report.recompute_pass == "eager: nothing is captured on a cuda"
    return prompt


def was_captured(prompt):
    how = prompt.report.recompute_pass
    assert how.startswith("captured,"), how
    return prompt


def assert_same(actual, expected, bound=ABSOLUTE):
    assert (actual.logits - expected.logits).abs().max() <= bound
    pairs = zip(actual.past_key_values.kv, expected.past_key_values.kv, strict=True)
    for ours, theirs in pairs:
        for one, other in zip(ours, theirs, strict=True):
            assert one.shape == other.shape
            assert (one - other).abs().max() <= bound


@pytest.mark.parametrize("family", TAKEN)
def test_every_family_gives_what_the_eager_pass_gives(family):
    try:
        model = families.build(family)
    except AttributeError as error:
        pytest.skip(f"this transformers has no such family: {error}")
    pic, chunks, query = pic_and_parts(model)
    expected = eagerly(pic, chunks, query, LegoLink(3))
    for _ in range(2):  # the second replays what the first captured
        prompt = pic.link(chunks, query, LegoLink(3))
        if family not in MAY_BE_EAGER:
            was_captured(prompt)
        assert_same(prompt, expected)


@pytest.mark.parametrize("method", [NaiveReuse(), A3(0.3), ProphetKV(0.3)], ids=str)
def test_one_graph_serves_every_prompt_of_its_size(method):
    pic, chunks, query = pic_and_parts(tiny_model("gemma3"))
    pic.warm_up(tokens=400, rows=128, progress=False, method=method)
    for some in (chunks, chunks[:3], chunks[::-1], [*chunks, *chunks[1:4]]):
        prompt = was_captured(pic.link(some, query, method))
        assert prompt.report.seconds["capture"] == 0
        assert_same(prompt, eagerly(pic, some, query, method))


@pytest.mark.parametrize("family", CONFIGS)
def test_half_precision_gives_the_same_first_token(family):
    """Within the error that the eager pass has against full precision."""
    reference = eagerly(*pic_and_parts(tiny_model(family)), LegoLink(3)).logits
    parts = pic_and_parts(tiny_model(family, dtype=torch.bfloat16))
    eager, prompt = (
        eagerly(*parts, LegoLink(3)),
        was_captured(parts[0].link(*parts[1:], LegoLink(3))),
    )
    theirs, ours = ((one.logits.float() - reference).norm() for one in (eager, prompt))
    assert ours <= 1.5 * theirs
    best, second = reference[0].topk(2).values
    if best - second > 4 * (eager.logits.float() - reference).abs().max():
        assert prompt.logits.argmax() == eager.logits.argmax() == reference.argmax()


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("method", [A3(0.3), ProphetKV(0.3, value_norm=True)], ids=str)
def test_what_the_query_attends_to_is_found_in_a_captured_pass(family, method, monkeypatch):
    pic, chunks, query = pic_and_parts(tiny_model(family))
    rows, queries = [chunks, chunks[:3]], [query, query[:4]]
    expected = [eagerly(pic, chunks, query, method), eagerly(pic, rows, queries, method)]
    monkeypatch.delattr(HFModel, "attention_masses")
    for _ in range(2):
        for given, right in zip([(chunks, query), (rows, queries)], expected, strict=True):
            assert_same(was_captured(pic.link(*given, method)), right)


def test_a_batch_goes_through_one_pass():
    pic, chunks, query = pic_and_parts(tiny_model("gemma3"))
    rows, queries = [chunks, chunks[:2], chunks[2:]], [query, query[:3], query[:1]]
    same_length = [chunks, [chunks[0], *chunks[:0:-1]]], [query, query.flip(0)]
    for some, asked in ((rows, queries), same_length):
        batch = was_captured(pic.link(some, asked, LegoLink(3)))
        expected = eagerly(pic, some, asked, LegoLink(3))
        assert_same(batch, expected)
        options = RUN | dict(disable_compile=True)
        answers = [pic.model.generate(**one, **options) for one in (batch, expected)]
        assert torch.equal(*answers)


def test_chunks_from_the_host_are_placed_before_the_pass_runs():
    model = tiny_model("llama").to("cuda")
    pic, chunks, query = pic_and_parts(model)
    expected = eagerly(pic, chunks, query, LegoLink(3))
    store = ChunkStore(device_bytes=1, host_bytes=math.inf)
    slower, chunks, query = pic_and_parts(model, store=store)
    for _ in range(3):
        assert_same(was_captured(slower.link(chunks, query, LegoLink(3))), expected)
        turned = was_captured(slower.link(chunks[::-1], query, LegoLink(3)))  # the arena holds both
        assert_same(turned, eagerly(slower, chunks[::-1], query, LegoLink(3)))


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("storage", ["exact", "int8"])
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_layers_are_loaded_beside_the_pass(tier, storage, together, monkeypatch, tmp_path):
    """However late a layer comes, the pass waits for it; of a batch, for that of every row."""
    monkeypatch.setattr(store_together, "MOST_LAYERS", together)
    where = {"host": {"host_bytes": math.inf}, "disk": {"path": tmp_path}}[tier]
    store = ChunkStore(device_bytes=1, storage=storage, **where)
    pic, chunks, query = pic_and_parts(tiny_model("gemma3"), store=store)
    rows, queries = [chunks, chunks[2:]], [query, query[:3]]
    expected = [eagerly(pic, some, query, LegoLink(3)) for some in (chunks, chunks[::-1])]
    expected.append(eagerly(pic, rows, queries, LegoLink(3)))
    make = LinkedKV._make
    made = []

    def late(self, group):
        with torch.cuda.stream(pic.hf.loading):
            torch.cuda._sleep(20_000_000)
        made.extend(self._groups[group])
        return make(self, group)

    monkeypatch.setattr(LinkedKV, "_make", late)
    pic.link(chunks, query, LegoLink(3))
    made.clear()
    for _ in range(2):
        asked = [(chunks, query), (chunks[::-1], query), (rows, queries)]
        for given, right in zip(asked, expected, strict=True):
            assert_same(was_captured(pic.link(*given, LegoLink(3))), right)
    assert sorted(made) == sorted(2 * 4 * [0, 1, 2, 3])  # each once for every row


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("method", [A3(0.3), ProphetKV(0.3)], ids=str)
def test_layers_begun_for_a_prompt_that_is_prefilled_in_full_do_not_reach_it(
    method, tier, monkeypatch, tmp_path
):
    """They are still on their way to its places when it has been chosen to be."""
    monkeypatch.setattr(store_together, "MOST_LAYERS", 1)
    where = {"host": {"host_bytes": math.inf}, "disk": {"path": tmp_path}}[tier]
    store = ChunkStore(device_bytes=1, **where)
    model = tiny_model("llama").to("cuda")
    pic = PIC(model, flops_per_byte=1e12, store=store)
    documents, query = prompt_parts(LENGTHS)
    chunks = compiled(pic, documents)
    other = PIC(model, flops_per_byte=1e12)
    expected = other.link(compiled(other, documents), query, method)
    place = LinkedKV._placed

    def late(self, layers, parts):
        torch.cuda._sleep(50_000_000)
        return place(self, layers, parts)

    monkeypatch.setattr(LinkedKV, "_placed", late)
    for _ in range(3):
        prompt = pic.link(chunks, query, method)
        assert prompt.report.full_prefill
        torch.cuda.synchronize()
        assert_same(prompt, expected)


@pytest.mark.parametrize("damaged", range(4))
def test_a_layer_found_damaged_between_two_graphs_is_mended(damaged, monkeypatch, tmp_path):
    monkeypatch.setattr(store_together, "MOST_LAYERS", 1)
    store = ChunkStore(device_bytes=1, path=tmp_path)
    pic, chunks, query = pic_and_parts(tiny_model("llama"), store=store)
    expected = eagerly(pic, chunks, query, LegoLink(3))
    was_captured(pic.link(chunks, query, LegoLink(3)))
    (path,) = tmp_path.rglob(f"{chunks[1].key}*")
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    data[begin + (len(data) - begin) * (2 * damaged + 1) // 8] ^= 1
    path.write_bytes(data)
    prompt = was_captured(pic.link(chunks, query, LegoLink(3)))
    assert prompt.report.chunk_hits.count(False) == 1
    assert_same(prompt, expected)


def test_two_prompts_stay_right_beside_each_other():
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    asked = [(chunks, query), (chunks[:3], query.flip(0))]
    expected = [eagerly(pic, *one, LegoLink(3)) for one in asked]
    prompts = [was_captured(pic.link(*one, LegoLink(3))) for one in asked]
    for prompt, right in zip(prompts, expected, strict=True):
        assert_same(prompt, right)
    options = RUN | dict(disable_compile=True)
    for prompt, right in zip(prompts, expected, strict=True):
        ours, theirs = (pic.model.generate(**one, **options) for one in (prompt, right))
        assert torch.equal(ours, theirs)


def test_an_arena_that_nobody_reads_is_used_again():
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    pic.link(chunks, query)
    arena, before = pic.passes.arena, torch.cuda.memory_allocated()
    for _ in range(3):
        pic.link(chunks, query)
    assert pic.passes.arena is arena
    assert torch.cuda.memory_allocated() - before < arena.nbytes


def test_tensors_that_somebody_took_are_never_written_to():
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    taken = [layer.keys.detach() for layer in pic.link(chunks, query).past_key_values.layers]
    before = [keys.clone() for keys in taken]
    was_captured(pic.link(chunks[::-1], query))
    assert all(map(torch.equal, taken, before))


def test_two_threads_take_turns():
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    asked = [(chunks, query), (chunks[:3], query.flip(0))]
    expected = [eagerly(pic, *one, LegoLink(3)) for one in asked]
    found = linked_in_threads(pic, asked, LegoLink(3), 5)
    for which, prompts in found.items():
        assert len(prompts) == 5
        for prompt in prompts:
            assert_same(was_captured(prompt), expected[which])


def replaced(layer):
    layer.weight = nn.Parameter(layer.weight * 2)


def written(layer):
    with torch.no_grad():
        layer.weight.mul_(2)


@pytest.mark.parametrize("change", [replaced, written])
def test_weights_that_changed_are_the_ones_used(change):
    model = tiny_model("llama")
    pic, chunks, query = pic_and_parts(model)
    was_captured(pic.link(chunks, query, LegoLink(3)))
    change(model.model.layers[0].mlp.up_proj)
    documents, query = prompt_parts(LENGTHS)
    chunks = compiled(pic, documents)
    prompt = was_captured(pic.link(chunks, query, LegoLink(3)))
    assert_same(prompt, eagerly(pic, chunks, query, LegoLink(3)))


@pytest.mark.parametrize("found_ahead", [True, False])
def test_a_pass_that_waits_for_the_device_is_eager_and_leaves_the_process_usable(
    found_ahead, monkeypatch
):
    if not found_ahead:  # the capture itself fails
        monkeypatch.setattr(recorders, "RefuseReadingBack", nullcontext)
    reason = "reads numbers of the device back" if found_ahead else "capturing failed"
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    own = mlp.forward
    mlp.forward = lambda x: own(x) if float(x.sum()) < math.inf else x  # waits for the device
    pic, chunks, query = pic_and_parts(model)
    expected = eagerly(pic, chunks, query, LegoLink(3))
    for _ in range(2):
        prompt = pic.link(chunks, query, LegoLink(3))
        assert reason in prompt.report.recompute_pass
        assert_same(prompt, expected)
    with pytest.raises(PICacheError, match=reason):
        pic.warm_up(tokens=64, rows=16)
    del mlp.forward
    assert_same(was_captured(pic.link(chunks, query, LegoLink(3))), expected)
    pic, chunks, query = pic_and_parts(tiny_model("qwen2"))
    prompt = was_captured(pic.link(chunks, query, LegoLink(3)))
    assert_same(prompt, eagerly(pic, chunks, query, LegoLink(3)))


def test_more_tokens_than_there_is_memory_for_are_refused_with_the_bytes():
    model = tiny_model("llama", max_position_embeddings=2**40)
    pic = PIC(model.to("cuda"))
    tokens = 2**38
    needed = (tokens + 1) * pic.hf.bytes_per_token
    with pytest.raises(PICacheError, match=f"need {needed:,} bytes on cuda:0, and"):
        pic.warm_up(tokens=tokens, rows=16)
    chunks = chunks_of(pic, 12, 40)
    was_captured(pic.link(chunks, random_ids(5)))


def test_memory_is_linear_in_the_rows():
    """Four times the rows take about four times the memory at most."""
    pic = PIC(tiny_model("llama", max_position_embeddings=16384).to("cuda"), flops_per_byte=None)
    chunks = [pic.compile(random_ids(2048, seed=seed)) for seed in range(4)]
    pic.warm_up(tokens=10000, rows=16, progress=False)
    taken = []
    for rows in (256, 1024):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        was_captured(pic.link(chunks, random_ids(rows), NaiveReuse()))
        taken.append(torch.cuda.max_memory_allocated() - before)
    assert taken[1] < 6 * taken[0]


def test_decoding_behind_a_link_is_compiled_once():
    """In place, at the same addresses for the next prompt; nothing keeps hold of the arena."""
    counters = torch._dynamo.utils.counters
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    eager = eagerly(pic, chunks, query, LegoLink(3))
    expected = pic.model.generate(**eager, **RUN)
    prompt = was_captured(pic.link(chunks, query, LegoLink(3)))
    assert prompt.past_key_values.is_compileable
    torch._dynamo.reset()
    counters.clear()
    assert torch.equal(pic.model.generate(**prompt, **RUN), expected)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs >= 1
    arena = pic.passes.arena
    del prompt
    for _ in range(2):
        prompt = was_captured(pic.link(chunks, query, LegoLink(3)))
        assert torch.equal(pic.model.generate(**prompt, **RUN), expected)
    assert pic.passes.arena is arena
    assert counters["stats"]["unique_graphs"] == graphs
    other = was_captured(pic.link(chunks[:3], query, LegoLink(3)))
    right = eagerly(pic, chunks[:3], query, LegoLink(3))
    ours, theirs = (pic.model.generate(**one, **RUN) for one in (other, right))
    assert torch.equal(ours, theirs)
    assert_close("logits", other.logits, right.logits)


@pytest.fixture
def counted():
    """Counters of what torch.compile traces, from zero."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters["stats"]


def was_compiled(prompt):
    how = prompt.report.recompute_pass
    assert how.startswith("captured and compiled, "), how
    return prompt


@pytest.mark.parametrize("family", CONFIGS)
def test_compiled_passes_give_what_the_eager_pass_gives(family, counted):
    pic, chunks, query = pic_and_parts(tiny_model(family))
    pic.warm_up(tokens=256, rows=32, batch=2, progress=False, compile=True)
    assert counted["unique_graphs"] == 2  # for one prompt, and for two
    for method in (NaiveReuse(), LegoLink(3), LegoLink(16)):  # the last is of a later class
        one = (chunks, query, method)
        two = ([chunks, chunks[:3]], [query, query[:4]], method)
        for asked in (one, two):
            expected = eagerly(pic, *asked)
            for _ in range(2):  # the second is not held against the plain pass any more
                assert_same(was_compiled(pic.link(*asked)), expected)
    assert counted["unique_graphs"] == 2


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_compiled_half_precision_is_as_good_as_the_eager_pass(family, counted):
    """Within the error that the eager pass has against full precision."""
    reference = eagerly(*pic_and_parts(tiny_model(family)), LegoLink(3)).logits
    pic, chunks, query = pic_and_parts(tiny_model(family, dtype=torch.bfloat16))
    pic.warm_up(tokens=256, rows=32, progress=False, compile=True)
    eager = eagerly(pic, chunks, query, LegoLink(3))
    prompt = was_compiled(pic.link(chunks, query, LegoLink(3)))
    theirs, ours = ((one.logits.float() - reference).norm() for one in (eager, prompt))
    assert ours <= 1.5 * theirs


def test_compiled_passes_write_into_the_arena_itself(counted, monkeypatch):
    """The compiler would otherwise copy the keys and values of all tokens in every layer."""
    attended = set()

    def noted(query, keys, values, *rest):
        attended.update((keys.data_ptr(), values.data_ptr()))
        return scattered_attention(query, keys, values, *rest)

    monkeypatch.setattr(attention_operator, "scattered_attention", noted)
    pic, _, _ = pic_and_parts(tiny_model("llama"))
    pic.warm_up(tokens=256, rows=16, progress=False, compile=True)
    places = pic.passes.arena.places(1)
    assert attended == {tensor.data_ptr() for layer in places for tensor in layer}


def test_a_changed_model_is_captured_as_it_is_until_it_is_warmed_up_again(counted):
    model = tiny_model("llama")
    pic, chunks, query = pic_and_parts(model)
    pic.warm_up(tokens=256, rows=32, progress=False, compile=True)
    was_compiled(pic.link(chunks, query, LegoLink(3)))
    written(model.model.layers[0].mlp.up_proj)
    chunks = compiled(pic, prompt_parts(LENGTHS)[0])
    expected = eagerly(pic, chunks, query, LegoLink(3))
    assert_same(was_captured(pic.link(chunks, query, LegoLink(3))), expected)
    pic.warm_up(tokens=256, rows=32, progress=False, compile=True)
    assert_same(was_compiled(pic.link(chunks, query, LegoLink(3))), expected)


def test_a_compilation_that_gives_something_else_is_not_used(counted, monkeypatch):
    def adds_one(graph, inputs):
        return lambda *given: [graph(*given)[0] + 1]

    monkeypatch.setattr(padded_forward, "COMPILER", {"backend": adds_one})
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    pic.warm_up(tokens=256, rows=32, progress=False, compile=True)
    for _ in range(2):
        prompt = was_captured(pic.link(chunks, query, LegoLink(3)))
        assert "not compiled: the compiled pass gave numbers" in prompt.report.recompute_pass
        assert_same(prompt, eagerly(pic, chunks, query, LegoLink(3)))


def test_a_compiler_that_fails_is_named_and_links_go_on_without(counted, monkeypatch):
    def fails(graph, inputs):
        raise FileNotFoundError("no compiler")

    monkeypatch.setattr(padded_forward, "COMPILER", {"backend": fails})
    pic, chunks, query = pic_and_parts(tiny_model("llama"))
    with pytest.raises(PICacheError, match=r"compile=True.*no compiler"):
        pic.warm_up(tokens=256, rows=32, progress=False, compile=True)
    prompt = was_captured(pic.link(chunks, query, LegoLink(3)))
    assert_same(prompt, eagerly(pic, chunks, query, LegoLink(3)))
