"""Architectures of transformers against one backward pass a sample, in float64: a dozen that differ in structure, and in the
soak all of them against the table in docs/models.md."""

import os

import numpy as np
import pytest
import transformers

from architectures import all_in_float64, names, outcomes, rows_of_table, timed, tiny_model
from staff.scoring import scopes
from staff.scoring.scorer import Scorer
from tiny import VOCABULARY, make_model

SOAK = os.environ.get("STAFF_SOAK") == "1"
# what is found in "last-value": the value projection
KINDS = {
    "deepseek_v3": "values: self_attn.kv_b_proj, 32 rows of it",
    "deepseek_v4": "values: self_attn.kv_proj",
    "glm4_moe": "values: self_attn.v_proj",
    "gpt_oss": "values: self_attn.v_proj",
    "granitemoehybrid": "values: self_attn.v_proj of block 1 of 0 to 2",
    "llama4_text": "values: self_attn.v_proj",
    "minimax": "values: self_attn.v_proj",
    "modernbert-decoder": "values: attn.v_proj",
    "openai-gpt": "values: attn.c_attn, 32 rows of it",
    "phimoe": "values: self_attn.v_proj",
    "qwen3_5_moe_text": "values: self_attn.v_proj",
    "recurrent_gemma": "values: temporal_block.v_proj",
}
BY_ONE = ("deepseek_v4", "llama4_text")


@pytest.mark.parametrize("kind", KINDS)
def test_an_architecture_is_exact_alone_padded_and_with_a_common_start(kind):
    found = outcomes(kind, ("last-value", "last-block"))
    assert found["last-value"].word == "exact"
    assert found["last-value"].remarks == (KINDS[kind],)
    assert found["last-block"].word == ("one by one" if kind in BY_ONE else "exact")
    assert found["packed"].word in ("packed", "padded")


@pytest.mark.skipif(not SOAK, reason="all classes: make soak PART=models")
@pytest.mark.parametrize("kind", names() if SOAK else [])
def test_every_class_fares_as_the_table_says(kind):
    name, row, _ = timed(kind)
    assert "WRONG" not in row
    assert row == rows_of_table().get(name), "python tests/architectures.py writes docs/models.md anew"


@pytest.mark.skipif(not SOAK, reason="all classes: make soak PART=models")
def test_the_table_holds_no_other_class():
    known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert rows_of_table().keys() == {known[kind] for kind in names()}


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


def test_a_model_that_takes_more_than_text_is_refused():
    with (
        all_in_float64(),
        pytest.raises(ValueError, match="MusicgenForCausalLM does not run on a few tokens of text alone"),
    ):
        Scorer(tiny_model("musicgen"))


def test_what_is_done_to_logits_must_be_known():
    model = make_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, logits: logits * 1.01)
    with pytest.raises(ValueError, match="LlamaForCausalLM makes its logits in a way that is not known here"):
        scopes.head_of(model)


def test_a_model_that_overflows_is_told_of_in_our_words():
    model = make_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data.fill_(np.inf)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM overflows in .*: try --dtype float32"):
        Scorer(model)
