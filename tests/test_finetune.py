"""Fine-tuning: the order is a pure function, the loss is the responses', a killed run goes on to the same
bytes."""

import json
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import staff
from family import config_of, write_pool
from staff import jobs
from staff.config import FinetuneConfig
from staff.files import SEAL
from staff.models import attention
from staff.models import finetune as training
from staff.models.adapters import add_lora
from staff.models.finetune import sample_order, train_lora
from staff.runs.scorefile import read_weights
from tiny import CHECKED, make_model, make_pool

LENGTHS = tuple(np.random.default_rng(3).integers(4, 30, 44).tolist())


@pytest.mark.parametrize("n", [1, 7, 8, 801, 2000])
def test_an_epochs_order_has_every_sample_once_and_depends_on_seed_and_epoch_alone(n):
    order = sample_order(n, seed=1, epoch=2)
    assert sorted(order.tolist()) == list(range(n))
    assert order.tolist() == sample_order(n, seed=1, epoch=2).tolist()
    if n > 1:
        assert order.tolist() != sample_order(n, seed=1, epoch=3).tolist()
        assert order.tolist() != sample_order(n, seed=2, epoch=2).tolist()


PACKED = {
    **dict.fromkeys(
        (
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
        ),
        True,
    ),
    **dict.fromkeys(("opt", "mixtral", "qwen3-moe", "qwen2-moe", "deepseek-v3"), True),
    **dict.fromkeys(
        ("gemma3", "gemma2-capped", "mistral", "gemma3n-shared"), False
    ),  # a window shorter than the samples
    **dict.fromkeys(("gpt-oss", "bloom", "falcon"), False),
}


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


@pytest.mark.parametrize("layout", CHECKED)
def test_samples_behind_one_another_train_as_they_do_padded(layout, tmp_path, monkeypatch):
    pool, found = make_pool(LENGTHS[:16]), []
    can_pack = attention.can_pack
    answers = []
    monkeypatch.setattr(
        attention,
        "can_pack",
        lambda *args: answers.append(can_pack(*args)) or (answers[-1] and len(answers) == 1),
    )
    for way in ("packed", "padded"):
        model = without_dropout(make_model(layout, torch.float32))
        train_lora(
            model,
            pool,
            np.arange(16),
            tmp_path / way,
            epochs=2,
            batch_size=8,
            lora_rank=2,
            learning_rate=1e-2,
        )
        found.append([p.clone() for name, p in model.named_parameters() if "lora_" in name])
    assert answers[0] == PACKED[layout]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)


def test_a_number_of_steps_stands_in_place_of_epochs(tmp_path):
    told = []
    pool = make_pool((6, 9, 5, 8, 7))
    settings = {"epochs": 100, "batch_size": 2, "lora_rank": 2}
    train_lora(
        make_model("llama", torch.float32),
        pool,
        np.arange(5),
        tmp_path / "s",
        max_steps=7,
        on_progress=lambda *n: told.append(n[:2]),
        **settings,
    )
    assert told[-1] == (7, 7)
    told.clear()
    settings["epochs"] = 7 / 3  # three steps an epoch: the same seven
    train_lora(
        make_model("llama", torch.float32),
        pool,
        np.arange(5),
        tmp_path / "e",
        on_progress=lambda *n: told.append(n[:2]),
        **settings,
    )
    assert told[-1] == (7, 7)
    by_steps, by_epochs = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("s", "e")
    )
    assert by_steps == by_epochs


@pytest.mark.parametrize("layout", ["llama", "llama-tied", "gemma2-capped", "gpt-neox", "gpt2", "phi3"])
def test_tuning_lowers_the_loss_that_the_models_own_forward_reports(layout, tmp_path):
    pool = make_pool(LENGTHS, vocabulary=6)  # three words only: soon learnt
    model = make_model(layout, torch.float32)

    def own_loss(model):
        losses = []
        for i in range(len(pool)):
            ids = torch.tensor(pool.ids(i), dtype=torch.int64)[None]
            labels = torch.where(torch.tensor(pool.response(i)), ids, -100)
            losses.append(model(input_ids=ids, labels=labels).loss.item() * int(pool.response(i).sum()))
        return sum(losses) / pool.response_tokens().sum()

    before = own_loss(model)
    tuned = train_lora(model, pool, np.arange(len(pool)), tmp_path, epochs=8, learning_rate=2e-2, lora_rank=2)
    assert own_loss(tuned) < before - 0.2
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("weights", "count"), [(None, (1, 1, 1, 1)), (np.array([3.0, 1, 2, 2, 99]), (1.5, 0.5, 1, 1))]
)
def test_the_trainers_first_step_has_the_gradient_of_the_mean_over_response_tokens(tmp_path, weights, count):
    pool, steps = make_pool((6, 9, 5, 8, 7)), []
    model = make_model("llama", torch.float32)
    reference = add_lora(make_model("llama", torch.float32), 2, 4, seed=5)
    losses = []
    for i in range(4):
        ids = torch.tensor(pool.ids(i), dtype=torch.int64)[None]
        labels = torch.where(torch.tensor(pool.response(i)), ids, -100)
        logits = reference(input_ids=ids).logits[0]
        summed = torch.nn.functional.cross_entropy(logits[:-1], labels[0, 1:], reduction="sum")
        losses.append(count[i] * summed)
    (sum(losses) / pool.response_tokens()[:4].sum()).backward()
    expected = {name: p.grad.clone() for name, p in reference.named_parameters() if p.grad is not None}

    class Look(training._Watch):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    original, training._Watch = training._Watch, Look
    try:
        settings = {"epochs": 1, "batch_size": 4, "lora_rank": 2, "lora_alpha": 4, "seed": 5}
        train_lora(model, pool, np.arange(4), tmp_path, weights=weights, **settings)
    finally:
        training._Watch = original
    scale = torch.stack([g.norm() for g in expected.values()]).norm().clamp(min=1.0)  # the trainer clips at 1
    assert steps[0].keys() == expected.keys()
    for name, grad in steps[0].items():
        torch.testing.assert_close(grad, expected[name] / scale, rtol=2e-4, atol=1e-6)


def test_weights_have_a_mean_of_one_and_none_takes_a_step_over():
    assert training.levelled(np.array([1.0, 3.0])).tolist() == [0.5, 1.5]
    levelled = training.levelled(np.array([1.0] * 99 + [901.0]))  # the mean is 10
    np.testing.assert_allclose(levelled, np.array([0.1] * 99 + [5.0]) / 0.149)


def test_a_run_says_what_its_rows_count_and_fine_tuning_takes_it_at_its_word(family, tmp_path):
    lines = write_pool(tmp_path / "pool.jsonl", 20).read_text().splitlines()
    rows = [json.loads(line) | {"source": "abbb"[i % 4]} for i, line in enumerate(lines)]
    run = staff.select(
        rows, method="random", budget=8, group_by="source", shares="a=0.5,b=0.5", output=tmp_path / "run"
    )
    settings = {"model": str(family / "target"), "max_steps": 3, "learning_rate": 1e-2}
    data, adapters = str(run.path / "coreset.jsonl"), []
    for name, weights in (("plain", None), ("weighted", str(run.path / "scores.parquet")), ("own", None)):
        if name == "own":
            kept = [(row, 1.25 if rows[row]["source"] == "a" else 3.75) for row in run.indices.tolist()]
            weights = str(tmp_path / "own.csv")
            text = "".join(f"{place},{weight}\n" for place, (_, weight) in enumerate(kept))
            Path(weights).write_text("row,weight\n" + text)
        config = config_of(
            FinetuneConfig, data=data, output=str(tmp_path / name), weights=weights, **settings
        )
        adapters.append((jobs.finetune(config) / "adapter_model.safetensors").read_bytes())
    plain, weighted, own = adapters
    assert plain != weighted == own


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("row,weight\n0,1\n1,0\n", "1 rows have no weight above 0, row 1 the first"),
        ("row,weight\n0,1\n", "1 rows have no weight above 0, row 1 the first"),
        ("row,weight\n0,1\n0,1\n", "a row stands twice"),
        ("row,effort\n0,1\n1,2\n", "needs columns weight and row or id; found row, effort"),
        ("row,weight\n0,a\n1,b\n", "holds something that is no number"),
        ("row,id,weight,selected\n7,a,1,true\n", "1 rows were kept there"),
        ("row,id,weight,selected\n7,a,1,true\n8,c,2,true\n9,b,2,false\n", "their ids differ"),
    ],
)
def test_weights_that_are_not_of_these_rows_are_refused(table, said, tmp_path):
    (tmp_path / "w.csv").write_text(table)
    with pytest.raises(ValueError, match=f"^--weights .*w.csv: .*{said}"):
        read_weights(tmp_path / "w.csv", np.arange(2), ["a", "b"], set())


def test_rows_without_ids_are_taken_for_a_runs_own_only_in_its_folder(tmp_path):
    (tmp_path / "w.csv").write_text("row,weight,selected\n3,1,true\n5,2,false\n8,4,true\n")
    with pytest.raises(ValueError, match="rows without ids can't be told from another run's"):
        read_weights(tmp_path / "w.csv", np.arange(2), [None, None], set())
    found = read_weights(tmp_path / "w.csv", np.arange(2), [None, None], {tmp_path.resolve()})
    assert found.tolist() == [1, 4]
    (tmp_path / "w.csv").write_text("id,weight\nb,2\na,1\n")
    assert read_weights(tmp_path / "w.csv", np.arange(2), ["a", "b"], set()).tolist() == [1, 2]


def start(output, pause):
    def work():
        train_lora(
            make_model("llama", torch.float32), make_pool(LENGTHS), np.arange(len(LENGTHS)), output, epochs=3, batch_size=4,
            learning_rate=1e-2, lora_rank=2, checkpoint_seconds=0, on_progress=lambda *_: time.sleep(pause),
        )  # fmt: skip

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def finish(process):
    process.join()
    return process.exitcode


def test_a_fine_tuning_killed_in_the_middle_of_an_epoch_ends_with_the_same_bytes(tmp_path):
    assert finish(start(tmp_path / "whole", 0)) == 0
    output = tmp_path / "killed"
    process = start(output, 0.1)
    deadline = time.monotonic() + 60
    while not any((output / "checkpoints" / f"checkpoint-{step}" / SEAL).exists() for step in range(15, 20)):
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    (output / "checkpoints" / "checkpoint-99").mkdir()  # one that the kill left unfinished
    assert finish(start(output, 0)) == 0
    whole, resumed = (
        (path / "adapter_model.safetensors").read_bytes() for path in (tmp_path / "whole", output)
    )
    assert whole == resumed
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 2


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_bases_own_dropout_is_off(kind, tmp_path):
    import transformers

    dropouts = {"gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"), "llama": ("attention_dropout",)}[kind]
    adapters = []
    for rate in (0.0, 0.5):
        made = make_model(kind, torch.float32)
        config = made.config.__class__(**{**made.config.to_dict(), **dict.fromkeys(dropouts, rate)})
        config._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        model.load_state_dict(made.state_dict())
        pool = make_pool((6, 9, 5, 8))
        output = tmp_path / str(rate)
        training.train_lora(model, pool, np.arange(4), output, epochs=2, batch_size=2, learning_rate=1e-2)
        adapters.append((output / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize("fault", ["loss", "adapter"])
def test_a_tuning_that_diverges_is_one_message_with_a_cure(tmp_path, fault, monkeypatch):
    model, pool = make_model("llama", torch.float32), make_pool()
    if fault == "adapter":  # the last step's own

        def spoil(self, *args, **kwargs):
            next(p for n, p in self.model.named_parameters() if "lora_B" in n).data.fill_(np.nan)

        monkeypatch.setattr(training.Trainer, "train", spoil)
        said = "fine-tuning diverged, the adapter is nan"
    else:
        said = r"fine-tuning diverged, the loss is nan at step \d+"
    with pytest.raises(ValueError, match=rf"{said}: lower --learning-rate \(now 1e\+30\), and add --update"):
        train_lora(model, pool, np.arange(7), tmp_path, epochs=5, batch_size=2, learning_rate=1e30)
    assert not (tmp_path / "finished.json").exists()


def test_a_tuned_draft_whose_efforts_are_no_numbers_is_told_with_the_cure(family, tmp_path, monkeypatch):
    data = write_pool(tmp_path / "pool.jsonl", 12)

    def overflow(*args, **kwargs):
        raise ValueError("2 samples have an effort that is nan or infinite")

    monkeypatch.setattr("staff.scoring.selfcheck.check", overflow)
    settings = {"target": str(family / "target"), "draft": str(family / "draft"), "pruning_rate": 0.5}
    with pytest.raises(
        ValueError, match=r"the draft after fine-tuning: 2 samples .*; or a lower learning_rate than"
    ):
        staff.select(str(data), output=tmp_path / "x", draft_epochs=0.5, **settings)
    with pytest.raises(ValueError, match=r"^2 samples have an effort"):
        staff.select(str(data), output=tmp_path / "y", **settings)
