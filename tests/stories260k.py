"""A second trained model: karpathy's stories260K, read from its llama2.c checkpoint.

The files are not part of the repository: `PICACHE_DATA` names the folder that holds `stories260k/`,
by default `../shared/data` beside the checkout. Tests that need it skip when it is absent.
"""

import json
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

_BESIDE = Path(__file__).parents[2] / "shared" / "data"
FOLDER = Path(os.environ.get("PICACHE_DATA", _BESIDE)) / "stories260k"
_BYTE = re.compile(rb"<0x([0-9A-F]{2})>")
needs_stories = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no stories260k checkpoint: set PICACHE_DATA (looked in {FOLDER})"
)


def load_model() -> LlamaForCausalLM:
    """The checkpoint (llama2.c format v0, fp32) as a HuggingFace Llama."""
    raw = (FOLDER / "stories260K.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("7i", raw[:28])
    floats = np.frombuffer(raw, dtype=np.float32, offset=28)
    place = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal place
        size = int(np.prod(shape))
        place += size
        return torch.from_numpy(floats[place - size : place].reshape(shape).copy())

    def halves(weight: torch.Tensor, n: int) -> torch.Tensor:
        """Rows from interleaved rotary pairs (2i, 2i + 1) to HF's (i, i + d/2)."""
        return weight.view(n, -1, 2, dim).transpose(1, 2).reshape(weight.shape)

    head_dim = dim // heads
    embedding = take(vocab, dim)
    attention_norm = take(layers, dim)
    wq = take(layers, dim, dim)
    wk, wv = (take(layers, kv_heads * head_dim, dim) for _ in range(2))
    wo, ffn_norm = take(layers, dim, dim), take(layers, dim)
    w1, w2, w3 = take(layers, hidden, dim), take(layers, dim, hidden), take(layers, hidden, dim)
    final_norm = take(dim)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=length,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    state = {"model.embed_tokens.weight": embedding, "model.norm.weight": final_norm}
    state["lm_head.weight"] = embedding
    for i in range(layers):
        layer = f"model.layers.{i}"
        state |= {
            f"{layer}.input_layernorm.weight": attention_norm[i],
            f"{layer}.post_attention_layernorm.weight": ffn_norm[i],
            f"{layer}.self_attn.q_proj.weight": halves(wq[i], heads),
            f"{layer}.self_attn.k_proj.weight": halves(wk[i], kv_heads),
            f"{layer}.self_attn.v_proj.weight": wv[i],
            f"{layer}.self_attn.o_proj.weight": wo[i],
            f"{layer}.mlp.gate_proj.weight": w1[i],
            f"{layer}.mlp.down_proj.weight": w2[i],
            f"{layer}.mlp.up_proj.weight": w3[i],
        }
    model.load_state_dict(state)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


class StoriesTokenizer:
    """Its 512-piece byte-pair tokenizer: merges the adjacent pair of highest score first."""

    def __init__(self) -> None:
        raw, place = (FOLDER / "tok512.bin").read_bytes(), 4
        self.pieces: list[bytes] = []
        self.scores: list[float] = []
        while place < len(raw):
            score, length = struct.unpack("fi", raw[place : place + 8])
            self.pieces.append(raw[place + 8 : place + 8 + length])
            self.scores.append(score)
            place += 8 + length
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}

    def encode(self, text: str) -> list[int]:
        """Ids of the text behind a leading space, without BOS."""
        ids: list[int] = []
        for character in " " + text:
            piece = character.encode()
            ids += [self.ids[piece]] if piece in self.ids else [byte + 3 for byte in piece]
        while True:
            pairs = [
                (self.scores[merged], i, merged)
                for i in range(len(ids) - 1)
                if (merged := self.ids.get(self.pieces[ids[i]] + self.pieces[ids[i + 1]]))
                is not None
            ]
            if not pairs:
                return ids
            _, at, merged = max(pairs, key=lambda pair: (pair[0], -pair[1]))
            ids[at : at + 2] = [merged]

    def decode(self, ids: list[int]) -> str:
        """Text of ids; a BOS in front swallows the leading space, as llama2.c prints it."""
        pieces = [
            bytes([int(found[1], 16)]) if (found := _BYTE.fullmatch(piece)) else piece
            for piece in (self.pieces[i] for i in ids if i > 2)
        ]
        return b"".join(pieces).decode(errors="replace").removeprefix(" ")


def golden() -> tuple[list[int], str]:
    """Ids and text of the published greedy sample."""
    record = json.loads((FOLDER / "golden_greedy.json").read_text())
    return record["ids"], record["text"]


def published_stories() -> list[str]:
    """The two stories printed in the checkpoint's own page, without the commands around them."""
    page = (FOLDER / "stories260K.md").read_text()
    samples = re.findall(r"```\n\$ \./run[^\n]*\n(.*?)```", page, re.DOTALL)
    return [sample.strip() for sample in samples]
