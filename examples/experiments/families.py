"""Tiny random models of many families, built from their configurations without any download."""

from collections.abc import Callable

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

SHAPE = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    tie_word_embeddings=False,
)
SMALL = dict(vocab_size=128, hidden_size=64, num_hidden_layers=2)
HEADS = dict(head_dim=16)
SLIDING = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 2)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=32)
ROUTED = dict(
    **EXPERTS,
    n_routed_experts=4,
    n_shared_experts=1,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
)
LATENT = dict(
    **{**SHAPE, "num_key_value_heads": 4},
    q_lora_rank=None,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=12,
)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16)


def rope(kind: str, **parameters: object) -> dict:
    """RoPE parameters of a kind, as transformers 5 takes them."""
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=10000.0, **parameters))


def without(*names: str) -> dict:
    """`SHAPE` less some names that a configuration does not know."""
    return {name: value for name, value in SHAPE.items() if name not in names}


LLAMA3 = rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=128)
LONGROPE = rope(
    "longrope",
    short_factor=[1 + i / 10 for i in range(8)],
    long_factor=[2.0 + i for i in range(8)],
    original_max_position_embeddings=256,
)

# Family to its configuration; a callable, since a family may be missing in an older transformers.
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "Llama 2": lambda: hf.LlamaConfig(**SHAPE),
    "Llama 3 (llama3 RoPE)": lambda: hf.LlamaConfig(**SHAPE, **LLAMA3),
    "Llama (YaRN)": lambda: hf.LlamaConfig(**SHAPE, **YARN),
    "Llama (dynamic NTK)": lambda: hf.LlamaConfig(**SHAPE, **rope("dynamic", factor=4.0)),
    "Llama 4": lambda: hf.Llama4TextConfig(
        **SHAPE,
        **HEADS,
        intermediate_size_mlp=96,
        num_local_experts=2,
        attention_chunk_size=32,
        interleave_moe_layer_step=2,
    ),
    "Mistral": lambda: hf.MistralConfig(**SHAPE, **HEADS, sliding_window=None),
    "Mistral (sliding)": lambda: hf.MistralConfig(**SHAPE, **HEADS, sliding_window=16),
    "Mixtral": lambda: hf.MixtralConfig(
        **SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    ),
    "Qwen2": lambda: hf.Qwen2Config(**SHAPE),
    "Qwen2-MoE": lambda: hf.Qwen2MoeConfig(
        **SHAPE, **EXPERTS, shared_expert_intermediate_size=32, num_experts=4
    ),
    "Qwen2-VL (text)": lambda: hf.Qwen2VLConfig(
        text_config={**SHAPE, **rope("default", mrope_section=[2, 3, 3])},
        vision_config=dict(depth=1, embed_dim=32, hidden_size=64, num_heads=2),
    ),
    "Qwen3": lambda: hf.Qwen3Config(**SHAPE, **HEADS),
    "Qwen3-MoE": lambda: hf.Qwen3MoeConfig(**SHAPE, **HEADS, **EXPERTS, num_experts=4),
    "Gemma": lambda: hf.GemmaConfig(**SHAPE, **HEADS),
    "Gemma 2": lambda: hf.Gemma2Config(
        **SHAPE,
        **HEADS,
        sliding_window=16,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=2.0,
        attn_implementation="eager",  # sdpa leaves the softcap out in older releases
    ),
    "Gemma 3": lambda: hf.Gemma3TextConfig(**SHAPE, **HEADS, **SLIDING, query_pre_attn_scalar=16),
    "Gemma 4": lambda: hf.Gemma4TextConfig(
        **SHAPE, **HEADS, **SLIDING, vocab_size_per_layer_input=128, hidden_size_per_layer_input=8
    ),
    "Phi": lambda: hf.PhiConfig(**SHAPE, partial_rotary_factor=0.5),
    "Phi-3": lambda: hf.Phi3Config(**SHAPE),
    "Phi-3 (longrope)": lambda: hf.Phi3Config(
        **SHAPE, **LONGROPE, original_max_position_embeddings=256
    ),
    "Phi-3.5-MoE": lambda: hf.PhimoeConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "GPT-OSS": lambda: hf.GptOssConfig(
        **SHAPE, **HEADS, **SLIDING, num_local_experts=4, num_experts_per_tok=2
    ),
    "GPT-NeoX": lambda: hf.GPTNeoXConfig(**without("num_key_value_heads")),
    "OLMo": lambda: hf.OlmoConfig(**SHAPE),
    "OLMo 2": lambda: hf.Olmo2Config(**SHAPE),
    "OLMo 3": lambda: hf.Olmo3Config(**SHAPE, **SLIDING),
    "OLMoE": lambda: hf.OlmoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2),
    "Cohere": lambda: hf.CohereConfig(**SHAPE),
    "Cohere 2": lambda: hf.Cohere2Config(**SHAPE, sliding_window=16),
    "SmolLM3": lambda: hf.SmolLM3Config(**SHAPE),
    "GLM": lambda: hf.GlmConfig(**SHAPE, **HEADS),
    "GLM 4": lambda: hf.Glm4Config(**SHAPE, **HEADS),
    "GLM 4 MoE": lambda: hf.Glm4MoeConfig(**SHAPE, **HEADS, **ROUTED),
    "DeepSeek V2": lambda: hf.DeepseekV2Config(**LATENT, **ROUTED),
    "DeepSeek V3": lambda: hf.DeepseekV3Config(**LATENT, **ROUTED),
    "DeepSeek V3 (YaRN)": lambda: hf.DeepseekV3Config(**LATENT, **ROUTED, **YARN),
    "MiniCPM3": lambda: hf.MiniCPM3Config(**{**LATENT, "q_lora_rank": 16}),
    "Granite": lambda: hf.GraniteConfig(**SHAPE),
    "Granite MoE": lambda: hf.GraniteMoeConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "Starcoder2": lambda: hf.Starcoder2Config(**SHAPE),
    "StableLM": lambda: hf.StableLmConfig(**SHAPE),
    "Exaone 4": lambda: hf.Exaone4Config(**SHAPE, **SLIDING),
    "Nemotron": lambda: hf.NemotronConfig(**SHAPE),
    "Ernie 4.5": lambda: hf.Ernie4_5Config(**SHAPE, **HEADS),
    "Helium": lambda: hf.HeliumConfig(**SHAPE, **HEADS),
    "Seed-OSS": lambda: hf.SeedOssConfig(**SHAPE, **HEADS),
    "Apertus": lambda: hf.ApertusConfig(**SHAPE),
    "MiMo V2 Flash": lambda: hf.MiMoV2FlashConfig(
        **SHAPE, **HEADS, **EXPERTS, v_head_dim=8, sliding_window=16, n_routed_experts=4
    ),
    "dots.llm1": lambda: hf.Dots1Config(**SHAPE, **HEADS, **ROUTED),
    "DBRX": lambda: hf.DbrxConfig(
        vocab_size=128,
        d_model=64,
        n_heads=4,
        n_layers=2,
        max_seq_len=512,
        ffn_config=dict(ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2),
        attn_config=dict(kv_n_heads=2, clip_qkv=8, rope_theta=10000.0),
    ),
    "ModernBERT decoder": lambda: hf.ModernBertDecoderConfig(**SHAPE, local_attention=16),
    "HunYuan dense": lambda: hf.HunYuanDenseV1Config(**SHAPE, **HEADS),
    "NanoChat": lambda: hf.NanoChatConfig(**SHAPE),
    "Doge": lambda: hf.DogeConfig(**SHAPE),
    "Gemma 3n": lambda: hf.Gemma3nTextConfig(
        **SHAPE,
        **HEADS,
        **SLIDING,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "GLM MoE DSA": lambda: hf.GlmMoeDsaConfig(
        **{**LATENT, "q_lora_rank": 16},
        **ROUTED,
        index_topk=8,
        index_head_dim=16,
        index_n_heads=2,
    ),
    "Falcon": lambda: hf.FalconConfig(**SMALL, num_attention_heads=4),
    "GPT-2": lambda: hf.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4),
    "GPT-J": lambda: hf.GPTJConfig(vocab_size=128, n_embd=64, n_layer=2, n_head=4, rotary_dim=8),
    "OPT": lambda: hf.OPTConfig(**SMALL, ffn_dim=96, num_attention_heads=4, word_embed_proj_dim=64),
    "BLOOM": lambda: hf.BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4),
    "MPT": lambda: hf.MptConfig(vocab_size=128, d_model=64, n_layers=2, n_heads=4),
    "T5": lambda: hf.T5Config(
        vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4
    ),
    "Mamba": lambda: hf.MambaConfig(**SMALL),
    "Mamba 2": lambda: hf.Mamba2Config(
        **SMALL, num_heads=8, head_dim=16, n_groups=1, state_size=16
    ),
    "Falcon Mamba": lambda: hf.FalconMambaConfig(**SMALL),
    "RWKV": lambda: hf.RwkvConfig(**SMALL, attention_hidden_size=64),
    "Jamba": lambda: hf.JambaConfig(
        **SHAPE, num_experts=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False
    ),
    "Bamba": lambda: hf.BambaConfig(**SHAPE, **MAMBA, attn_layer_indices=[1, 3]),
    "Falcon H1": lambda: hf.FalconH1Config(**SHAPE, **MAMBA, mamba_d_ssm=128),
    "RecurrentGemma": lambda: hf.RecurrentGemmaConfig(
        **without("max_position_embeddings"), **HEADS, attention_window_size=16
    ),
    "Qwen3-Next": lambda: hf.Qwen3NextConfig(
        **SHAPE,
        **HEADS,
        **EXPERTS,
        num_experts=4,
        shared_expert_intermediate_size=32,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    ),
    "LFM2": lambda: hf.Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"] * 2),
    "MiniMax": lambda: hf.MiniMaxConfig(
        **SHAPE,
        **HEADS,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["linear_attention", "full_attention"] * 2,
        block_size=16,
    ),
}


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random model of a family, in evaluation mode.

    Every matrix is drawn wide enough that attention is far from uniform, and norms, biases and
    sinks are not left at their start, so that a wrong mask or a norm in another place shows.

    Raises:
        AttributeError: when the installed transformers has no such family.
    """
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    kind = hf.AutoModelForCausalLM
    for other in (hf.AutoModelForImageTextToText, hf.AutoModelForSeq2SeqLM):
        kind = kind if type(config) in kind._model_mapping else other  # noqa: SLF001
    model = kind.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.add_((noise * 0.1).to(dtype))
            else:
                parameter.copy_((noise * (0.5 if "embed" in name else 0.12)).to(dtype))
    # What does not matter here, and would end a text early or ask for padding.
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def random_ids(tokens: int, seed: int) -> Tensor:
    """Token ids in [3, 118), ``[tokens]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 118, (tokens,), generator=generator)
