"""The reasoning adapter, as its README has it."""

import re

import pytest
import torch


def test_the_example_of_the_adapter_solves_its_problem(kv_model_name, pytestconfig, monkeypatch):
    root = pytestconfig.rootpath
    if "smollm2" not in kv_model_name:
        pytest.skip("the adapter is one of SmolLM2")
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(str(root))  # the block adds folders of examples in front
    readme = (root / "examples" / "reasoning_adapter" / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    found: dict = {}
    exec(block, found)
    out, ids, problem = (found[name] for name in ("out", "ids", "problem"))
    tokenizer = found["tokenizer"]
    chain = tokenizer(problem.solution, add_special_tokens=False)["input_ids"]
    assert torch.equal(out[0, ids.shape[1] :], torch.tensor([*chain, found["END"]]))
