"""Every family links exactly or is refused with its reason; their page is measured."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from picache import PIC, LegoLink, PICacheError

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "experiments"))
import check_families  # noqa: E402 - the examples are scripts, not a package
import families  # noqa: E402

NO_ROTATION = "no rotary embedding module"
RECURRENT = "keeps a recurrent state"
OTHER_STATE = "another kind of state"
REFUSED = {
    "HunYuan dense": "no known rotary layout",
    "NanoChat": "no known rotary layout",
    "Doge": "self-check of DogeForCausalLM: its forward over scattered rows failed",
    "Gemma 3n": "layers that share keys",
    "GLM MoE DSA": OTHER_STATE,
    "Falcon": "does not state that it uses transformers' attention interface",
    "GPT-2": NO_ROTATION,
    "GPT-J": NO_ROTATION,
    "OPT": NO_ROTATION,
    "BLOOM": NO_ROTATION,
    "MPT": NO_ROTATION,
    "T5": "is not a causal language model",
    "Mamba": RECURRENT,
    "Mamba 2": RECURRENT,
    "Falcon Mamba": RECURRENT,
    "RWKV": RECURRENT,
    "Jamba": RECURRENT,
    "Bamba": RECURRENT,
    "Falcon H1": RECURRENT,
    "RecurrentGemma": RECURRENT,
    "Qwen3-Next": RECURRENT,
    "LFM2": OTHER_STATE,
    "MiniMax": OTHER_STATE,
}
PAGE = (ROOT / "docs" / "models.md").read_text()
RECORD = json.loads((ROOT / "docs" / "results" / "families.json").read_text())


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_family_links_exactly_or_is_refused_with_the_reason(family):
    """In another release than the page was measured with, an exact family may be refused."""
    measured = RECORD["environment"]["transformers"] == transformers.__version__
    try:
        families.build(family)
    except (AttributeError, StrictDataclassError) as error:
        if measured:
            raise
        pytest.skip(f"transformers {transformers.__version__} does not build it: {error}")
    row = check_families.verdict(family)
    if family in REFUSED:
        assert row["verdict"] == "refused", row
        assert REFUSED[family] in row["reason"] or not measured
    else:
        assert row["verdict"] == "exact" or (row["verdict"] == "refused" and not measured), row


def test_a_softcap_that_the_models_own_attention_drops_is_refused():
    model = families.build("Gemma 2")
    model.set_attn_implementation("eager")
    PIC(model)
    model.config._attn_implementation = "sdpa"
    with pytest.raises((PICacheError, ValueError), match=r"eager|softcap"):
        PIC(model)


@pytest.mark.parametrize("family", ["GPT-OSS", "Gemma 2", "DeepSeek V3", "Llama 4", "Qwen3-MoE"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_not_refused_for_its_rounding(family, dtype):
    PIC(families.build(family, dtype=dtype))


def test_a_chat_on_latents_goes_on_after_a_link():
    """Latents as keys carry no position: the same words asked again are no prompt fed again."""
    model = families.build("DeepSeek V3")
    pic = PIC(model)
    parts = [families.random_ids(n, seed=n) for n in (12, 9, 6)]
    prompt = pic.link([pic.compile(p) for p in parts[:-1]], parts[-1], LegoLink(99))
    cache = prompt["past_key_values"]
    run = dict(max_new_tokens=4, do_sample=False)
    first = model.generate(prompt["input_ids"], past_key_values=cache, **run)
    turn = torch.cat([first, parts[1][None]], dim=1)
    again = model.generate(turn, past_key_values=cache, **run)
    assert again.tolist() == model.generate(turn, **run).tolist()


def test_the_page_is_that_of_the_result_file():
    assert check_families.table(RECORD) in PAGE
    assert {"configuration", "environment"} <= set(RECORD)
    assert {row["verdict"] for row in RECORD["families"]} == {"exact", "refused"}
    assert [row["family"] for row in RECORD["families"]] == list(families.FAMILIES)
    assert len(RECORD["families"]) >= 20
