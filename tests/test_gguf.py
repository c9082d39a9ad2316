"""Targets that come as one .gguf file are evaluated and compared as their own weights in a folder are."""

import csv
import json

import pytest

pytest.importorskip("gguf")
import gguf
import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM

import staff
from family import TEMPLATE, config_of, make_rows, make_tokenizer, write_pool
from staff.comparison.evaluate import evaluate, read_examples
from staff.comparison.grid import FULL, UNTOUCHED, read_comparison
from staff.comparison.run import compare
from staff.config import EvaluateConfig
from staff.models import load as models
from staff.runs import answers

SMALL = {"max_new_tokens": 6, "dtype": "float32"}
COMPARISON = {
    "methods": ["random", "direct"],
    "pruning_rates": [0.5],
    "seeds": [1],
    "select": {"num_regions": 4, "dtype": "float32"},
    "finetune": {"max_steps": 2, "learning_rate": 1e-2, "dtype": "float32"},
    "evaluate": SMALL,
}
TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(folder, path):
    """A Llama of tests/family.py as llama.cpp's converter writes it: halves of rotated pairs next to each
    other, float32."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    config, tokenizer = model.config, make_tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])]
    tokens[-1] = "QZ"  # a merge there must be, and no text has this one
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(tokens))])
    writer.add_token_merges(["Q Z"])
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        parts = name.removeprefix("model.").removesuffix(".weight").split(".", 2)
        if parts[0] == "layers":
            kind = TENSORS[parts[2]]
            if kind in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if kind == "attn_q" else config.num_key_value_heads
                values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            writer.add_tensor(f"blk.{parts[1]}.{kind}.weight", np.ascontiguousarray(values))
        elif name != "lm_head.weight":  # tied
            writer.add_tensor(
                {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[parts[0]], values
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    write_pool(folder / "pool.jsonl", 24)
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(28)[24:]))
    write_gguf(family / "target", folder / "target.gguf")
    return folder


def test_a_gguf_file_answers_as_its_weights_in_a_folder_do(family, folder, tmp_path, monkeypatch):
    unpacked = []
    unpack = models.unpack_gguf
    monkeypatch.setattr(models, "unpack_gguf", lambda *rest: unpacked.append(rest) or unpack(*rest))
    found = {}
    for name, model in (("gguf", folder / "target.gguf"), ("folder", family / "target")):
        output = tmp_path / f"{name}.jsonl"
        config = config_of(
            EvaluateConfig, data=(str(folder / "test.jsonl"),), model=str(model), output=str(output), **SMALL
        )
        found[name] = evaluate(config), read_examples(output)
        assert evaluate(config) == found[name][0]  # taken as it is
    assert len(unpacked) == 1
    assert found["gguf"][1]["prediction"] == found["folder"][1]["prediction"]
    assert found["gguf"][1]["loss"] == pytest.approx(found["folder"][1]["loss"], abs=1e-5)
    assert found["gguf"][0]["metrics"] == found["folder"][0]["metrics"]


def test_unpacking_is_a_stage_of_its_own_and_not_counted_as_tokenising(folder, tmp_path, monkeypatch):
    import time

    from staff.models import load

    unpack = load.unpack_gguf
    monkeypatch.setattr(load, "unpack_gguf", lambda *args: (time.sleep(0.3), unpack(*args))[1])
    settings = {"target": str(folder / "target.gguf"), "dtype": "float32", "method": "direct", "budget": 5}
    stages = staff.select(str(folder / "pool.jsonl"), output=tmp_path / "x", **settings).cost["stages"]
    assert stages["unpack the target"]["seconds"] >= 0.3
    assert stages["tokenise"]["seconds"] < 0.3


def test_a_killed_evaluation_of_a_gguf_file_does_not_unpack_it_again(folder, tmp_path, monkeypatch):
    config = config_of(
        EvaluateConfig,
        data=(str(folder / "test.jsonl"),),
        model=str(folder / "target.gguf"),
        output=str(tmp_path / "x.jsonl"),
        **SMALL,
    )

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(answers.Answerer, "answer", stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate(config)
    load, loaded = models.load_model, []
    monkeypatch.setattr(
        models,
        "load_model",
        lambda source, *rest, **more: loaded.append(source.gguf) or load(source, *rest, **more),
    )
    assert evaluate(config)["n"] == 4
    assert loaded == [None]


def test_a_gguf_target_goes_through_a_comparison_and_gives_the_figures_of_its_folder(
    family, folder, tmp_path, monkeypatch
):
    def rows_of(target, output):
        tasks = {"sums": {"train": str(folder / "pool.jsonl"), "test": str(folder / "test.jsonl")}}
        (tmp_path / "c.yaml").write_text(
            yaml.safe_dump({**COMPARISON, "target": str(target), "tasks": tasks}, sort_keys=False)
        )
        compare(read_comparison(tmp_path / "c.yaml", str(output)))
        with open(output / "results.csv") as table:
            return {row["method"]: row for row in csv.DictReader(table)}

    of_file, of_folder = (
        rows_of(folder / "target.gguf", tmp_path / "a"),
        rows_of(family / "target", tmp_path / "b"),
    )
    assert set(of_file) == {"random", "direct", FULL, UNTOUCHED}
    for method, row in of_file.items():
        assert float(row["loss"]) == pytest.approx(float(of_folder[method]["loss"]), abs=1e-3)
        assert {name: row[name] for name in ("m", "nearest")} == {
            name: of_folder[method][name] for name in ("m", "nearest")
        }
    assert of_file["direct"]["loss"] != of_file[UNTOUCHED]["loss"]
    (unpacked,) = (tmp_path / "a" / "models").iterdir()
    base = json.loads(
        (
            tmp_path / "a" / "cells" / "sums" / "direct-0.5" / "seed1" / "adapter" / "adapter_config.json"
        ).read_text()
    )
    assert base["base_model_name_or_path"] == str(unpacked)
    before = (tmp_path / "a" / "results.csv").read_text()
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("a model was loaded again"))
    rows_of(folder / "target.gguf", tmp_path / "a")
    assert (tmp_path / "a" / "results.csv").read_text() == before


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_one_message(family, tmp_path, share):
    write_gguf(family / "draft", tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[: int(share * len(whole))])
    source = models.resolve(str(tmp_path / "m.gguf"))
    with pytest.raises(
        ValueError, match=r"m.gguf can't be loaded: .*; if the file was cut off, download it again"
    ):
        models.load_model(source, torch.float32, torch.device("cpu"))
