"""What the runs of all arms say: times, answers, contributions, and what other loads would do."""

import statistics
from collections.abc import Callable, Sequence

from serving.applications import first_words
from serving.experiment import BESIDE, EIGHT, Setting, Way, served_of, tasks_of
from serving.factorial import effects, over_repeats, share_interval
from serving.knowledge import Knowledge
from serving.replay import replays

NONE = Way(False, False, "FCFS")
LOADS = (0.5, 0.9)
"""Of the server without any of the three parts, in replays."""
SEEDS = 8
"""Streams of each replay."""


def summary(runs: Sequence[dict], setting: Setting, knowledge: Knowledge) -> dict:
    """Rows by arm, contributions and replays of the runs."""
    replayed = _replays(runs, setting, knowledge)
    names = [way.name for way in EIGHT + BESIDE]
    return {
        "arms": [_row(name, runs) for name in names if any(run["arm"] == name for run in runs)],
        "contributions": _contributions(runs) | _replayed_contributions(replayed),
        "replays": replayed,
    }


def _row(name: str, runs: Sequence[dict]) -> dict:
    """Everything on one arm."""
    own = [run for run in runs if run["arm"] == name]
    calls = [call for run in own for one in run["applications"] for call in one["calls"]]
    firsts = [call["waited"] + call["first_token_seconds"] for call in calls]
    ended = [one for run in own for one in run["applications"] if not one["error"]]
    right = [each for one in ended for each in one["right"]]
    equal = _equal_answers(own, [run for run in runs if run["arm"] == NONE.name])
    counts = [run["prewarming_counts"] for run in own if run["prewarming_counts"]]
    return {
        "arm": name,
        "mean_seconds": [_mean_completion(run) for run in own],
        "p95_seconds": _p95([one["completion"] for one in ended]),
        "by_application": {
            kind: statistics.fmean(o["completion"] for o in ended if o["application"] == kind)
            for kind in sorted({one["application"] for one in ended})
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
        "applications": sum(len(run["applications"]) for run in own),
        "failed": sum(bool(one["error"]) for run in own for one in run["applications"]),
        "right": sum(right),
        "answers": len(right),
        "right_interval": share_interval(sum(right), len(right)),
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
            key: over_repeats([each[key] for each in streams]) for key in streams[0]
        }
    return found


def _replays(runs: Sequence[dict], setting: Setting, knowledge: Knowledge) -> list[dict]:
    """Calls of the four arms served first come, first served, in other orders at stated loads."""
    recorded = {}
    for way in (way for way in EIGHT if way.order == "FCFS"):
        pool = []
        for run in (run for run in runs if run["arm"] == way.name):
            tasks = {task.number: task for task in tasks_of(setting, run["repeat"])}
            pool += [
                (tasks[one["number"]], [served_of(call) for call in one["calls"]])
                for one in run["applications"]
                if not one["error"]
            ]
        recorded[way.name] = pool
    return replays(
        recorded, setting.library(), knowledge, LOADS, applications=setting.replayed, seeds=SEEDS
    )


def _mean_completion(run: dict) -> float:
    """Of the applications that did not fail."""
    return statistics.fmean(one["completion"] for one in run["applications"] if not one["error"])


def _p95(values: Sequence[float]) -> float:
    """The 95th percentile, by linear interpolation between the values."""
    ordered = sorted(values)
    place = 0.95 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
