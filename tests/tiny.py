"""Tiny random models of every layout, and a pool of token ids for them. Nothing is downloaded."""

import copy
import os

import numpy as np
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from staff.data.tokens import Pool

VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BARE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, **ENDS}
WINDOW = {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    **{**SHAPE, "num_key_value_heads": 4},
    **{"q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, **EXPERTS},
}
SHARED = {
    **{
        **SHAPE,
        "num_hidden_layers": 4,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "head_dim": 8,
    },
    **{"num_kv_shared_layers": 1, "laurel_rank": 4, "altup_num_inputs": 2, "sliding_window": 4},
    **{"layer_types": ["full_attention"] * 4, "activation_sparsity_pattern": [0.0] * 4},
}

LAYOUTS = {
    "llama": transformers.LlamaConfig(**SHAPE),
    "llama-tied": transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SHAPE),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=8),
    "gemma3": transformers.Gemma3TextConfig(**SHAPE, **WINDOW),
    "gemma2-capped": transformers.Gemma2Config(
        **SHAPE, **WINDOW, final_logit_softcapping=3.0, attn_logit_softcapping=2.0
    ),
    "mistral": transformers.MistralConfig(**SHAPE, head_dim=8, sliding_window=5),
    "granite": transformers.GraniteConfig(
        **SHAPE, logits_scaling=4.0, attention_multiplier=0.3, residual_multiplier=0.6
    ),
    "cohere": transformers.CohereConfig(**SHAPE, logit_scale=0.5),
    "stablelm": transformers.StableLmConfig(**SHAPE),
    "opt": transformers.OPTConfig(
        **BARE, ffn_dim=48, max_position_embeddings=128, word_embed_proj_dim=16, do_layer_norm_before=False
    ),
    "gpt-neox": transformers.GPTNeoXConfig(**{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}),
    "falcon": transformers.FalconConfig(**BARE, new_decoder_architecture=True, num_kv_heads=2),
    "bloom": transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4, **ENDS),
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=128, **ENDS
    ),
    "phi3": transformers.Phi3Config(**SHAPE),
    "gemma3n-shared": transformers.Gemma3nTextConfig(**SHARED),
    "mixtral": transformers.MixtralConfig(**SHAPE, num_local_experts=4),
    "qwen3-moe": transformers.Qwen3MoeConfig(**SHAPE, num_experts=4, **EXPERTS, head_dim=8),
    "qwen2-moe": transformers.Qwen2MoeConfig(
        **SHAPE, num_experts=4, **EXPERTS, shared_expert_intermediate_size=16
    ),
    "gpt-oss": transformers.GptOssConfig(
        **SHAPE, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=4
    ),
    "deepseek-v3": transformers.DeepseekV3Config(**LATENT, first_k_dense_replace=1),
}
# structurally different: plain, capped with windows, projected embeddings, values fused head by head and as a
# third, values of another block, experts, latent values; the others differ from one of these in a norm, a
# bias or a factor
EIGHT = ("llama", "gemma2-capped", "opt", "gpt-neox", "gpt2", "gemma3n-shared", "mixtral", "deepseek-v3")
CHECKED = tuple(LAYOUTS) if os.environ.get("STAFF_SOAK") == "1" else EIGHT  # `make soak` checks all
EXPERT_LAYOUTS = ("mixtral", "qwen3-moe", "qwen2-moe", "gpt-oss", "deepseek-v3")


def interleaved(heads: int, group: int, first: int, last: int) -> list[int]:
    """Rows first to last of every group of a fused projection."""
    return [head * group + row for head in range(heads) for row in range(first, last)]


# where the value projection of the last block is, how many outputs its layer has, and which of them are
# values
VALUE = {
    **dict.fromkeys(LAYOUTS, ("blocks.2.self_attn.v_proj", 16, None)),
    "cohere": ("blocks.2.self_attn.v_proj", 16, None),
    "stablelm": ("blocks.2.self_attn.v_proj", 16, None),
    "opt": ("blocks.2.self_attn.v_proj", 32, None),
    "gpt-neox": ("blocks.2.attention.query_key_value", 96, interleaved(4, 24, 16, 24)),
    "falcon": ("blocks.2.self_attention.query_key_value", 64, interleaved(2, 32, 24, 32)),
    "bloom": ("blocks.2.self_attention.query_key_value", 96, interleaved(4, 24, 16, 24)),
    "gpt2": ("blocks.2.attn.c_attn", 96, [*range(64, 96)]),
    "phi3": ("blocks.2.self_attn.qkv_proj", 64, [*range(48, 64)]),
    "deepseek-v3": ("blocks.2.self_attn.kv_b_proj", 64, interleaved(4, 16, 8, 16)),
}


def make_model(layout: str, dtype=torch.float64, seed: int = 0, settle: float = 5.0) -> torch.nn.Module:
    """A model of its own random weights; matrices are `settle` times as large as a library would make
    them."""
    config = copy.deepcopy(LAYOUTS[layout])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        for name, parameter in model.named_parameters():  # norms and biases away from their ones and zeros
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn(parameter.shape)
            elif "embed" not in name and "wte" not in name:
                parameter.data *= settle
    if layout in EXPERT_LAYOUTS and dtype == torch.float64:
        model.set_experts_implementation("eager")  # the grouped product knows no float64
    return model.to(dtype).eval().requires_grad_(False)


def make_pool(lengths=(5, 12, 3, 9, 12, 7, 21), seed: int = 0, vocabulary: int = VOCABULARY) -> Pool:
    """Random tokens; about the second half of each sample is the response."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, vocabulary, length).astype(np.int32) for length in lengths]
    masks = [np.arange(length) >= max(1, length // 2 - i % 2) for i, length in enumerate(lengths)]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Pool(np.concatenate(ids), np.concatenate(masks), offsets)
