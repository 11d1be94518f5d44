"""What the runs of all arms say: times, answers, contributions, and what other loads would do."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

from serving.applications import first_words
from serving.experiment import BESIDE, EIGHT, SERVINGS, Setting, Way, served_of, tasks_of
from serving.factorial import effects, over_repeats, over_streams, share_interval
from serving.knowledge import Knowledge
from serving.model_server import Served
from serving.replay import replays

NONE = Way(False, False, "FCFS")
LOADS = (0.5, 0.9)
"""Of the server without any of the three parts, in replays."""
SEEDS = 16
"""Streams of each replay, each drawn anew from what was recorded."""


def summary(
    runs: Sequence[dict], setting: Setting, knowledge: Mapping[str, Knowledge], compiled: dict
) -> dict:
    """Rows by arm, contributions and replays of the runs.

    Args:
        runs: of all arms, as `serving.experiment.run` gives them.
        setting: that was served.
        knowledge: by way of serving (`Way.serving`).
        compiled: what `compile_library` gave.

    Raises:
        ValueError: no repeat in which all eight combinations ran and an application ended in all.
    """
    runs = paired(runs)
    replayed = _replays(runs, setting, knowledge)
    names = [way.name for way in EIGHT + BESIDE]
    rows = [_row(name, runs) for name in names if any(run["arm"] == name for run in runs)]
    return {
        "repeats": sorted({run["repeat"] for run in runs}),
        "arms": rows,
        "noise": _noise(runs),
        "compiling": _compiling(runs, compiled),
        "contributions": _contributions(runs) | _replayed_contributions(replayed),
        "replays": replayed,
    }


def paired(runs: Sequence[dict]) -> list[dict]:
    """The runs with what every arm served to its end, so that all are compared on the same.

    A repeat counts once the eight combinations ran in it, and of its applications those that ended
    in every arm of the repeat; `served` and `failed` count all.
    """
    kept = []
    for repeat in sorted({run["repeat"] for run in runs}):
        own = [run for run in runs if run["repeat"] == repeat]
        if not {way.name for way in EIGHT} <= {run["arm"] for run in own}:
            continue
        ended = [{one["number"] for one in run["applications"] if not one["error"]} for run in own]
        whole = set.intersection(*ended)
        kept += [
            {
                **run,
                "applications": [one for one in run["applications"] if one["number"] in whole],
                "served": len(run["applications"]),
                "failed": sum(bool(one["error"]) for one in run["applications"]),
            }
            for run in own
            if whole
        ]
    if not kept:
        raise ValueError(
            "no repeat has all eight combinations and an application that ended in each of them: "
            "there is nothing to compare; run more of them, or see `error` in the runs"
        )
    return kept


def _row(name: str, runs: Sequence[dict]) -> dict:
    """Everything on one arm."""
    own = [run for run in runs if run["arm"] == name]
    calls = [call for run in own for one in run["applications"] for call in one["calls"]]
    firsts = [call["waited"] + call["first_token_seconds"] for call in calls]
    ended = [one for run in own for one in run["applications"]]
    kinds = sorted({one["application"] for one in ended})
    right = [each for one in ended for each in one["right"]]
    full = [run for run in runs if run["arm"] == NONE.name]
    equal, changed = _equal_answers(own, full), _changed(own, full)
    counts = [run["prewarming_counts"] for run in own if run["prewarming_counts"]]
    return {
        "arm": name,
        "mean_seconds": [_mean_completion(run) for run in own],
        "p95_seconds": _p95([one["completion"] for one in ended]),
        "by_application": {
            kind: statistics.fmean(o["completion"] for o in ended if o["application"] == kind)
            for kind in kinds
        },
        "served_by_application": {
            kind: statistics.fmean(
                sum(call["seconds"] for call in one["calls"])
                for one in ended
                if one["application"] == kind
            )
            for kind in kinds
        },
        "first_token_mean": statistics.fmean(call["first_token_seconds"] for call in calls),
        "first_token_p95": _p95([call["first_token_seconds"] for call in calls]),
        "waited_first_token_mean": statistics.fmean(firsts),
        "waited_first_token_p95": _p95(firsts),
        "call_seconds": statistics.fmean(call["seconds"] for call in calls),
        "call_processor_seconds": statistics.fmean(call["processor_seconds"] for call in calls),
        "new_tokens": statistics.fmean(call["new_tokens"] for call in calls),
        "calls": len(calls),
        "computed_share": sum(call["computed_tokens"] for call in calls)
        / sum(call["prompt_tokens"] for call in calls),
        "kv_bytes": statistics.fmean(call["kv_bytes"] for call in calls),
        "from_disk": sum(call["on_disk"] for call in calls),
        "compiled": sum(call["compiled"] for call in calls),
        "damaged": sum(call["damaged"] for call in calls),
        "brought": sum(each["brought"] for each in counts),
        "prefetch_errors": sum(len(each["errors"]) for each in counts),
        "applications": len(ended),
        "served": sum(run["served"] for run in own),
        "failed": sum(run["failed"] for run in own),
        "right": sum(right),
        "answers": len(right),
        "right_interval": share_interval(sum(right), len(right)),
        "lost": sum(not each["right"] for each in changed),
        "gained": sum(each["right"] for each in changed),
        "changed": changed,
        "equal": sum(equal),
        "equal_interval": share_interval(sum(equal), len(equal)),
    }


def _equal_answers(own: Sequence[dict], full: Sequence[dict]) -> list[bool]:
    """For each answer of an arm, whether it begins as that of the arm with nothing on does.

    What counts are as many words as the known fact has: a model that goes on behind it, or stops,
    has answered the same.
    """
    given = {
        (run["repeat"], one["number"]): one["answers"]
        for run in full
        for one in run["applications"]
    }
    return [
        first_words(answer, expected) == first_words(reference, expected)
        for run in own
        for one in run["applications"]
        for answer, reference, expected in zip(
            one["answers"], given[run["repeat"], one["number"]], one["expected"], strict=False
        )
    ]


def _changed(own: Sequence[dict], full: Sequence[dict]) -> list[dict]:
    """The answers that are right in an arm and wrong with nothing on, or the other way round."""
    given = {(run["repeat"], one["number"]): one for run in full for one in run["applications"]}
    return [
        {
            "repeat": run["repeat"],
            "number": one["number"],
            "application": one["application"],
            "expected": expected,
            "answer": answer,
            "right": right,
        }
        for run in own
        for one in run["applications"]
        for expected, answer, right, before in zip(
            one["expected"],
            one["answers"],
            one["right"],
            given[run["repeat"], one["number"]]["right"],
            strict=True,
        )
        if right != before
    ]


def _noise(runs: Sequence[dict]) -> dict:
    """By how much the seconds of identical calls differ, which no order can change.

    Returns:
        `arms`: by way of serving, of each repeat the mean seconds of a call in the arm where it is
        largest over that in the arm where it is smallest; `largest` of them all; `one_call`: 95 %
        of the calls have a largest over a smallest recording below this.
    """
    arms: dict[str, list[float]] = {}
    single = []
    for way in SERVINGS:
        for repeat in sorted({run["repeat"] for run in runs}):
            own = [r for r in runs if r["repeat"] == repeat and _serving(r) == way.name]
            seconds = [
                [call["seconds"] for one in run["applications"] for call in one["calls"]]
                for run in own
            ]
            means = [statistics.fmean(each) for each in seconds]
            arms.setdefault(way.name, []).append(max(means) / min(means))
            if len({len(each) for each in seconds}) == 1:  # else they did not serve the same
                single += [max(of) / min(of) for of in zip(*seconds, strict=True)]
    largest = max(max(each) for each in arms.values())
    return {"arms": arms, "largest": largest, "one_call": _p95(single) if single else None}


def _serving(run: dict) -> str:
    return Way(run["link"], run["retention"], "FCFS").name


def _compiling(runs: Sequence[dict], compiled: dict) -> dict:
    """What compiling the pages took, and after how many uses of a page it is paid back.

    A use saves what the first token of a call comes earlier by, over the documents of a call; calls
    are those of link alone and those with nothing on.
    """
    calls = {
        way.name: [call for run in runs if _serving(run) == way.name for call in _calls(run)]
        for way in SERVINGS[::2]
    }
    full, linked = calls[NONE.name], calls[Way(True, False, "FCFS").name]
    first = [statistics.fmean(call["first_token_seconds"] for call in of) for of in (full, linked)]
    uses = statistics.fmean(c["in_memory"] + c["on_disk"] + c["compiled"] for c in linked)
    saved = (first[0] - first[1]) / uses
    alone = [c for run in runs if run["arm"] == Way(True, False, "FCFS").name for c in _calls(run)]
    computed = sum(call["computed_tokens"] for call in alone)
    return {
        **compiled,
        "documents_a_call": uses,
        "saved_seconds_a_use": saved,
        "uses_to_pay_back": compiled["seconds"] / compiled["documents"] / saved
        if saved > 0.0
        else None,
        "computed_share_with_compiling": (computed + compiled["tokens"])
        / sum(call["prompt_tokens"] for call in alone),
    }


def _calls(run: dict) -> Iterator[dict]:
    for one in run["applications"]:
        yield from one["calls"]


def _contributions(runs: Sequence[dict]) -> dict:
    """Of each time, what each part contributes, over repeats."""
    measured: dict[str, Callable[[dict], float]] = {
        "mean completion": _mean_completion,
        "P95 completion": lambda run: _p95([one["completion"] for one in run["applications"]]),
        "first token": lambda run: statistics.fmean(
            call["waited"] + call["first_token_seconds"]
            for one in run["applications"]
            for call in one["calls"]
        ),
        "call": lambda run: statistics.fmean(
            call["seconds"] for one in run["applications"] for call in one["calls"]
        ),
    }
    found = {}
    for name, time_of in measured.items():
        repeats = [
            effects(
                {
                    (way.link, way.retention, way.order == "Gittins"): time_of(
                        next(r for r in runs if r["arm"] == way.name and r["repeat"] == repeat)
                    )
                    for way in EIGHT
                }
            )
            for repeat in sorted({run["repeat"] for run in runs})
        ]
        found[name] = {key: over_repeats([each[key] for each in repeats]) for key in repeats[0]}
    return found


def _replayed_contributions(replayed: Sequence[dict]) -> dict:
    """The same of the mean completion in replays at each load, over streams."""
    found = {}
    for load in LOADS:
        means = {
            (row["arm"], row["order"]): row["means"] for row in replayed if row["load"] == load
        }
        streams = [
            effects(
                {
                    (way.link, way.retention, way.order == "Gittins"): means[
                        Way(way.link, way.retention, "FCFS").name, way.order
                    ][stream]
                    for way in EIGHT
                }
            )
            for stream in range(SEEDS)
        ]
        found[f"replayed at load {load}"] = {
            key: over_streams([each[key] for each in streams]) for key in streams[0]
        }
    return found


def _replays(
    runs: Sequence[dict], setting: Setting, knowledge: Mapping[str, Knowledge]
) -> list[dict]:
    """Calls of the four ways of serving in every order at stated loads.

    Arms that serve alike record the same calls: each call has a recording of each of them.
    """
    recorded = {}
    for way in SERVINGS:
        pool = []
        for first in (run for run in runs if run["arm"] == way.name):
            tasks = {task.number: task for task in tasks_of(setting, first["repeat"])}
            alike = [r for r in runs if r["repeat"] == first["repeat"] and _serving(r) == way.name]
            for place, one in enumerate(first["applications"]):
                each = [[served_of(c) for c in r["applications"][place]["calls"]] for r in alike]
                same = [of for of in each if _what(of) == _what(each[alike.index(first)])]
                pool.append((tasks[one["number"]], same))
        recorded[way.name] = pool
    return replays(
        recorded, setting.library(), knowledge, LOADS, applications=setting.replayed, seeds=SEEDS
    )


def _what(calls: Sequence[Served]) -> list[tuple[str, int, int]]:
    """What makes calls the same, whatever they took."""
    return [(call.text, call.computed_tokens, call.new_tokens) for call in calls]


def _mean_completion(run: dict) -> float:
    return statistics.fmean(one["completion"] for one in run["applications"])


def _p95(values: Sequence[float]) -> float:
    """The 95th percentile, by linear interpolation between the values."""
    ordered = sorted(values)
    place = 0.95 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
