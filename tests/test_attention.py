"""Attention by plain products: the library's numbers, and taken only where it computes the same."""

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from staff.models import attention
from tiny import make_model

IDS = torch.tensor([[5, 9, 3, 40, 7, 7, 12], [8, 2, 60, 11, 4, 90, 1]])


@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 8), (6, 2, 8), (3, 1, 5)])
def test_attend_is_causal_softmax_attention_with_its_gradients(heads, groups, width):
    generator = torch.Generator().manual_seed(heads)
    query, key, value = (
        torch.randn(2, count, 9, size, generator=generator, dtype=torch.float64, requires_grad=True)
        for count, size in ((heads, 8), (groups, 8), (groups, width))
    )
    repeated = (part.repeat_interleave(heads // groups, 1) for part in (key, value))
    expected = scaled_dot_product_attention(query, *repeated, is_causal=True, scale=0.3)
    found = attention.attend(
        query, key, value, 0.3, torch.full((9, 9), -torch.inf, dtype=torch.float64).triu_(1)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    direction = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(
        *(torch.autograd.grad(out, (query, key, value), direction) for out in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def calls(monkeypatch, model, **inputs):
    taken = []
    attend = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *args: taken.append(args) or attend(*args))
    with attention.short_samples(), torch.no_grad():
        hidden = model(input_ids=IDS, use_cache=False, output_hidden_states=True, **inputs).hidden_states[-1]
    return len(taken), hidden


@pytest.mark.parametrize("layout", ["qwen3", "mistral"])  # the second with a window of 5 tokens
def test_a_bfloat16_model_takes_it_in_every_block_and_means_the_same(layout, monkeypatch):
    model = make_model(layout, torch.bfloat16)
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states[-1]
    count, found = calls(monkeypatch, model)
    assert count == 3
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("why", ["float32", "mask", "long", "eager"])
def test_everywhere_else_the_library_keeps_the_work(monkeypatch, why):
    model = make_model("qwen3", torch.float32 if why == "float32" else torch.bfloat16)
    if why == "long":
        monkeypatch.setattr(attention, "SHORT", 6)
    if why == "eager":
        model.set_attn_implementation("eager")
    inputs = {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1] * 7])} if why == "mask" else {}
    assert calls(monkeypatch, model, **inputs)[0] == 0


def test_behind_the_block_the_library_is_as_it_was_even_after_an_error():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with attention.short_samples():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
        with attention.short_samples():
            pass
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
    with pytest.raises(TypeError), attention.short_samples():
        len(0)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    assert "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping


SAMPLES = [np.array([5, 9, 3, 40, 7]), np.array([8, 2, 60]), np.array([11, 4, 90, 1, 7, 9, 2])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_behind_one_another_do_not_see_each_other(dtype):
    model = make_model("qwen3", dtype)
    with attention.short_samples([5, 3, 7]), torch.no_grad():
        together = model(**attention.packed(SAMPLES), use_cache=False).logits[0]
    with torch.no_grad():
        alone = torch.cat(
            [model(input_ids=torch.tensor(sample)[None], use_cache=False).logits[0] for sample in SAMPLES]
        )
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(together, alone, **close)


def test_a_model_whose_tokens_meet_outside_of_attention_is_found_out():
    """One token's state added to the next: behind one another, a sample's first would get that of the sample
    before it."""
    model = make_model("qwen3", torch.float32)
    assert attention.can_pack(model, SAMPLES[:2], 7)
    model.model.layers[1].mlp.register_forward_hook(
        lambda module, args, out: out + torch.nn.functional.pad(out[:, :-1], (0, 0, 1, 0))
    )
    assert not attention.can_pack(model, SAMPLES[:2], 7)


def test_a_window_counts_only_where_samples_are_longer():
    model = make_model("mistral", torch.float32)  # its window is of 5 tokens
    assert attention.can_pack(model, SAMPLES[:2], 5)
    assert not attention.can_pack(model, SAMPLES[:2], 6)
