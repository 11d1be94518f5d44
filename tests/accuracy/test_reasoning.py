"""The reasoning adapter, as its README has it."""

import re

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig


def test_the_tokenizer_ends_a_turn_where_the_model_does(kv_model_name):
    """Whatever release of transformers made them of one file."""
    tokenizer = AutoTokenizer.from_pretrained(kv_model_name)
    model_says = GenerationConfig.from_pretrained(kv_model_name)
    assert tokenizer.eos_token_id == model_says.eos_token_id
    assert tokenizer.pad_token_id == model_says.pad_token_id


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
