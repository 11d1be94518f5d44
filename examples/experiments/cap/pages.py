"""What docs/cap.md shows of cap.json, as Markdown."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from cap.arms import FULL
from cap.summary import LEVEL, OFFERS, SAME, Interval, smallest_seen, tested
from quickstart_pages import markdown

NAMES = {"both": "both bounds", "time": "time binds", "memory": "memory binds"}
LETTERS = "CAP"


def map_table(summed: dict[str, Any]) -> str:
    """C, A and P of every arm."""
    rows = [shown(row) for row in summed["rows"]]
    columns = {
        "method": "{label}",
        **{f"C: {NAMES[name]}": f"{{{name}}}" for name in OFFERS},
        "A: extra nats a token": "{extra}",
        "agreement": "{agrees}",
        "P: tokens a second, both bounds": "{rate}",
        **{f"P of full: {NAMES[name]}": f"{{P {name}}}" for name in OFFERS},
        "first token": "{first}",
        "between": "{between}",
        "in memory, serving": "{held}",
        "preparing": "{preparing}",
        "requests": "{requests}",
    }
    return f"{markdown(rows, columns)}\n\n{about(summed)}"


def verdict_table(summed: dict[str, Any]) -> str:
    """What every arm improves and what it pays with, by what binds."""
    rows = [
        {"label": row["label"]} | {name: said(row["verdicts"][name]) for name in OFFERS}
        for row in summed["rows"]
        if row["kind"] != FULL
    ]
    columns = {"method": "{label}", **{NAMES[name]: f"{{{name}}}" for name in OFFERS}}
    return markdown(rows, columns)


def principle(summed: dict[str, Any]) -> str:
    """Whether the principle was refuted, in words and by counts."""
    rows = [row for row in summed["rows"] if row["kind"] != FULL]
    scored = [row for row in rows if row["extra_nll"] is not None]
    if not scored:
        return (
            f"A was not measured for any of the {len(rows)} ways, so that whether one improves all "
            f"three is not told.\n\n{principle_table(summed)}"
        )
    reference = summed["configuration"]["reference_context"]
    judged = tested(scored, reference)
    tests = len(judged) * len(OFFERS)

    def having(test: Callable[[dict[str, Any], str], bool]) -> dict[str, list[str]]:
        found = {row["label"]: [n for n in OFFERS if test(row, n)] for row in judged}
        return {label: [NAMES[n] for n in binding] for label, binding in found.items() if binding}

    def estimated(row: dict[str, Any], name: str) -> bool:
        more = 1 + SAME
        ahead = row["context"][name][0] > more * reference and row["speed"][name][0] > more
        return ahead and row["extra_nll"][0] < -SAME

    def kept(row: dict[str, Any], name: str) -> bool:
        verdict = row["verdicts"][name]
        return _improved(verdict, "CP") and verdict["A"] == "same"

    refuting = having(lambda row, name: row["p_of_all"][name] <= LEVEL)
    seeming, keeping = having(estimated), having(kept)
    if refuting:
        first = (
            f"All three are improved by {listed(refuting)}: for these the principle is refuted on "
            f"these requests ({LEVEL:.0%} by Holm over {tests} tests)."
        )
    else:
        first = (
            f"Not refuted: none of the {len(judged)} ways that served more than one "
            f"request is shown to improve all three ({LEVEL:.0%} by Holm over {tests} tests). That "
            f"does not show that the principle holds: {seen(smallest_seen(scored, reference))}."
        )
    beyond = f"and by more than {SAME:.0%} (A: {SAME} nats)"
    second = (
        f"By the estimates alone {beyond} all three are improved by {listed(seeming)}."
        if seeming
        else f"By the estimates alone {beyond} none improves all three either."
    )
    third = (
        f"C and P are improved and A is no different within {SAME} nats by {listed(keeping)}: "
        "what the survey calls CP and enough for its user."
        if keeping
        else f"None is told to improve C and P and to lose no more than {SAME} nats."
    )
    return "\n\n".join([f"{first} {second} {third}", principle_table(summed)])


def seen(smallest: dict[str, float]) -> str:
    """The smallest effects that could have been seen, in words."""
    if not smallest:
        return "of one request a way no effect could have been seen, however large"
    return (
        "the smallest effect that could have been seen is, at the median of the ways, "
        f"{smallest['A']:.2f} nats a token of A and {smallest['P']:.0%} of P"
    )


def listed(found: dict[str, list[str]]) -> str:
    """Labels, with what binds where that is not the same for all."""
    each = [
        label if len(binding) == len(OFFERS) else f"{label} ({', '.join(binding)})"
        for label, binding in found.items()
    ]
    return "; ".join(each)


def principle_table(summed: dict[str, Any]) -> str:
    """How many arms improve how many of the three, by what binds."""
    kinds: dict[str, Callable[[dict[str, str]], bool]] = {
        "all three improved, each by its own interval": lambda v: _count(v, "improved") == 3,
        "C and P improved, A no different": lambda v: _improved(v, "CP") and v.get("A") == "same",
        "C and P improved, A open": lambda v: _improved(v, "CP") and v.get("A") == "open",
        "C and P improved, A paid": lambda v: _improved(v, "CP") and v.get("A") == "paid",
        "two improved with A among them": lambda v: (
            _improved(v, "A") and _count(v, "improved") == 2
        ),
        "one improved": lambda v: _count(v, "improved") == 1,
        "none improved": lambda v: _count(v, "improved") == 0,
    }
    rows = []
    for what, counts in kinds.items():
        found = {
            name: sum(
                counts(row["verdicts"][name]) for row in summed["rows"] if row["kind"] != FULL
            )
            for name in OFFERS
        }
        rows.append({"what": what} | {name: str(count) for name, count in found.items()})
    columns = {"methods with": "{what}", **{NAMES[name]: f"{{{name}}}" for name in OFFERS}}
    return markdown(rows, columns)


def device_table(summed: dict[str, Any]) -> str:
    """Of a run with a few requests what needs no more of them: times as ratios, and bytes.

    The time between tokens is told where `generate` was timed: single forwards on a GPU take as
    long as the processor needs to launch them, which varies by half from one to the next.
    """
    asked, where = summed["configuration"], summed["environment"]
    rows = [
        shown(row) | {"first": f"{row['first_token'][0]:.2f}"}
        for row in summed["rows"]
        if row["kind"] != FULL
    ]
    columns = {
        "method": "{label}",
        "first token": "{first}",
        **({"between": "{between}"} if asked["generates"] else {}),
        "in memory, serving": "{held}",
        "preparing": "{preparing}",
        "requests": "{requests}",
    }
    full = next(row for row in summed["rows"] if row["kind"] == FULL)
    beneath = (
        f"{asked['model']}, {where['hardware']}, torch {where['torch']}, transformers "
        f"{where['transformers']}, seed {asked['seed']}; times are shares of full attention's "
        f"({1e3 * summed['bounds']['both']['first_token_seconds']:.0f} ms to the first token), "
        f"told at {asked['reference_context']} tokens; full attention holds {shown(full)['held']}."
    )
    return f"{markdown(rows, columns)}\n\n{beneath}"


def refused_table(summed: dict[str, Any]) -> str:
    """What does not go together, and what is said."""
    rows = [{"arm": one["arm"], "why": one["why"].replace("|", "/")} for one in summed["refused"]]
    table = markdown(rows, {"asked for": "{arm}", "refused with": "{why}"})
    return table.replace("| --- | ---: |", "| --- | --- |")


def tables(summed: dict[str, Any]) -> str:
    """All of them."""
    each = (principle, map_table, verdict_table, refused_table)
    return "\n\n".join(table(summed) for table in each)


def about(summed: dict[str, Any]) -> str:
    """What a reader needs to place the numbers."""
    asked, where, bounds = summed["configuration"], summed["environment"], summed["bounds"]
    served = ", ".join(f"{n} of {context}" for context, n in summed["rows"][0]["requests"].items())
    both = bounds["both"]
    clock = "seconds of one core" if asked["device"] == "cpu" else "seconds of the clock"
    return (
        f"{asked['model']}, {where['hardware']}, torch {where['torch']}, transformers "
        f"{where['transformers']}, seed {asked['seed']}; {clock}. Requests by tokens: {served}; A "
        f"and P at {asked['reference_context']}, of {asked['answer']} forced tokens and of an "
        f"answer of {asked['answer_told']}. Bounds: {both['memory_bytes'] / 1e6:.1f} MB, "
        f"{both['first_token_seconds']:.2f} s to the first token, "
        f"{1e3 * bounds['between_tokens_seconds']:.0f} ms between tokens; where one binds the "
        "other is what full attention takes at twice the context. 95 % intervals in brackets. Full "
        f"attention was measured {summed['full_measurements']} times between the arms."
    )


def shown(row: dict[str, Any]) -> dict[str, str]:
    """The cells of a row."""
    scored, longest = row["extra_nll"] is not None, max(map(int, row["requests"]))
    return {
        "label": row["label"],
        "requests": ", ".join(f"{n} of {context}" for context, n in row["requests"].items()),
        **{name: tokens(row["context"][name], longest) for name in OFFERS},
        "extra": between(row["extra_nll"], "+.2f") if scored else "",
        "agrees": f"{row['agreement'][0]:.0%}" if scored else "",
        "rate": f"{row['tokens_a_second']['both']:.1f}",
        **{f"P {name}": between(row["speed"][name], ".2f") for name in OFFERS},
        "first": between(row["first_token"], ".2f"),
        "between": f"{row['between_tokens'][0]:.2f}",
        "held": f"{(row['resting_bytes'] + row['working_bytes']) / 1e6:.1f} MB",
        "preparing": f"{row['preparing_bytes'] / 1e6:.1f} MB",
    }


def tokens(interval: Interval, longest: int) -> str:
    """Tokens of a context; as at least so many where the arm was measured at no longer one."""
    estimate, low, high = interval
    more = "≥ " if estimate >= longest else ""
    if low is None or low >= longest:  # of a single request, or beyond all that was measured
        return f"{more}{estimate:.0f}"
    upper = f"≥ {longest}" if high is None else f"{high:.0f}"
    return f"{more}{estimate:.0f} [{low:.0f}, {upper}]"


def between(interval: Interval, form: str) -> str:
    estimate, low, high = interval
    if low is None or high is None:  # of a single request
        return f"{estimate:{form}}"
    return f"{estimate:{form}} [{low:{form}}, {high:{form}}]"


def said(verdict: dict[str, str]) -> str:
    """A verdict in words: what is improved, what is paid with, what is open."""
    found = {kind: [a for a in LETTERS if verdict.get(a) == kind] for kind in
             ("improved", "paid", "open")}  # fmt: skip
    parts = []
    if found["improved"]:
        parts.append(f"improves {' and '.join(found['improved'])}")
    if found["paid"]:
        parts.append(f"pays with {' and '.join(found['paid'])}")
    if found["open"]:
        parts.append(f"{' and '.join(found['open'])} open")
    return "; ".join(parts) or "no different"


def _count(verdict: dict[str, str], kind: str) -> int:
    return Counter(verdict.values())[kind]


def _improved(verdict: dict[str, str], letters: str) -> bool:
    return all(verdict.get(letter) == "improved" for letter in letters)
