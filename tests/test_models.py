"""Finding and loading: adapters with their bases, quantised folders, number types, and what a token costs."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from family import make_tokenizer
from staff.models import load as models
from staff.scoring import scopes
from staff.scoring.scorer import Scorer
from tiny import EXPERT_LAYOUTS, make_model, make_pool

POOL = make_pool()
CPU = torch.device("cpu")


@pytest.fixture
def adapter(tmp_path):
    """A folder with a base model and, beside it, a LoRA adapter that names it by a relative path."""
    base = make_model("llama", torch.float32)
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    save_adapter(base, tmp_path / "adapter", "../base")
    return tmp_path / "adapter"


def save_adapter(model, folder, base):
    wrapped = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(folder)
    change(folder / "adapter_config.json", base_model_name_or_path=base)
    return wrapped


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def efforts(model, scope="last-value", **options):
    return Scorer(model, scope, **options).scores(POOL, range(len(POOL)))["effort"]


def test_an_adapter_is_found_with_the_base_it_names_beside_it_or_below_the_working_directory(
    adapter, monkeypatch
):
    source = models.resolve(str(adapter))
    assert (source.folder.resolve(), source.adapter) == (adapter.parent / "base", adapter)
    change(adapter / "adapter_config.json", base_model_name_or_path="base")
    monkeypatch.chdir(adapter.parent)
    assert models.resolve("adapter").folder.resolve() == adapter.parent / "base"


def test_an_adapter_counts_among_the_files_and_its_tokenizer_goes_before_the_bases(adapter):
    files = models.resolve(str(adapter)).files()
    names = {path.name: path.parent.name for path in files}
    assert len(names) == len(files)
    assert names["adapter_model.safetensors"] == names["adapter_config.json"] == "adapter"
    assert names["model.safetensors"] == names["config.json"] == names["tokenizer.json"] == "base"
    make_tokenizer("{{ messages[0]['content'] }}").save_pretrained(adapter)
    source = models.resolve(str(adapter))
    assert {path.name: path.parent.name for path in source.files()}["tokenizer.json"] == "adapter"
    assert models.load_tokenizer(source).chat_template == "{{ messages[0]['content'] }}"


@pytest.mark.parametrize("scope", ["last-value", "linear"])
def test_a_merged_adapter_scores_as_one_kept_apart(adapter, scope):
    source = models.resolve(str(adapter))
    merged = models.load_model(source, torch.float32, CPU)
    apart = models.load_model(source, torch.float32, CPU, merge=False)
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    np.testing.assert_allclose(efforts(merged, scope), efforts(apart, scope), rtol=1e-4)
    bare = models.load_model(models.resolve(str(adapter.parent / "base")), torch.float32, CPU)
    assert np.abs(efforts(merged) / efforts(bare) - 1).max() > 0.01
    assert models.measure(merged) == models.measure(apart) == models.measure(bare)


@pytest.mark.parametrize(
    "targets", [["lm_head", "q_proj"], ["embed_tokens"], ["lm_head", "embed_tokens"], ["v_proj"]]
)
def test_an_adapter_on_one_of_a_tied_head_and_its_embeddings_leaves_the_other(tmp_path, targets):
    save = make_model("llama-tied", torch.float32, settle=1.0)
    save.save_pretrained(tmp_path / "base")
    wrapped = get_peft_model(save, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    wrapped.save_pretrained(tmp_path / "adapter")
    change(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="../base")
    merged = models.load_model(models.resolve(str(tmp_path / "adapter")), torch.float32, CPU)
    ids = torch.tensor([[5, 9, 3, 40]])
    torch.testing.assert_close(
        merged(input_ids=ids).logits, wrapped.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-5
    )
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == (targets == ["v_proj"])


def test_an_adapter_kept_apart_has_the_scope_lora(adapter):
    apart = models.load_model(models.resolve(str(adapter)), torch.float32, CPU, merge=False)
    assert efforts(apart, "lora").min() > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "type IA3; only LoRA adapters"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "../nowhere"}, "its base model, ../nowhere: there is no such folder"),
        ({"base_model_name_or_path": "../adapter"}, "is an adapter itself|names"),
    ],
)
def test_adapters_that_can_not_be_read_say_why(adapter, values, message):
    if values.get("base_model_name_or_path") == "../adapter":
        other = adapter.parent / "second"
        shutil.copytree(adapter, other)
        change(other / "adapter_config.json", **values)
        adapter = other
    else:
        change(adapter / "adapter_config.json", **values)
    with pytest.raises(ValueError, match=message):
        models.resolve(str(adapter))


def test_pickled_adapters_and_those_of_another_model_are_refused(adapter):
    other = make_model("qwen3", torch.float32)
    other.save_pretrained(adapter.parent / "other")
    change(adapter / "adapter_config.json", base_model_name_or_path="../other")
    save_adapter(make_model("gpt2", torch.float32), adapter, "../other")
    source = models.resolve(str(adapter))
    with pytest.raises(ValueError, match="can't be loaded"):
        models.load_model(source, torch.float32, CPU)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"no adapter_model.safetensors \(pickled"):
        models.resolve(str(adapter))


def test_a_folder_that_is_a_model_and_no_adapter_says_what_it_lacks(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        models.resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no \.safetensors weights"):
        models.resolve(str(tmp_path))


@pytest.fixture
def base(tmp_path):
    """A folder of a model, tied, in ten shards."""
    make_model("llama-tied", torch.float32).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    return tmp_path / "base"


def load_base(base, dtype=torch.float32):
    return models.load_model(models.resolve(str(base)), dtype, CPU)


def test_ties_are_not_missing_and_lost_shards_are_named(base):
    model = load_base(base)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    shards = sorted(base.glob("*.safetensors"))
    shards[2].unlink()
    with pytest.raises(
        ValueError, match=rf"names 1 of {len(shards)} shards that are not there \({shards[2].name}\)"
    ):
        models.resolve(str(base))


def test_a_model_without_a_head_or_with_weights_left_out_is_named(base, tmp_path):
    change(base / "config.json", tie_word_embeddings=False)
    with pytest.raises(
        ValueError, match=r"its files lack weights that LlamaForCausalLM has \(lm_head.weight\): they"
    ):
        load_base(base)
    make_model("gpt2", torch.float32).save_pretrained(tmp_path / "cut")
    weights = load_file(tmp_path / "cut" / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if ".1.attn" not in name}
    save_file(kept, tmp_path / "cut" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lack weights that GPT2LMHeadModel has \(.*h.1.attn.c_attn.bias and 3 more\)"
    ):
        load_base(tmp_path / "cut")


def test_weights_of_other_shapes_are_named(base):
    change(base / "config.json", vocab_size=120)
    with pytest.raises(
        ValueError, match=r"embed_tokens.weight is \(97, 32\) in the files and \(120, 32\) by config"
    ):
        load_base(base)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_weights_that_are_no_numbers_are_named(tmp_path, value):
    model = make_model("llama", torch.float32)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"layers.1.mlp.up_proj.weight holds nan or infinity: it overflows in float16, try --dtype",
    ):
        load_base(tmp_path, torch.float16)
    if np.isfinite(value):
        load_base(tmp_path, torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "model.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "pointer of Git LFS",
        ),
        (
            "tokenizer.json",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "pointer of Git LFS",
        ),
        ("model.safetensors", 0.5, r"is cut off, at \d+ bytes of \d+: download it again"),
        ("model.safetensors", 0.001, r"is cut off or damaged \(\d+ bytes\): download it again"),
        ("model.safetensors", b"", r"is cut off or damaged \(0 bytes\)"),
        ("x.gguf", b"<html>not found", "is no .gguf file"),
        ("x.gguf", b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
    ],
)
def test_files_that_are_not_whole_are_named_with_a_cure(tmp_path, name, content, said):
    make_model("llama", torch.float32).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / name
    path.write_bytes(
        path.read_bytes()[: int(content * path.stat().st_size)] if type(content) is float else content
    )
    with pytest.raises(ValueError, match=rf"--target .*: .*{name} {said}|{name} is a {said}"):
        models.resolve(str(path if path.suffix == ".gguf" else tmp_path))


@pytest.fixture
def no_libraries(monkeypatch):
    monkeypatch.setattr("staff.models.files.find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("method", "package"), [("gptq", "gptqmodel"), ("awq", "gptqmodel"), ("bitsandbytes", "bitsandbytes")]
)
def test_a_quantised_folder_names_the_library_it_needs(adapter, no_libraries, method, package):
    base = adapter.parent / "base"
    change(base / "config.json", quantization_config={"quant_method": method})
    source = models.resolve(str(base))
    with pytest.raises(
        ValueError, match=f"is quantised .{method}., which needs the {package} package: pip install {package}"
    ):
        models.check_model(source, "last-value")
    with pytest.raises(ValueError, match=f"is quantised already .{method}.: leave --load-in 4bit away"):
        models.load_model(source, torch.float32, CPU, load_in="4bit")


def test_quantising_on_load_names_the_library_it_needs(adapter, no_libraries):
    source = models.resolve(str(adapter.parent / "base"))
    with pytest.raises(
        ValueError, match="--load-in 8bit needs the bitsandbytes package: pip install bitsandbytes"
    ):
        models.load_model(source, torch.float32, CPU, load_in="8bit")
    with pytest.raises(ValueError, match="8bit or 4bit; found '3bit'"):
        models.check_model(source, "last-value", "3bit")


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_a_quantised_model_has_every_scope_and_nearly_the_scores(tmp_path, load_in):
    pytest.importorskip("bitsandbytes")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    whole = LlamaForCausalLM(config)
    whole.save_pretrained(tmp_path / "base")
    save_adapter(LlamaForCausalLM(config), tmp_path / "adapter", "../base")
    quantised = models.load_model(models.resolve(str(tmp_path / "base")), torch.float32, CPU, load_in=load_in)
    assert models.measure(quantised) == models.measure(whole)
    for scope in ("last-value", "last-block", "linear", "released"):
        np.testing.assert_allclose(efforts(quantised, scope), efforts(whole, scope), rtol=0.2)
    with_adapter = models.load_model(
        models.resolve(str(tmp_path / "adapter")), torch.float32, CPU, load_in=load_in
    )
    assert efforts(with_adapter, "lora").min() > 0
    quantised.save_pretrained(tmp_path / "quantised")
    again = models.load_model(models.resolve(str(tmp_path / "quantised")), torch.float32, CPU)
    np.testing.assert_allclose(efforts(again), efforts(quantised), rtol=1e-5)


@pytest.mark.parametrize("layout", ["llama-tied", "gemma2-capped", "gpt2", "qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_number_type_loads_and_scores_alike(tmp_path, layout, dtype):
    made = make_model(layout, torch.float32, settle=1.0)
    made.config.pad_token_id = None
    made.save_pretrained(tmp_path)
    model = models.load_model(models.resolve(str(tmp_path)), getattr(torch, dtype), CPU)
    expected = efforts(made)
    close = {"bfloat16": 0.1, "float16": 0.02, "float32": 1e-3}[dtype]
    assert np.median(np.abs(efforts(model) / expected - 1)) < close


@pytest.mark.parametrize(("residual", "logits", "scale_that_fails"), [(1e5, 1, 1.0), (0.01, 3e3, 256.0)])
def test_gradients_neither_vanish_nor_overflow_in_float16(residual, logits, scale_that_fails):
    """A large residual stream makes gradients small, large output weights make them large."""
    model, pool = make_model("llama", torch.float32, settle=1.0), make_pool((400, 30, 90))
    model.model.embed_tokens.weight.data *= residual
    model.lm_head.weight.data *= logits
    expected = Scorer(model).scores(pool, range(3))["effort"]
    scorer = Scorer(model.to(torch.float16))
    np.testing.assert_allclose(scorer.scores(pool, range(3))["effort"], expected, rtol=5e-3)
    unscaled = [scorer._of_batch(pool, [i], scale_that_fails, None)["effort"].item() for i in range(3)]
    assert not np.allclose(unscaled, expected, rtol=0.05)


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_every_scope_of_a_model_with_experts_is_told_from_the_configuration_alone(tmp_path, layout):
    model = make_model(layout, torch.float32)
    model.config.save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    source = models.resolve(str(tmp_path))
    for scope in ("last-value", "released", "last-block", "linear"):
        models.check_model(source, scope)


def test_a_token_costs_the_experts_it_meets():
    size = models.measure(make_model("mixtral"))
    attention, expert, router = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 48, 32 * 4
    assert size == models.Size(
        2 * (attention + 2 * expert + router), attention + 2 * expert + router, 97 * 32
    )


def test_a_loaded_model_is_frozen_and_in_eval_mode(adapter):
    model = models.load_model(models.resolve(str(adapter)), torch.float32, CPU)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert isinstance(scopes.value_projection(model).module, torch.nn.Linear)
    assert type(model) is type(AutoModelForCausalLM.from_config(model.config))
