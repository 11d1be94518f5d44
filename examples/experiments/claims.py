"""Each paper's claims beside what was measured; a verdict follows from the numbers by a rule.

Where there is an interval, "confirmed" and "refuted" want all of it on one side of the line; where
it lies on both sides nothing is decided. "Partly" is said of a gain that is there but smaller than
was promised.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from picache import Comparison
from picache.comparison import Interval


class Claim(NamedTuple):
    """A row of the table; `line` is what the verdict goes by."""

    paper: str
    claim: str
    line: str
    measured: str
    verdict: str


def table(record: dict) -> str:
    """Of a record of `quickstart.py`, as Markdown."""
    return _markdown([*_of_linking(record), *_of_retention(record), *_of_scheduling(record)])


def _markdown(rows: Iterable[Claim]) -> str:
    head = [
        "| paper | claim | confirmed if | measured | verdict |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


def of_questions(record: dict) -> str:
    """Of a record of `link_evidence.py`: claims on which tokens to recompute, as Markdown."""
    best = {(row["budget"], row["among"]): row for row in record["best"]}
    pairs = {(row["arm"], row["against"]): Interval(*row["kl"]) for row in record["pairs"]}
    fewer = "its KL to full prefill is lower"
    rows = []
    for budget in (0.02, 0.05, 0.15, 0.3):
        row = best[budget, "LegoLink"]
        rows.append(
            Claim(
                "EPIC",
                f"first tokens of each chunk are the ones to recompute, at {budget:.0%}",
                f"{fewer} than with as many random tokens",
                f"{row['arm']}: {_kl(Interval(*row['kl_minus_twin']))}",
                _better(Interval(*row["kl_minus_twin"])),
            )
        )
        loss = Interval(*row["extra_nll"])
        rows.append(
            Claim(
                "EPIC",
                f"LegoLink is as good as full prefill, at {budget:.0%}",
                "the right answer loses at most 0.05 nats a token",
                f"{row['arm']}: {_nats(loss)}; KL {row['kl'][0]:.2f}",
                _at_most(loss, 0.05),
            )
        )
    for arm, other, paper, said in (
        (
            "CacheBlend 15 %",
            "LegoLink 32",
            "EPIC",
            "LegoLink is nearer to full prefill than CacheBlend, at 25 % of the prompt and 22 %",
        ),
        ("CacheBlend 15 %", "ProphetKV 15 %", "ProphetKV", "the query says better what to compute"),
        ("true deviation 15 %", "ProphetKV 15 %", "ProphetKV", "better than true deviation does"),
    ):
        apart = pairs[arm, other]
        back = _negative(apart)
        rows.append(Claim(paper, said, f"{other}: {fewer} than {arm}'s", _kl(back), _better(back)))
    together = pairs["LegoLink-4 + ProphetKV 15 %", "ProphetKV 15 %"]
    said = "first tokens and the query's choice together are better than the choice alone"
    rows.append(Claim("ours", said, f"{fewer}, at 15 %", _kl(together), _better(together)))
    return _markdown(rows)


def of_long_texts(record: dict) -> str:
    """Of a record of `retention_evidence.py`: claims on policies along long texts, as Markdown."""
    tokens = f"{record['configuration']['tokens']:,}"
    rows = []
    for row in by_budget(record["chosen"]):
        if row["policy"] in ("RaaS", "Quest"):
            loss = Interval(*row["of_default"])
            said = f"{row['policy']} is as accurate as dense, at {row['budget']} of {tokens} tokens"
            rule = "at most 0.05 nats a token lost"
            rows.append(Claim(row["policy"], said, rule, _nats(loss), _at_most(loss, 0.05)))
    for row in by_budget(record["rows"]):
        if (row["arm"], row["texts"]) == ("RaaS, prompt pinned", "both") and "minus_random" in row:
            loss = Interval(*row["minus_random"])
            said = f"RaaS keeps what is needed better than random pages, at {row['budget']}"
            rows.append(Claim("RaaS", said, "fewer nats a token", _nats(loss), _better(loss)))
    pairs = {
        ("RaaS, prompt pinned", "H2O, no sinks"): ("RaaS", "RaaS loses less than H2O"),
        ("RaaS, prompt pinned", "StreamingLLM, 4 sinks"): (
            "RaaS",
            "RaaS loses less than StreamingLLM",
        ),
        ("ShareRaaS, 4 sinks", "H2O, no sinks"): ("ours", "ShareRaaS loses less than H2O"),
        ("ShareRaaS, 4 sinks", "Quest"): ("ours", "ShareRaaS loses less than Quest"),
        ("StreamingLLM, 4 sinks", "StreamingLLM, no sinks"): (
            "StreamingLLM",
            "a window needs the first tokens",
        ),
    }
    for row in by_budget(record["pairs"]):
        if (row["arm"], row["against"]) in pairs:
            paper, said = pairs[row["arm"], row["against"]]
            loss, at = Interval(*row["extra_nll"]), f"{said}, at {row['budget']}"
            rows.append(Claim(paper, at, "fewer nats a token", _nats(loss), _better(loss)))
    return _markdown(rows)


def by_budget(rows: Iterable[dict]) -> list[dict]:
    """The rows in the order of their budgets, those of one budget as they stand."""
    return sorted(rows, key=lambda row: row["budget"])


def of_chains(record: dict) -> str:
    """Of a record of `reasoning_accuracy.py`: claims on chains of thought, as Markdown."""
    papers = {
        "RaaS, prompt pinned": "RaaS",
        "Quest": "Quest",
        "Quest on the prompt, RaaS behind": "RaaS",
    }
    rows = []
    for row in record["rows"]:
        if row["arm"] in papers and "solved" in row:
            rows.append(
                Claim(
                    papers[row["arm"]],
                    f"{row['arm']}: as good as dense on chains of thought, at {row['budget']}",
                    "at least 0.95 of the chains written as taught, which dense writes all",
                    f"{_of_problems(Interval(*row['solved']), '')} of {row['problems']}",
                    _at_most(_negative(Interval(*row["solved"])), -0.95),
                )
            )
        if row["arm"] == "RaaS, prompt pinned" and "solved_minus_random" in row:
            claim = f"it keeps what a chain needs better than random pages, at {row['budget']}"
            rows.append(_of_raas(claim, Interval(*row["solved_minus_random"])))
    for row in record["pairs"]:
        if (row["arm"], row["less"]) == ("RaaS, prompt pinned", "H2O, prompt pinned"):
            claim = f"it solves more than H2O, at {row['budget']}"
            rows.append(_of_raas(claim, Interval(*row["solved"])))
    return _markdown(rows)


def _of_raas(claim: str, gain: Interval) -> Claim:
    """That RaaS writes more chains than another way, by what it writes more."""
    rule = "more chains written as taught, the prompt pinned in both"
    return Claim("RaaS", claim, rule, _of_problems(gain, "+"), _better(_negative(gain)))


def _negative(gain: Interval) -> Interval:
    """A gain as a loss."""
    return Interval(-gain.estimate, -gain.high, -gain.low)


def _of_problems(share: Interval, sign: str) -> str:
    return f"{share.estimate:{sign}.2f} [{share.low:{sign}.2f}, {share.high:{sign}.2f}]"


def of_heads(record: dict) -> str:
    """Of a record of `milestone_maps.py`: what the RaaS paper says of pages, as Markdown."""

    def all_of(name: str) -> int:
        return sum(row[name] for row in record["rows"])

    back, inside = all_of("phoenix_pages"), all_of("of_them_in_the_prompt")
    faded, early = all_of("milestone_pages"), all_of("milestones_in_the_prompt")
    pages, gap = f"pages of {record['configuration']['page_size']}", record["configuration"]["gap"]
    rows = [
        Claim(
            "RaaS",
            f"what matters again after {gap} steps is nearly always part of the prompt",
            f"at least 0.8 of the phoenix {pages}",
            f"{inside / back:.2f}: {inside:,} of {back:,}",
            "confirmed" if inside >= 0.8 * back else "refuted",
        ),
        Claim(
            "RaaS",
            "there are milestones: lemmas that are used for a while and never again",
            f"more than half of the {pages} that fade for good are of the chain",
            f"{(faded - early) / faded:.2f}: {faded - early:,} of {faded:,}",
            "confirmed" if 2 * early < faded else "refuted",
        ),
    ]
    return _markdown(rows)


def _kl(apart: Interval) -> str:
    return f"KL {apart.estimate:+.3f} [{apart.low:+.3f}, {apart.high:+.3f}]"


def _comparison(record: dict, name: str) -> Comparison:
    """The numbers of a record: question by question, text by text, or seed by seed."""
    values = {
        arm: {metric: np.array(numbers, dtype=float) for metric, numbers in found.items()}
        for arm, found in record["values"][name].items()
    }
    return Comparison(values, name, frozenset({"accuracy"}), seed=record["configuration"]["seed"])


def _ratio(result: Comparison, above: str, below: str, metric: str) -> Interval:
    """Mean over units of one arm's number divided by another's, with its interval."""
    ratio = result.measured[above][metric] / result.measured[below][metric]
    return Comparison({"ratio": {"ratio": ratio}}, result.unit, seed=result.seed)["ratio"]["ratio"]


def _at_most(loss: Interval, line: float) -> str:
    """Of the claim that a loss is at most `line`."""
    if loss.high <= line:
        return "confirmed"
    return "refuted" if loss.low > line else "not decided"


def _better(loss: Interval) -> str:
    """Of the claim that there is a gain, which is a loss below zero."""
    if loss.high < 0.0:
        return "confirmed"
    return "refuted" if loss.low >= 0.0 else "not decided"


def _times(ratio: Interval, promised: float) -> str:
    """Of the claim that something is so many times less."""
    if ratio.low >= promised:
        return "confirmed"
    if ratio.low > 1.0:
        return "partly" if ratio.high < promised else "not decided"
    return "refuted" if ratio.high <= 1.0 else "not decided"


def _points(loss: Interval) -> str:
    low, high = 100 * loss.low, 100 * loss.high
    return f"{100 * loss.estimate:.0f} points less [{low:.0f}, {high:.0f}]"


def _nats(loss: Interval) -> str:
    return f"{loss.estimate:+.3f} nats a token [{loss.low:+.3f}, {loss.high:+.3f}]"


def _fold(ratio: Interval) -> str:
    return f"{ratio.estimate:.2f} times [{ratio.low:.2f}, {ratio.high:.2f}]"


def _share(ratio: Interval) -> str:
    return f"{ratio.estimate:.2f} of it [{ratio.low:.2f}, {ratio.high:.2f}]"


def _of_linking(record: dict) -> Iterator[Claim]:
    result = _comparison(record, "linking")
    layers = record["attention_on_first_tokens"]
    full, naive, first = (float(np.mean(layers[a])) for a in ("full", "naive", "LegoLink-1"))
    gone = naive > 10 * full and first < 0.1 * naive
    yield Claim(
        "EPIC",
        "first tokens of chunks compiled alone are attention sinks, which recomputing them ends",
        "naive has over ten times full's attention on them, LegoLink-1 under a tenth of naive's",
        f"full {full:.1%}, naive {naive:.1%}, LegoLink-1 {first:.1%}",
        "confirmed" if gone else "refuted",
    )
    accuracy = {
        "LegoLink-2": ("EPIC", "LegoLink-2 loses 0 to 7 % of accuracy", 0.07),
        "LegoLink-16": ("EPIC", "LegoLink-16 loses 0 to 7 % of accuracy", 0.07),
        "LegoLink-4, 4 dummies": ("ours", "LegoLink-4 behind four dummies loses 0 to 7 %", 0.07),
        "CacheBlend 15 %": ("CacheBlend", "15 % recomputed lose next to nothing", 0.03),
    }
    for arm, (paper, said, line) in accuracy.items():
        loss = result.loss(arm, "accuracy")
        rule = f"at most {100 * line:.0f} points fewer answers"
        yield Claim(paper, said, rule, _points(loss), _at_most(loss, line))
    gains = {
        ("LegoLink-1", "naive"): "one token a chunk is worth recomputing",
        ("LegoLink-4", "random-4"): "which tokens are recomputed matters, not how many alone",
        ("LegoLink-16", "CacheBlend 15 %"): "LegoLink-16 is as good as CacheBlend or better",
    }
    for (arm, other), said in gains.items():
        apart = result.loss(arm, "extra_nll", of=other)
        rule = f"{arm} finds the right answer likelier than {other}"
        yield Claim("EPIC", said, rule, _nats(apart), _better(apart))
    times = {
        ("CacheBlend 15 %", "LegoLink-2"): ("EPIC", 3.0, ""),
        ("CacheBlend 15 %", "LegoLink-16"): ("EPIC", 8.0, " (on a loaded server)"),
        ("full", "CacheBlend 15 %"): ("CacheBlend", 2.2, " at no loss (see above)"),
    }
    for (slow, fast), (paper, promised, where) in times.items():
        ratio = _ratio(result, slow, fast, "first_token_seconds")
        said = (
            f"{fast} needs up to {promised:g} times less time to the first token than {slow}{where}"
        )
        rule = f"{promised:g} times less in the mean; partly: less"
        verdict = "not comparable" if "server" in where else _times(ratio, promised)
        yield Claim(paper, said, rule, f"{_fold(ratio)} less, single requests", verdict)


def _of_retention(record: dict) -> Iterator[Claim]:
    result = _comparison(record, "retention")
    asked = record["configuration"]
    small = f"here: a budget of {asked['budget']} in texts of {asked['tokens']} tokens"
    settings = {
        "Quest": f"{small}, in every layer; the paper leaves two layers dense",
        "RaaS": f"{small}, {asked['prompt_tokens']} of it the pinned prompt; the paper's is 1,024",
    }
    for arm, setting in settings.items():
        loss = result.loss(arm, "extra_nll")
        said, rule = f"{arm} is as accurate as dense ({setting})", "at most 0.05 nats a token lost"
        yield Claim(arm, said, rule, _nats(loss), _at_most(loss, 0.05))
    for other in ("random", "StreamingLLM", "H2O"):
        apart = result.loss("RaaS", "extra_nll", of=other)
        said, rule = f"RaaS keeps what is needed better than {other}", "fewer nats a token"
        yield Claim("RaaS", said, rule, _nats(apart), _better(apart))
    held = {row["arm"]: row["kept_bytes"] for row in record["retention"]}
    raas, quest = held["RaaS"] / held["dense"], held["Quest"] / held["dense"]
    share = record["configuration"]["budget"] / record["configuration"]["tokens"]
    yield Claim(
        "RaaS",
        "its memory is that of the budget, where Quest's is that of the text",
        f"at most a quarter more than {share:.2f} of dense's bytes, the budget's share",
        f"RaaS {raas:.2f}, Quest {quest:.2f} of the bytes",
        "confirmed" if raas <= 1.25 * share and quest >= 1 else "refuted",
    )


def _of_scheduling(record: dict) -> Iterator[Claim]:
    mixes = {mix: _comparison(record, mix) for mix in ("hermes", "bimodal")}
    for metric, name, line in (("mean", "mean", 0.3), ("p95", "P95", 0.2)):
        ratio = mixes["hermes"]["Gittins"][f"{metric}_to_fcfs"]
        down = f"down by {1 - ratio.estimate:.0%} [{1 - ratio.high:.0%}, {1 - ratio.low:.0%}]"
        said = f"{name} completion time down by over {1 - line:.0%} (simulated, the paper's mix)"
        verdict = _at_most(ratio, line)
        yield Claim("Hermes", said, f"at most {line} of first come, first served", down, verdict)
    gains = {
        mix: _ratio(result, "Gittins", "ClassMean", "mean_seconds") for mix, result in mixes.items()
    }
    for mix, gain in gains.items():
        yield Claim(
            "ours",
            f"the Gittins index gains on knowing each application's mean ({mix} mix)",
            "a mean completion time of at most 0.97 of ClassMean's",
            _share(gain),
            _at_most(gain, 0.97),
        )
    gain = _ratio(mixes["bimodal"], "Gittins", "SERPT", "mean_seconds")
    yield Claim(
        "ours",
        "it gains on the mean of what remains, too (bimodal mix)",
        "at most 0.97 of SERPT's",
        _share(gain),
        _at_most(gain, 0.97),
    )
