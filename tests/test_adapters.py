"""LoRA layers run as one step of the graph: the same numbers as peft's own, and only where that holds."""

import pytest
import torch

from architectures import tiny_model
from staff.models.adapters import add_lora, joined_products
from tiny import make_model

IDS = torch.tensor([[5, 9, 3, 40, 7, 7], [8, 2, 60, 11, 4, 90]])


def with_adapter(layout, dtype=torch.float64):
    model = add_lora(make_model(layout, dtype), 3, 8, seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator).to(p.dtype) * 0.3
    return model


def run(model, autocast=False):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=IDS).logits
    torch.linalg.vector_norm(logits.float() if autocast else logits).backward()
    return logits.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("layout", ["llama", "qwen2", "gemma3", "phi3", "gpt-neox", "gpt2"])
def test_joined_products_give_pefts_own_numbers_and_gradients(layout):
    model = with_adapter(layout)
    logits, grads = run(model)
    with joined_products(model):
        ours, our_grads = run(model)
    torch.testing.assert_close(ours, logits, rtol=1e-10, atol=1e-12)
    assert our_grads.keys() == grads.keys()
    assert any("lora_A" in name for name in grads)
    for name, grad in grads.items():
        assert our_grads[name].dtype == grad.dtype
        torch.testing.assert_close(our_grads[name], grad, rtol=1e-9, atol=1e-11)


def test_in_bfloat16_adapters_keep_float32_gradients_near_those_in_float64():
    model, reference = with_adapter("llama", torch.bfloat16), with_adapter("llama")
    for ours, exact in zip(model.parameters(), reference.parameters(), strict=True):
        exact.data = ours.data.double()
    _, expected = run(reference)
    _, theirs = run(model, autocast=True)
    with joined_products(model):
        _, ours = run(model, autocast=True)

    def error(grads):
        return sum(
            ((grads[name].double() - grad).norm() / grad.norm()).item() for name, grad in expected.items()
        ) / len(expected)

    assert all(grad.dtype == torch.float32 for grad in ours.values())
    assert error(ours) < max(0.05, 1.2 * error(theirs))


def test_layers_are_their_own_again_behind_the_block():
    model = with_adapter("llama")
    with joined_products(model):
        assert any("forward" in m.__dict__ for m in model.modules())
    assert not any("forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("change", ["hook", "dropout", "disabled", "second"])
def test_a_layer_that_is_more_than_a_sum_keeps_its_own_forward(change):
    model = with_adapter("llama")
    layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
    if change == "hook":
        layer.lora_A["default"].register_forward_hook(lambda *args: None)
    if change == "dropout":
        layer.lora_dropout["default"] = torch.nn.Dropout(0.5)
    if change == "disabled":
        layer.enable_adapters(False)
    if change == "second":
        layer.update_layer(
            "other", 2, lora_alpha=4, init_lora_weights=True, config=model.peft_config["default"]
        )
    with joined_products(model):
        assert "forward" not in layer.__dict__


def adapted(model, **targets):
    wrapped = add_lora(model, 3, 8, 1, **targets)
    return {
        name.split(".lora_A")[0].rpartition(".")[2]
        for name, _ in wrapped.named_parameters()
        if "lora_A" in name
    }


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [("llama4_text", "router"), ("mamba", "out_proj"), ("falcon_h1", "out_proj"), ("phimoe", "router")],
)
def test_what_peft_cannot_wrap_is_left_out_and_said(kind, left_out, caplog):
    model = tiny_model(kind).float()
    assert left_out not in adapted(model)
    assert f"LoRA leaves out what PEFT can't wrap: {left_out}" in caplog.text
    assert model(input_ids=IDS, use_cache=False).logits.isfinite().all()


def test_targets_are_taken_by_name(caplog):
    assert adapted(make_model("llama"), targets=("q_proj", "v_proj")) == {"q_proj", "v_proj"}
    assert adapted(make_model("llama")) == adapted(make_model("llama"), targets=("all-linear",))
    assert adapted(make_model("gpt2"), targets=("attn.c_proj",)) == {"c_proj"}
    with pytest.raises(
        ValueError, match=r"--lora-targets w_q is no linear layer of the model; there are .*q_proj"
    ):
        adapted(make_model("llama"), targets=("w_q",))
    with pytest.raises(ValueError, match=r"--lora-targets router can't be wrapped by PEFT; there are "):
        adapted(tiny_model("llama4_text").float(), targets=("router", "q_proj"))
    assert caplog.text == ""
