"""Options of a score, and the scopes on models that are not like the others."""

from functools import partial

import numpy as np
import pytest
import torch
import transformers

from staff.config import Scoring
from staff.scoring import scopes, shards
from staff.scoring.scorer import Scorer
from staff.scoring.shards import level, make_shards, score_by_shards, shards_of
from test_gradnorm import oracle, weights_of, with_lora
from tiny import EXPERT_LAYOUTS, EXPERTS, SHAPE, VOCABULARY, make_model, make_pool

POOL = make_pool()
POSITIONS = np.arange(len(POOL))


def efforts(model, scope="last-value", **options):
    return Scorer(model, scope, **options).scores(POOL, POSITIONS, 64)["effort"]


@pytest.mark.parametrize(("loss", "power"), [("mean", 1.0), ("sum", 0.0), ("sqrt", 0.5)])
def test_the_loss_is_the_sum_over_the_tokens_divided_by_their_number_to_a_power(loss, power):
    model = make_model("llama")
    found = Scorer(model, "last-block", loss=loss).scores(POOL, POSITIONS, 64)
    expected = np.array([oracle(model, POOL, i, weights_of(model, "last-block", "llama")) for i in POSITIONS])
    expected *= (POOL.response_tokens() ** (1 - power))[:, None]
    np.testing.assert_allclose(found["effort"], expected[:, 0], rtol=1e-10)
    np.testing.assert_allclose(found["loss"], expected[:, 1], rtol=1e-10)


def test_levelled_efforts_by_hand():
    norms = np.array([[3.0, 40.0, 0.0], [1.0, 80.0, 0.0]])
    assert level(norms, np.array([2.0, 60.0, 0.0])).tolist() == [
        np.hypot(3 / 2, 40 / 60),
        np.hypot(1 / 2, 80 / 60),
    ]


def test_balanced_layers_are_divided_by_their_mean_over_the_pool_whatever_the_shards(tmp_path, monkeypatch):
    model = make_model("qwen2")
    weights = weights_of(model, "linear", "qwen2")
    norms = np.array([[oracle(model, POOL, i, [weight])[0] for weight in weights] for i in POSITIONS])
    expected = np.sqrt(((norms / norms.mean(0)) ** 2).sum(1))
    path = tmp_path / "scores.npz"
    scorer = Scorer(model, "linear", balance=True)
    last = {3: len(POOL) // 3 * 3, 512: 0}

    def killed(positions, seconds):
        if positions[0] == last[shards.SHARD]:
            raise KeyboardInterrupt

    for shard in (3, 512):
        monkeypatch.setattr(shards, "SHARD", shard)
        of = shards_of(POOL.lengths, path)
        run = partial(make_shards, lambda: (partial(scorer.scores, POOL), 64), of)
        with pytest.raises(KeyboardInterrupt):
            score_by_shards(of, path, partial(run, on_shard=killed))
        assert len(list(tmp_path.glob("shard-*.npz"))) == last[shard] / shard
        scores = score_by_shards(of, path, run)  # the rest, beside what is there
        np.testing.assert_allclose(scores["effort"], expected, rtol=1e-10)
        assert not list(tmp_path.glob("shard-*.npz"))
    means = scorer.scores(POOL, POSITIONS[:4])["site_norms"].mean(0)
    np.testing.assert_allclose(np.sort(means), np.sort(norms[:4].mean(0)), rtol=1e-10)
    alone = level(scorer.scores(POOL, [5])["site_norms"], means)
    np.testing.assert_allclose(alone, np.sqrt(((norms[5] / norms[:4].mean(0)) ** 2).sum()), rtol=1e-10)


def test_balancing_one_weight_is_refused():
    with pytest.raises(ValueError, match="--balance-layers needs a scope of several weights"):
        Scoring(scope="last-value", balance_layers=True)


def test_a_fresh_adapter_that_never_gets_a_gradient_is_left_out_of_the_balance(tmp_path):
    from staff.models.adapters import add_lora

    model = add_lora(make_model("llama"), 4, 8, seed=0)  # B = 0: the gradient of A is 0
    scorer = Scorer(model, "lora", balance=True)
    path = tmp_path / "scores.npz"
    of = shards_of(POOL.lengths, path)
    scores = score_by_shards(of, path, partial(make_shards, lambda: (partial(scorer.scores, POOL), 64), of))
    assert (scorer.scores(POOL, POSITIONS)["site_norms"] == 0).any(0).mean() == 0.5
    assert np.isfinite(scores["effort"]).all()


def test_the_released_scope_is_a_seeded_sketch():
    model = make_model("gpt-neox")
    first, second = Scorer(model, "released", seed=1), Scorer(model, "released", seed=2)
    sketch = first.sites[0].sketch
    assert sketch.shape == (81, 32)
    assert sketch.abs().max() <= 16 / 81 / np.sqrt(32)
    assert sketch.std() == pytest.approx(16 / 81 / np.sqrt(3 * 32), rel=0.05)
    one, two = (scorer.scores(POOL, POSITIONS)["effort"] for scorer in (first, second))
    assert not np.allclose(one, two, rtol=1e-3)
    np.testing.assert_allclose(efforts(model, "released", seed=1), one, rtol=1e-10)


@pytest.mark.parametrize(
    ("layout", "lost"), [("llama", ("q_proj", "v_proj")), ("gpt-neox", ("query_key_value",))]
)
def test_the_released_scope_drops_tuned_queries_and_values_and_keeps_the_rest(layout, lost):
    model = with_lora(make_model(layout))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    dropped = scopes.drop_tuned_queries_and_values(model)
    assert {name.rsplit(".", 1)[-1] for name in dropped} == set(lost)
    assert len(dropped) == 3 * len(lost)
    for name, parameter in model.named_parameters():
        is_lost = "lora_B" in name and name.split(".lora_B")[0] in dropped
        assert torch.equal(parameter, torch.zeros_like(parameter) if is_lost else before[name]), name
    assert scopes.drop_tuned_queries_and_values(make_model(layout)) == []


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_experts_score_alike_in_any_batch_in_float32(layout):
    model = make_model(layout, torch.float32, settle=1.0)
    one_by_one = Scorer(model).scores(POOL, POSITIONS, 1)["effort"]
    np.testing.assert_allclose(Scorer(model).scores(POOL, POSITIONS, 1000)["effort"], one_by_one, rtol=1e-4)


def test_a_last_block_without_softmax_attention_sends_the_search_to_one_that_has_it(caplog):
    torch.manual_seed(0)
    config = transformers.Qwen3NextConfig(
        **{**SHAPE, "num_hidden_layers": 3}, **EXPERTS, num_experts=4, head_dim=8, shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention", "linear_attention"], linear_num_value_heads=4, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    model = transformers.Qwen3NextForCausalLM(config).eval().requires_grad_(False)
    assert [site.name for site in scopes.sites(model, "last-value")] == ["blocks.1.self_attn.v_proj"]
    assert (
        "the last block has no values of its own: scope 'last-value' takes blocks.1.self_attn" in caplog.text
    )


def test_a_model_without_attention_has_no_value_projection():
    model = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)
    )
    with pytest.raises(
        ValueError, match=r"found no value projection in MambaForCausalLM, .* use --scope last-block"
    ):
        Scorer(model.eval())
    assert efforts(model, "last-block").min() > 0


def test_linear_experts_that_see_some_tokens_are_scored_one_sample_at_a_time(caplog):
    class Routed(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(3))

        def forward(self, hidden):
            flat = hidden.reshape(-1, hidden.shape[-1])
            goes = flat[:, 0] > 0
            mixed = torch.zeros_like(flat)
            mixed[goes], mixed[~goes] = self.experts[0](flat[goes]), self.experts[1](flat[~goes])
            return mixed.reshape(hidden.shape)

    model = make_model("llama")
    model.model.layers[2].mlp = Routed(32).double()
    assert efforts(model).min() > 0
    scorer = Scorer(model, "last-block")
    assert scorer.tokens_borne == 1
    assert "blocks.2.mlp.experts.0.weight (and 2 more) sees its tokens in a way of its own" in caplog.text
    weights = [(p, None) for n, p in model.named_parameters() if "layers.2." in n and p.ndim == 2]
    expected = [oracle(model, POOL, i, weights)[0] for i in POSITIONS]
    np.testing.assert_allclose(scorer.scores(POOL, POSITIONS, 1000)["effort"], expected, rtol=1e-6)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_every_scope_says_what_it_costs():
    assert all("price" in cost or "default" in cost for cost in scopes.SCOPES.values())
