"""Evaluation: greedy answers are the model's own whatever the batch, losses are its own, a killed one goes
on."""

import contextlib
import errno
import json
import os
import shutil
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from architectures import tiny_model
from family import TEMPLATE, config_of, make_rows, make_tokenizer, run_staff
from staff import jobs
from staff.comparison.evaluate import evaluate, read_examples, summary_path
from staff.config import EvaluateConfig, FinetuneConfig
from staff.data.rows import read
from staff.data.samples import prompts_of
from staff.data.tokens import tokenise
from staff.models import load as models
from staff.runs import answers

SMALL = {"max_new_tokens": 12, "dtype": "float32"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("test") / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(13)), encoding="utf-8")
    return path


def answer(family, data, output, **settings):
    return evaluate(
        config_of(
            EvaluateConfig,
            **{
                "data": (str(data),),
                "model": str(family / "target"),
                "output": str(output),
                **SMALL,
                **settings,
            },
        )
    )


@pytest.fixture(scope="module")
def finished(family, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("scores") / "x.jsonl"
    return output, answer(family, data, output)


def test_answers_and_losses_are_those_of_the_model_alone_on_one_example(finished, family):
    output, _ = finished
    found = read_examples(output)
    source = models.resolve(str(family / "target"))
    model, tokenizer = (
        models.load_model(source, torch.float32, torch.device("cpu")),
        models.load_tokenizer(source),
    )
    for i, row in enumerate(make_rows(13)):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        said = []
        while len(said) < 12:
            said.append(model(input_ids=torch.tensor([ids + said])).logits[0, -1].argmax().item())
            if said[-1] == tokenizer.eos_token_id:
                break
        assert found["prediction"][i] == tokenizer.decode(said, skip_special_tokens=True).strip()
        assert found["cut"][i] == (said[-1] != tokenizer.eos_token_id)
        whole = torch.tensor(
            [ids + tokenizer(row["response"] + "<|im_end|>", add_special_tokens=False)["input_ids"]]
        )
        loss = model(
            input_ids=whole, labels=torch.where(torch.arange(whole.shape[1]) < len(ids), -100, whole)
        ).loss.item()
        assert found["loss"][i] == pytest.approx(loss, abs=1e-5)
        assert found["reference"][i] == row["response"]
        assert (found["row"][i], found["id"][i], found["prompt_tokens"][i]) == (i, row["id"], len(ids))


def test_the_batch_and_the_file_format_change_nothing(finished, family, data, tmp_path):
    output, summary = finished
    other = answer(family, data, tmp_path / "x.parquet", batch_tokens=150)
    table = pq.read_table(tmp_path / "x.parquet").to_pydict()
    found = read_examples(output)
    assert table["prediction"] == found["prediction"]
    assert table["loss"] == pytest.approx(found["loss"], abs=1e-6)
    assert table["rougeL"] == found["rougeL"]
    assert other["metrics"] == summary["metrics"]


def test_the_summary_names_the_tokenisation_and_agrees_with_the_examples(finished):
    output, summary = finished
    assert summary == json.loads(summary_path(output).read_text())
    assert (
        set(summary["tokenisation"])
        == set(summary["metrics"])
        == {"rouge1", "rouge2", "rougeL", "bleu", "chrf", "exact"}
    )
    found = read_examples(output)
    for name in ("rouge1", "rouge2", "rougeL", "exact"):
        assert summary["metrics"][name] == pytest.approx(np.mean(found[name]))
    assert summary["loss"] == pytest.approx(np.mean(found["loss"]))
    assert (summary["n"], summary["cut"]) == (13, sum(found["cut"]))
    assert not output.with_suffix(".unfinished").exists()


def test_a_finished_evaluation_is_taken_as_it_is_and_a_killed_one_begins_at_the_first_missing_shard(
    finished, family, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(answers, "ROWS_A_SHARD", 4)
    asked = []
    original = answers.Answerer.answer

    def watch(self, prompts):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return original(self, prompts)

    monkeypatch.setattr(answers.Answerer, "answer", watch)
    with pytest.raises(KeyboardInterrupt):
        answer(family, data, tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()
    seen = []
    monkeypatch.setattr(
        answers.Answerer,
        "answer",
        lambda self, prompts: seen.append(len(prompts)) or original(self, prompts),
    )
    summary = answer(family, data, tmp_path / "x.jsonl")
    assert (asked, seen) == ([4, 4], [4, 1])
    assert read_examples(tmp_path / "x.jsonl")["prediction"] == read_examples(finished[0])["prediction"]
    assert answer(family, data, tmp_path / "x.jsonl") == summary
    assert (asked, seen) == ([4, 4], [4, 1])
    (tmp_path / "x.jsonl").write_text("damaged")
    assert answer(family, data, tmp_path / "x.jsonl")["metrics"] == summary["metrics"]


def test_less_memory_means_smaller_batches_and_the_same_answers(
    finished, family, data, tmp_path, monkeypatch
):
    original = answers.Answerer._generate

    def little(self, prompts, **asked):
        if len(prompts) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, prompts, **asked)

    monkeypatch.setattr(answers.Answerer, "_generate", little)
    answer(family, data, tmp_path / "x.jsonl")
    assert read_examples(tmp_path / "x.jsonl")["prediction"] == read_examples(finished[0])["prediction"]


def test_an_adapter_trained_on_the_answers_says_them_and_stops(family, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family / "target")
    model.get_input_embeddings().weight.data.mul_(
        20
    )  # else a frozen head of tiny weights lets no answer become likely
    model.save_pretrained(tmp_path / "target")
    models.load_tokenizer(models.resolve(str(family / "target"))).save_pretrained(tmp_path / "target")
    data = tmp_path / "two.jsonl"
    rows = [{"prompt": "Say so", "response": "so."}, {"prompt": "Say so again", "response": "so."}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"epochs": 80, "learning_rate": 1e-2, "batch_size": 2, "dtype": "float32"}
    adapter = jobs.finetune(
        config_of(
            FinetuneConfig,
            data=(str(data),),
            model=str(tmp_path / "target"),
            output=str(tmp_path / "a"),
            **settings,
        )
    )
    before = answer(family, data, tmp_path / "before.jsonl", model=str(tmp_path / "target"))
    after = answer(family, data, tmp_path / "after.jsonl", model=str(adapter))
    assert after["loss"] < before["loss"] / 5
    assert after["metrics"]["exact"] == 100
    assert after["cut"] == 0


def test_an_adapter_is_found_with_its_base_from_any_folder(family, data, tmp_path, monkeypatch):
    monkeypatch.chdir(family)
    jobs.finetune(
        config_of(
            FinetuneConfig,
            data=(str(data),),
            model="draft",
            output=str(tmp_path / "a"),
            max_steps=1,
            dtype="float32",
        )
    )
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        family / "draft"
    )
    monkeypatch.chdir(tmp_path)
    assert answer(family, data, tmp_path / "x.jsonl", model="a", max_new_tokens=1)["n"] == 13


def test_a_prompt_that_leaves_no_room_loses_its_start(family, tmp_path, caplog):
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"prompt": "x" * 300, "response": "short"}) + "\n")
    summary = answer(family, data, tmp_path / "x.jsonl", max_length=100)
    assert read_examples(tmp_path / "x.jsonl")["prompt_tokens"] == [88]
    assert summary["shortened_prompts"] == 1
    assert "lost the start of their text" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": None}, "--output"),
        ({"output": "x.csv"}, "ends in .jsonl or .parquet"),
        ({"model": "no/such/model/here"}, "there is no such folder"),
        ({"data": ("nothing.jsonl",)}, "nothing.jsonl"),
        ({"max_new_tokens": 1024}, "leaves no room for a prompt"),
        ({"data": ("TEXT",)}, "row 0 has a text and no prompt"),
    ],
)
def test_what_cannot_be_evaluated_is_one_clear_error(settings, message, family, data, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "no prompt"}) + "\n")
    if settings.get("data") == ("TEXT",):
        settings = {"data": (str(text),)}
    values = {
        "data": (str(data),),
        "model": str(family / "target"),
        "output": str(tmp_path / "x.jsonl"),
        **SMALL,
        **settings,
    }
    with pytest.raises(ValueError, match=message):
        evaluate(config_of(EvaluateConfig, **values))
    assert {path.name for path in tmp_path.iterdir()} == {"text.jsonl"}


def test_the_command_prints_what_was_found_and_how_it_was_counted(family, data, tmp_path):
    model = family / "draft"
    flags = ("--data", data, "--model", model, "--max-new-tokens", "4", "--output", tmp_path / "x.jsonl")
    result = run_staff("evaluate", *flags)
    assert result.returncode == 0, result.stderr
    assert "examples   13" in result.stdout
    assert "rougeL" in result.stdout
    assert "sacrebleu" in result.stdout


class Killed(BaseException):
    pass


def test_a_full_disk_is_one_message_at_every_file_and_the_same_command_goes_on(
    finished, family, data, tmp_path, monkeypatch
):
    whole, number, last = read_examples(finished[0]), [0], [0]
    replace = os.replace

    def full(source, target):
        number[0] += 1
        if number[0] == last[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    said = []
    while not (tmp_path / "x.summary.json").exists():
        number[0], last[0] = 0, last[0] + 1
        try:
            answer(family, data, tmp_path / "x.jsonl")
        except ValueError as error:
            said.append(str(error))
    assert len(said) >= 5  # what goes in, hashes, shard, examples, summary
    assert all("the disk is full" in message and "\n" not in message for message in said)
    assert read_examples(tmp_path / "x.jsonl") == whole
    assert {path.name for path in tmp_path.iterdir()} == {"x.jsonl", "x.summary.json"}


def test_killed_behind_any_file_it_ends_with_the_same_rows_and_counts_no_second_less(
    finished, family, data, tmp_path, monkeypatch
):
    replace, writes = os.replace, [0]
    for last in range(1, 40):
        writes[0] = 0

        def kill(source, target, last=last):
            replace(source, target)
            writes[0] += 1
            if writes[0] == last:
                raise Killed

        output = tmp_path / str(last) / "x.jsonl"
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(os, "replace", kill)
            answer(family, data, output)
        summary = answer(family, data, output)
        assert summary["seconds"] > 0
        assert read_examples(output) == read_examples(finished[0])
        assert {path.name for path in output.parent.iterdir()} == {"x.jsonl", "x.summary.json"}
        if writes[0] < last:
            return
    pytest.fail("it writes more files than were tried")


def test_a_separator_of_lines_inside_an_answer_ends_no_row(family, tmp_path):
    rows = [{"prompt": "Name\u2028it", "response": f"one\u2028two\x85{i}\x0c"} for i in range(3)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    for output in (tmp_path / "x.jsonl", tmp_path / "x.parquet"):
        summary = answer(family, tmp_path / "data.jsonl", output, max_new_tokens=2)
        assert read_examples(output)["reference"] == [row["response"].strip() for row in rows]
        assert answer(family, tmp_path / "data.jsonl", output, max_new_tokens=2) == summary


CALLED = "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
THINKS = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] }}" + CALLED).replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}",
)
CHANNELS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}<pad>final<|message|>"
    "{% else %}<|message|>{% endif %}{{ m.content }}" + CALLED + "<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


@pytest.mark.parametrize("template", [THINKS, CHANNELS])
def test_a_model_that_says_what_it_was_trained_on_gets_full_marks_whatever_its_template_puts_before_it(
    template, family, tmp_path, monkeypatch
):
    shutil.copytree(family / "target", tmp_path / "target")
    tokenizer = make_tokenizer(template)
    tokenizer.save_pretrained(tmp_path / "target")
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock"}}]}
    roles = (("user", "prompt"), ("assistant", "response"))
    rows = [{"messages": [{"role": r, "content": row[name]} for r, name in roles]} for row in make_rows(5)]
    given = tmp_path / "chats.jsonl"
    rows.append({"messages": [{"role": "user", "content": "What is the time?"}, call]})
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = list(read(given).examples())
    pool, (prompts, _, _) = tokenise(examples, tokenizer, 1000), prompts_of(examples, tokenizer, 1000)
    by_heart = {tuple(prompt): pool.ids(i)[len(prompt) :] for i, prompt in enumerate(prompts)}

    def say(self, asked):
        said = [by_heart[tuple(prompt)] for prompt in asked]
        behind = max(map(len, asked)), max(map(len, said))
        return torch.tensor(np.array([np.pad(each, (behind[0], behind[1] - len(each))) for each in said]))

    monkeypatch.setattr(answers.Answerer, "_generate", say)
    monkeypatch.setattr(answers.Answerer, "_is_the_same", lambda *_: True)
    summary = answer(tmp_path, given, tmp_path / "x.jsonl", max_new_tokens=100)
    assert {summary["metrics"][name] for name in ("exact", "rougeL")} == {100}
    said = read_examples(tmp_path / "x.jsonl")["prediction"]
    assert said[:-1] == [e.turns[-1].content for e in examples[:-1]]
    assert said[-1] == '<call>{"name": "clock"}</call>'


class Numbers:
    """Token ids as text."""

    eos_token_id, pad_token_id, chat_template = 2, 0, None
    all_special_ids: ClassVar = [0, 1, 2]
    added_tokens_decoder: ClassVar = {}

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(map(str, ids))


@pytest.mark.parametrize(
    ("kind", "together"),
    [
        ("rwkv", "one by one"),
        ("recurrent_gemma", "of one length"),
        ("mamba", "any"),
        ("llama", "any"),
        ("gpt2", "any"),
    ],
)
def test_an_answer_is_that_of_the_prompt_alone_whatever_the_model_makes_of_padding(
    kind, together, monkeypatch, caplog
):
    monkeypatch.setattr("staff.data.chat.scaffold", lambda tokenizer: "")
    monkeypatch.setattr("staff.data.chat.control_tokens", lambda tokenizer: None)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 97, n).astype(np.int32) for n in (3, 17, 8, 5, 17, 26, 8, 11)]
    answerer = answers.Answerer(tiny_model(kind).float(), Numbers(), 2, 6, 4096)
    found = answerer.answer(prompts)["prediction"]
    assert found == [answerer.answer([prompt])["prediction"][0] for prompt in prompts]
    assert answerer.together == together
    assert (f"or padding: prompts are taken {together}" in caplog.text) == (together != "any")
    if together != "any":
        answerer.together = "any"
        assert answerer.answer(prompts)["prediction"] != found
