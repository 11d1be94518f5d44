"""A ragged batch: whatever is done with it, each row comes out as linked and run alone."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import picache.methods
from picache import (
    A3,
    APE,
    CacheBlend,
    Combined,
    FullRecompute,
    LegoLink,
    NaiveReuse,
    OracleDeviation,
    PICacheError,
    ProphetKV,
    RandomRecompute,
)
from picache.methods.presets import Arm, arms
from tests.helpers import CONFIGS, assert_close, random_ids
from tests.picache.helpers import compiled, pic_of, prompt_parts

LENGTHS = ((7, 20, 33, 1, 18), (5, 40), (1,))  # of the chunks of each row
QUERIES = (9, 3, 1)


def texts():
    """Chunks and query of each row, as ids."""
    rows = enumerate(zip(LENGTHS, QUERIES, strict=True))
    return [prompt_parts(lengths, query, seed) for seed, (lengths, query) in rows]


def linked(pic, method):
    """The batch, and each of its rows alone."""
    rows = [(compiled(pic, chunks), query) for chunks, query in texts()]
    batch = pic.link([chunks for chunks, _ in rows], [query for _, query in rows], method)
    return batch, [pic.link(chunks, query, method) for chunks, query in rows]


@pytest.mark.parametrize(
    ("family", "method"),
    [*((family, LegoLink(3)) for family in CONFIGS), ("gemma3", CacheBlend(0.3))],
    ids=str,
)
def test_beams_find_the_same_sequences_as_alone(family, method):
    pic = pic_of(family)
    batch, alone = linked(pic, method)
    options = dict(max_new_tokens=8, num_beams=3, num_return_sequences=2, do_sample=False)
    together = pic.model.generate(**batch, **options)[:, -8:]
    for index, prompt in enumerate(alone):
        single = pic.model.generate(**prompt, **options)[:, -8:]
        assert together[2 * index : 2 * index + 2].tolist() == single.tolist()


@pytest.mark.parametrize("family", CONFIGS)
def test_sampling_draws_from_the_distributions_of_each_row_alone(family):
    """Two samples a row; the logits behind every drawn token are those of the row fed the same."""
    pic = pic_of(family)
    model = pic.model
    batch, alone = linked(pic, LegoLink(3))
    torch.manual_seed(3)
    out = model.generate(
        **batch,
        max_new_tokens=6,
        do_sample=True,
        num_return_sequences=2,
        output_logits=True,
        return_dict_in_generate=True,
    )
    drawn, seen = out.sequences[:, -6:], torch.stack(out.logits, dim=1)
    assert len({tuple(row) for row in drawn.tolist()}) == len(drawn), "nothing was sampled"
    for index, prompt in enumerate(alone):
        for sample in (2 * index, 2 * index + 1):
            fed = torch.cat([prompt["input_ids"][:, -1:], drawn[sample : sample + 1, :-1]], dim=1)
            held = prompt["past_key_values"]
            with torch.no_grad():
                steps = [model(one, past_key_values=held).logits for one in fed.split(1, dim=1)]
            assert_close("logits", seen[sample], torch.cat(steps, dim=1)[0], 1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_sampled_batch_is_the_dense_one_of_the_same_seed(family):
    """Everything recomputed, so that the left-padded prompts fed as they are must agree."""
    pic = pic_of(family)
    model = pic.model
    batch, alone = linked(pic, FullRecompute())
    options = dict(max_new_tokens=10, do_sample=True)
    for prompt in (batch, *alone):
        dense = {name: prompt[name] for name in ("input_ids", "attention_mask")}
        torch.manual_seed(5)
        expected = model.generate(**dense, **options)
        torch.manual_seed(5)
        assert model.generate(**prompt, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("family", CONFIGS)
def test_a_choice_of_one_is_greedy_in_every_row(family):
    pic = pic_of(family)
    batch, alone = linked(pic, LegoLink(3))
    options = dict(max_new_tokens=8, do_sample=True, top_k=1)
    together = pic.model.generate(**batch, **options)[:, -8:]
    for row, prompt in zip(together, alone, strict=True):
        greedy = pic.model.generate(**prompt, max_new_tokens=8, do_sample=False)
        assert row.tolist() == greedy[0, -8:].tolist()


def chat(pic, prompt, turns, tokens=5):
    """Answers to the prompt and to each turn after it, on one cache; new tokens only."""
    model, held = pic.model, prompt["past_key_values"]
    ids, mask, said = prompt["input_ids"], prompt["attention_mask"], []
    for turn in (None, *turns):
        if turn is not None:
            ids = torch.cat([ids, turn], dim=1)
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        with prompt.attached():
            ids = model.generate(
                ids,
                attention_mask=mask,
                past_key_values=held,
                max_new_tokens=tokens,
                do_sample=False,
            )
        said.append(ids[:, -tokens:])
    return torch.cat(said, dim=1)


@pytest.mark.parametrize("family", CONFIGS)
def test_chat_goes_on_behind_a_link_as_in_each_row_alone(family):
    pic = pic_of(family)
    batch, alone = linked(pic, LegoLink(3))
    turns = [random_ids(6, 3, seed=77), random_ids(1, 3, seed=78)]
    together = chat(pic, batch, turns)
    for index, prompt in enumerate(alone):
        mine = [turn[index : index + 1] for turn in turns]
        assert together[index].tolist() == chat(pic, prompt, mine)[0].tolist()


def test_chat_reads_what_was_linked_and_not_a_full_prefill():
    """Against a decode by hand, token by token, on the layers that the link made."""
    pic = pic_of("llama")
    model = pic.model
    batch, alone = linked(pic, LegoLink(3))
    turn = random_ids(6, 3, seed=77)
    together = chat(pic, batch, [turn])
    for index, prompt in enumerate(alone):
        held, said = prompt["past_key_values"], []
        fed = prompt["input_ids"][:, -1:]
        for answer in range(2):
            if answer:
                fed = torch.cat([fed, turn[index : index + 1]], dim=1)
            for _ in range(5):
                for one in fed.split(1, dim=1):
                    with torch.no_grad():
                        logits = model(one, past_key_values=held).logits[:, -1]
                fed = logits.argmax(-1, keepdim=True)
                said.append(fed.item())
        assert together[index].tolist() == said
    full, _ = linked(pic, FullRecompute())
    assert together.tolist() != chat(pic, full, [turn]).tolist(), "the test would see no error"


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_chat_goes_on_behind_chunks_side_by_side(family):
    pic = pic_of(family)
    batch, alone = linked(pic, APE())
    turns = [random_ids(6, 3, seed=77)]
    together = chat(pic, batch, turns)
    for index, prompt in enumerate(alone):
        assert (
            together[index].tolist() == chat(pic, prompt, [turns[0][index : index + 1]])[0].tolist()
        )


def answered(pic, prompt, **options):
    with prompt.attached():
        out = pic.model.generate(**prompt, max_new_tokens=6, do_sample=False, **options)
    return out[:, -6:].tolist()


@pytest.mark.parametrize("method", [LegoLink(3), CacheBlend(0.3), APE()], ids=repr)
def test_a_deep_copy_is_a_prompt_of_its_own_on_the_same_model(method):
    pic = pic_of("qwen3")
    batch, _ = linked(pic, method)
    expected, held = answered(pic, batch), batch["past_key_values"].layers[1].keys.clone()
    twin = copy.deepcopy(batch)
    assert answered(pic, twin) == answered(pic, twin) == expected
    assert answered(pic, twin, num_beams=2) == answered(pic, batch, num_beams=2)
    assert torch.equal(twin.logits, batch.logits)
    assert twin.report == batch.report
    for layer in twin["past_key_values"].layers:  # nothing is shared but the model
        layer.keys.zero_()
        layer.values.zero_()
    twin.logits.zero_()
    twin["attention_mask"].zero_()
    assert torch.equal(batch["past_key_values"].layers[1].keys, held)
    assert answered(pic, batch) == expected


def test_a_deep_copy_of_the_cache_is_for_one_more_run():
    pic = pic_of("qwen3")
    batch, _ = linked(pic, APE())
    inputs = {name: batch[name] for name in batch if name != "past_key_values"}
    first = batch["past_key_values"]
    second = copy.deepcopy(first)
    runs = []
    with batch.attached():
        for held in (first, second):
            before = held.get_seq_length()
            runs.append(
                pic.model.generate(
                    **inputs, past_key_values=held, max_new_tokens=6, do_sample=False
                )
            )
            assert held.get_seq_length() == before + 6
    assert torch.equal(*runs)


def test_a_pickled_prompt_is_the_same_and_one_bound_to_its_model_is_refused():
    pic = pic_of("qwen3")
    batch, _ = linked(pic, LegoLink(3))
    assert answered(pic, pickle.loads(pickle.dumps(batch))) == answered(pic, batch)
    batch, _ = linked(pic, APE())
    for what in (batch, batch["past_key_values"]):
        with pytest.raises(PICacheError, match="keep the texts and a store with a path"):
            pickle.dumps(what)


METHODS: dict[str, Callable[[int, float], picache.LinkMethod]] = {
    "A3": lambda k, ratio: A3(ratio),
    "APE": lambda k, ratio: APE(),
    "CacheBlend": lambda k, ratio: CacheBlend(ratio),
    "Combined": lambda k, ratio: Combined((LegoLink(k), ProphetKV(1.0)), ratio),
    "FullRecompute": lambda k, ratio: FullRecompute(),
    "LegoLink": lambda k, ratio: LegoLink(k),
    "NaiveReuse": lambda k, ratio: NaiveReuse(),
    "OracleDeviation": lambda k, ratio: OracleDeviation(ratio),
    "ProphetKV": lambda k, ratio: ProphetKV(ratio, value_norm=True),
    "RandomRecompute": lambda k, ratio: RandomRecompute(k),
}
ARMS: dict[str, Callable[[int, float], Arm]] = {
    name: lambda k, ratio, make=make: Arm(make(k, ratio)) for name, make in METHODS.items()
} | {
    f"{preset}: {name}": lambda k, ratio, preset=preset, index=index: list(
        arms(preset, max(k, 1), ratio).values()  # LegoLink-0 is an arm already
    )[index]
    for preset in ("fair", "paper", "repo")
    for index, name in enumerate(arms(preset))
}
ARMS["CacheBlend as LMCache"] = lambda k, ratio: Arm(CacheBlend.lmcache(ratio))
ARMS["RandomRecompute of all"] = lambda k, ratio: Arm(RandomRecompute(seed=k, ratio=ratio))


def test_every_method_is_among_the_arms():
    assert set(METHODS) == set(picache.methods.__all__)


def one_step(pic, prompt):
    """Logits of the first token that generate makes."""
    with prompt.attached():
        out = pic.model.generate(
            **prompt, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
        )
    return out.logits[0]


@pytest.mark.parametrize("name", ARMS)
@settings(max_examples=5, deadline=None)  # for each of the arms, which share their code
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    orders=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=3),
    queries=st.lists(st.integers(1, 6), min_size=3, max_size=3),
    bos=st.booleans(),
    k=st.integers(0, 22),
    ratio=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
)
def test_any_batch_of_any_method_equals_its_rows(name, lengths, orders, queries, bos, k, ratio):
    """Chunks of any length in any order, some of them twice: logits, cache, inputs and report."""
    arm = ARMS[name](k, ratio)
    pic = pic_of("qwen3", arm.sinks)
    begin = torch.ones(int(bos), dtype=torch.int64)
    pool = [torch.cat([begin, random_ids(n, seed=i)]) for i, n in enumerate(lengths)]
    chunks = [[pic.compile(pool[i % len(pool)]) for i in order] for order in orders]
    asked = [random_ids(n, seed=50 + i) for i, n in enumerate(queries[: len(orders)])]
    batch = pic.link(chunks, asked, arm.method)
    layers, step = batch["past_key_values"].layers, one_step(pic, batch)
    for index, (row, query) in enumerate(zip(chunks, asked, strict=True)):
        alone = pic.link(row, query, arm.method)
        length = alone["input_ids"].shape[1]
        assert batch["attention_mask"][index].sum() == length
        for what in alone.keys() - {"past_key_values"}:
            assert batch[what][index, -length:].tolist() == alone[what][0].tolist(), what
        assert torch.equal(batch.logits[index], alone.logits[0])
        for mine, theirs in zip(layers, alone["past_key_values"].layers, strict=True):
            held = mine.keys.shape[2] - (length - 1)
            assert torch.equal(mine.keys[index, :, held:], theirs.keys[0])
            assert torch.equal(mine.values[index, :, held:], theirs.values[0])
        per_layer = alone.report.tokens_recomputed_per_layer
        assert batch.reports[index].tokens_recomputed_per_layer == per_layer
        assert_close("the next token", step[index : index + 1], one_step(pic, alone), 1e-4)
