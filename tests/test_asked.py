"""What methods ask models for while they run: answers, rewards and attention, on tiny models of random weights."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

import staff
from family import make_rows, make_tokenizer
from staff.data.tokens import tokenise
from staff.models import answering, reward
from staff.models import load as loading
from staff.runs import asked
from staff.scoring import whisper as looking

SMALL = {"target_epochs": 1, "learning_rate": 1e-2, "max_new_tokens": 6, "dtype": "float32"}


@pytest.fixture(scope="module")
def judge(family, tmp_path_factory):
    """A reward model of random weights."""
    folder = tmp_path_factory.mktemp("judge")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=259, **shape, num_labels=1, pad_token_id=0, initializer_range=0.2)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def pool(tmp_path):
    rows = [row | {"quality": i % 5, "template": "ab"[i % 3 == 0]} for i, row in enumerate(make_rows(30))]
    return write(tmp_path / "pool.jsonl", rows)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def choose(family, data, output, **settings):
    models = {"target": str(family / "target"), "draft": str(family / "draft")}
    columns = {"columns": "prompt=prompt,response=response,id=id"}
    return staff.select_grid(str(data), output=output, **{**models, **SMALL, **columns, **settings})


def test_a_reward_is_the_models_logit_of_the_whole_conversation_whatever_the_batch(judge):
    examples = [
        asked._with_answer(example, words)
        for example, words in zip(EXAMPLES, ("a", "bc d", "e" * 40), strict=True)
    ]
    tokenizer = AutoTokenizer.from_pretrained(judge)
    model = LlamaForSequenceClassification.from_pretrained(judge, dtype=torch.float32).eval()
    inputs = reward.encoded(examples, tokenizer, reward.Reading())
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 1?"}, {"role": "assistant", "content": "bc d"}], tokenize=False
    )
    assert inputs[1]["input_ids"] == tokenizer(text.rstrip("\n"))["input_ids"]
    found = reward.rewards_of(model, tokenizer, inputs, np.array([2, 0, 1]), 4096)["rewards"]
    alone = [model(torch.tensor([inputs[i]["input_ids"]])).logits.item() for i in (2, 0, 1)]
    np.testing.assert_allclose(found, alone, rtol=1e-4)
    assert len(set(np.round(found, 4))) == 3
    model.config.pad_token_id = None  # then one at a time
    np.testing.assert_allclose(
        reward.rewards_of(model, tokenizer, inputs, np.arange(3), 4096)["rewards"],
        found[[1, 2, 0]],
        rtol=1e-4,
    )
    assert reward.weights_met(model) == sum(
        p.numel() for n, p in model.named_parameters() if p.ndim > 1 and "embed" not in n
    )


class _Pairs:
    """A tokenizer of pairs, as BERT's kin have them."""

    chat_template, sep_token_id, model_max_length = None, 9, 50

    def __call__(self, asked, answers, truncation, max_length):
        ids = [[len(a), 9, len(b), 9] for a, b in zip(asked, answers, strict=True)]
        return {"input_ids": ids, "token_type_ids": [[0, 0, 1, 1]] * len(ids)}


def test_without_a_template_prompt_and_answer_are_a_pair_where_the_tokenizer_has_a_mark_for_it():
    inputs = reward.encoded(EXAMPLES[:1], _Pairs(), reward.Reading())
    assert inputs == [{"input_ids": [10, 9, 2, 9], "token_type_ids": [0, 0, 1, 1]}]


def _examples():
    from staff.data.rows import read

    rows = [{"prompt": f"What is {i}?", "response": f"A{i}"} for i in range(3)]
    return list(read(rows).examples())


EXAMPLES = _examples()


def test_attention_is_summed_over_heads_and_meaned_over_question_and_demonstration(family):
    model = AutoModelForCausalLM.from_pretrained(family / "target", dtype=torch.float32).eval()
    ids, ends = np.arange(3, 43), [10, 25]
    eager = AutoModelForCausalLM.from_pretrained(family / "target", attn_implementation="eager")
    every = eager(torch.tensor(ids[None]), output_attentions=True).attentions
    for layer in (0, 2):
        weights = every[layer][0].sum(0)[25:].detach().numpy()
        expected = [weights[:, :10].mean(), weights[:, 10:25].mean()]
        np.testing.assert_allclose(looking.attention_to(model, ids, ends, layer), expected, rtol=1e-5)
    assert model.config._attn_implementation == "sdpa"  # as it was
    assert [looking.layer_of(model, layer) for layer in (None, 0, 3)] == [2, 0, 3]
    with pytest.raises(ValueError, match="layer=4: the model has 4, from 0 to 3"):
        looking.layer_of(model, 4)


def test_a_question_stands_behind_its_demonstrations_whose_ends_are_those_of_their_answers(family):
    tokenizer = AutoTokenizer.from_pretrained(family / "draft")
    system = EXAMPLES[0].turns[0]._replace(role="system", content="Be brief.")
    whole = [example._replace(turns=(system, *example.turns)) for example in EXAMPLES]
    behind = asked._behind(whole[0], [whole[1], whole[2]])
    (opening,), _, cut = asked.openings_of([behind], tokenizer, 500)
    text = tokenizer.decode(opening.ids)
    start = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 1?<|im_end|>\n"
    assert text.startswith(start + "<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nWhat is 2?")
    assert text.endswith("<|im_start|>user\nWhat is 0?<|im_end|>\n<|im_start|>assistant\n")
    ends = asked._ends(opening)
    assert [tokenizer.decode(opening.ids[:end])[-12:] for end in ends] == ["A1<|im_end|>", "A2<|im_end|>"]
    assert cut == 0


def test_mods_with_a_quality_model_keeps_what_its_numbers_say(family, judge, pool, tmp_path, monkeypatch):
    def say(self, prompts):
        n = len(prompts)
        return {"prediction": ["", *["words"] * (n - 1)], "answer_tokens": [5] * n, "cut": [True] * n}

    monkeypatch.setattr(answering.Answerer, "answer", say)
    mods = {"methods": ["mods"], "quality_model": str(judge), "option": ["alpha=-0.4", "seed_share=0.2"]}
    runs = choose(family, pool, tmp_path / "x", pruning_rates=[0.5, 0.9], **mods)
    assert [len(run.indices) for run in runs] == [15, 3]
    stages = runs[0].cost["stages"]
    of = stages["answer on the target tuned on the seed"]
    assert of["generated"] > 0
    assert of["tokens"] == of["prefilled"] + of["generated"]
    assert of["flops"] > 0
    assert {
        "fine-tune the target on the seed",
        "rate the answers of the data",
        "rate the answers of the target",
    } < stages.keys()
    assert stages["fine-tune the target on the seed"]["samples"] == 6
    assert runs[0].cost["passes"] == pytest.approx(sum(row.get("passes", 0) for row in stages.values()))
    # the seed of both rates is the same, and the smaller coreset lies in it
    assert set(runs[1].indices) <= set(runs[0].indices)
    # the good ones alone, by the model itself
    rows = runs[0].rows
    tokenizer = AutoTokenizer.from_pretrained(judge)
    model = LlamaForSequenceClassification.from_pretrained(judge, dtype=torch.float32).eval()
    inputs = reward.encoded(list(rows.examples()), tokenizer, reward.Reading())
    quality = reward.rewards_of(model, tokenizer, inputs, np.arange(30), 4096)["rewards"]
    assert 15 < (quality > -0.4).sum() < 30
    assert (quality[runs[0].indices] > -0.4).all()


def test_a_killed_mods_goes_on_with_the_answers_that_are_there(family, judge, pool, tmp_path, monkeypatch):
    mods = {
        "methods": ["mods"],
        "budget": 20,
        "quality_model": str(judge),
        "option": ["alpha=-5", "seed_share=0.1"],
    }
    (whole,) = choose(family, pool, tmp_path / "whole", **mods)
    monkeypatch.setattr(asked, "ANSWERS_A_SHARD", 8)
    answer, asked_for = answering.Answerer.answer, []

    def watch(self, prompts):
        if len(asked_for) == 2:
            raise KeyboardInterrupt
        asked_for.append(len(prompts))
        return answer(self, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(answering.Answerer, "answer", watch)
        with pytest.raises(KeyboardInterrupt):
            choose(family, pool, tmp_path / "x", **mods)
    seen = []
    monkeypatch.setattr(
        answering.Answerer, "answer", lambda self, prompts: seen.append(len(prompts)) or answer(self, prompts)
    )
    (again,) = choose(family, pool, tmp_path / "x", **mods)
    assert (asked_for, seen) == ([8, 8], [8, 3])
    assert again.indices.tolist() == whole.indices.tolist()
    for stage, row in again.cost["stages"].items():
        assert row.get("flops") == whole.cost["stages"][stage].get("flops")


def test_mods_with_a_quality_column_counts_an_answer_as_a_share_of_its_rows_worth(
    family, pool, tmp_path, monkeypatch
):
    said = iter(["It is 0, and so on.", "nothing of the kind"] * 100)
    monkeypatch.setattr(
        asked, "_answers", lambda *_, **__: {"prediction": np.array([next(said) for _ in range(100)])}
    )
    given = {}

    def like(pieces, answers, examples):
        given["n"] = len(examples)
        return np.where(np.arange(len(examples)) % 2 == 0, 100.0, 10.0)

    monkeypatch.setattr(asked, "_likeness", like)
    mods = {"methods": ["mods"], "quality_column": "quality", "option": ["alpha=2", "seed_share=0.1"]}
    (run,) = choose(family, pool, tmp_path / "x", budget=8, **mods)
    assert given["n"] == 12 - 3  # of qualities 3 and 4 without the seed
    assert all(i % 5 > 2 for i in run.indices)


def test_whisper_is_metric_times_attention(family, pool, tmp_path):
    runs = choose(
        family,
        pool,
        tmp_path / "x",
        methods=["whisper"],
        pruning_rates=[0.5, 0.9],
        option=["demonstrations=2"],
    )
    assert [len(run.indices) for run in runs] == [15, 3]
    assert set(runs[1].indices) <= set(runs[0].indices)
    row = runs[0].cost["stages"]["answer on the draft"]
    assert row["samples"] == 2 * 8 * 3  # fifteen samples by two, before three questions, of either half
    assert row["tokens"] == row["prefilled"] + row["generated"]
    (other,) = choose(
        family, pool, tmp_path / "y", methods=["whisper_target"], pruning_rates=[0.9], option=["layer=1"]
    )
    assert other.cost["stages"]["answer on the target"]["passes"] > 3


def test_whisper_on_a_few_rows(family, tmp_path):
    rows = make_rows(4)  # halves of two: three demonstrations a prompt are not there
    (run,) = choose(
        family, write(tmp_path / "few.jsonl", rows), tmp_path / "x", methods=["whisper"], budget=2
    )
    assert len(run.indices) == 2


def test_templates_name_a_column_of_the_data(family, pool, tmp_path):
    (run,) = choose(family, pool, tmp_path / "x", methods=["ltd"], budget=6, option=["templates=template"])
    assert all(i % 3 for i in run.indices)
    with pytest.raises(
        ValueError, match=r"templates=tempate.?: row 0 has no such column .did you mean 'template'"
    ):
        choose(family, pool, tmp_path / "y", methods=["ltd"], budget=6, option=["templates=tempate"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"quality_model=MODEL .* or quality_column=COLUMN"),
        ({"quality_column": "quality"}, "say above which a row is good, as in option=.alpha=3"),
        (
            {"quality_column": "qualities", "option": ["alpha=1"]},
            r"row 0 has no such column .did you mean 'quality'",
        ),
        (
            {"quality_column": "template", "option": ["alpha=1"]},
            "row 0 has 'b'; qualities are numbers from 0 on",
        ),
        ({"quality_model": "nowhere/at/all"}, "quality_model=.nowhere/at/all.: there is no such folder"),
        (
            {"quality_model": "TARGET"},
            "needs a sequence-classification model of one logit; found LlamaForCausalLM",
        ),
        (
            {"quality_column": "quality", "quality_model": "x"},
            "give quality_model or quality_column, one of them",
        ),
        ({"quality_column": "quality", "option": ["alpha=1", "beta=low"]}, "beta=low.: beta is a number"),
    ],
)
def test_what_mods_lacks_is_named_before_any_model_loads(
    settings, message, family, pool, tmp_path, monkeypatch
):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "load_model", load)
    settings = {
        name: str(family / "target") if value == "TARGET" else value for name, value in settings.items()
    }
    with pytest.raises(ValueError, match=message):
        choose(family, pool, tmp_path / "x", methods=["mods"], budget=6, **settings)
    assert not (tmp_path / "x").exists()


def test_plain_texts_have_no_prompts_to_be_answered(family, tmp_path):
    rows = [{"text": f"a text, the {i}th"} for i in range(8)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"method=.whisper. has prompts answered, and plain texts have none"):
        choose(family, tmp_path / "t.jsonl", tmp_path / "x", methods=["whisper"], budget=2, columns=None)


def test_prompts_alone_end_where_the_last_answer_begins(family):
    tokenizer = AutoTokenizer.from_pretrained(family / "draft")
    pool = tokenise(EXAMPLES, tokenizer, 100)
    prompts = pool.prompts_alone()
    assert (
        tokenizer.decode(prompts.ids(1)) == "<|im_start|>user\nWhat is 1?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompts.lengths.tolist() == (pool.lengths - pool.response_tokens()).tolist()
