"""The examples that measure predictors and attained service, on made-up data, and their pages."""

import json
from pathlib import Path

import numpy as np
import pytest

from demand import Execution, PendingCall, Unit, bimodal_mix

ROOT = Path(__file__).parents[2]


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "experiments"))
    import attained
    import learning_loop
    import predictors

    return predictors, attained, learning_loop


def asked(predictors, n, seed=0):
    """The prompt is a number of words, each of which takes a second; its length tells nothing."""
    rng = np.random.default_rng(seed)
    words = rng.integers(1, 30, n)
    runs = [[Execution(Unit("solve", "llm"), 100, float(w) / 0.06)] for w in words]
    return predictors.Asked([f"{w:03}" for w in words], runs)


def test_an_embedding_that_tells_all_closes_the_gap(examples):
    predictors, *_ = examples

    def embed(prompt):
        return np.array([np.log(float(prompt)), 1.0])

    found = predictors.experiment(embed, asked(predictors, 200), seeds=2, jobs=80)
    closed = {arm: gap["share"] for arm, gap in found["gap_closed"].items()}
    assert closed["shortest predicted, embedding"] > 0.8
    assert closed["shortest predicted, prompt length"] < 0.4
    assert found["calibration"]["embedding"]["crps_ratio_to_none"] < 0.3
    record = {
        "configuration": {"seeds": 2, "jobs": 80, "load": 0.9, "model": "made up"},
        "results": {"made up": found},
    }
    assert "| embedding | 0." in predictors.markdown(record)


def test_policies_that_know_nothing_are_compared(examples):
    _, attained, _ = examples

    def mix(jobs, seed):
        return bimodal_mix(load=0.9, jobs=jobs, seed=seed)

    found = attained.summed([attained.served({"x": mix}, 60, ("x", seed)) for seed in range(2)])
    assert found["FCFS"]["mean"] == [1.0, 1.0, 1.0]
    assert found["oracle"]["mean"][0] < found["LAS"]["mean"][0] < 1.0
    assert found["MLFQ"]["preemptions"] < found["LAS"]["preemptions"] / 5
    text = attained.markdown({"configuration": {"jobs": 60, "seeds": 2}, "results": {"x": found}})
    assert text.count("\n| ") == len(found) + 2


def test_who_starts_from_nothing_has_learned_by_the_end(examples):
    *_, learning_loop = examples
    found = learning_loop.experiment(jobs=120, seeds=2, workers=1)
    learning, knowing, las = (
        found[name]
        for name in ("Gittins, learning from nothing", "Gittins, graphs from the start", "LAS")
    )
    assert learning[-1][0] < las[-1][0]
    assert learning[3][0] < 1.3 * knowing[3][0]
    text = learning_loop.markdown({"configuration": {"jobs": 120, "seeds": 2}, "results": found})
    assert text.count("\n| ") == len(found) + 1


@pytest.mark.parametrize("name", ["predictors", "attained", "learning_loop"])
def test_the_record_says_how_it_was_made(name):
    record = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())
    assert record["environment"]["commit"]
    assert record["configuration"]["load"] == 0.9


def test_a_small_model_reads_the_prompt(examples):
    """The embedding is that of the whole model, of which half is left out."""
    import torch
    from models import load
    from prompt_embedding import Embedder, EmbeddingPredictor

    embed = Embedder("reference")
    prompts = [f"Q : where is number {n} ?" for n in range(12)]
    model, tokenizer = load("reference")
    with torch.inference_mode():
        ids = tokenizer(prompts[3], return_tensors="pt").input_ids
        layers = model(ids, output_hidden_states=True).hidden_states
    middle = layers[model.config.num_hidden_layers // 2][0].mean(dim=0)
    np.testing.assert_allclose(embed(prompts[3]), middle.numpy(), rtol=1e-5, atol=1e-6)
    predictor = EmbeddingPredictor.fit(embed, prompts, [1.0 + n for n in range(12)])
    told = predictor.predict(PendingCall("a", Unit("ask", "llm"), prompt=prompts[5]))
    assert 1.0 < told.mean() < 12.0
