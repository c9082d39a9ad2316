"""Tokens and positions that a model does not have are named before any work."""

import logging

import pytest
import torch
import transformers

from architectures import tiny_model
from family import config_of, make_tokenizer, write_pool
from staff import jobs, pipeline
from staff.comparison.evaluate import evaluate
from staff.config import EvaluateConfig, FinetuneConfig, ScoreConfig, SelectConfig
from staff.models import anatomy
from tiny import make_model

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ENDS = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("room")
    made = {
        "table": transformers.GPT2Config(
            vocab_size=259, n_embd=16, n_layer=2, n_head=4, n_positions=64, **ENDS
        ),
        "rotary": transformers.LlamaConfig(vocab_size=259, max_position_embeddings=64, **SHAPE, **ENDS),
        "few": transformers.LlamaConfig(vocab_size=100, **SHAPE, **ENDS),
    }
    for name, config in made.items():
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pool(tmp_path_factory.mktemp("data") / "pool.jsonl", 20)


TOKENS = r"few: row 0 of the data has token \d+, and the model knows 100 tokens: give it its own tokenizer"
POSITIONS = r"table: row \d+ of the data has \d+ tokens.* and the model has positions for 64: --max-length 64"


@pytest.mark.parametrize(("model", "said"), [("few", TOKENS), ("table", POSITIONS)])
@pytest.mark.parametrize("command", ["score", "finetune", "evaluate", "select"])
def test_no_command_begins_what_the_model_has_no_room_for(
    models, data, tmp_path, model, said, command, monkeypatch
):
    monkeypatch.setattr("staff.models.load.load_model", None)  # before any weight is read
    given = {"data": (str(data),), "model": str(models / model), "output": str(tmp_path / "x.parquet")}
    commands = {
        "score": (jobs.score, ScoreConfig),
        "finetune": (jobs.finetune, FinetuneConfig),
        "evaluate": (evaluate, EvaluateConfig),
        "select": (pipeline.select, SelectConfig),
    }
    if command == "select":
        given |= {"target": given.pop("model"), "draft": "self:1", "pruning_rate": 0.5}
    run, kind = commands[command]
    with pytest.raises(ValueError, match=said):
        run(config_of(kind, **given))


def test_beyond_rotary_positions_is_a_warning(models, data, tmp_path, caplog):
    output = str(tmp_path / "x.parquet")
    settings = {"data": (str(data),), "model": str(models / "rotary"), "output": output, "dtype": "float32"}
    with caplog.at_level(logging.WARNING):
        jobs.score(config_of(ScoreConfig, **settings))
    said = "has 91 tokens and the model has positions for 64; what it makes of later ones is a guess: --max-length 64"
    assert f"rotary: row 19 of the data {said}" in caplog.text
    caplog.clear()
    jobs.score(config_of(ScoreConfig, **settings, max_length=64))
    assert "positions" not in caplog.text


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gptj", "mpt", "openai-gpt", "biogpt"])
def test_a_table_of_positions_is_found_where_there_is_one(kind):
    model = tiny_model(kind).float()
    limit, is_table = anatomy.positions(model)
    ids = torch.full((1, limit), 5)
    model(input_ids=ids, use_cache=False)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 5), use_cache=False)
    assert is_table


@pytest.mark.parametrize(
    ("layout", "rope", "expected"),
    [
        ("llama", {}, (128, False)),
        ("bloom", None, (None, False)),
        (
            "qwen2",
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
            (512, False),
        ),
        ("llama", {"rope_type": "dynamic", "factor": 2.0}, (None, False)),
    ],
)
def test_rotary_positions_reach_as_far_as_they_are_stretched(layout, rope, expected):
    model = make_model(layout, torch.float32)
    if rope:
        model.config.rope_parameters = rope
    assert anatomy.positions(model) == expected
