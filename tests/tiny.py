"""Tiny random models of every layout, and a pool of token ids for them. Nothing is downloaded."""

import copy

import numpy as np
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from staff.pool import Pool

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

LAYOUTS = {
    "llama": LlamaConfig(**SHAPE),
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "gemma3": Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
    "gemma2-capped": Gemma2Config(**SHAPE, head_dim=8, sliding_window=4, query_pre_attn_scalar=8, final_logit_softcapping=3.0),
    "mistral": MistralConfig(**SHAPE, head_dim=8, sliding_window=5),
    "gpt-neox": GPTNeoXConfig(**{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=128, **ENDS),
    "phi3": Phi3Config(**SHAPE),
}
# where the value projection of the last block is, and how many of its outputs are values
VALUE = {
    "llama": ("blocks.2.self_attn.v_proj", 16, None),
    "llama-tied": ("blocks.2.self_attn.v_proj", 16, None),
    "qwen3": ("blocks.2.self_attn.v_proj", 16, None),
    "gemma3": ("blocks.2.self_attn.v_proj", 16, None),
    "gemma2-capped": ("blocks.2.self_attn.v_proj", 16, None),
    "mistral": ("blocks.2.self_attn.v_proj", 16, None),
    "gpt-neox": ("blocks.2.attention.query_key_value", 96, [*range(16, 24), *range(40, 48), *range(64, 72), *range(88, 96)]),
    "gpt2": ("blocks.2.attn.c_attn", 96, [*range(64, 96)]),
    "phi3": ("blocks.2.self_attn.qkv_proj", 64, [*range(48, 64)]),
}


def make_model(layout: str, dtype=torch.float64, seed: int = 0) -> torch.nn.Module:
    config = copy.deepcopy(LAYOUTS[layout])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        for name, parameter in model.named_parameters():  # norms and biases away from their ones and zeros
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn(parameter.shape)
            elif "embed" not in name and "wte" not in name:
                parameter.data *= 5
    return model.to(dtype).eval().requires_grad_(False)


def make_pool(lengths=(5, 12, 3, 9, 12, 7, 21), seed: int = 0, vocabulary: int = VOCABULARY) -> Pool:
    """Random tokens; about the second half of each sample is the response."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, vocabulary, length).astype(np.int32) for length in lengths]
    masks = [np.arange(length) >= max(1, length // 2 - i % 2) for i, length in enumerate(lengths)]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Pool(np.concatenate(ids), np.concatenate(masks), offsets)
