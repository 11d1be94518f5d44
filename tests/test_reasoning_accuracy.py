"""Chains under a policy: forced tells what decoding freely would write, and how it is counted."""

import json
import sys
from pathlib import Path

import pytest
import torch

from sparsity import H2O, RaaS, SparseCache, StreamingLLM
from sparsity.hf.attach import keep_attached

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "experiments"))  # scripts

import claims
import how_to_tables
import milestone_maps
import reasoning_accuracy
from layer_by_layer import Texts, Walk, hidden_states
from loaded import loaded
from reasoning_accuracy import Chains, chains, likeliest, marks, measured
from reasoning_accuracy_summary import DENSE, draw, summary, tables
from retention_ways import REASONING
from word_problems import unseen

PROMPT, DECODED, PADDING = 60, 40, 9


class Words:
    """A tokenizer whose tokens are bytes."""

    eos_token_id = 0

    def apply_chat_template(self, chat, add_generation_prompt, tokenize):
        return f"<{chat[0]['content']}>"

    def __call__(self, text, add_special_tokens=True, return_offsets_mapping=False):
        ids = [*text.encode()]
        return {"input_ids": ids, "offset_mapping": [(i, i + 1) for i in range(len(ids))]}


@pytest.fixture(scope="module")
def some():
    problems = unseen(0, 6, (2, 7))
    return problems, chains(Words(), problems, [4, 1, 3], torch.device("cpu"))


def test_prompts_end_and_chains_begin_together(some):
    problems, chain = some
    prompt = chain.texts.prompt_tokens
    for number, ids, real, lines in zip(
        chain.numbers, chain.texts.ids, chain.texts.real, chain.lines, strict=True
    ):
        solution = problems[number].solution
        assert bytes(ids[:prompt][real[:prompt]].tolist()).decode() == (
            f"<{problems[number].question}>"
        )
        behind = ids[prompt:].tolist()
        assert bytes(behind[: len(solution)]).decode() == solution
        assert not any(behind[len(solution) :])
        assert real[prompt:].all()
        spelled = [
            bytes(part for part, line in zip(behind, lines, strict=True) if line == i).decode()
            for i in range(int(lines.max()) + 1)
        ]
        assert [part.strip("\n") for part in spelled] == solution.split("\n")
        assert (lines == -1).sum() == len(behind) - len(solution)


def test_a_problem_is_solved_where_no_token_of_its_chain_is_wrong(some):
    _, chain = some
    found = chain.texts.ids[:, chain.texts.prompt_tokens :].clone()
    padding = (chain.lines == -1).nonzero()[0]
    found[tuple(padding)] += 1  # behind a chain: does not count
    assert all(mark["solved"] == mark["lines_right"] == 1
               for mark in marks(chain, found))  # fmt: skip
    line = (chain.lines[1] == 1).nonzero().flatten()
    found[1, line[:2]] += 1  # twice in the second line
    marked = marks(chain, found)
    lines = int(chain.lines[1].max()) + 1
    assert [mark["solved"] for mark in marked] == [1, 0, 1]
    assert marked[1]["problem"] == 1
    assert marked[1]["lines_right"] == pytest.approx(1 - 1 / lines)


@pytest.mark.parametrize(
    "policy", [RaaS(48, 4, pin_prompt=False), H2O(32), StreamingLLM(24)], ids=lambda p: type(p)
)
def test_forced_along_what_it_decodes_every_token_is_the_likeliest(policy):
    """The law that the measure rests on; two rows, the second with padding in front."""
    model, tokenizer = loaded("reference")
    text = "The Harbour of Linz lies in the north . " * 20
    ids = torch.tensor([tokenizer(text)["input_ids"][:PROMPT]] * 2)
    ids[1] = ids[1].flip(0)
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, :PADDING] = False
    with keep_attached(model):
        out = model.generate(
            input_ids=ids,
            attention_mask=real.long(),
            past_key_values=SparseCache(model, policy),
            max_new_tokens=DECODED,
            min_new_tokens=DECODED,
            do_sample=False,
            pad_token_id=0,
        )
    behind = torch.ones(2, DECODED, dtype=torch.bool)
    texts = Texts(out, PROMPT, torch.cat([real, behind], 1))
    states = hidden_states(model, texts, [Walk(model, policy, texts)])[0]
    found = likeliest(model, texts, states)
    assert torch.equal(found, out[:, PROMPT:])
    lines = torch.zeros(2, DECODED, dtype=torch.int64)
    assert len(marks(Chains([0, 1], texts, lines), found)) == 2


def made():
    """A record in which every arm gets a line in two right, and the dense model all."""
    rows = [{"arm": DENSE, "budget": 0, "problems": [_mark(i, 1.0) for i in range(8)]}]
    for way in REASONING:
        twin = "random" in way.label
        rows += [
            {"arm": way.label, "budget": budget, "problems": [_mark(i, 0.25 if twin else 0.5)
                                                             for i in range(8)]}
            for budget in (64, 128)
        ]  # fmt: skip
    rows[-1] = rows[-1] | {"problems": [], "refused": list(range(8))}
    rows[-2] = rows[-2] | {"problems": [_mark(i, 0.5) for i in range(6)], "refused": [6, 7]}
    return {
        "configuration": {"seed": 0, "problems": 8},
        "environment": {},
        "seconds": 1.0,
        "tokens": {str(i): [10 + i, 20 + i] for i in range(8)},
        "rows": rows,
    }


def _mark(number, share):
    solved = float(share == 1)
    return {"problem": number, "solved": solved, "lines_right": share}


def test_the_summary_sets_every_arm_against_its_twin(tmp_path):
    summed = summary(made())
    assert summed["rows"][0]["arm"] == DENSE
    assert summed["chain_tokens"] == [20, 23.5, 27]
    rows = {(row["arm"], row["budget"]): row for row in summed["rows"]}
    for budget, on in ((64, 6), (128, 8)):  # at 64 one arm takes six problems, so all are set there
        row = rows["H2O, 4 sinks", budget]
        assert row["in_common"] == on
        assert row["lines_right"] == pytest.approx([0.5, 0.5, 0.5])
        assert row["lines_right_in_common"] == pytest.approx([0.5, 0.5, 0.5])
        assert row["lines_right_minus_random"] == pytest.approx([0.25, 0.25, 0.25])
    # Beside each other only where one takes fewer problems than another does.
    assert "solved of the 6 that all take" in tables(summed)
    assert tables(summed).count("that all take") == 1
    last = REASONING[-1].label
    assert rows[last, 64]["problems"] == rows[last, 64]["in_common"] == 6
    assert "solved" not in rows[last, 128]
    assert tables(summed).count("| dense | 8 | 1.000 (1.000 to 1.000) |") == 2
    assert f"| {last} | 0 |  |  |" in tables(summed)
    assert claims.of_chains(summed).count("RaaS, prompt pinned: as good as dense") == 2
    for budgets in ((64, 128), (64,)):
        shown = [row for row in summed["rows"] if row["budget"] in (0, *budgets)]
        draw(summed | {"rows": shown}, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_means_are_of_what_an_arm_takes_and_pairs_of_what_both_take():
    """The twin solves the two problems that its policy refuses, and half of the lines elsewhere."""
    record = made()
    pinned = next(way for way in REASONING if way.label == "RaaS, prompt pinned")
    record["rows"] = [row for row in record["rows"] if row["budget"] != 128]
    for row in record["rows"]:
        if row["arm"] == pinned.label:
            row["problems"] = [_mark(i, 0.75) for i in range(2, 8)]
        if row["arm"] == pinned.twin:
            row["problems"] = [_mark(i, 1.0 if i < 2 else 0.5) for i in range(8)]
    rows = {row["arm"]: row for row in summary(record)["rows"]}
    own, twin = rows[pinned.label], rows[pinned.twin]
    assert twin["solved"][0] == 0.25
    assert twin["solved_in_common"][0] == own["solved"][0] == 0
    assert own["lines_right"][0] == 0.75
    assert own["lines_right_minus_random"] == pytest.approx([0.25, 0.25, 0.25])
    assert twin["in_common"] == 4  # two are refused by one arm, and two by another


def test_arms_with_a_pinned_prompt_are_set_against_each_other_on_what_both_take():
    record = made()
    record["rows"] = [row for row in record["rows"] if row["budget"] != 128]
    for row in record["rows"]:
        if row["arm"] == "RaaS, prompt pinned":
            row["problems"] = [_mark(i, 0.5 if i % 2 else 1.0) for i in range(2, 8)]
        if row["arm"] == "H2O, prompt pinned":
            row["problems"] = [_mark(i, 1.0) for i in range(4)] + [_mark(i, 0.5) for i in (6, 7)]
    summed = summary(record)
    row = next(row for row in summed["pairs"] if row["less"] == "H2O, prompt pinned")
    assert (row["arm"], row["budget"], row["problems"]) == ("RaaS, prompt pinned", 64, 4)
    assert row["solved"][0] == (1 + 0 + 1 + 0) / 4 - (1 + 1 + 0 + 0) / 4
    assert row["lines_right"][0] == pytest.approx((1 + 0.5 + 1 + 0.5) / 4 - (1 + 1 + 1) / 4)
    assert "| RaaS, prompt pinned | H2O, prompt pinned | 64 | +0.000" in tables(summed)
    assert "it solves more than H2O, at 64" in claims.of_chains(summed)


def test_the_short_table_tells_of_how_many_problems(monkeypatch):
    """Those that every arm takes at its budget, and not those of dense, which has none."""
    monkeypatch.setattr(how_to_tables, "CHAIN_BUDGET", 64)
    assert "Of the 6 problems" in how_to_tables.chains(summary(made()))


def test_a_run_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    model, tokenizer = loaded("reference")
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0]['content'] }}")
    monkeypatch.setattr(reasoning_accuracy, "reasoner", lambda name, adapter: (model, tokenizer))
    few = [way for way in REASONING if way.label in ("H2O, 4 sinks", "H2O, prompt pinned")]
    monkeypatch.setattr(reasoning_accuracy, "REASONING", few)

    def run(*more):
        given = "x --problems 4 --steps 2 3 --rows 2 --together 1 --out"
        monkeypatch.setattr(sys, "argv", [*given.split(), str(tmp_path), *more])
        reasoning_accuracy.main()
        return json.loads((tmp_path / "reasoning_accuracy.json").read_text())

    assert len(run("--budgets", "16", "--seconds", "-1")["rows"]) == 1  # dense alone
    found = run("--budgets", "16", "1024")
    rows = {(row["arm"], row["budget"]): row for row in found["rows"]}
    assert len(rows) == 5
    assert rows["H2O, prompt pinned", 16]["problems"] == 0
    dense, ample = rows[DENSE, 0], rows["H2O, 4 sinks", 1024]
    assert ample["problems"] == dense["problems"] == 4
    assert ample["lines_right"] == dense["lines_right"]
    assert run("--budgets", "16", "1024")["rows"] == found["rows"]

    # How many go through the model at once, and how they are padded, changes nothing.
    run("--budgets", "16", "1024", "--rows", "3", "--out", str(tmp_path / "by three"))
    threes = json.loads((tmp_path / "by three" / "reasoning_accuracy.json").read_text())
    assert threes["rows"] == found["rows"]

    # An arm that was measured on some problems stays until it is measured on all.
    growing = reasoning_accuracy.GrowingRecord
    file = tmp_path / reasoning_accuracy.MEASURED
    record = reasoning_accuracy.read(file)
    part = next(row for row in record["rows"] if (row["arm"], row["budget"]) == (few[0].label, 16))
    whole = part["problems"]
    part["problems"] = whole[:3]
    writing = growing(tmp_path / "part.json.gz", record, [])
    writing.write()
    (tmp_path / "part.json.gz").replace(file)
    kept = {(r["arm"], r["budget"]): r for r in run("--budgets", "16", "--seconds", "-1")["rows"]}
    assert kept[few[0].label, 16]["problems"] == 3
    anew = run("--budgets", "16", "1024")["rows"]
    assert sorted(anew, key=str) == sorted(found["rows"], key=str)
    assert "budget 1024" in capsys.readouterr().out


def test_every_page_of_a_head_is_of_one_kind(tmp_path, monkeypatch, capsys):
    model, tokenizer = loaded("reference")
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0]['content'] }}")
    monkeypatch.setattr(milestone_maps, "reasoner", lambda name, adapter: (model, tokenizer))
    given = "x --problems 2 --steps 3 --gap 8 --alpha 0.02 --out"
    monkeypatch.setattr(sys, "argv", [*given.split(), str(tmp_path)])
    milestone_maps.main()
    found = json.loads((tmp_path / "milestone_maps.json").read_text())
    heads = model.config.num_hidden_layers * model.config.num_key_value_heads
    assert len(found["rows"]) == heads
    for row in found["rows"]:
        assert sum(row[name] for name in milestone_maps.NAMES) == pytest.approx(1)
        assert 0 <= row["of_them_in_the_prompt"] <= row["phoenix_pages"]
        assert 0 <= row["milestones_in_the_prompt"] <= row["milestone_pages"]
    shares = {(row["layer"], row["kv_head"]): row["milestone"] for row in found["rows"]}
    assert max(shares, key=shares.get)[0] in {layer for layer, _ in found["shown"]}
    assert len({layer for layer, _ in found["shown"]}) == min(4, len(found["shown"]))
    assert (tmp_path / "milestone_maps.png").stat().st_size > 10_000
    assert f"| {heads} |" in capsys.readouterr().out


def test_a_prompt_is_refused_alone_and_the_others_are_measured(tmp_path, monkeypatch):
    """Prompts of several lengths in a group, and a budget that holds some of them pinned."""
    model, tokenizer = loaded("reference")
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0]['content'] }}")
    problems = unseen(0, 6, (2, 9))
    chain = chains(tokenizer, problems, list(range(6)), torch.device("cpu"))
    lengths = chain.texts.real[:, : chain.texts.prompt_tokens].sum(1)
    budget = int(lengths.median()) + 8
    ways = [way for way in REASONING if way.label in ("H2O, 4 sinks", "H2O, prompt pinned")]
    free, pinned = measured(model, [chain], ways, budget)
    assert free["refused"] == []
    assert pinned["refused"] == [i for i in range(6) if lengths[i] >= budget]
    assert 0 < len(pinned["refused"]) < 6
    taken = [one["problem"] for one in pinned["problems"]]
    assert taken == [i for i in range(6) if lengths[i] < budget]
    alone = chain.of(taken[-1:])
    again = measured(model, [alone], ways[1:], budget)[0]
    assert again["problems"] == pinned["problems"][-1:]


def test_a_prompt_that_leaves_too_little_room_for_the_chain_is_refused():
    """Pages that are pinned but for a few tokens hold the prompt, and not all that is behind it."""
    way = next(way for way in REASONING if way.label == "RaaS, prompt pinned")
    page = way.policy(64).page_size
    assert reasoning_accuracy.fits(way, 64, 64 - page, 1000)  # one page is left, which goes round
    assert reasoning_accuracy.fits(way, 64, 64 - page + 1, page - 1)
    assert not reasoning_accuracy.fits(way, 64, 64 - page + 1, page)
    assert not reasoning_accuracy.fits(way, 64, 64, 1)


def test_claims_say_nothing_of_what_was_not_measured():
    """Of a run that was cut off, or an arm that takes no problem."""
    record = made()
    record["rows"] = [row for row in record["rows"] if not row["arm"].startswith("Quest")]
    said = claims.of_chains(summary(record))
    assert "Quest" not in said
    assert said.count("RaaS, prompt pinned: as good as dense") == 2
    nothing = {"configuration": {"tokens": 80}, "chosen": [], "rows": [], "pairs": []}
    assert claims.of_long_texts(nothing).count("\n") == 1  # the head of a table
