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


@pytest.mark.parametrize(
    ("stage", "change", "says"),
    [
        (LLM, {"kind": "gpu"}, r"has kind 'gpu'; expected one of llm"),
        (LLM, {"input_tokens": (1.0, -2.0)}, r"input_tokens\[1\] of a stage is -2.0; .*drop"),
        (LLM, {"output_tokens": (float("nan"),)}, r"output_tokens\[0\] of a stage is nan"),
        (TOOL, {"seconds": (float("inf"),)}, r"seconds\[0\] of a stage is inf"),
        (LLM, {"parallelism": (1.0, 1.5)}, r"parallelism\[1\] of a stage is 1.5; expected a whole"),
        (LLM, {"parallelism": (0,)}, r"parallelism\[0\] of a stage is 0; .* count the calls"),
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
        (("",), {"": LLM}, r"unit name is ''; choose any name"),
        (("start",), {"start": LLM}, r"unit name is 'start'; choose any name"),
    ],
)
def test_broken_applications(entries, stages, says):
    with pytest.raises(DemandError, match=says):
        ApplicationProfile("mine", entries, stages)
