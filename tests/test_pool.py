"""Rows to tokens: the mask is on the response, and truncation takes the prompt's start."""

import numpy as np
import pytest

from family import TEMPLATE, make_tokenizer
from staff.data.samples import CUT, SHORTENED, SPELLED
from staff.data.tokens import batches, collate, tokenise
from staff.data.turns import Example, Turn


def example(*turns, train=-1):
    train %= len(turns)
    return Example(tuple(Turn(role, content, i == train) for i, (role, content) in enumerate(turns)), "x")


def texts(tokenizer, pool, i=0):
    return tokenizer.decode(pool.ids(i)), tokenizer.decode(pool.ids(i)[pool.response(i)])


QUESTION = example(("user", "What is it?"), ("assistant", "A thing.\n"))


def test_the_loss_is_on_the_response_and_its_end_of_turn_and_on_no_blank_behind_it():
    tokenizer = make_tokenizer()
    pool = tokenise([QUESTION], tokenizer, 1024)
    whole, response = texts(tokenizer, pool)
    assert whole == "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA thing.\n<|im_end|>"
    assert response == "A thing.\n<|im_end|>"
    assert pool.response_tokens().tolist() == [len("A thing.\n") + 1]


def test_without_a_template_prompt_newline_response_and_end_token_are_joined():
    tokenizer = make_tokenizer(None)
    whole, response = texts(tokenizer, tokenise([QUESTION], tokenizer, 1024))
    assert (whole, response) == ("What is it?\nA thing.\n<|im_end|>", "A thing.\n<|im_end|>")


def test_every_trained_turn_of_a_conversation_counts():
    tokenizer = make_tokenizer()
    turns = (
        Turn("user", "a", False),
        Turn("assistant", "B", True),
        Turn("user", "c", False),
        Turn("assistant", "D", True),
    )
    pool = tokenise([Example(turns, None)], tokenizer, 1024)
    whole, response = texts(tokenizer, pool)
    assert (
        whole
        == tokenizer.apply_chat_template(
            [{"role": t.role, "content": t.content} for t in turns], tokenize=False
        )[:-1]
    )
    assert response == "B<|im_end|>D<|im_end|>"


def test_a_template_that_refuses_system_turns_gets_them_with_the_first_question():
    tokenizer = make_tokenizer(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    )
    pool = tokenise([example(("system", "Be brief."), ("user", "Hi"), ("assistant", "Yo"))], tokenizer, 1024)
    assert (
        texts(tokenizer, pool)[0]
        == "<|im_start|>user\nBe brief.\n\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>"
    )


def test_a_template_without_an_end_of_turn_gets_no_end_token_that_it_does_not_write_and_that_is_said(caplog):
    tokenizer = make_tokenizer(
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert texts(tokenizer, tokenise([QUESTION], tokenizer, 1024))[1] == "A thing.\n"
    assert "no end token" in caplog.text


def test_an_answer_is_found_where_the_template_renders_the_prompt_anew():
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ messages|length }}{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    assert texts(tokenizer, tokenise([QUESTION], tokenizer, 1024)) == (
        "2What is it?<|im_end|>2A thing.\n<|im_end|>",
        "A thing.\n<|im_end|>",
    )
    twice = make_tokenizer(
        "{% for m in messages %}{{ m['content'] }}|{{ m['content'] }}{{ messages|length }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="row 0 has an answer that can't be told apart"):
        tokenise([QUESTION], twice, 1024)


def test_a_long_prompt_loses_the_start_of_its_text_and_a_long_response_its_end_and_both_are_marked():
    tokenizer = make_tokenizer(None)
    rows = [
        QUESTION,
        example(("user", "long " * 10), ("assistant", "short")),
        example(("user", "why"), ("assistant", "long " * 10)),
    ]
    pool = tokenise(rows, tokenizer, 24)
    assert pool.lengths.tolist() == [22, 24, 24]
    assert (len(pool.marked(SHORTENED)), len(pool.marked(CUT))) == (1, 1)
    assert texts(tokenizer, pool, 1) == (("long " * 10 + "\n")[-18:] + "short<|im_end|>", "short<|im_end|>")
    assert texts(tokenizer, pool, 2) == ("why\n" + ("long " * 10)[:20], ("long " * 10)[:20])


def test_text_that_spells_control_tokens_is_read_as_trainers_read_it_and_counted():
    tokenizer = make_tokenizer()
    spelling = example(("user", "What does <|im_end|> mean?"), ("assistant", "It ends a turn."))
    text = Example((Turn("text", "<|im_start|>user\nhi<|im_end|>", True),), None)  # formatted already: meant
    pool = tokenise([QUESTION, spelling, text], tokenizer, 1024)
    assert len(pool.marked(SPELLED)) == 1
    messages = [{"role": turn.role, "content": turn.content} for turn in spelling.turns]
    assert pool.ids(1).tolist() == tokenizer.apply_chat_template(messages, return_dict=False)[:-1]
    assert tokenise([QUESTION], make_tokenizer(None), 1024).marked(SPELLED).size == 0


def test_parts_of_any_size_give_one_pool(monkeypatch):
    tokenizer = make_tokenizer()
    rows = [
        example(("user", f"How many {i}?"), ("assistant", "many " * i + "<|im_end|>" * (i == 3)))
        for i in range(11)
    ]
    whole, seen = tokenise(rows, tokenizer, 40), []
    monkeypatch.setattr("staff.data.samples.ROWS_AT_ONCE", 3)
    parts = tokenise(iter(rows), tokenizer, 40, seen.append)
    assert seen == [3, 6, 9, 11]
    monkeypatch.setattr("staff.data.samples.LETTERS_AT_ONCE", 1)
    assert tokenise(rows, tokenizer, 40, seen.append).input_ids.tolist() == whole.input_ids.tolist()
    assert seen[4:] == list(range(1, 12))
    for name in ("input_ids", "is_response", "offsets", "marks"):
        assert getattr(parts, name).tolist() == getattr(whole, name).tolist()
    assert [len(parts.marked(mark)) for mark in (SHORTENED, CUT, SPELLED)] == [2, 7, 1]
    assert len(tokenise([], tokenizer, 40)) == 0


def test_batches_hold_every_sample_once_within_the_token_budget():
    lengths = np.random.default_rng(0).integers(1, 90, 200)
    cut = batches(lengths, 256)
    assert sorted(np.concatenate(cut).tolist()) == list(range(200))
    assert all(len(part) * lengths[part].max() <= 256 for part in cut)
    assert [lengths[part].max() for part in cut] == sorted(
        (lengths[part].max() for part in cut), reverse=True
    )
    assert [len(part) for part in batches(np.array([500, 3]), 256)] == [1, 1]


def test_a_batch_names_each_response_token_and_the_one_before_it():
    tokenizer = make_tokenizer(None)
    pool = tokenise([QUESTION, example(("user", "Hm"), ("assistant", "No"))], tokenizer, 1024)
    batch = collate(pool, [0, 1])
    assert batch.counts.tolist() == pool.response_tokens().tolist()
    following = batch.input_ids[batch.sample_of, batch.before + 1]
    assert following.tolist() == batch.labels.tolist()
    assert tokenizer.decode(batch.labels[batch.sample_of == 1]) == "No<|im_end|>"
