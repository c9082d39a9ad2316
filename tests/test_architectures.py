"""Structurally different architectures of transformers against one backward pass a sample, in float64."""

import numpy as np
import pytest
import torch
import transformers

from architectures import outcome, tiny_model
from staff.scoring import scopes
from staff.scoring.scorer import Scorer
from tiny import VOCABULARY, make_model

# what is found in "last-value": the value projection
KINDS = {
    "deepseek_v3": "blocks.2.self_attn.kv_b_proj",
    "glm4_moe": "blocks.2.self_attn.v_proj",
    "gpt_oss": "blocks.2.self_attn.v_proj",
    "granitemoehybrid": "blocks.1.self_attn.v_proj",
    "minimax": "blocks.2.self_attn.v_proj",
    "openai-gpt": "blocks.2.attn.c_attn",
    "phimoe": "blocks.2.self_attn.v_proj",
    "qwen3_5_text": "blocks.3.self_attn.v_proj",
    "qwen3_5_moe_text": "blocks.3.self_attn.v_proj",
}


@pytest.fixture(autouse=True)
def _all_of_it_in_float64(monkeypatch):
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize("kind", KINDS)
def test_an_architecture_is_exact_alone_padded_and_with_a_common_start(kind):
    assert outcome(kind, "last-value") == ("exact", KINDS[kind])
    assert outcome(kind, "last-block")[0] == "exact"


def test_blocks_that_hand_out_several_streams_have_their_values_found():
    assert scopes.value_projection(tiny_model("deepseek_v4")).name.startswith("blocks.2.self_attn.")


def test_a_model_that_sees_later_tokens_is_refused():
    config = transformers.BertGenerationConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    with pytest.raises(ValueError, match="BertGenerationDecoder lets a token see those after it"):
        Scorer(transformers.BertGenerationDecoder(config).double())


def test_a_model_that_overflows_is_told_of_in_our_words():
    model = make_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data.fill_(np.inf)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM overflows in .*: try --dtype float32"):
        Scorer(model)
