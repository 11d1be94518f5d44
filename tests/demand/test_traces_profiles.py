"""Profiles built by hand are refused where drawing from them would fail or never end."""

from dataclasses import replace

import numpy as np
import pytest

from demand import DemandError
from demand.traces import ApplicationProfile, StageProfile

LLM = StageProfile("llm", (10.0,), (5.0,), (), (2.0,), ("end",))
TOOL = StageProfile("tool", (), (), (3.0,), (), ("llm", "end"))


def test_a_profile_by_hand_is_drawn_from():
    profile = ApplicationProfile("mine", ("tool",), {"tool": TOOL, "llm": LLM})
    rng = np.random.default_rng(0)
    drawn = [[span.unit for span in profile.session(rng).spans] for _ in range(20)]
    assert {tuple(names) for names in drawn} == {("tool",), ("tool", "llm")}


def test_chances_rounds_and_gaps_are_drawn_from():
    """Two or four rounds of the llm, a tool before each but the first, then the tool or the end."""
    llm = replace(
        LLM, successors=("tool", "end", "llm"), chances=(0.25, 0.75, 0.0), rounds=(2.0, 4.0),
        gap_seconds=(1.0, 3.0),
    )  # fmt: skip
    tool = replace(TOOL, successors=("end",))
    profile = ApplicationProfile("mine", ("llm",), {"tool": tool, "llm": llm})
    rng = np.random.default_rng(0)
    sessions = [profile.session(rng) for _ in range(2000)]
    drawn = [[span.unit for span in session.spans] for session in sessions]
    forms = {
        ("llm", *["before llm", "llm"] * (rounds - 1), *after)
        for rounds in (2, 4)
        for after in ((), ("tool",))
    }
    assert {tuple(units) for units in drawn} == forms
    assert np.mean([units[-1] == "tool" for units in drawn]) == pytest.approx(0.25, abs=0.03)
    assert np.mean([units.count("llm") == 2 for units in drawn]) == pytest.approx(0.5, abs=0.04)
    gaps = [s for session in sessions for s in session.spans if s.unit == "before llm"]
    assert {span.kind for span in gaps} == {"tool"}
    assert np.mean([span.seconds for span in gaps]) == pytest.approx(2.0, abs=0.05)
    assert [span.parents for span in sessions[0].spans] == [
        (at - 1,) if at else () for at in range(len(sessions[0].spans))
    ]


@pytest.mark.parametrize(
    ("stage", "change", "says"),
    [
        (LLM, {"kind": "gpu"}, r"has kind 'gpu'; expected one of llm"),
        (LLM, {"input_tokens": (1.0, -2.0)}, r"input_tokens\[1\] of a stage is -2.0; .*drop"),
        (LLM, {"output_tokens": (float("nan"),)}, r"output_tokens\[0\] of a stage is nan"),
        (TOOL, {"seconds": (float("inf"),)}, r"seconds\[0\] of a stage is inf"),
        (LLM, {"parallelism": (1.0, 1.5)}, r"parallelism\[1\] of a stage is 1.5; expected a whole"),
        (LLM, {"parallelism": (0,)}, r"parallelism\[0\] of a stage is 0; .* count the calls"),
        (LLM, {"rounds": (2, 0)}, r"rounds\[1\] of a stage is 0; .* count the rounds"),
        (LLM, {"gap_seconds": (-1.0,)}, r"gap_seconds\[0\] of a stage is -1.0"),
        (LLM, {"chances": (0.5, 0.5)}, r"2 chances for 1 successors; give one for each"),
        (
            TOOL,
            {"chances": (0.5, 0.4)},
            r"chances of a stage are .*; expected a sum of 1",
        ),
        (LLM, {"output_tokens": ()}, r"output_tokens of a stage of kind 'llm' has no samples"),
        (TOOL, {"seconds": ()}, r"seconds of a stage of kind 'tool' has no samples; .*by seconds"),
    ],
)
def test_broken_stages(stage, change, says):
    with pytest.raises(DemandError, match=says):
        replace(stage, **change)


@pytest.mark.parametrize(
    ("entries", "stages", "says"),
    [
        (("a",), {}, r"'mine', what follows 'start': an application without stages .give one"),
        ((), {"a": LLM}, r"what follows 'start': expected names of stages .seen: \[\]"),
        (("b",), {"a": LLM}, r"what follows 'start': expected names of stages .seen: \['b'\]"),
        (("end",), {"a": LLM}, r"what follows 'start': expected names of stages .seen: \['end'\]"),
        (("a",), {"a": replace(LLM, successors=())}, r"what follows 'a': expected names of stages"),
        (("a",), {"a": TOOL}, r"what follows 'a': expected .* or end .seen: \['end', 'llm'\]"),
        (("a",), {"a": replace(LLM, successors=("a",))}, r"follows .a.: end cannot be reached"),
        (
            ("a",),
            {"a": replace(LLM, successors=("a", "end"), chances=(1.0, 0.0))},
            r"follows .a.: end cannot be reached",
        ),
        (("",), {"": LLM}, r"unit name is ''; choose any name"),
        (("start",), {"start": LLM}, r"unit name is 'start'; choose any name"),
    ],
)
def test_broken_applications(entries, stages, says):
    with pytest.raises(DemandError, match=says):
        ApplicationProfile("mine", entries, stages)
