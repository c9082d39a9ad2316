# ruff: noqa: RUF024
"""A tiny configuration for every class of transformers' causal mapping, by rule; what a rule can't know
stands in EXCEPTIONS."""

from typing import Any

import numpy as np
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from staff.data.tokens import Pool
from staff.models import anatomy
from staff.scoring import scopes
from staff.scoring.scorer import Scorer
from tiny import VOCABULARY, make_pool

# settings and what is small for them; a configuration takes those that it has
SMALL: dict[str, Any] = {
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"], VOCABULARY),
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "attention_hidden_size", "lru_width", "embedding_size"], 32),
    **dict.fromkeys(["dim_model", "emb_dim", "d_embed", "word_embed_proj_dim", "input_embedding_size"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "dim_ff", "dff"], 48),
    **dict.fromkeys(["n_inner", "intermediate_size_mlp", "ffn_hidden_size", "d_inner", "feed_forward_size"], 48),
    **dict.fromkeys(["dense_intermediate_size", "prefix_dense_intermediate_size", "expert_ffn_hidden_size"], 48),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"], 3),
    **dict.fromkeys(["num_decoder_layers", "num_encoder_layers", "num_blocks"], 3),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"], 2),
    **dict.fromkeys(["head_dim", "v_head_dim", "qk_nope_head_dim", "swa_head_dim", "swa_v_head_dim", "dim_head"], 8),
    **dict.fromkeys(["kv_channels", "index_head_dim", "global_head_dim", "attention_head_dim"], 8),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"], 128),
    **dict.fromkeys(["num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "moe_topk", "index_n_heads"], 2),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"], 16),
    **dict.fromkeys(["expert_intermediate_size", "moe_shared_expert_intermediate_size", "moe_latent_size"], 16),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "first_k_dense_replace"], 1),
    **dict.fromkeys(["n_group", "topk_group", "decoder_start_token_id", "bos_token_id", "num_dense_layers"], 1),
    **dict.fromkeys(["sliding_window", "attention_window_size", "window_size", "local_attention", "index_topk"], 6),
    **dict.fromkeys(["linear_num_value_heads", "linear_num_heads", "mamba_num_heads"], 4),
    **dict.fromkeys(["linear_num_key_heads", "linear_conv_kernel_dim"], 2),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "state_size", "mamba_d_state", "ssm_state_size"], 8),
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_head_dim": 8, "mamba_d_ssm": 64, "mamba_n_groups": 1, "n_groups": 1,
    "mamba_chunk_size": 8, "chunk_size": 8, "time_step_rank": 4, "mamba_dt_rank": 4, "hidden_size_per_layer_input": 8,
    "q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_head_dim": 12, "query_pre_attn_scalar": 8,
    "num_kv_shared_layers": 0, "laurel_rank": 4, "altup_num_inputs": 2, "pad_token_id": 0, "eos_token_id": 2,
    "cls_token_id": 1, "sep_token_id": 2, "mask_token_id": 3, "dropout": 0.0, "o_lora_rank": 8, "o_groups": 2,
    "decoder_layerdrop": 0.0, "type_vocab_size": 2, "max_window_layers": 1, "conv_L_cache": 3, "d_kv": 8,
}  # fmt: skip
EVEN_IF_NONE = ("head_dim", "num_key_value_heads", "n_routed_experts", "moe_intermediate_size", "n_shared_experts", "n_group",
                "topk_group")  # fmt: skip
LATENT = {"num_key_value_heads": 4, "qk_head_dim": 12}  # attention by a latent has as many keys as queries
EXCEPTIONS: dict[str, dict[str, Any]] = {
    **{
        kind: {"num_hidden_layers": 4}  # every fourth has softmax attention
        for kind in ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "qwen4_exp_text")
    },
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    **dict.fromkeys(["gptj", "codegen"], {"rotary_dim": 4}),
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "zaya": {"num_experts_per_tok": 1},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    **dict.fromkeys(["dots1", "deepseek_v2"], {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}),
    "roc_bert": {"is_decoder": True, "shape_vocab_size": 50, "pronunciation_vocab_size": 50, "shape_embed_dim": 16,
                 "pronunciation_embed_dim": 16},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "zamba2": {"layer_types": ["mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 4, "mamba_ngroups": 1,
               "n_mamba_heads": 8, "mamba_headdim": 8, "attention_head_dim": 16},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2, "n_mamba_heads": 1,
              "mamba_dt_rank": 4},
    "dbrx": {},
    "longcat_flash": {"head_dim": 4},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local", "local"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    **dict.fromkeys(
        ["bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert", "roberta",
         "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl", "bert-generation"],
        {"is_decoder": True},
    ),
}  # fmt: skip


def names() -> list[str]:
    """A model type for each class of the causal mapping; of several the last, which reads text alone."""
    return list({name: kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}.values())


def tiny_config(kind: str) -> Any:
    """A configuration of three blocks, by rule; in the parts of a composite one too."""
    return _tiny(CONFIG_MAPPING[kind], EXCEPTIONS.get(kind, {}))


def _tiny(config_class: type, exceptions: dict[str, Any]) -> Any:
    default = config_class()
    small = SMALL | (LATENT if "kv_lora_rank" in vars(default) else {})
    settings: dict[str, Any] = {}
    for name, value in small.items():
        alias = default.attribute_map.get(name, name)
        if alias in vars(default) and (vars(default)[alias] is not None or alias in EVEN_IF_NONE):
            settings[alias] = value
    if "qk_rope_head_dim" in settings:
        settings.pop("head_dim", None)
    for part in config_class.sub_configs:
        if getattr(default, part, None) is not None:
            settings[part] = _tiny(type(getattr(default, part)), exceptions.get(part, {})).to_dict()
    return config_class(**settings | exceptions)


def model_class(kind: str) -> type:
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])


def tiny_model(kind: str, settle: float = 2.0) -> torch.nn.Module:
    """Of random weights, in float64; matrices are `settle` times as large as the library would make them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(kind)(tiny_config(kind))
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "A_log" not in name and "dt_bias" not in name:
                parameter.data += 0.1 * torch.randn(parameter.shape)
            elif parameter.ndim > 1 and "embed" not in name:
                parameter.data = settle * parameter.data + 0.02 * torch.randn(parameter.shape)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product knows no float64
    return model.double().eval().requires_grad_(False)


def pool_with_start(tokens: int = 10) -> Pool:
    """The first samples of `make_pool`, with a common start before each."""
    pool = make_pool((5, 12, 3, 9))
    start = np.arange(20, 20 + tokens, dtype=np.int32)
    ids = [np.concatenate([start, pool.ids(i)]) for i in range(len(pool))]
    response = [np.concatenate([np.zeros(tokens, bool), pool.response(i)]) for i in range(len(pool))]
    return Pool(
        np.concatenate(ids), np.concatenate(response), pool.offsets + tokens * np.arange(len(pool) + 1)
    )


def plain_efforts(model: torch.nn.Module, pool: Pool, sites: list) -> np.ndarray:
    """The slow way: one sample, one backward pass through the model's own logits, the norm of what counts."""
    weights = scopes.counted(sites)
    parameters = {id(weight): weight for _, weight, _ in weights}.values()
    efforts = []
    for i in range(len(pool)):
        for parameter in parameters:
            parameter.requires_grad_(True).grad = None
        ids = torch.tensor(pool.ids(i), dtype=torch.int64)[None]
        labels = torch.where(torch.tensor(pool.response(i)), ids[0], -100)
        logits = model(input_ids=ids, use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100).backward()
        squares = [
            counts(weight.grad).square().sum() for _, weight, counts in weights if weight.grad is not None
        ]
        efforts.append(torch.stack(squares).sum().sqrt().item())
        for parameter in parameters:
            parameter.requires_grad_(False).grad = None
    return np.array(efforts)


def outcome(kind: str, scope: str) -> tuple[str, str]:
    """How a class fares in a scope: ("exact", the value projection or the weights left out), ("refused",
    why), or
    ("wrong", by how much) where one of: alone, padded, with a common start, with it computed once, is not the
    plain way's.
    """
    model = tiny_model(kind)
    try:
        scorer = Scorer(model, scope)
        errors = []
        for pool in (make_pool((5, 12, 3, 9)), pool_with_start()):
            plain = plain_efforts(model, pool, scorer.sites)
            for batch_tokens in (1, 1000):
                scores = scorer.scores(pool, np.arange(len(pool)), batch_tokens)["effort"]
                errors.append(np.abs(scores / plain - 1).max())
    except ValueError as error:
        return "refused", str(error)
    if not max(errors) < 1e-8:
        return "wrong", ", ".join(f"{error:.0e}" for error in errors)
    if scope == "last-value":
        return "exact", scorer.sites[0].name
    counted = {id(weight) for _, weight, _ in scopes.counted(scorer.sites)}
    blocks = anatomy.blocks(model)[-1:] if scope == "last-block" else anatomy.blocks(model)
    left_out = {
        name for block in blocks for name, weight in block.named_parameters()
        if weight.ndim > 1 and id(weight) not in counted and "bias" not in name
    }  # fmt: skip
    return "exact", ", ".join(sorted(left_out))
