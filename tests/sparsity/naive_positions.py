"""Positions inside the cache, slow and obvious: nothing is rotated until it is asked for.

The model runs with every position 0, so that queries and keys come without one. At each step what
is kept is rotated from scratch: its i-th token stands at position i, the query at the last one.
"""

import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

from tests.sparsity.helpers import padded_ids, run

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "experiments"))
import families  # noqa: E402 - the examples are scripts, not a package

# Halves or neighbours as pairs, some of the dimensions, angles written once, twice or doubled,
# scaled, by type of layer, with layers that have none, norms, attention sinks, sliding windows.
ROTATED = {
    "Llama 2": ("half", "twice"),
    "Llama (YaRN)": ("half", "twice"),
    "Qwen3": ("half", "twice"),
    "Gemma 3": ("half", "twice"),
    "Phi": ("half", "twice"),
    "Phi-3": ("half", "twice"),
    "Cohere": ("interleaved", "doubled"),
    "GLM": ("interleaved", "twice"),
    "GPT-OSS": ("half", "once"),
    "SmolLM3": ("half", "twice"),
}


def angles(positions):
    """Of a toy model: 3 pairs, a scale of 2."""
    angle = positions[..., None] * torch.tensor([1.0, 0.3, 0.01], dtype=torch.float64)
    return 2 * angle.cos(), 2 * angle.sin()


def build(family):
    try:
        return families.build(family)
    except (AttributeError, StrictDataclassError) as error:
        pytest.skip(f"this transformers does not build it: {error}")


def held_after(policy, held, width):
    """Ranks held after a forward of `width` tokens, and those it finds there."""
    if width == 1 and held and len(held) == policy.budget + policy.evict_every - 1:
        held = held[: policy.sinks] + held[len(held) - (policy.budget - 1 - policy.sinks) :]
    first = held[-1] + 1 if held else 0
    both = held + list(range(first, first + width))
    if (width == 1 and held) or len(both) <= policy.budget:
        return both, held
    return both[: policy.sinks] + both[len(both) - (policy.budget - policy.sinks) :], held


class Naive:
    """Attention over keys without a position: the model runs with every position 0.

    Of what is kept the i-th token stands at position i, the query at the last one.
    """

    def __init__(self, policy, model, padding):
        self.policy, self.padding, self.held = policy, padding, {}
        self.rotary = next(
            m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")
        )

    def rotate(self, module, states, positions):
        """States `[heads, n, head_dim]` by the model's own code."""
        types = getattr(module.config, "layer_types", None) or [None] * 99
        if not getattr(module, "use_rope", True):
            return states
        name = type(module).__name__
        kind = {"layer_type": types[module.layer_idx]} if name.startswith("Gemma3") else {}
        cos, sin = self.rotary(states, torch.tensor([[0, *positions]]), **kind)
        scale = cos[:, :1]  # in the states already
        cos, sin = cos[:, 1:] / scale, sin[:, 1:] / scale
        width = cos.shape[-1] * (2 if name.startswith("GptOss") else 1)
        apply = sys.modules[type(module).__module__].apply_rotary_pos_emb
        turned = apply(states[None, ..., :width], states[None, ..., :width], cos, sin)[0][0]
        return torch.cat([turned, states[..., width:]], -1)

    def attend(self, module, query, key, value, attention_mask, scaling, s_aux=None, **kwargs):
        policy, width = self.policy, query.shape[2]
        index, total = module.layer_idx, key.shape[2]
        types = getattr(module.config, "layer_types", None)
        window = kwargs.get("sliding_window") if types and "sliding" in types[index] else None
        out = query.new_zeros(query.shape[0], width, query.shape[1], value.shape[3])
        for b in range(query.shape[0]):
            real = self.padding[b, :total].nonzero()[:, 0].tolist()
            new = [column for column in real if column >= total - width]
            held = list(range(len(real) - len(new)))
            if window is None and index >= policy.dense_layers and new:
                before = self.held.get((index, b), [])
                # One column onto what has begun is decoding; else it is a prompt.
                self.held[index, b], held = held_after(policy, before, len(new))
                if len(new) == 1 and before:
                    held = self.held[index, b][:-1]
            for column in new:
                rank = real.index(column)
                seen = held + list(range(rank - new.index(column), rank + 1))
                seen = seen[-window:] if window else seen
                place = list(range(len(seen)))
                columns = [real[r] for r in seen]
                q = self.rotate(module, query[b][:, [column - total + width]], place[-1:])
                k = self.rotate(module, key[b][:, columns], place)
                group = len(q) // len(k)
                scores = q @ k.repeat_interleave(group, 0).mT * scaling
                if s_aux is not None:
                    scores = torch.cat([scores, s_aux[:, None, None]], -1)
                weights = scores.softmax(-1)[..., : len(seen)]
                values = value[b][:, columns].repeat_interleave(group, 0)
                out[b, column - total + width] = (weights @ values)[:, 0]
        return out, None


def naive(model, policy, ids, padding, widths):
    """The same by the twin."""
    twin, before = Naive(policy, model, padding), model.config._attn_implementation
    AttentionInterface.register("cache_positions_twin", twin.attend)
    AttentionMaskInterface.register("cache_positions_twin", sdpa_mask)
    model.set_attn_implementation("cache_positions_twin")
    logits = run(model, DynamicCache(), ids, padding, widths, positions=0)
    model.set_attn_implementation(before)
    return logits


def batch(total, pads=(4, 0)):
    ids, padding = padded_ids(total, *pads)
    return ids.clamp(max=117), padding
