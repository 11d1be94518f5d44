"""The padded pass, compiled before it is recorded: what the eager pass gives, to rounding.

What is made of a graph is the compiler's affair: most tests are of what is traced, which needs no
compiler, and the slow ones run what inductor makes of it.
"""

import shutil
import threading

import pytest
import torch
from torch._dynamo.utils import counters

from picache import LegoLink, NaiveReuse, PICacheError
from picache.hf import padded_forward, recorders
from picache.hf.compiled import never_compiled
from picache.hf.due import nothing_due
from picache.hf.reading_back import RefuseReadingBack
from picache.kernels import attention_operator
from picache.kernels.scattered_attention import scattered_attention
from tests.helpers import CONFIGS, tiny_model
from tests.picache.captured import assert_same, families, pic_and_parts
from tests.picache.helpers import compiled, prompt_parts

INDUCTOR = padded_forward.COMPILER
WITHOUT_MUTATION = {"backend": "aot_eager"}  # a graph in the form in which inductor takes it
COMPILED = "captured and compiled, 19 rows in a class of 32"
PLAIN = "captured, 19 rows in a class of 32"


@pytest.fixture(autouse=True)
def traced(captured, monkeypatch):
    """Graphs are traced and run as they are, unless a test says otherwise."""
    use(monkeypatch, {"backend": "eager"})
    torch._dynamo.reset()
    counters.clear()


def use(monkeypatch, compiler):
    monkeypatch.setattr(padded_forward, "COMPILER", compiler)


def traces():
    return counters["stats"]["unique_graphs"]


def small(family, layers=1, **options):
    """A model of few layers, of the kinds that stand first in its family."""
    if family == "gpt-oss":
        return families.build("GPT-OSS")
    kinds = getattr(CONFIGS[family](), "layer_types", None)
    if kinds is not None:
        options["layer_types"] = kinds[:layers]
    return tiny_model(family, num_hidden_layers=layers, **options)


def warm(pic, rows=32, **options):
    pic.warm_up(tokens=128, rows=rows, progress=False, **{"compile": True} | options)


@pytest.mark.parametrize("family", [*CONFIGS, "gpt-oss"])
def test_every_family_is_traced_once_and_gives_what_the_eager_pass_gives(family, eagerly):
    # A layer of each kind; in llama, two of one kind.
    pic, chunks, query = pic_and_parts(small(family, 2 if family in ("llama", "gemma3") else 1))
    warm(pic)
    assert traces() == 1
    for method in (LegoLink(3), NaiveReuse()):
        prompt = pic.link(chunks, query, method)
        assert prompt.report.recompute_pass.startswith("captured and compiled, ")
        assert prompt.report.seconds["capture"] == 0
        assert_same(prompt, eagerly(pic, chunks, query, method))
    assert pic.link(chunks, query, LegoLink(3)).report.recompute_pass == COMPILED
    assert traces() == 1


def test_one_compilation_serves_every_class_those_of_later_links_too(monkeypatch, eagerly):
    use(monkeypatch, WITHOUT_MUTATION)
    pic, chunks, query = pic_and_parts(small("llama"))
    warm(pic, batch=2)
    assert traces() == 2
    for method in (NaiveReuse(), LegoLink(3), LegoLink(16)):
        one = (chunks, query, method)
        two = ([chunks[:4], chunks[:3]], [query, query[:3]], method)
        for asked in (one, two):
            prompt = pic.link(*asked)
            assert prompt.report.recompute_pass.startswith("captured and compiled, ")
            assert_same(prompt, eagerly(pic, *asked))
    assert prompt.report.seconds["capture"] > 0
    assert traces() == 2


@pytest.mark.compiled
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_what_inductor_makes_of_it_differs_by_rounding_and_copies_no_arena(monkeypatch, eagerly):
    use(monkeypatch, INDUCTOR)
    attended, found = set(), {}

    def noted(query, keys, values, *rest):
        attended.update((keys.data_ptr(), values.data_ptr()))
        return scattered_attention(query, keys, values, *rest)

    monkeypatch.setattr(attention_operator, "scattered_attention", noted)
    for dtype in (torch.float32, torch.bfloat16):
        pic, chunks, query = pic_and_parts(small("llama", dtype=dtype))
        warm(pic)
        attended.clear()
        prompt = pic.link(chunks, query, LegoLink(3))
        assert prompt.report.recompute_pass == COMPILED
        places = pic.passes.arena.places(1)
        assert attended == {tensor.data_ptr() for layer in places for tensor in layer}
        found[dtype] = prompt, eagerly(pic, chunks, query, LegoLink(3))
    full, reference = found[torch.float32]
    assert_same(full, reference)
    ours, theirs = (
        (prompt.logits.float() - reference.logits).norm() for prompt in found[torch.bfloat16]
    )
    assert ours <= 1.5 * theirs


def test_without_being_asked_nothing_is_compiled():
    pic, chunks, query = pic_and_parts(small("llama"))
    warm(pic, compile=False)
    assert pic.link(chunks, query, LegoLink(3)).report.recompute_pass == PLAIN
    assert traces() == 0


def test_what_was_captured_before_is_captured_compiled_and_back(eagerly):
    pic, chunks, query = pic_and_parts(small("llama"))
    assert pic.link(chunks, query, LegoLink(3)).report.recompute_pass == PLAIN
    for asked, said in ((True, COMPILED), (True, COMPILED), (False, PLAIN)):
        warm(pic, compile=asked)
        prompt = pic.link(chunks, query, LegoLink(3))
        assert prompt.report.recompute_pass == said
        assert prompt.report.seconds["capture"] == 0
        assert_same(prompt, eagerly(pic, chunks, query, LegoLink(3)))
    assert traces() == 1


def test_a_changed_model_is_captured_as_it_is_until_it_is_warmed_up_again(eagerly):
    pic, _, query = pic_and_parts(small("llama"))
    warm(pic)
    with torch.no_grad():
        pic.model.model.layers[0].mlp.up_proj.weight.mul_(2)
    chunks = compiled(pic, prompt_parts()[0])
    expected = eagerly(pic, chunks, query, LegoLink(3))
    for said in (PLAIN, COMPILED):
        prompt = pic.link(chunks, query, LegoLink(3))
        assert prompt.report.recompute_pass == said
        assert_same(prompt, expected)
        warm(pic)


def test_another_arena_of_the_same_size_is_served_and_a_larger_one_is_not():
    pic, chunks, query = pic_and_parts(small("llama"))
    warm(pic)
    first = pic.passes.arena
    taken = pic.link(chunks, query, LegoLink(3)).past_key_values.layers[0].keys
    assert pic.link(chunks, query, LegoLink(3)).report.recompute_pass == COMPILED
    assert pic.passes.arena is not first
    assert len(taken)
    longer = compiled(pic, prompt_parts([90, 90])[0])
    said = "not compiled: the warm-up was for other batches or shorter prompts"
    assert said in pic.link(longer, query, LegoLink(3)).report.recompute_pass
    assert traces() == 1


def fails(graph, inputs):
    raise FileNotFoundError("no C++ compiler\nand more")


def adds_one(graph, inputs):
    return lambda *given: [graph(*given)[0] + 1]


def test_a_compiler_that_fails_is_named_and_links_go_on_without(monkeypatch, eagerly):
    use(monkeypatch, {"backend": fails})
    pic, chunks, query = pic_and_parts(small("llama"))
    with pytest.raises(PICacheError, match=r"compile=True\) of LlamaFor.*no C\+\+ compiler"):
        warm(pic)
    prompt = pic.link(chunks, query, LegoLink(3))
    assert prompt.report.recompute_pass.startswith(f"{PLAIN}, not compiled: compiling failed")
    assert_same(prompt, eagerly(pic, chunks, query, LegoLink(3)))


def test_a_warm_up_that_finds_no_memory_leaves_nothing_to_compile(monkeypatch):
    class Full(recorders.RunAgain):
        def record(self, forward):
            if full:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().record(forward)

    full = True
    monkeypatch.setitem(recorders.RECORDERS, "cpu", Full)
    pic, chunks, query = pic_and_parts(small("llama"))
    with pytest.raises(PICacheError, match="not the memory to capture it"):
        pic.warm_up(tokens=128, rows=32, batch=2, progress=False, compile=True)
    before, full = traces(), False
    for asked in ((chunks, query), ([chunks] * 2, [query] * 2)):
        prompt = pic.link(*asked, LegoLink(3))
        assert prompt.report.recompute_pass.startswith("captured, ")
        assert "not compiled: there is not the memory" in prompt.report.recompute_pass
    assert traces() == before
    other, chunks, query = pic_and_parts(small("llama"))
    full = True
    with pytest.raises(PICacheError, match="not the memory to capture it"):
        other.warm_up(tokens=128, rows=32, progress=False)
    full = False  # nobody asked for compilation, and nothing is said of it
    assert other.link(chunks, query, LegoLink(3)).report.recompute_pass == PLAIN


def test_a_model_whose_python_cannot_be_traced_is_refused():
    model = small("llama")
    own = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: own(x) if float(x.sum()) < 1e9 else x
    pic, chunks, query = pic_and_parts(model)
    with pytest.raises(PICacheError, match="compiling failed"):
        warm(pic)
    assert pic.link(chunks, query, LegoLink(3)).report.recompute_pass.startswith(PLAIN)


def test_a_compilation_that_gives_something_else_is_not_used(monkeypatch, eagerly):
    use(monkeypatch, {"backend": adds_one})
    pic, chunks, query = pic_and_parts(small("llama"))
    warm(pic)
    for _ in range(2):
        prompt = pic.link(chunks, query, LegoLink(3))
        said = f"{PLAIN}, not compiled: the compiled pass gave numbers that are"
        assert prompt.report.recompute_pass.startswith(said)
        assert_same(prompt, eagerly(pic, chunks, query, LegoLink(3)))
    assert prompt.report.seconds["capture"] == 0


def test_the_compiled_pass_is_what_is_captured_after_the_search_for_waits(monkeypatch):
    """Inside that search torch.compile leaves functions alone."""
    ran = []

    class LikeCUDAGraphs(recorders.RunAgain):
        def record(self, forward):
            with RefuseReadingBack():
                forward(nothing_due)
            ran.clear()
            forward(nothing_due)
            assert ran == [1]
            return recorders.Again(forward)

    def counts(graph, inputs):
        return lambda *given: ran.append(1) or graph(*given)

    monkeypatch.setitem(recorders.RECORDERS, "cpu", LikeCUDAGraphs)
    use(monkeypatch, {"backend": counts})
    pic, chunks, query = pic_and_parts(small("llama"))
    warm(pic)
    assert pic.link(chunks, query, LegoLink(3)).report.recompute_pass == COMPILED
    assert traces() == 1


def test_a_model_that_its_user_compiled_is_compiled_here_as_well(eagerly):
    model = small("llama")
    model.compile(backend="eager")
    pic, chunks, query = pic_and_parts(model)
    warm(pic)
    prompt = pic.link(chunks, query, LegoLink(3))
    assert prompt.report.recompute_pass == COMPILED
    assert_same(prompt, eagerly(pic, chunks, query, LegoLink(3)))


def test_compiled_calls_and_forwards_that_must_not_be_take_turns():
    seen, compiling, done = [], threading.Event(), threading.Event()

    def compiles():
        with never_compiled.compiling():
            seen.append("compiling")
            compiling.set()
            assert done.wait(10)
            seen.append("compiled")

    def links():
        with never_compiled, never_compiled:
            seen.append("linking")

    threads = [threading.Thread(target=compiles), threading.Thread(target=links)]
    with never_compiled:
        threads[0].start()
        assert not compiling.wait(0.1)
    assert compiling.wait(10)
    threads[1].start()
    threads[1].join(0.1)
    done.set()
    for thread in threads:
        thread.join()
    assert seen == ["compiling", "compiled", "linking"]


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, 3.0)])
def test_the_operator_is_the_attention_and_its_shape_is_known_without_it(sinks, window, softcap):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 7, 8, generator=generator)
    keys, values = (torch.randn(2, 3, 19, dim, generator=generator) for dim in (8, 5))
    positions = torch.tensor([[-1, -1, 0, 3, 4, 9, 18], [1, 2, 3, 5, 8, 13, 15]])
    extra = torch.randn(6, generator=generator) if sinks else None
    given = (query, keys, values, positions, 0.3, window, softcap, extra)
    operator = attention_operator.attention_operator
    checked = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, given, test_utils=checked)
    expected = scattered_attention(*given)[0].transpose(1, 2)
    assert torch.equal(operator(*given), expected)
