"""What all samples begin with is computed once: the same scores to the last digits, and only where that
holds."""

import numpy as np
import pytest
import torch

from staff.data.tokens import Pool
from staff.models.adapters import add_lora
from staff.scoring import prefix
from staff.scoring.scorer import Scorer
from tiny import CHECKED, VOCABULARY, make_model

COMMON = 11
REUSED = (
    "llama",
    "llama-tied",
    "qwen2",
    "qwen3",
    "granite",
    "cohere",
    "stablelm",
    "gpt-neox",
    "gpt2",
    "phi3",
    "opt",
)


def pool_with_start(common=COMMON, samples=7, first_response=None):
    rng = np.random.default_rng(4)
    start = rng.integers(3, VOCABULARY, common)
    ids, masks = [], []
    for length in rng.integers(4, 15, samples):
        sample = np.concatenate([start, rng.integers(3, VOCABULARY, length)])
        mask = np.arange(len(sample)) >= (common + 2 if first_response is None else first_response)
        ids.append(sample)
        masks.append(mask)
    ids[0][common], ids[1][common] = 5, 6  # where they part
    offsets = np.concatenate([[0], np.cumsum([len(sample) for sample in ids])])
    return Pool(np.concatenate(ids).astype(np.int32), np.concatenate(masks), offsets)


def test_the_common_start_ends_before_the_token_that_predicts_the_first_response():
    assert prefix.length_of(pool_with_start()) == COMMON
    assert prefix.length_of(pool_with_start(first_response=6)) == 5
    assert prefix.length_of(pool_with_start(common=0)) == 0
    assert (
        prefix.length_of(
            pool_with_start(samples=1)
            if False
            else Pool(np.arange(9, dtype=np.int32), np.arange(9) > 3, np.array([0, 9]))
        )
        == 0
    )
    twins = pool_with_start()
    twins = Pool(
        np.tile(twins.ids(0), 2),
        np.tile(twins.is_response[: twins.offsets[1]], 2),
        np.array([0, 1, 2]) * twins.offsets[1],
    )
    assert prefix.length_of(twins) == COMMON + 1


@pytest.mark.parametrize("scope", ["last-value", "last-block"])
@pytest.mark.parametrize("layout", CHECKED)
def test_scores_with_and_without_are_the_same(layout, scope, caplog):
    pool, model = pool_with_start(), make_model(layout)
    positions = np.arange(len(pool))
    plain = Scorer(model, scope, reuse_prefix=False, balance=True).scores(pool, positions, 64)
    scorer = Scorer(model, scope, balance=True)
    found = scorer.scores(pool, positions, 64)
    for name, values in plain.items():
        np.testing.assert_allclose(
            found[name], values, rtol=1e-7 if layout == "bloom" else 1e-9, err_msg=name
        )  # its biases are float32
    if layout in REUSED:
        assert scorer._prefix[1].tokens == COMMON
        assert "computed anew" not in caplog.text


@pytest.mark.parametrize("scope", ["last-value", "last-block"])
@pytest.mark.parametrize("layout", ["llama", "phi3", "gpt-neox"])
def test_a_tuned_models_scores_are_the_same(layout, scope):
    pool, model = pool_with_start(), add_lora(make_model(layout), 3, 8, seed=1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(3))
    plain = Scorer(model, scope, reuse_prefix=False).scores(pool, np.arange(len(pool)))["effort"]
    scorer = Scorer(model, scope)
    np.testing.assert_allclose(scorer.scores(pool, np.arange(len(pool)))["effort"], plain, rtol=1e-9)
    assert scorer._prefix[1] is not None


def test_the_released_scope_and_others_do_without():
    pool = pool_with_start()
    for scope in ("linear", "released"):
        scorer = Scorer(make_model("llama"), scope)
        scorer.scores(pool, np.arange(2))
        assert scorer._prefix is None


def test_a_cache_that_changes_scores_is_said_and_left(monkeypatch, caplog):
    pool = pool_with_start()
    model = make_model("llama")
    plain = Scorer(model, reuse_prefix=False).scores(pool, np.arange(len(pool)))["effort"]
    find = prefix.find

    def wrong(*args):
        found = find(*args)
        found.values[0].mul_(1.5)
        return found

    monkeypatch.setattr(prefix, "find", wrong)
    np.testing.assert_array_equal(Scorer(model).scores(pool, np.arange(len(pool)))["effort"], plain)
    assert "computed anew" in caplog.text


def test_in_bfloat16_the_ranks_stay(caplog):
    pool, model = pool_with_start(samples=40), make_model("llama", torch.bfloat16)
    scorer = Scorer(model)
    found = scorer.scores(pool, np.arange(40))["effort"]
    plain = Scorer(model, reuse_prefix=False).scores(pool, np.arange(40))["effort"]
    assert scorer._prefix[1] is not None
    np.testing.assert_allclose(found, plain, rtol=0.03)
