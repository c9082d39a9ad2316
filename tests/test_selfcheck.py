"""What is wrong with a model or with our pass through it stops the run by name; rounding never does."""

import logging
import types

import pytest
import torch

import staff
from family import write_pool
from staff.scoring import gradnorm, selfcheck
from staff.scoring.scorer import Scorer
from test_gradnorm import with_lora
from tiny import CHECKED, make_model, make_pool

POOL = make_pool()


@pytest.mark.parametrize("layout", CHECKED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_far_from_what_is_tolerated(layout, dtype):
    scope = "last-block" if dtype in (torch.float32, torch.bfloat16) else "last-value"
    scorer = Scorer(make_model(layout, dtype, settle=2.0), scope)
    told = selfcheck.check(scorer, POOL)
    assert told["differences"].keys() == selfcheck.CURES.keys()
    assert told["positions"] == [2, 0]  # the shortest, and the next longer
    assert all(value < told["tolerance"] / 4 for value in told["differences"].values())


@pytest.mark.parametrize(
    ("layout", "scope"), [("gpt2", "released"), ("phi3", "released"), ("qwen3-moe", "linear")]
)
@pytest.mark.parametrize("loss", ["sum", "sqrt"])
def test_sketches_experts_and_other_losses_are_checked_alike(layout, scope, loss):
    scorer = Scorer(make_model(layout, torch.float32), scope, loss=loss)
    assert max(selfcheck.check(scorer, POOL)["differences"].values()) < 1e-4


def test_an_adapter_is_checked_in_its_own_scope_and_the_model_left_frozen():
    model = with_lora(make_model("llama"))
    assert max(selfcheck.check(Scorer(model, "lora"), POOL)["differences"].values()) < 1e-6
    assert not any(
        p.requires_grad or p.grad is not None or p._post_accumulate_grad_hooks for p in model.parameters()
    )


def normalised_over_the_batch(model):
    layer = model.model.layers[1].mlp
    plain = layer.forward
    layer.forward = lambda states: plain(states) / states.square().mean()


def rows_of_the_batch_mixed(model):
    plain = model.model.norm.forward
    model.model.norm.forward = lambda states: plain(states + 0.3 * states.mean(0, keepdim=True))


def dropout(model):
    plain = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *a, **k: torch.nn.functional.dropout(plain(*a, **k), 0.1)


def padding_seen(model):
    """Attention by a mask that hides what comes after, but not once there is padding behind."""
    attention = model.model.layers[0].self_attn
    plain = attention.forward

    def forward(hidden_states, **given):
        if len(hidden_states) > 1:
            given["attention_mask"] = torch.ones(1, 1, *2 * hidden_states.shape[1:2], dtype=torch.bool)
        return plain(hidden_states=hidden_states, **given)

    attention.forward = forward


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (dropout, r"loss twice is off by .*random inside"),
        (normalised_over_the_batch, r"together is off by .*--batch-tokens 1"),
        (rows_of_the_batch_mixed, r"together is off by .*--batch-tokens 1"),
        (padding_seen, r"together is off by .*--batch-tokens 1"),
    ],
)
def test_a_model_that_is_not_what_it_is_taken_for_is_named(spoil, said):
    model = make_model("llama", torch.float32)
    scorer = Scorer(model)  # before it is spoilt: some of it is seen by the probes already
    spoil(model)
    with pytest.raises(ValueError, match=f"LlamaForCausalLM failed the self-check, .*{said}"):
        selfcheck.check(scorer, POOL)
    if "batch-tokens" in said and spoil is not normalised_over_the_batch:
        selfcheck.check(scorer, POOL, batch_tokens=1)  # as the message says


def test_wrong_hooks_and_wrong_weights_are_named(monkeypatch):
    scorer = Scorer(make_model("llama", torch.float32))
    with monkeypatch.context() as patch:
        patch.setattr(
            gradnorm,
            "_kept",
            lambda given, out, *rest: gradnorm._Call(given * 2, out.requires_grad_(), *rest),
        )
        with pytest.raises(ValueError, match=r"effort alone is off by 1, .*try another --scope"):
            selfcheck.check(scorer, POOL)
    monkeypatch.setattr(scorer, "head", gradnorm.Head(scorer.head.module, 1.2))
    with pytest.raises(ValueError, match=r"loss alone is off by .*can't be scored"):
        selfcheck.check(scorer, POOL)


def test_packed_weights_are_checked_by_a_matrix_beside_them_and_reported(caplog):
    model = make_model("llama", torch.float32)
    model.config.quantization_config = {"quant_method": "ours"}
    scorer = Scorer(model)
    module = scorer.sites[0].module
    weight = module.weight.data
    module.weight = torch.nn.Parameter((weight * 1000).round().to(torch.int16), requires_grad=False)
    module.forward = types.MethodType(lambda self, x: x @ (self.weight.float() / 1000).mT, module)
    assert max(selfcheck.check(scorer, POOL)["differences"].values()) < 1e-4
    rows_of_the_batch_mixed(model)
    with caplog.at_level(logging.WARNING):
        told = selfcheck.check(scorer, POOL)
    assert told["differences"]["loss together"] > told["tolerance"]
    assert "Its weights are quantised, so the run goes on" in caplog.text


def test_a_pool_of_one_sample_or_of_one_length_will_do():
    scorer = Scorer(make_model("llama", torch.float32))
    assert selfcheck.check(scorer, make_pool((9,)))["differences"].keys() == {
        "loss twice",
        "loss alone",
        "effort alone",
    }
    assert selfcheck.check(scorer, make_pool((9, 9)))["tokens"] == [9, 9]


def test_no_memory_for_it_is_said_and_no_stop(monkeypatch, caplog):
    def full(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(selfcheck, "_plain", full)
    assert selfcheck.check(Scorer(make_model("llama")), POOL) == {"skipped": "out of memory"}
    assert "no memory for the self-check of LlamaForCausalLM" in caplog.text


def test_the_manifest_has_it_and_a_finished_run_does_not_do_it_again(family, tmp_path, monkeypatch):
    data = write_pool(tmp_path / "pool.jsonl", 30)
    settings = {"target": str(family / "target"), "draft": str(family / "draft"), "dtype": "float32"}
    given = {**settings, "num_regions": 4, "verification_budget": 2, "pruning_rate": 0.5, "method": "staff"}
    run = staff.select(str(data), output=tmp_path / "x", **given)
    told = run.manifest["self_check"]
    assert told.keys() == {"draft", "target"}
    assert all(max(of["differences"].values()) < 1e-4 for of in told.values())
    monkeypatch.setattr(selfcheck, "check", None)
    assert staff.select(str(data), output=tmp_path / "x", **given).manifest["self_check"] == told
    (tmp_path / "x" / "manifest.json").unlink()  # cut off at the very end: no model is loaded
    assert staff.select(str(data), output=tmp_path / "x", **given).manifest["self_check"] == told
