"""Efforts against the slow oracle: one sample, one backward pass, float64."""

import re

import numpy as np
import pytest
import torch

from staff.data.tokens import Pool
from staff.models import anatomy
from staff.scoring import scopes
from staff.scoring.gradnorm import Head, response_scores, squared_norm_of_products
from staff.scoring.scorer import Scorer
from tiny import CHECKED, VALUE, make_model, make_pool

POSITIONS = np.arange(7)


@pytest.fixture(autouse=True)
def _all_of_it_in_float64(monkeypatch):
    """Softmax, norms and routers go to float32 whatever the model's type; the oracle needs all of it in
    float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def with_lora(model, seed=0):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(
        model, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return wrapped


def with_released_lora(model, name, sketch):
    """The authors' adapter as PEFT builds it: rank 81, alpha 16, B = 0."""
    from peft import LoraConfig, get_peft_model

    (target,) = [n for n, _ in model.named_modules() if n.endswith(f".{name}")]
    wrapped = get_peft_model(
        model, LoraConfig(r=81, lora_alpha=16, target_modules=[target], task_type="CAUSAL_LM")
    )
    for n, parameter in wrapped.named_parameters():
        if "lora_A" in n:
            parameter.data = sketch.double() * 81 / 16
        if "lora_B" in n:
            parameter.data = parameter.data.double()
    return wrapped


def oracle(model, pool, i, weights):
    """L2 norm of the gradient of sample i's mean response loss, by batch-size-1 backward through the model's
    own loss."""
    model.requires_grad_(False)
    for weight, _ in weights:
        weight.requires_grad_(True)
        weight.grad = None
    ids = torch.tensor(pool.ids(i), dtype=torch.int64)[None]
    labels = torch.where(torch.tensor(pool.response(i)), ids[0], -100)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100)
    loss.backward()
    reached = [(weight.grad, rows) for weight, rows in weights if weight.grad is not None]
    squares = [(grad if rows is None else rows(grad)).square().sum() for grad, rows in reached]
    model.requires_grad_(False)
    return torch.stack(squares).sum().sqrt().item(), loss.item()


def weights_of(model, scope, layout):
    """The scope's weights by name, written out independently of `scopes`."""
    named = dict(model.named_parameters())
    if scope == "lora":
        return [(p, None) for n, p in named.items() if "lora_" in n]
    matrices = {
        n: p
        for n, p in named.items()
        if re.search(r"(layers|h)\.\d+\.", n) and p.ndim >= 2 and not n.endswith("_bias")
    }
    if scope == "linear":
        return [(p, None) for p in matrices.values()]
    last = model.config.num_hidden_layers - 1
    if scope == "last-block":
        return [(p, None) for n, p in matrices.items() if f".{last}." in n]
    where, _, rows = VALUE[layout]
    ending = where.removeprefix("blocks")
    if scope == "released":
        return [(p, rows and (lambda grad: grad[rows])) for n, p in named.items() if f"{ending}.lora_B" in n]
    (weight,) = [p for n, p in matrices.items() if n.endswith(f"{ending}.weight")]
    return [(weight, rows and (lambda grad: grad[:, rows] if layout == "gpt2" else grad[rows]))]


@pytest.mark.parametrize("layout", CHECKED)
def test_the_value_projection_is_found_by_structure(layout):
    site = scopes.value_projection(make_model(layout))
    where, width, rows = VALUE[layout]
    assert site.name == where
    assert (None if site.rows is None else site.rows.tolist()) == rows
    assert anatomy.weight_shape(site.module)[0] == width


def largest_error(layout, scope):
    """Of efforts and losses in batches of two sizes against the oracle, relative."""
    model, pool = make_model(layout), make_pool()
    scored = with_lora(model) if scope == "lora" else model
    scorers = [Scorer(scored, scope) for _ in range(2)]
    found = [
        scorer.scores(pool, POSITIONS, tokens) for scorer, tokens in zip(scorers, (64, 1000), strict=True)
    ]
    if scope == "released":
        scored = with_released_lora(
            model, VALUE[layout][0].removeprefix("blocks."), scorers[0].sites[0].sketch
        )
    weights = weights_of(scored, scope, layout)
    assert weights
    expected = np.array([oracle(scored, pool, i, weights) for i in POSITIONS])
    return max(np.abs(np.stack([f["effort"], f["loss"]], 1) / expected - 1).max() for f in found)


@pytest.mark.parametrize("scope", scopes.SCOPES)
@pytest.mark.parametrize("layout", CHECKED)
def test_efforts_equal_one_backward_pass_a_sample_to_1e_10(layout, scope):
    assert largest_error(layout, scope) < 1e-10


@pytest.mark.parametrize("layout", CHECKED)
def test_an_effort_depends_on_neither_batch_size_nor_order(layout):
    model, pool = make_model(layout), make_pool()
    one_by_one = Scorer(model).scores(pool, POSITIONS, 1)
    for batch_tokens in (40, 1000):
        order = np.random.default_rng(batch_tokens).permutation(POSITIONS)
        together = Scorer(model).scores(pool, order, batch_tokens)
        for name, values in one_by_one.items():
            np.testing.assert_allclose(together[name], values[order], rtol=1e-10, err_msg=name)


@pytest.mark.parametrize(("tokens", "inner", "outer"), [(3, 40, 50), (60, 5, 4), (1, 1, 1)])
def test_both_ways_to_the_norm_equal_the_gradient_matrix(tokens, inner, outer):
    a, g = (
        torch.randn(4, tokens, inner, dtype=torch.float64),
        torch.randn(4, tokens, outer, dtype=torch.float64),
    )
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


def test_sums_of_the_highest_entropies_and_surprise_where_sure_equal_the_obvious_way():
    model = make_model("llama")
    ids = np.random.default_rng(3).integers(1, model.config.vocab_size, 750).astype(np.int32)
    is_response = np.ones(750, bool)
    is_response[[0, 1, 740, 741, 746, 747]] = (
        False  # responses of 738, 4 and 2 tokens: the 3 highest, 1 and 1
    )
    pool = Pool(ids, is_response, np.array([0, 740, 746, 750]))
    found = Scorer(model).scores(pool, [2, 0, 1], 3000)
    for place, i in enumerate([2, 0, 1]):
        with torch.no_grad():
            logits = model(torch.tensor(pool.ids(i)[None], dtype=torch.int64)).logits[0, :-1]
        mask, entropies, products = pool.response(i)[1:], [], []
        for row, label in zip(logits[mask], pool.ids(i)[1:][mask], strict=True):
            p = row.softmax(-1)
            entropies.append(float(-(p * p.log()).sum()))
            loss = -float(p[int(label)].log())
            sure = max(0.0, 1 - entropies[-1] / np.log(len(p)))
            products.append(sure / (1 + np.exp(-loss)))
        kept = sorted(entropies)[-max(1, len(entropies) // 200) :]
        assert len(kept) == (3 if i == 0 else 1)
        np.testing.assert_allclose(found["hes"][place], sum(kept), rtol=1e-10)
        np.testing.assert_allclose(found["upd"][place], np.mean(products), rtol=1e-10)


def test_nothing_below_the_scope_is_kept_for_a_backward_pass():
    model, pool = make_model("llama"), make_pool()
    graph = []
    handle = anatomy.blocks(model)[1].register_forward_hook(
        lambda module, args, output: graph.append(output.requires_grad)
    )
    Scorer(model).scores(pool, POSITIONS)
    handle.remove()
    assert graph
    assert not any(graph)


def test_unknown_scopes_and_missing_adapters_are_named():
    with pytest.raises(ValueError, match="scope must be one of"):
        Scorer(make_model("llama"), "first-value")
    with pytest.raises(ValueError, match="needs a model with a LoRA adapter"):
        Scorer(make_model("llama"), "lora")
