"""Drafts cut from the target, and the siblings that a user is pointed to."""

import pytest
import torch

from staff.models import anatomy, families
from staff.models import drafts as draft
from staff.scoring.scorer import Scorer
from tiny import CHECKED, make_model, make_pool


@pytest.mark.parametrize(
    ("which", "expected"),
    [("even", [0, 3, 6, 9]), ("first", [0, 1, 2, 3]), ("last", [6, 7, 8, 9]), ("ends", [0, 1, 8, 9])],
)
def test_the_choices_of_blocks(which, expected):
    assert draft.chosen_blocks(10, 4, which) == expected
    assert draft.chosen_blocks(10, 10, which) == list(range(10))
    assert len(draft.chosen_blocks(10, 1, which)) == 1


def test_more_blocks_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="only 3 blocks"):
        draft.chosen_blocks(3, 4, "even")


@pytest.mark.parametrize(
    "layout", [layout for layout in CHECKED if layout != "gemma3n-shared"]
)  # blocks that share can't be cut apart
def test_a_cut_model_computes_as_one_with_only_those_blocks(layout):
    whole, pool = make_model(layout), make_pool()
    ids = torch.tensor(pool.ids(3), dtype=torch.int64)[None]
    kept = draft.cut(make_model(layout), [0, 2] if layout == "llama" else 2, "ends")
    blocks = anatomy.blocks(whole)
    in_tuple = layout in ("falcon", "bloom")
    blocks[1].forward = lambda hidden, *args, **kwargs: (
        (hidden, None) if in_tuple else hidden
    )  # what a missing block does
    expected = whole(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(kept(input_ids=ids, use_cache=False).logits, expected, rtol=1e-10, atol=1e-10)
    assert Scorer(kept).scores(pool, range(7))["effort"].min() > 0


def test_blocks_that_share_keys_and_values_cannot_be_left_out():
    model = make_model("llama")
    model.config.num_kv_shared_layers = 1
    with pytest.raises(ValueError, match="shares keys and values"):
        draft.cut(model, 2)


def test_self_needs_a_number():
    assert families.self_blocks("self:8") == 8
    assert families.self_blocks("some/model") is None
    assert families.self_blocks("selfrag/selfrag_llama2_7b") is None
    with pytest.raises(ValueError, match="self:8"):
        families.self_blocks("self")


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", ["Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-3B"]),
        ("google/gemma-7b", ["google/gemma-2b"]),
        ("meta-llama/Llama-2-13b-hf", ["meta-llama/Llama-2-7b-hf"]),
        ("openai-community/gpt2-medium", ["openai-community/gpt2"]),
        ("openai-community/gpt2", []),
        ("cerebras/Cerebras-GPT-2.7B", []),
        ("somebody/unheard-of", []),
    ],
)
def test_smaller_siblings_are_suggested_by_name(target, expected):
    assert list(families.suggest_drafts(target)) == expected


def test_a_suggestion_comes_with_its_cost():
    assert families.suggest_drafts("Qwen/Qwen2.5-7B-Instruct")["Qwen/Qwen2.5-0.5B"] == pytest.approx(0.07)
    assert families.suggest_drafts("/models/Mistral-Nemo-Instruct-2407")  # no size in its name: all are named
    for family in families.FAMILIES.values():
        sizes = list(family.members.values())
        assert sizes == sorted(sizes)
