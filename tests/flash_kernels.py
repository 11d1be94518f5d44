"""Stand-ins for flash attention's packages, so that transformers' own way to them runs on a CPU."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash

VERSIONS = ("flash_attention_2", "flash_attention_3", "flash_attention_4")


def attend(query, key, value, scale, causal, window, softcap) -> Tensor:
    """Written out in float32, for `[batch, tokens, heads, head_dim]`."""
    group = query.shape[2] // key.shape[2]
    q, k, v = (t.float().transpose(1, 2) for t in (query, key, value))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    behind = (
        torch.arange(k.shape[2])[None]
        - (torch.arange(q.shape[2]) + k.shape[2] - q.shape[2])[:, None]
    )
    allowed = behind <= 0 if causal else torch.ones_like(behind, dtype=torch.bool)
    if window[0] >= 0:
        allowed = allowed & (behind >= -window[0])
    out = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v
    return out.transpose(1, 2).to(query.dtype)


class FlashKernels:
    """The two functions of a flash attention package that transformers calls for a prompt.

    Attributes:
        calls: of each call, the function's name and its arguments by name.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict]] = []

    def flash_attn_func(
        self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
        softcap=0.0,
    ):  # fmt: skip
        assert q.dtype in (torch.float16, torch.bfloat16), "flash attention takes half precision"
        self.calls.append(("batch", {"q": q, "k": k, "causal": causal, "window": window_size}))
        return attend(q, k, v, softmax_scale, causal, window_size, softcap)

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    ):  # fmt: skip
        assert q.dtype in (torch.float16, torch.bfloat16), "flash attention takes half precision"
        lengths = cu_seqlens_q.diff().tolist()
        self.calls.append(("texts", {"q": q, "causal": causal, "lengths": lengths}))
        texts = [t.split(lengths) for t in (q, k, v)]
        out = [
            attend(*(t[None] for t in text), softmax_scale, causal, window_size, softcap)[0]
            for text in zip(*texts, strict=True)
        ]
        return torch.cat(out)


def install(monkeypatch: pytest.MonkeyPatch) -> FlashKernels:
    """Put stand-ins where transformers looks for the packages, for the length of a test."""
    kernels = FlashKernels()

    def module(name: str) -> ModuleType:
        made = ModuleType(name)
        made.__dict__.update(
            flash_attn_func=kernels.flash_attn_func,
            flash_attn_varlen_func=kernels.flash_attn_varlen_func,
            flash_attn_with_kvcache=None,
        )
        monkeypatch.setitem(sys.modules, name, made)
        return made

    package = module("flash_attn")
    package.cute = module("flash_attn.cute")  # type: ignore[attr-defined]
    padding = module("flash_attn.bert_padding")
    padding.pad_input, padding.unpad_input = flash._pad_input, flash._unpad_input  # type: ignore[attr-defined]
    module("flash_attn_interface")
    for version in (2, 3, 4):
        monkeypatch.setattr(flash, f"is_flash_attn_{version}_available", lambda **_: True)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    return kernels


def load(model: torch.nn.Module, implementation: str) -> None:
    """Set the implementation, as on a machine that has the package."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = implementation
