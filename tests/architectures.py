# ruff: noqa: RUF024, T201
"""Every class of transformers' causal mapping against plain backward passes, in float64: docs/models.md is what came out.

A tiny configuration for each by rule; what a rule can't know stands in EXCEPTIONS.
"""

import collections
import contextlib
import multiprocessing
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from staff.data.tokens import Pool
from staff.models import anatomy, attention
from staff.models.adapters import add_lora
from staff.scoring import scopes
from staff.scoring.gradnorm import Site
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
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "moe_topk"], 2),
    "index_n_heads": 32,  # of few, all may be below 0 for a key: scores tie, and which keys are taken hangs on padding
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
    "logit_scale": 0.5, "logits_scaling": 3.0, "lm_head_multiplier": 0.5, "final_logit_softcapping": 1.5, "logits_soft_cap": 1.5,
    "output_logit_soft_cap": 1.5, "decoder_layerdrop": 0.0, "type_vocab_size": 2, "max_window_layers": 1, "conv_L_cache": 3, "d_kv": 8,
}  # fmt: skip
EVEN_IF_NONE = ("head_dim", "num_key_value_heads", "n_routed_experts", "moe_intermediate_size", "n_shared_experts", "n_group",
                "topk_group")  # fmt: skip
LATENT = {"num_key_value_heads": 4, "qk_head_dim": 12}  # attention by a latent has as many keys as queries
EXCEPTIONS: dict[str, dict[str, Any]] = {
    **{
        kind: {"num_hidden_layers": 4}  # every fourth has softmax attention
        for kind in ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
    },
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    **dict.fromkeys(["gptj", "codegen"], {"rotary_dim": 4}),
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "zaya": {"num_experts_per_tok": 1},
    "blt": {"encoder_hash_byte_group_vocab": 50, "encoder_config": {"hidden_size_global": 32},
            "decoder_config": {"hidden_size_global": 32}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    **dict.fromkeys(["dots1", "deepseek_v2"], {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}),
    "roc_bert": {"is_decoder": True, "shape_vocab_size": 50, "pronunciation_vocab_size": 50, "shape_embed_dim": 16,
                 "pronunciation_embed_dim": 16},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_mem_blocks": 1, "num_hidden_layers": 4, "mamba_ngroups": 1,
               "n_mamba_heads": 8, "mamba_headdim": 8, "attention_head_dim": 16, "attention_hidden_size": 64},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2, "n_mamba_heads": 1,
              "mamba_dt_rank": 4, "attention_hidden_size": 64, "attention_head_dim": 16},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}, "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4,
             "moe_top_k": 2, "hidden_size": 32}},
    "qwen4_exp_text": {"num_hidden_layers": 4, "indexer_n_heads": 32, "indexer_kv_heads": 1, "indexer_head_dim": 8,
                       "indexer_budget": 4, "indexer_compress_ratio": 2, "ngram_vocab_size_base": 100,
                       "hc_lowrank": 8, "split_ngram_parts": 1, "make_ngram_vocab_size_divisible_by": 1},
    "rembert": {"is_decoder": True, "output_embedding_size": 32},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "xlstm": {"chunk_size": 1, "autocast_kernel_dtype": "float32"},
    "longcat_flash": {"head_dim": 4},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local", "local"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    **dict.fromkeys(
        ["bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "roberta",
         "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl", "bert-generation"],
        {"is_decoder": True},
    ),
}  # fmt: skip


def names() -> list[str]:
    """A model type for each class of the causal mapping; of several the last, which reads text alone."""
    return list({name: kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}.values())


def tiny_config(kind: str) -> Any:
    """A configuration of three blocks, by rule; in the parts of a composite one too."""
    config_class = model_class(kind).config_class or CONFIG_MAPPING[kind]
    if not issubclass(CONFIG_MAPPING[kind], config_class):
        return _tiny(config_class, EXCEPTIONS.get(kind, {}))  # of a composite one the class takes a part
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
    return config_class(
        **settings
        | {name: value for name, value in exceptions.items() if name not in config_class.sub_configs}
    )


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


def plain_efforts(
    model: torch.nn.Module, pool: Pool, sites_of: dict[str, list[Site]]
) -> dict[str, np.ndarray]:
    """The slow way: one sample, one backward pass through the model's own logits, the norm of what counts."""
    weights_of = {scope: scopes.counted(sites) for scope, sites in sites_of.items()}
    parameters = {id(weight): weight for weights in weights_of.values() for _, weight, _ in weights}.values()
    for parameter in parameters:
        parameter.requires_grad_(True)
    efforts: dict[str, list[float]] = {scope: [] for scope in sites_of}
    for i in range(len(pool)):
        for parameter in parameters:
            parameter.grad = None
        ids = torch.tensor(pool.ids(i), dtype=torch.int64)[None]
        labels = torch.where(torch.tensor(pool.response(i)), ids[0], -100)
        logits = model(input_ids=ids, use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100).backward()
        for scope, weights in weights_of.items():
            squares = [
                part(weight.grad).square().sum() for _, weight, part in weights if weight.grad is not None
            ]
            efforts[scope].append(torch.stack(squares).sum().sqrt().item())
    for parameter in parameters:
        parameter.requires_grad_(False).grad = None
    return {scope: np.array(values) for scope, values in efforts.items()}


@contextlib.contextmanager
def all_in_float64() -> Iterator[None]:
    """Softmax, norms and routers go to float32 whatever the model's type; the oracle needs them in float64."""
    before = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@dataclass(frozen=True)
class Outcome:
    """How a class fares in a scope.

    Attributes:
        word: "exact", "one by one" (exact, a batch holds one sample), "refused", "fails", or "WRONG" where one of:
            alone, padded, with a common start, with it computed once, is not the plain way's.
        remarks: what to say besides: the value projection, weights that do not count, the message.
    """

    word: str
    remarks: tuple[str, ...] = ()


SCOPES = ("last-value", "last-block", "linear", "lora", "released")


def outcomes(kind: str, wanted: Sequence[str] = SCOPES) -> dict[str, Outcome]:
    """How a class fares in each scope, and "packed": do samples behind one another come out as they do alone?"""
    found: dict[str, Outcome] = {}
    with all_in_float64():
        try:
            model = tiny_model(kind)
        except Exception as error:
            return dict.fromkeys([*wanted, "packed"], Outcome("fails", (said(error),)))
        scorers: dict[str, Scorer] = {}
        errors: dict[str, list[float]] = {}
        for scope in wanted:
            with _told(found, scope):
                scorers[scope] = Scorer(with_lora(kind) if scope == "lora" else model, scope)
                errors[scope] = []
        for pool in (make_pool((5, 12, 3, 9)), pool_with_start()):
            plain: dict[str, np.ndarray] = {}
            for of_lora in (False, True):  # one backward pass for all scopes of a model
                group = {scope: scorer for scope, scorer in scorers.items() if (scope == "lora") == of_lora}
                if group:
                    plain |= plain_efforts(
                        next(iter(group.values())).model,
                        pool,
                        {scope: scorer.sites for scope, scorer in group.items()},
                    )
            for scope, scorer in scorers.items():
                with _told(found, scope):
                    for batch_tokens in (1, 1000):
                        effort = scorer.scores(pool, np.arange(len(pool)), batch_tokens)["effort"]
                        errors[scope].append(float(np.abs(effort / plain[scope] - 1).max()))
        for scope, scorer in scorers.items():
            if scope not in found:
                found[scope] = _measured(scorer, scope, errors[scope])
        with _told(found, "packed"):
            found["packed"] = _packed(model)
    return {scope: found[scope] for scope in (*wanted, "packed")}


@contextlib.contextmanager
def _told(found: dict[str, Outcome], scope: str) -> Iterator[None]:
    """An error within the block is the outcome."""
    try:
        yield
    except ValueError as error:
        found[scope] = Outcome("refused", (said(error),))
    except Exception as error:
        found[scope] = Outcome("fails", (said(error),))


def said(error: Exception) -> str:
    """An error in one line, for a table."""
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())}"[:240].replace("|", "/")


def _measured(scorer: Scorer, scope: str, errors: list[float]) -> Outcome:
    if not max(errors) < 1e-8:
        return Outcome("WRONG", (f"by {max(errors):.0e} in {scope}",))
    by_one = sorted({_short(site.name) for site in scorer.sites if site.parameter})
    remarks = (
        [f"one sample at a time in {scope} for {', '.join(by_one[:3])}" + (" and more" if by_one[3:] else "")]
        if by_one
        else []
    )
    if scope == "last-value":
        (site,) = scorer.sites
        last = len(anatomy.blocks(scorer.model)) - 1
        block = int(site.name.split(".")[1])
        rows = "" if site.rows is None else f", {len(site.rows)} rows of it"
        remarks.append(
            f"values: {_short(site.name)}{rows}"
            + (f" of block {block} of 0 to {last}" if block < last else "")
        )
    elif scope == "linear":
        counted = {id(weight) for _, weight, _ in scopes.counted(scorer.sites)}
        left_out = {
            _short(f"blocks.0.{name}") for block in anatomy.blocks(scorer.model) for name, weight in block.named_parameters()
            if weight.ndim > 1 and id(weight) not in counted and "bias" not in name
        }  # fmt: skip
        if left_out:
            remarks.append(f"not counted: {', '.join(sorted(left_out))}")
    return Outcome("one by one" if by_one else "exact", tuple(remarks))


def _short(name: str) -> str:
    """Without the block, and without which expert of a list."""
    return re.sub(
        r"^(model\.)?(blocks|layers)\.\d+\.",
        "",
        re.sub(r"\.\d+(?=\.)", "", name) if "experts" in name else name,
    )


def _packed(model: torch.nn.Module) -> Outcome:
    pool = make_pool((5, 12, 3, 9))
    samples = [pool.ids(i) for i in range(len(pool))]
    if not attention.can_pack(model, [samples[2], samples[0]], 12):
        return Outcome("padded")
    with torch.no_grad(), attention.short_samples([len(sample) for sample in samples]):
        together = anatomy.final_states(model, **attention.packed(samples), use_cache=False)[0]
    with torch.no_grad():
        alone = [
            anatomy.final_states(
                model, input_ids=torch.tensor(np.array(sample), dtype=torch.int64)[None], use_cache=False
            )[0]
            for sample in samples
        ]
    off = float((together - torch.cat(alone)).abs().max() / together.abs().max())
    return Outcome("packed") if off < 1e-8 else Outcome("WRONG", (f"by {off:.0e} packed",))


def with_lora(kind: str) -> torch.nn.Module:
    """With an adapter as `staff` makes it, its matrices B away from 0."""
    model = tiny_model(kind)
    scopes.head_of(model)  # as before any fine-tuning
    model = add_lora(model, 3, 6, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


TABLE = Path(__file__).parents[1] / "docs" / "models.md"
MARK = "<!-- written by python tests/architectures.py -->"


def row_of(kind: str, found: dict[str, Outcome]) -> str:
    """The line of a class in the table."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    remarks = dict.fromkeys(
        remark.replace(name, "it")
        for scope in (*SCOPES, "packed")
        if scope in found
        for remark in found[scope].remarks
    )
    words = [found[scope].word for scope in (*SCOPES, "packed")]
    return f"| {name} | {' | '.join(words)} | {'; '.join(remarks)} |"


def rows_of_table() -> dict[str, str]:
    """The lines of docs/models.md by class."""
    lines = TABLE.read_text().partition(MARK)[2].splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}
    return {name: line for name, line in rows.items() if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}


def write_table(rows: dict[str, str]) -> None:
    """All below the mark: the counts, then the rows."""
    words = {name: [word.strip() for word in row.split("|")[2:8]] for name, row in rows.items()}
    heads = [*SCOPES, "packed"]
    counts = [collections.Counter(row[place] for row in words.values()) for place in range(len(heads))]
    order = ["exact", "one by one", "refused", "fails", "WRONG", "packed", "padded"]
    lines = [
        f"{len(rows)} classes of transformers {transformers.__version__}, with peft {peft.__version__} and torch "
        f"{torch.__version__.partition('+')[0]}.",
        "",
        f"| | {' | '.join(heads)} |",
        f"| --- |{' ---: |' * len(heads)}",
        *[f"| {word} | {' | '.join(str(count[word] or '') for count in counts)} |" for word in order],
        "",
        f"| class | {' | '.join(heads)} | remarks |",
        f"| ---{' | ---' * (len(heads) + 1)} |",
        *[rows[name] for name in sorted(rows, key=str.lower)],
    ]
    TABLE.write_text(TABLE.read_text().partition(MARK)[0] + MARK + "\n\n" + "\n".join(lines) + "\n")


def timed(kind: str, seconds: int = 300) -> tuple[str, str, float]:
    """A class's name, its line of the table, and the seconds it took; "fails" after too many."""

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"takes more than {seconds} s")

    torch.set_num_threads(1)
    started = time.monotonic()
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        found = outcomes(kind)
    except Exception as error:
        found = dict.fromkeys([*SCOPES, "packed"], Outcome("fails", (said(error),)))
    finally:
        signal.alarm(0)
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind], row_of(kind, found), time.monotonic() - started


if __name__ == "__main__":  # python tests/architectures.py [MODEL TYPE ...]
    began, took = time.monotonic(), 0.0
    rows = rows_of_table() if sys.argv[1:] else {}
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=8) as workers:
        for name, row, seconds in workers.imap_unordered(timed, sys.argv[1:] or names()):
            rows[name] = row
            took += seconds
            print(f"{seconds:5.1f} s  {row}", flush=True)
    write_table(rows)
    print(f"{took:.0f} s of work in {time.monotonic() - began:.0f} s")
