"""A fine-tuning that can be watched: its log, what is held out, the merged model, and what is known before."""

import json
import os

import numpy as np
import pytest
import torch

from family import config_of, make_rows, run_staff, write_pool
from staff import jobs
from staff.bars import Bars
from staff.config import FinetuneConfig
from staff.files import sealed
from staff.models.finetune import train_lora
from tiny import make_model, make_pool


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def own_loss(model, pool):
    losses = []
    for i in range(len(pool)):
        ids = torch.tensor(pool.ids(i), dtype=torch.int64)[None]
        labels = torch.where(torch.tensor(pool.response(i)), ids, -100)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        losses.append(
            torch.nn.functional.cross_entropy(logits[:-1], labels[0, 1:], ignore_index=-100, reduction="sum")
        )
    return float(sum(losses) / pool.response_tokens().sum())


def tune(output, **settings):
    return train_lora(
        make_model("llama", torch.float32),
        make_pool((6, 9, 5, 8, 7)),
        np.arange(5),
        output,
        **{"epochs": 3, "batch_size": 2, "lora_rank": 2, "learning_rate": 1e-2, **settings},
    )


def test_the_log_has_a_line_a_step_and_what_was_held_out_before_and_after_every_epoch(tmp_path):
    told, held_out = [], make_pool((11, 4, 9, 6, 7, 12))
    log = tmp_path / "log.jsonl"
    model = tune(tmp_path / "a", log=log, held_out=held_out, on_progress=lambda *n: told.append(n))
    lines = lines_of(log)
    steps, judged = ([line for line in lines if name in line] for name in ("loss", "eval_loss"))
    assert [line["step"] for line in steps] == list(range(1, 10))
    assert [line["step"] for line in judged] == [0, 3, 6, 9]
    assert judged[0]["eval_loss"] == pytest.approx(
        own_loss(make_model("llama", torch.float32), held_out), rel=1e-5
    )
    assert judged[-1]["eval_loss"] == pytest.approx(own_loss(model, held_out), rel=1e-5)
    assert sum(line["tokens"] for line in steps) == 3 * (6 + 9 + 5 + 8 + 7)
    assert max(line["learning_rate"] for line in steps) == 1e-2
    assert all(line["seconds"] > 0 and line["grad_norm"] > 0 for line in steps)
    assert [n[:2] for n in told] == [(step, 9) for step in range(1, 10)]
    assert told[-1][2].startswith(
        f"loss {steps[-1]['loss']:.3f}, held out {judged[-2]['eval_loss']:.3f}, rate"
    )
    plain = tmp_path / "plain"
    tune(plain)
    assert (plain / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "a" / "adapter_model.safetensors"
    ).read_bytes(), "watching changes nothing"


def test_a_killed_fine_tunings_log_is_mended_when_it_goes_on(tmp_path):
    log = tmp_path / "log.jsonl"
    settings = {"log": log, "held_out": make_pool((11, 4)), "checkpoint_seconds": 0}

    class Killed(Exception):
        pass

    def stop(done, total, figures):
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        tune(tmp_path / "a", on_progress=stop, **settings)
    with open(log, "a") as file:
        file.write('{"step": 5, "loss": 1.')  # cut off in the middle
    tune(tmp_path / "a", **settings)
    lines = lines_of(log)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 10))
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3, 6, 9]


def settings_of(family, tmp_path, **more):
    data = write_pool(tmp_path / "pool.jsonl", 12)
    given = {"data": (str(data),), "model": str(family / "target"), "output": str(tmp_path / "tuned")}
    return config_of(FinetuneConfig, **given, epochs=1, learning_rate=1e-2, dtype="float32", **more)


def test_a_fine_tuning_leaves_its_log_a_picture_and_a_merged_model(family, tmp_path):
    held_out = tmp_path / "held.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in make_rows(16)[12:]))
    config = settings_of(family, tmp_path, eval_data=[str(held_out)], merge=True)
    path = jobs.finetune(config)
    assert [line["step"] for line in lines_of(path / "log.jsonl") if "eval_loss" in line] == [0, 2]
    assert (path / "loss.png").read_bytes().startswith(b"\x89PNG")
    merged = path / "merged"
    assert sealed(merged)
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        one = AutoPeftModelForCausalLM.from_pretrained(path)(input_ids=ids).logits
        other = AutoModelForCausalLM.from_pretrained(merged)(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(family / "target")(input_ids=ids).logits
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert (one - base).abs().max() > 1e-2
    assert AutoTokenizer.from_pretrained(merged).chat_template
    before = (merged / "model.safetensors").stat().st_mtime_ns
    jobs.finetune(config)
    assert (merged / "model.safetensors").stat().st_mtime_ns == before, "it is there already"


def test_a_finished_fine_tuning_is_merged_later_without_tuning_again(family, tmp_path, monkeypatch):
    path = jobs.finetune(settings_of(family, tmp_path, lora_targets=["lm_head", "q_proj"]))
    monkeypatch.setattr("staff.models.finetune.train_lora", None)
    jobs.finetune(settings_of(family, tmp_path, lora_targets=["lm_head", "q_proj"], merge=True))
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(path / "merged")
    base = AutoModelForCausalLM.from_pretrained(family / "target")
    embeddings = [model.get_input_embeddings().weight for model in (merged, base)]
    assert torch.equal(*embeddings), "an adapter on a tied head leaves the embeddings as they are"
    ids = torch.arange(3, 40)[None]
    import warnings

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        one = AutoPeftModelForCausalLM.from_pretrained(path)(input_ids=ids).logits
    torch.testing.assert_close(one, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "missing", "said"),
    [
        ({"report_to": "wandb"}, "wandb", "--report-to wandb needs the wandb package: pip install wandb"),
        ({"load_in": "4bit"}, "bitsandbytes", "--load-in 4bit needs the bitsandbytes package"),
    ],
)
def test_what_is_missing_is_known_before_any_work(family, tmp_path, settings, missing, said, monkeypatch):
    from importlib import util

    found = util.find_spec
    for place in ("staff.jobs.find_spec", "staff.models.files.find_spec"):
        monkeypatch.setattr(place, lambda name: None if name == missing else found(name))
    with pytest.raises(ValueError, match=said):
        jobs.finetune(settings_of(family, tmp_path, **settings))
    assert not (tmp_path / "tuned").exists()


def test_a_quantised_model_is_not_merged_into(family, tmp_path):
    config = json.loads((family / "target" / "config.json").read_text())
    (tmp_path / "q").mkdir()
    for path in (family / "target").iterdir():
        os.link(path, tmp_path / "q" / path.name)
    (tmp_path / "q" / "config.json").unlink()
    (tmp_path / "q" / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "x"}})
    )
    given = settings_of(family, tmp_path, merge=True)
    with pytest.raises(ValueError, match=r"--merge: .* is quantised already \(x\); leave --merge away"):
        jobs.finetune(
            config_of(FinetuneConfig, data=given.data, model=str(tmp_path / "q"), output="x", merge=True)
        )


def test_the_trainer_is_told_whom_to_report_to(family, tmp_path, monkeypatch):
    told = {}
    monkeypatch.setattr("staff.jobs.find_spec", lambda name: True)
    monkeypatch.setattr(
        "staff.models.finetune.train_lora", lambda *args, **settings: told.update(settings) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        jobs.finetune(settings_of(family, tmp_path, report_to="trackio"))
    assert told["report"] == {"report_to": "trackio", "run_name": "tuned"}


def test_a_line_in_a_plain_output_has_the_figures_and_the_time_left(family, tmp_path, capsys):
    data = write_pool(tmp_path / "pool.jsonl", 12)
    flags = ["--data", data, "--model", family / "target", "--output", tmp_path / "t", "--epochs", 2]
    done = run_staff("finetune", *flags, "--batch-size", 4)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("fine-tune the model: 5 of 6")]
    assert len(lines) == 1
    assert "left, loss " in lines[0]
    assert lines[0].endswith("tokens/s")
    with Bars() as bars:
        bars("read", 0, 1)
    assert capsys.readouterr().err == "read\n"


def test_a_notebook_is_shown_the_stages_in_place(monkeypatch):
    import types

    shown = []
    cell = types.SimpleNamespace(update=lambda page: shown.append(page))
    display = types.SimpleNamespace(HTML=str, display=lambda page, display_id: cell)
    monkeypatch.setitem(__import__("sys").modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(__import__("sys").modules, "IPython.display", display)
    bars = Bars()
    monkeypatch.setattr(bars, "_console", types.SimpleNamespace(quiet=False, is_jupyter=True))
    with bars:
        for done in (1, 2, 3):
            bars("score <b>", done, 4, "loss 1")
    assert len(shown) == 2, "no more often than the eye takes in"
    assert "score &lt;b&gt;" in shown[-1]
    assert "<td>3 of 4</td>" in shown[-1]
