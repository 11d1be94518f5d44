"""The metrics of the CAP principle are continuous; arms serve what they should; verdicts follow."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from picache import PIC, LegoLink, NaiveReuse
from sparsity import RaaS, SnapKV, SparseCache, StreamingLLM
from sparsity.hf.attach import is_attached
from tests.helpers import tiny_model

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES / "experiments")]
from cap import measure, requests  # noqa: E402 - the examples are scripts, not a package
from cap.arms import AT_REST, FULL, LINK, RETAIN, STORE, Arm, arms  # noqa: E402
from cap.definitions import (  # noqa: E402
    agreement,
    cost,
    extra_loss,
    longest_context,
    tokens_a_second,
    within,
)
from cap.pages import device_table, principle, said, tables  # noqa: E402
from cap.picture import draw  # noqa: E402
from cap.serving import NotComposedError, Server  # noqa: E402
from cap.summary import chance, holm, nearest, summary, verdict_of  # noqa: E402
from loaded import loaded  # noqa: E402

CONTEXTS = [256, 512, 1024]
SECONDS = [0.8, 1.7, 3.6]
BYTES = [12e6, 24e6, 47e6]


@given(bound=st.floats(0, 5), step=st.floats(0, 0.1))
def test_context_moves_little_when_a_bound_does(bound, step):
    """By at most the steepest inverse slope, 320 tokens a second here; never down."""
    steepest = max(np.diff([0, *CONTEXTS]) / np.diff([0, *SECONDS]))
    before, after = (within(CONTEXTS, SECONDS, at) for at in (bound, bound + step))
    assert before <= after <= before + steepest * step + 1e-6
    both = [longest_context(CONTEXTS, BYTES, SECONDS, 30e6, at) for at in (bound, bound + step)]
    assert both[0] <= both[1] <= both[0] + steepest * step + 1e-6


@settings(max_examples=30)
@given(moved=st.lists(st.floats(-0.05, 0.05), min_size=3, max_size=3))
def test_context_moves_little_when_what_was_measured_does(moved):
    """Each second moves by up to 0.05 and the curves have at least 0.8 s between their points."""
    other = np.add(SECONDS, moved)
    for bound in np.linspace(0.1, 3.4, 12):
        assert abs(within(CONTEXTS, SECONDS, bound) - within(CONTEXTS, other, bound)) < 0.05 * 640
        assert abs(cost(CONTEXTS, SECONDS, 700) - cost(CONTEXTS, other, 700)) <= 0.05 + 1e-9


def test_context_between_and_beyond_what_was_measured():
    assert within(CONTEXTS, SECONDS, 1.7) == 512
    assert within(CONTEXTS, SECONDS, 2.65) == pytest.approx(768)
    assert within(CONTEXTS, SECONDS, 0.4) == pytest.approx(128)  # from nothing at no token
    assert within(CONTEXTS, SECONDS, 99) == 1024  # no more is said than was measured
    assert within(CONTEXTS, SECONDS, -1) == 0
    assert cost(CONTEXTS, SECONDS, 768) == pytest.approx(2.65)
    assert longest_context(CONTEXTS, BYTES, SECONDS, 24e6, 3.6) == 512
    # A cache of a fixed size leaps where it fits, as it does for who uses it.
    assert within(CONTEXTS, [12, 12, 12], 11.9) < 256
    assert within(CONTEXTS, [12, 12, 12], 12) == 1024
    # What falls is noise: 512 tokens take as long as 256 of them took.
    assert within(CONTEXTS, [1.0, 0.9, 2.0], 0.99) < 256
    with pytest.raises(ValueError, match="each there once"):
        cost([256, 256], [1, 2], 256)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("base", [(1, 0.1, 0.5, 0.15), (1, 0.1, 2, 0.08), (1, 0.1, 2, 0.15)])
def test_tokens_a_second_move_little_with_a_bound_or_a_time(base, place):
    """Through late and early, slow and fast: the largest leap shrinks with the step."""

    def leap(steps: int) -> float:
        rates = []
        for at in np.linspace(0.5, 1.5, steps) * base[place]:
            first, between, wait, pace = (*base[:place], at, *base[place + 1 :])
            rates.append(tokens_a_second(first, between, 64, wait, pace))
        return max(np.abs(np.diff(rates)))

    coarse, fine = leap(500), leap(5000)
    assert fine < coarse / 5 + 1e-9
    # Of an answer of 64 tokens all count or none within a change of 100 %: the mean slope is at
    # most the highest rate, and the steepest place 20 times that.
    assert fine < 20 * 64 / (1 + 63 * 0.05) / 5000


def test_tokens_a_second_of_answers_that_are_late_or_slow():
    whole = 11 / (1 + 10 * 0.1)
    assert tokens_a_second(1, 0.1, 11, 1, 0.1) == pytest.approx(whole)
    # A second late, a token caught up every 0.2 s: from token 5 of 0 to 10 on.
    assert tokens_a_second(1, 0.1, 11, 0, 0.3) == pytest.approx(whole / 2)
    # A second early, 0.05 s lost a token: all are in time; lost 0.2 s a token: up to token 5.
    assert tokens_a_second(1, 0.1, 11, 2, 0.05) == pytest.approx(whole)
    assert tokens_a_second(1, 0.3, 11, 2, 0.1) == pytest.approx(11 / 4 / 2)
    assert tokens_a_second(2, 0.2, 11, 1, 0.1) == 0


@given(st.lists(st.floats(0, 9), min_size=4, max_size=4), st.floats(0, 0.1))
def test_accuracy_moves_by_the_mean_of_what_tokens_move_by(nats, step):
    full = [1.0, 2.0, 3.0, 4.0]
    moved = [nats[0] + step, *nats[1:]]
    assert extra_loss(moved, full) - extra_loss(nats, full) == pytest.approx(step / 4)
    assert agreement([1, 2, 3, 4], [1, 2, 3, 5]) == 0.75


def test_a_larger_budget_of_a_method_moves_its_loss_little():
    """One more token kept is a small step of A, seen on a model and not on numbers made up."""
    request = requests.random_requests(128, {200: 1}, 8, 0)[200][0]
    server = Server(tiny_model("llama"), None)
    full = server.serve(Arm(FULL, FULL), request)["nats"]
    kept = [
        extra_loss(server.serve(arm, request)["nats"], full)
        for arm in (Arm(RETAIN, "x", policy=StreamingLLM(b)) for b in (60, 61, 62, 200))
    ]
    whole = abs(kept[0])  # what the budgets from 60 to 200 tokens make of it
    assert whole > 1e-4
    assert max(np.abs(np.diff(kept[:3]))) < whole / 2
    assert abs(kept[-1]) < 1e-4  # all of the 200 tokens are kept


@pytest.fixture(scope="module")
def served():
    """A tiny model that serves, and a request of it."""
    return Server(tiny_model("llama"), None), requests.random_requests(128, {160: 1}, 6, 1)[160][0]


def test_a_prompt_stored_whole_is_exact_and_naive_links_are_not(served):
    server, request = served
    rows = {
        name: server.serve(arm, request)
        for name, arm in {
            "full": Arm(FULL, FULL),
            "whole": Arm(STORE, "x", link=NaiveReuse()),
            "int8": Arm(STORE, "x", link=NaiveReuse(), storage="int8"),
            "naive": Arm(LINK, "x", link=NaiveReuse()),
            "disk": Arm(LINK, "x", link=NaiveReuse(), on_disk=True),
        }.items()
    }
    full = rows["full"]
    assert rows["whole"]["nats"] == pytest.approx(full["nats"], abs=1e-3)
    assert 0 < abs(extra_loss(rows["int8"]["nats"], full["nats"])) < 0.05
    assert abs(extra_loss(rows["naive"]["nats"], full["nats"])) > 1e-3
    assert rows["disk"]["nats"] == rows["naive"]["nats"]
    assert full["resting_bytes"] == rows["disk"]["resting_bytes"] == 0
    a_token = full["working_bytes"] / (request.context - 1)  # the last one is not fed
    assert rows["whole"]["resting_bytes"] == a_token * len(request.before_query)
    assert rows["whole"]["working_bytes"] == full["working_bytes"]
    assert rows["int8"]["resting_bytes"] < 0.5 * rows["whole"]["resting_bytes"]


@pytest.mark.parametrize("policy", [SnapKV(48, window=8), RaaS(48, page_size=1, pin_prompt=False)])
def test_kept_tokens_stored_exactly_serve_as_the_cache_that_kept_them(served, policy):
    """Retain, then store: what is read back is what the policy kept, at its own positions."""
    server, request = served
    stored = server.serve(Arm(AT_REST, "x", policy=policy), request)
    cache = SparseCache(server.model, policy)
    with torch.no_grad():
        for ids in (request.before_query, request.query):
            logits = server.model(torch.tensor([ids]), past_key_values=cache).logits[0, -1]
    first = -logits.log_softmax(-1)[request.answer[0]].item()
    assert stored["nats"][0] == pytest.approx(first, abs=1e-3)
    full = server.serve(Arm(FULL, FULL), request)
    assert stored["working_bytes"] < 0.7 * full["working_bytes"]
    assert stored["nats"][0] != pytest.approx(full["nats"][0], abs=1e-3)


def test_pages_with_empty_places_are_not_stored(served):
    """46 tokens in 48 places: the empty ones would be attended to."""
    server, request = served
    arm = Arm(AT_REST, "x", policy=RaaS(48, page_size=4, pin_prompt=False))
    with pytest.raises(NotComposedError, match="46 tokens in 48 places"):
        server.serve(arm, request)


def test_a_link_that_is_retained_counts_what_it_went_on_from(served):
    server, request = served
    link = Arm(LINK, "x", link=LegoLink(4))
    both = server.serve(replace(link, policy=SnapKV(48, window=8)), request)
    linked = server.serve(link, request)
    assert both["working_bytes"] > linked["working_bytes"]  # the linked prompt and what is kept
    assert both["resting_bytes"] == linked["resting_bytes"] > 0


def test_a_retained_link_is_made_on_a_model_that_is_attached_already(served, monkeypatch):
    """As between the requests of a server, whose captured passes are of the attached model."""
    server, request = served
    seen, link = [], PIC.link

    def linked(self, *args, **kwargs):
        seen.append(is_attached(self.model))
        return link(self, *args, **kwargs)

    monkeypatch.setattr(PIC, "link", linked)
    server.serve(Arm(LINK, "x", link=LegoLink(4)), request)
    server.serve(Arm(LINK, "x", link=LegoLink(4), policy=SnapKV(48, window=8)), request)
    assert seen == [False, True]
    assert not is_attached(server.model)


def test_generate_is_timed_where_that_is_asked_for(served):
    server, request = served
    timed = Server(server.model, None, generates=True)
    for arm in (
        Arm(FULL, FULL),
        Arm(LINK, "x", link=LegoLink(4)),
        Arm(LINK, "x", link=LegoLink(4), policy=SnapKV(48, window=8)),
    ):
        own, forwards = timed.serve(arm, request), server.serve(arm, request)
        assert own["nats"] == pytest.approx(forwards["nats"], abs=1e-3)
        assert own["between_tokens_seconds"] > 0
    with pytest.raises(NotComposedError, match="this one holds a part"):
        timed.serve(Arm(AT_REST, "x", policy=SnapKV(48, window=8)), request)


def test_requests_have_the_tokens_asked_for(tmp_path):
    _, tokenizer = loaded("reference")
    words = [f"w{i} has number {i * 7 % 90} and stands there" for i in range(240)]
    # What answers stands at the end of a sentence that is longer than what is forced.
    places = {i: ". ".join(words[i : i + 3]).rindex("stands") for i in range(0, 240, 4)}
    paragraphs = [
        {
            "context": ". ".join(words[i : i + 4]) + ".",
            "qas": [
                {
                    "question": f"Where is w{i}?",
                    "answers": [{"text": "stands there", "answer_start": places[i]}],
                }
            ],
        }
        for i in range(0, 240, 4)
    ]
    (tmp_path / "xquad_en").mkdir()
    file = tmp_path / "xquad_en" / "xquad.en.json"
    file.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    found = requests.asked(tokenizer, tmp_path, {700: 2, 400: 1}, 6, 0)
    assert [[one.context for one in found[c]] for c in (700, 400)] == [[700, 700], [400]]
    assert all(len(one.answer) == 6 and len(one.passages) > 1 for c in found for one in found[c])
    holding = tokenizer("stands there", add_special_tokens=False)["input_ids"]
    for one in (*found[700], *found[400]):
        assert list(one.answer[-len(holding) :]) == holding
    more = requests.asked(tokenizer, tmp_path, {700: 3}, 6, 0)[700]
    assert more[:2] == found[700]
    with pytest.raises(SystemExit, match="too few questions"):
        requests.asked(tokenizer, tmp_path, {700: 90}, 6, 0)
    with pytest.raises(SystemExit, match="there is no"):
        requests.asked(tokenizer, tmp_path / "other", {700: 1}, 6, 0)


def test_arms_are_told_apart_and_full_attention_is_the_first():
    every = arms()
    assert every[0].kind == FULL
    assert len({arm.label for arm in every}) == len(every)
    assert {arm.storage for arm in every} == {"exact", "int8", "fp8"}


@pytest.mark.parametrize(
    ("span", "first"),
    [((0, 6), 0), ((15, 20), 2), ((24, 29), 5), ((0, 29), None), ((90, 95), None)],
)
def test_a_window_holds_the_answer(span, first):
    """Ten words of two characters and a blank each; five of them are forced."""
    offsets = [(3 * i, 3 * i + 2) for i in range(10)]
    found = requests.window(offsets, *span, 5)
    assert found == first
    assert requests.window(offsets[:3], 0, 2, 5) is None  # a sentence that is too short


NOISE = np.array([-1.0, 1.0, -1.0, 1.0])
"""Of four requests: mean 0 and standard error 1 / sqrt(3)."""
HALF = stats.t.ppf(0.975, 3) / np.sqrt(3)
"""Half a 95 % interval of a mean with that noise, by Student's t."""


def crafted(
    label: str,
    seconds: float = 1,
    loss: float = 0,
    size: float = 1,
    noise: float = 0,
    preparing: float = 0,
    requests: int = 4,
    contexts: Sequence[int] = CONTEXTS,
) -> list[dict]:
    """Rows of an arm that takes so many times full attention's seconds and bytes, and full's.

    The machine takes twice as long at each request as at the one before it, and each arm has its
    own piece of full attention beside it. `noise` is of the loss and of a tenth of the seconds.
    """
    rows = []
    for context in contexts:
        for number in range(requests):
            drift, more = 2.0**number, noise * NOISE[number]
            for name, factor, nats, held in (
                (FULL, 1.0, 1.0, 1.0),
                (label, seconds * (1 + more / 10), 1.0 + loss + more, size),
            ):
                rows.append(
                    {
                        "arm": name,
                        "piece": label,
                        "at": float(number),
                        "context": context,
                        "number": number,
                        "first_token_seconds": factor * drift * context / 300,
                        "between_tokens_seconds": 0.07 * drift,
                        "preparing_bytes": int(preparing * context * 1000) if name == label else 0,
                        "resting_bytes": 0,
                        "working_bytes": int(held * context * 1000),
                        "nats": [nats] * 5,
                        "likeliest": [1, 2, 3, 4, 5],
                    }
                )
    return rows


def summed_up(*arms: list[dict], scored: bool = True) -> dict:
    """The summary of crafted rows, and of one that was refused."""
    rows = [row for each in arms for row in each]
    names = list(dict.fromkeys([FULL, *(row["arm"] for row in rows)]))
    record = {
        "configuration": {
            "contexts": CONTEXTS, "random_weights": not scored, "seed": 0,
            "model": "made up", "device": "cpu", "answer": 5,
        },
        "environment": {"hardware": "none", "torch": "0", "transformers": "0"},
        "seconds": 1.0,
        "arms": [{"label": n, "kind": FULL if n == FULL else LINK, "method": n, "budget": ""}
                 for n in names],
        "rows": [*rows, {"arm": "never", "context": 256, "number": 0,
                          "refused": "SomeError: a | b"}],
    }  # fmt: skip
    return summary(record)


def by_label(summed: dict) -> dict[str, dict]:
    return {row["label"]: row for row in summed["rows"]}


def test_verdicts_follow_from_the_rows(tmp_path):
    """One arm better in all three refutes the principle; who pays for a gain does not."""
    summed = summed_up(
        crafted("wonder", 0.5, -0.3, 0.5),
        crafted("fast and worse", 0.5, 0.3, 0.5),
        crafted("as it is", 1.0, 0.01, 1.0),
        crafted("more memory", 0.5, 0.3, 2),
        crafted("prepared with more", 0.5, -0.3, 0.5, preparing=2),
    )
    rows = by_label(summed)
    assert summed["configuration"]["reference_context"] == 256
    assert rows[FULL]["context"]["both"][0] == pytest.approx(256)
    assert rows[FULL]["speed"]["both"] == pytest.approx([1, 1, 1])
    assert rows["wonder"]["context"]["both"] == pytest.approx([512, 512, 512], rel=0.01)
    assert rows["wonder"]["context"]["time"][0] == pytest.approx(512, rel=0.01)
    assert rows["more memory"]["context"]["both"][0] == pytest.approx(128)
    assert rows["more memory"]["context"]["time"][0] == pytest.approx(256)
    assert rows["prepared with more"]["context"]["both"][0] == pytest.approx(128)
    assert said(rows["wonder"]["verdicts"]["both"]) == "improves C and A and P"
    assert said(rows["fast and worse"]["verdicts"]["both"]) == "improves C and P; pays with A"
    assert said(rows["as it is"]["verdicts"]["both"]) == "no different"
    assert said(rows["more memory"]["verdicts"]["both"]) == "improves P; pays with C and A"
    assert [name for name, row in rows.items() if not row["dominated"]] == ["wonder"]
    text = tables(summed)
    assert "| all three improved, each by its own interval | 1 | 1 | 1 |" in text
    assert "All three are improved by wonder: for these the principle is refuted" in text
    assert "| never | SomeError: a / b |" in text
    draw(summed, tmp_path / "picture")
    assert {file.suffix for file in tmp_path.iterdir()} == {".png", ".svg"}


def test_intervals_are_those_of_the_noise_whatever_the_machine_drifts():
    """Seconds at 8 times the first request's move neither; one arm's noise is known."""
    row = by_label(summed_up(crafted("x", 0.5, 0.3, 0.5, noise=0.2)))["x"]
    assert row["extra_nll"] == pytest.approx([0.3, 0.3 - 0.2 * HALF, 0.3 + 0.2 * HALF])
    first = [0.5 * (1 + sign * 0.02 * HALF) for sign in (0, -1, 1)]
    assert row["first_token"] == pytest.approx(first)
    # By time alone: half of full attention's seconds a token, so that C is the bound over them.
    estimate, low, high = row["context"]["time"]
    assert estimate == pytest.approx(512)
    assert (low, high) == pytest.approx((256 / first[2], 256 / first[1]), rel=0.01)
    assert said(row["verdicts"]["time"]) == "improves C and P; A open"


def test_bounds_of_each_offer_are_its_own():
    """Three times the wait is late by one reference, in time by two only in part."""
    rows = by_label(summed_up(crafted("late", 3.0, 0, 1.0)))["late"]
    assert rows["speed"]["both"][0] == rows["speed"]["time"][0]
    assert rows["speed"]["memory"][0] > rows["speed"]["both"][0]
    nothing = by_label(summed_up(crafted("never in time", 99.0, 0, 1.0)))["never in time"]
    assert nothing["speed"]["memory"] == [0, 0, 0]


def test_one_request_decides_nothing():
    row = by_label(summed_up(crafted("once", 0.5, -0.3, 0.5, requests=1)))["once"]
    assert row["context"]["both"][1:] == [None, None]
    assert set(row["verdicts"]["both"].values()) == {"open"}
    assert row["p"]["both"] == 1
    both = summed_up(crafted("once", 0.4, -0.3, 0.4, requests=1), crafted("often", 0.5, 0, 0.5))
    assert not by_label(both)["often"]["dominated"]  # what one request seems to say counts not
    assert "no effect could have been seen" in principle(
        summed_up(crafted("once", 0.5, -0.3, 0.5, requests=1))
    )


def test_an_arm_without_the_long_contexts_is_not_cut_there():
    """What fits at its own longest context has no upper end; full attention is of its requests."""
    full = crafted("whole")
    row = by_label(summed_up(full, crafted("short", 0.5, 0, 0.5, contexts=[256])))["short"]
    assert row["context"]["both"][0] == 256
    assert row["context"]["both"][2] is None
    assert row["verdicts"]["both"]["C"] == "open"
    assert "| short | ≥ 256 |" in tables(summed_up(full, crafted("short", 0.5, contexts=[256])))
    # Fewer requests of the same: paired with full attention on these, they are told the same.
    fewer = by_label(summed_up(full, crafted("few", 0.5, 0, 0.5, requests=2)))["few"]
    assert fewer["context"]["both"] == pytest.approx([512, 512, 512], rel=0.01)


def test_the_principle_is_not_said_to_hold():
    """Without A nothing is told; else what could have been seen is."""
    text = principle(summed_up(crafted("fast", 0.5, 0, 0.5), scored=False))
    assert "is not told" in text
    assert "refuted" not in text
    text = principle(summed_up(crafted("noisy", 0.5, -0.1, 0.5, noise=0.2)))
    assert "Not refuted" in text
    limit = 0.2 / np.sqrt(3) * stats.t.ppf(1 - 0.05 / 3, 3)  # an arm by three offers
    assert f"{limit:.2f} nats a token of A" in text
    assert "and by more than 5% (A: 0.05 nats) all three are improved by noisy." in text
    # Rounding is no gain: a stored prompt is computed in other shapes than one that is prefilled.
    text = principle(summed_up(crafted("rounded", 0.5, -1e-4, 0.5, noise=1e-5)))
    assert "(A: 0.05 nats) none improves all three either" in text


def test_many_tests_are_adjusted_by_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1, 1]
    assert chance([-1.0, -2.0, -3.0]) == pytest.approx(
        stats.ttest_1samp([-1, -2, -3], 0, alternative="less").pvalue
    )
    assert chance([-1.0]) == 1


def test_an_arm_is_held_against_the_full_attention_nearest_in_time():
    full = [{"piece": "a", "at": 1, "n": 0}, {"piece": "b", "at": 5, "n": 1},
            {"piece": "b", "at": 9, "n": 2}]  # fmt: skip
    row = {"arm": "x", "context": 256, "number": 0, "piece": "b", "at": 8}
    assert nearest(row, full)["n"] == 2
    assert nearest(row | {"at": 2}, full)["n"] == 1  # another piece's is never taken
    with pytest.raises(ValueError, match="measure it again"):
        nearest(row | {"piece": "c"}, full)


def test_full_attention_is_measured_anew_wherever_another_arm_is():
    labels = [FULL, *"abcdefg"]
    (job,) = measure.jobs_of([(256, 1)], labels, set())
    every = measure.with_full(job.labels)
    assert every[0] == every[-1] == FULL
    assert every.count(FULL) == 3
    assert sorted(set(every)) == sorted(labels)
    done = {(label, 256, 0) for label in labels if label != "c"}
    assert measure.jobs_of([(256, 1)], labels, done)[0].labels == (FULL, "c")
    assert not measure.jobs_of([(256, 1)], labels, done | {("c", 256, 0)})


def test_arms_are_asked_for_by_name_or_by_part():
    every = arms()
    assert measure.chosen(every, ["naive"]) == [FULL, "naive"]
    assert set(measure.chosen(every, ["1 dummy, k ="])) > {FULL, "LegoLink, 1 dummy, k = 4"}
    assert len(measure.chosen(every, [""])) == len(every)


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        ([0.2, 0.1, 0.3], "improved"),
        ([-0.2, -0.3, -0.1], "paid"),
        ([0.01, -0.02, 0.04], "same"),
        ([0.1, -0.1, 0.3], "open"),
        ([0.1, -np.inf, np.inf], "open"),
    ],
)
def test_an_interval_decides(gain, said):
    assert verdict_of(gain) == said


def test_times_between_tokens_are_told_where_generate_was_timed():
    summed = summed_up(crafted("one", 0.5, 0.1, 0.5, requests=1))
    for generates in (False, True):
        summed["configuration"]["generates"] = generates
        table = device_table(summed)
        assert ("between" in table) == generates
        assert "| one | 0.50 |" in table
        assert "| full |" not in table
        assert "853 ms to the first token" in table


def test_a_run_goes_on_from_its_file(tmp_path, monkeypatch, capsys):
    """On random weights, as on a GPU: C and P alone; nothing is measured twice."""
    given = ["measure.py", "--model", "llama-tiny", "--contexts", "220", "--requests", "1",
             "--answer", "4", "--arms", "LegoLink, 1 dummy, k = 4",
             "--out", str(tmp_path)]  # fmt: skip
    monkeypatch.setattr("cap.summary.DRAWS", 40)
    monkeypatch.setattr(sys, "argv", [*given, "--seconds", "-1"])
    with pytest.raises(SystemExit, match="no request is served"):
        measure.main()
    monkeypatch.setattr(sys, "argv", [*given, "--name", "other"])
    measure.main()
    assert (tmp_path / "other.json").exists()
    assert not (tmp_path / "cap.json").exists()
    monkeypatch.setattr(sys, "argv", given)
    measure.main()
    first = json.loads((tmp_path / "cap.json").read_text())
    assert [row["extra_nll"] for row in first["rows"]] == [None] * 2
    assert {"configuration", "environment", "bounds"} <= set(first)
    assert not (tmp_path / "cap.png").exists()
    monkeypatch.setattr(measure, "server", None)  # would fail where it is called
    measure.main()
    assert json.loads((tmp_path / "cap.json").read_text())["rows"] == first["rows"]
    assert "LegoLink, 1 dummy, k = 4" in capsys.readouterr().out
