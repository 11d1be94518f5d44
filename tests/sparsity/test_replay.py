"""A recorded dense run, what policies would have kept of it, and what its pages were used for."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity import (
    H2O,
    Full,
    Quest,
    RaaS,
    Random,
    SparseCache,
    SparsityError,
    StreamingLLM,
    detach,
    milestone_map,
    record,
    replay,
)
from sparsity.hf.attach import is_attached
from sparsity.recorded.milestones import NAMES, Thresholds, classify
from sparsity.recorded.replay import _attended
from tests.helpers import assert_close, random_ids, tiny_model
from tests.sparsity.zoo import TIGHT

PROMPT, NEW = 13, 40


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def trace(model):
    return record(model, input_ids=random_ids(PROMPT, 1), max_new_tokens=NEW, do_sample=False)


def test_a_trace_is_the_dense_run(model, trace):
    assert not is_attached(model)
    dense = model.generate(random_ids(PROMPT, 1), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(trace.ids, dense[0])
    assert (trace.tokens, trace.prompt_tokens) == (PROMPT + NEW - 1, PROMPT)
    assert trace.num_bytes < 4 * 4 * trace.tokens * 16 * (4 + 2 + 2) + 1
    assert "13 prompt and 39 decoded tokens, 4 of 4 layers" in repr(trace)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_mass_is_the_models_own_attention(family):
    """Grouped heads averaged, pages summed; only layers with full attention are there."""
    model = tiny_model(family)
    trace = record(model, input_ids=random_ids(PROMPT, 1), max_new_tokens=20, do_sample=False)
    expected = [1, 3] if family == "gemma3" else [0, 1, 2, 3]
    assert sorted(trace.layers) == expected
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(trace.ids[None, :-1], output_attentions=True).attentions
    for layer in trace.layers:
        whole = attentions[layer][0].unflatten(0, (2, 2)).mean(1)
        pages = [part.sum(-1) for part in whole[:, PROMPT:].split(5, dim=-1)]
        assert_close("mass", trace.mass(layer, page_size=5), torch.stack(pages, -1))


@pytest.mark.parametrize("policy", TIGHT, ids=str)
def test_a_replay_keeps_what_the_cache_keeps(model, trace, policy):
    """In layer 0, whose queries do not depend on what other layers keep."""
    cache = SparseCache(model, policy)
    first = 0
    for count in trace.forwards:
        with torch.no_grad():
            model(trace.ids[None, first : first + count], past_key_values=cache)
        first += count
    slots = cache.retentions[0].pool.slots[0]
    detach(model)
    *_, (_, held) = _attended(trace, policy, 0)
    for head, kept in zip(held, slots, strict=True):
        assert head.nonzero().flatten().tolist() == sorted(kept[kept >= 0].tolist())


@pytest.mark.parametrize("policy", TIGHT, ids=str)
def test_no_policy_beats_hindsight(trace, policy):
    result = replay(trace, policy, page_size=4, progress=False)
    for one in result.layers.values():
        assert (one.kept_mass <= one.best_mass + 1e-5).all()
        for share in (one.kept_mass, one.recall, one.prompt_survival):
            assert ((share >= 0) & (share <= 1 + 1e-5)).all()
            assert share.shape == (2, NEW - 1)
    assert 0 <= result.kept_mass <= 1 + 1e-5
    assert result.regret >= -1e-5
    assert "attention kept" in str(result)


@pytest.mark.parametrize(
    "policy", [Full(), Quest(64), RaaS(64), H2O(64), StreamingLLM(64)], ids=str
)
def test_with_room_for_everything_nothing_is_missed(trace, policy):
    result = replay(trace, policy, page_size=4, progress=False)
    assert_close("kept", torch.tensor(result.kept_mass), torch.tensor(1.0))
    assert abs(result.regret) < 1e-5
    assert result.recall == pytest.approx(1)
    assert result.prompt_survival == 1


def test_shares_are_those_of_a_slow_twin(trace):
    """StreamingLLM keeps the first 2 and the newest 8: written out token by token."""
    result = replay(
        trace, StreamingLLM(10, sinks=2), [2], page_size=4, top_tokens=8, progress=False
    )
    one, weights = result.layers[2], trace.at(2).weights(PROMPT, trace.tokens)
    for head in range(2):
        for step, rank in enumerate(range(PROMPT, trace.tokens)):
            kept = {0, 1, *range(rank - 7, rank + 1)}
            row = weights[head, step]
            assert one.kept_mass[head, step] == pytest.approx(
                sum(float(row[i]) for i in kept), rel=1e-4
            )
            best = sorted(map(float, row), reverse=True)[: len(kept)]
            assert one.best_mass[head, step] == pytest.approx(sum(best), rel=1e-4)
            assert one.prompt_survival[head, step] == pytest.approx(
                len(kept & set(range(PROMPT))) / PROMPT
            )
            pages = [set(range(p, min(p + 4, rank + 1))) for p in range(0, rank + 1, 4)]
            top = sorted(pages, key=lambda page: -sum(float(row[i]) for i in page))[:2]
            share = sum(len(page & kept) / len(page) for page in top) / len(top)
            assert one.recall[head, step] == pytest.approx(share, rel=1e-4)


def test_milestone_mass_and_returns_are_those_of_a_slow_twin(trace):
    """Of the attention to a milestone's tokens, what goes to tokens that are attended to."""
    policy, size, limits = StreamingLLM(10, sinks=2), 4, Thresholds(0.3, 6, 4)
    result = replay(trace, policy, page_size=size, thresholds=limits, progress=False)
    counted = [0, 0]
    for layer, one in result.layers.items():
        weights = trace.at(layer).weights(PROMPT, trace.tokens)
        for head in range(2):
            names, returns = kinds_by_hand(
                trace.mass(layer, size)[head].tolist(), PROMPT, size, limits
            )
            pages = [p for p, name in enumerate(names) if name == "milestone"]
            kept = total = back = found = 0.0
            for step, rank in enumerate(range(PROMPT, trace.tokens)):
                held = {0, 1, *range(rank - 7, rank + 1)}
                for page in pages:
                    for i in range(page * size, min(page * size + size, rank + 1)):
                        total += float(weights[head, step, i])
                        kept += float(weights[head, step, i]) * (i in held)
                for page, at in enumerate(returns):
                    if step in at:
                        there = set(range(page * size, min(page * size + size, rank + 1)))
                        back += 1
                        found += len(there & held) / len(there) > 0.5
            if total:
                counted[0] += 1
                assert one.milestone_mass[head] == pytest.approx(kept / total, rel=1e-4)
            if back:
                counted[1] += 1
                assert one.phoenix_survival[head] == pytest.approx(found / back)
    assert min(counted) > 0, "nothing was compared"


def test_a_prompt_in_chunks_is_a_prompt_to_its_last_token(model):
    trace = record(
        model, input_ids=random_ids(33, 1), max_new_tokens=4, prefill_chunk_size=16, do_sample=False
    )
    assert (trace.prompt_tokens, trace.tokens) == (33, 36)
    assert replay(trace, Full(), progress=False).layers[0].kept_mass.shape == (2, 3)


def test_random_keeps_less_than_attention_would(trace):
    kept = {
        type(policy).__name__: replay(trace, policy, progress=False).kept_mass
        for policy in (
            Random(16, pin_prompt=False, recent=1),
            Quest(16, page_size=4, dense_layers=0),
        )
    }
    assert kept["Random"] < kept["Quest"]


def kinds_by_hand(mass, prompt_tokens, page_size, limits):
    """One head, page by page, step by step."""
    steps, pages = len(mass), len(mass[0])
    names, returns = [], []
    for page in range(pages):
        last = page * page_size + page_size - 1
        apart = [t for t in range(steps) if prompt_tokens + t - last >= limits.local]
        bright = [t for t in apart if mass[t][page] > limits.alpha]
        name, before = "steady", apart[0] if apart else 0
        back = []
        for t in bright:
            if t - before > limits.gap:
                back.append(t)
            before = t
        if not apart:
            name = "none"
        elif not bright:
            name = "unused"
        elif back:
            name = "phoenix"
        elif steps - 1 - bright[-1] > limits.gap:
            name = "milestone"
        names.append(name)
        returns.append(back)
    return names, returns


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_kinds_are_those_of_a_slow_twin(data):
    steps, pages = data.draw(st.integers(1, 25)), data.draw(st.integers(1, 7))
    size, prompt = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    limits = Thresholds(0.5, data.draw(st.integers(1, 6)), data.draw(st.integers(0, 5)))
    row = st.lists(st.sampled_from([0.0, 0.9]), min_size=pages, max_size=pages)
    mass = data.draw(st.lists(row, min_size=steps, max_size=steps))
    kinds = classify(torch.tensor([mass]), prompt, size, limits)
    names, returns = kinds_by_hand(mass, prompt, size, limits)
    for page in range(pages):
        found = [name for name in NAMES if getattr(kinds, name)[0, page]] or ["none"]
        assert found == [names[page]]
        assert kinds.returns[0, :, page].nonzero().flatten().tolist() == returns[page]
    assert kinds.prompt.tolist() == [page * size < prompt for page in range(pages)]


def test_a_water_column_is_a_milestone_and_a_return_a_phoenix():
    mass = torch.zeros(1, 400, 3)
    mass[0, 40:90, 1] = 0.5  # used for a while, then never again
    mass[0, 10, 0] = mass[0, 300, 0] = 0.5  # comes back after 290 steps
    kinds = classify(mass, prompt_tokens=16, page_size=16)
    assert [kinds.share(name) for name in ("milestone", "phoenix", "unused")] == [1 / 3] * 3
    assert kinds.phoenixes_in_prompt == 1
    assert kinds.returns.nonzero().tolist() == [[0, 300, 0]]
    assert "milestone 33.3%" in str(kinds)


def test_a_mean_of_nothing_is_said_in_words(trace):
    """No share and no NaN where no page is of the kind, or none was counted at all."""
    none_counted = "none counted: no page has left the newest tokens (Thresholds.local)"
    counted = 2 * 4 * ((PROMPT + NEW - 1) // 4)  # heads, layers, pages that are whole at the end
    never = Thresholds(alpha=0.99, gap=400, local=0)
    text = str(replay(trace, RaaS(64), page_size=4, thresholds=never, progress=False))
    assert f"milestone pages  none among the {counted} pages counted" in text
    assert f"phoenix pages    none among the {counted} pages counted" in text
    all_local = Thresholds(local=400)
    result = replay(trace, RaaS(64), page_size=4, thresholds=all_local, progress=False)
    assert f"milestone pages  {none_counted}" in str(result)
    assert f"phoenix pages    {none_counted}" in str(result)
    assert "nan" not in (text + str(result)).lower()
    assert math.isnan(result.milestone_mass)
    assert math.isnan(result.phoenix_survival)
    assert str(result.layers[0].kinds) == none_counted
    assert {result.layers[0].kinds.share(name) for name in NAMES} == {0}


def test_kinds_without_a_phoenix_say_nothing_of_where_they_are():
    mass = torch.zeros(1, 400, 3)
    mass[0, 40:90, 1] = 0.5
    kinds = classify(mass, prompt_tokens=16, page_size=16)
    assert kinds.counted == 3
    assert str(kinds) == "milestone 33.3%, phoenix 0.0%, steady 0.0%, unused 66.7%"


def test_the_experiment_writes_no_nan(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples" / "experiments"))
    import replay_policies

    assert replay_policies.mean([math.nan, 0.25, 0.75]) == 0.5
    row = dict.fromkeys(replay_policies.MEASURES, 0.5) | {"arm": "RaaS", "regret": 0.125}
    row["phoenix_survival"] = replay_policies.mean([math.nan, math.nan])
    lines = replay_policies.table({"rows": [row], "kinds": []}).splitlines()
    assert lines[2] == "| RaaS | 0.500 | +0.125 | 0.500 | 0.50 | 0.500 | - |"


def test_a_map_is_drawn(trace, tmp_path):
    figure = milestone_map(trace, 1, 1, page_size=4, path=tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    image = figure.axes[0].images[0]
    assert_close(
        "picture", torch.tensor(image.get_array().data), trace.mass(1, 4)[1].clamp(min=1e-4)
    )
    with pytest.raises(SparsityError, match="kv_head=2: layer 1 has KV heads 0 to 1"):
        milestone_map(trace, 1, 2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"input_ids": random_ids(5, 2)}, "called with 2 rows"),
        ({"input_ids": random_ids(5, 1), "num_beams": 2}, "called with 2 rows"),
        ({"input_ids": random_ids(5, 1), "layers": [1, 9]}, r"layers=\[9\].*choose of"),
        ({"input_ids": random_ids(5, 1), "max_bytes": 9000}, "more than max_bytes=9,000"),
        ({"inputs_embeds": torch.zeros(1, 5, 64)}, "takes no inputs_embeds"),
        ({"input_ids": random_ids(5, 1), "past_key_values": None}, "takes no past_key_values"),
        ({}, "needs input_ids"),
        (
            {"input_ids": random_ids(5, 1), "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])},
            "without padding",
        ),
    ],
)
def test_what_cannot_be_recorded_is_refused_and_the_model_left_alone(model, arguments, says):
    with pytest.raises(SparsityError, match=says):
        record(model, **arguments, max_new_tokens=8, do_sample=False)
    assert not is_attached(model)
    ids = random_ids(7, 1)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 9)


def test_an_attached_model_stays_attached(model):
    SparseCache(model, Full())
    record(model, input_ids=random_ids(5, 1), max_new_tokens=2)
    assert is_attached(model)
    detach(model)


def test_what_cannot_be_replayed_is_refused(model, trace):
    with pytest.raises(SparsityError, match="layer 7 is not in this trace"):
        replay(trace, Full(), [7])
    with pytest.raises(SparsityError, match="pins the prompt"):
        replay(trace, Random(12, recent=2), progress=False)
    short = record(model, input_ids=random_ids(5, 1), max_new_tokens=1)
    with pytest.raises(SparsityError, match="no decoded tokens"):
        replay(short, Full())
    for wrong in ({"alpha": 1.0}, {"gap": 0}, {"local": -1}):
        with pytest.raises(SparsityError, match=rf"Thresholds\({next(iter(wrong))}=.*: expected a"):
            Thresholds(**wrong)
