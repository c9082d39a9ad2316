"""Efforts against the slow oracle: one sample, one backward pass, float64."""

import numpy as np
import pytest
import torch
from tiny import LAYOUTS, VALUE, make_model, make_pool

from staff import scopes
from staff.gradnorm import Head, response_scores, squared_norm_of_products
from staff.pool import collate
from staff.score import Scorer

POSITIONS = np.arange(7)


@pytest.fixture(autouse=True)
def _softmax_stays_in_float64(monkeypatch):
    """Eager attention takes its softmax in float32 whatever the model's type; the oracle needs all of it in float64."""
    softmax = torch.nn.functional.softmax

    def wide(values, dim=None, dtype=None, **kwargs):
        return softmax(values, dim=dim, dtype=None if values.dtype == torch.float64 else dtype, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "softmax", wide)


def with_lora(model, seed=0):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return wrapped


def oracle(model, pool, i, weights):
    """L2 norm of the gradient of sample i's mean response loss, by batch-size-1 backward through the model's own loss."""
    model.requires_grad_(False)
    for weight, _ in weights:
        weight.requires_grad_(True)
        weight.grad = None
    ids = torch.tensor(pool.ids(i), dtype=torch.int64)[None]
    labels = torch.where(torch.tensor(pool.response(i)), ids[0], -100)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100)
    loss.backward()
    squares = [(weight.grad if rows is None else rows(weight.grad)).square().sum() for weight, rows in weights]
    model.requires_grad_(False)
    return torch.stack(squares).sum().sqrt().item(), loss.item()


def weights_of(model, scope, layout):
    """The scope's weights by name, written out independently of `scopes`."""
    named = dict(model.named_parameters())
    last = [n for n in named if (".2." in n) and named[n].ndim == 2]
    if scope == "lora":
        return [(p, None) for n, p in named.items() if "lora_" in n]
    last = [n for n in last if "lora_" not in n]
    if scope == "last-block":
        return [(named[n], None) for n in last]
    where, _, rows = VALUE[layout]
    (name,) = [n for n in last if where.split(".", 2)[2] in n]
    if rows is None:
        return [(named[name], None)]
    return [(named[name], lambda grad: grad[:, rows] if layout == "gpt2" else grad[rows])]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_value_projection_is_found_by_structure(layout):
    site = scopes.value_projection(make_model(layout))
    where, width, rows = VALUE[layout]
    assert site.name == where
    assert (None if site.rows is None else site.rows.tolist()) == rows
    assert site.module.weight.shape[1 if layout == "gpt2" else 0] == width


@pytest.mark.parametrize("scope", ["last-value", "last-block", "lora"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_efforts_equal_one_backward_pass_a_sample_to_1e_10(layout, scope):
    model, pool = make_model(layout), make_pool()
    if scope == "lora":
        model = with_lora(model)
    found = Scorer(model, scope, batch_tokens=64).scores(pool, POSITIONS)
    for i in POSITIONS:
        effort, loss = oracle(model, pool, i, weights_of(model, scope, layout))
        assert found["effort"][i] == pytest.approx(effort, rel=1e-10)
        assert found["loss"][i] == pytest.approx(loss, rel=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_effort_depends_on_neither_batch_size_nor_order_nor_padding_side(layout):
    model, pool = make_model(layout), make_pool()
    one_by_one = Scorer(model, batch_tokens=1).scores(pool, POSITIONS)
    for batch_tokens, side in [(40, "right"), (1000, "right"), (1000, "left")]:
        order = np.random.default_rng(batch_tokens).permutation(POSITIONS)
        together = Scorer(model, batch_tokens=batch_tokens, padding_side=side).scores(pool, order)
        for name, values in one_by_one.items():
            np.testing.assert_allclose(together[name], values[order], rtol=1e-10, err_msg=name)


def test_a_block_that_shares_values_sends_the_probe_to_the_block_that_has_them():
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    config = Gemma3nTextConfig(
        vocab_size=97, vocab_size_per_layer_input=97, hidden_size=32, hidden_size_per_layer_input=8, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_kv_shared_layers=1, laurel_rank=4, altup_num_inputs=2,
        layer_types=["full_attention"] * 4, activation_sparsity_pattern=[0.0] * 4, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3nForCausalLM(config).eval().requires_grad_(False)
    assert scopes.value_projection(model).name == "blocks.2.self_attn.v_proj"


@pytest.mark.parametrize(("tokens", "inner", "outer"), [(3, 40, 50), (60, 5, 4), (1, 1, 1)])
def test_both_ways_to_the_norm_equal_the_gradient_matrix(tokens, inner, outer):
    a, g = torch.randn(4, tokens, inner, dtype=torch.float64), torch.randn(4, tokens, outer, dtype=torch.float64)
    expected = torch.einsum("bto,bti->boi", g, a).square().sum((1, 2))
    torch.testing.assert_close(squared_norm_of_products(a, g), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.3, None), (2.0, 1.5)])
def test_the_head_in_chunks_equals_autograd_through_whole_logits(scale, cap):
    torch.manual_seed(0)
    linear = torch.nn.Linear(8, 31, dtype=torch.float64)
    hidden = torch.randn(13, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(31, (13,))
    ours = response_scores(hidden, Head(linear, scale, cap), labels, chunk_bytes=31 * 8 * 4)
    (grad,) = torch.autograd.grad((ours.loss * torch.arange(13)).sum(), hidden)
    logits = linear(hidden) * scale
    logits = torch.tanh(logits / cap) * cap if cap else logits
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    (expected,) = torch.autograd.grad((loss * torch.arange(13)).sum(), hidden)
    p = logits.softmax(-1)
    torch.testing.assert_close(ours.loss, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.entropy, -(p * p.log()).sum(-1), rtol=1e-12, atol=1e-12)
    one_hot = torch.nn.functional.one_hot(labels, 31)
    torch.testing.assert_close(ours.el2n, (p - one_hot).norm(dim=-1), rtol=1e-12, atol=1e-12)


def test_nothing_below_the_scope_is_kept_for_a_backward_pass():
    model, pool = make_model("llama"), make_pool()
    graph = []
    handle = scopes.blocks(model)[1].register_forward_hook(lambda module, args, output: graph.append(output.requires_grad))
    Scorer(model).scores(pool, POSITIONS)
    handle.remove()
    assert graph
    assert not any(graph)


def test_unknown_scopes_and_missing_adapters_are_named():
    with pytest.raises(ValueError, match="scope must be one of"):
        Scorer(make_model("llama"), "first-value")
    with pytest.raises(ValueError, match="needs a model with a LoRA adapter"):
        Scorer(make_model("llama"), "lora")


def test_a_left_padded_batch_masks_its_padding():
    batch = collate(make_pool((3, 5)), [0, 1], padding_side="left")
    assert batch.attention_mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
