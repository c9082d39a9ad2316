"""Fine-tuning: the order is a pure function, the loss is the responses', a killed run goes on to the same bytes."""

import json
import multiprocessing
import time

import numpy as np
import pytest
import torch

from staff import finetune as training
from staff.adapters import add_lora
from staff.finetune import batch_order, finetune
from staff.store import SEAL
from tiny import make_model, make_pool

LENGTHS = tuple(np.random.default_rng(3).integers(4, 30, 44).tolist())


@pytest.mark.parametrize("n", [1, 7, 8, 801, 2000])
def test_an_epochs_order_has_every_sample_once_and_depends_on_seed_and_epoch_alone(n):
    lengths = np.random.default_rng(n).integers(1, 1000, n)
    order = batch_order(lengths, 8, seed=1, epoch=2)
    assert sorted(order.tolist()) == list(range(n))
    assert order.tolist() == batch_order(lengths, 8, seed=1, epoch=2).tolist()
    if n > 8:
        assert order.tolist() != batch_order(lengths, 8, seed=1, epoch=3).tolist()
        assert order.tolist() != batch_order(lengths, 8, seed=2, epoch=2).tolist()


def test_batches_of_an_epoch_hold_samples_of_like_length():
    lengths = np.random.default_rng(0).integers(1, 1000, 2000)
    in_batches = lengths[batch_order(lengths, 8, 0, 0)].reshape(-1, 8)
    padded = (in_batches.max(1, keepdims=True) - in_batches).sum() / in_batches.sum()
    assert padded < 0.05  # in plain random order nine tenths more
    assert np.corrcoef(in_batches.mean(1), np.arange(len(in_batches)))[0, 1] < 0.3  # and long batches do not all come first


def test_a_number_of_steps_stands_in_place_of_epochs(tmp_path):
    told = []
    pool = make_pool((6, 9, 5, 8, 7))
    settings = {"epochs": 100, "batch_size": 2, "lora_rank": 2}
    finetune(
        make_model("llama", torch.float32),
        pool,
        np.arange(5),
        tmp_path / "s",
        max_steps=7,
        on_progress=lambda *n: told.append(n),
        **settings,
    )
    assert told[-1] == (7, 7)
    told.clear()
    settings["epochs"] = 7 / 3  # three steps an epoch: the same seven
    finetune(make_model("llama", torch.float32), pool, np.arange(5), tmp_path / "e", on_progress=lambda *n: told.append(n), **settings)
    assert told[-1] == (7, 7)
    by_steps, by_epochs = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("s", "e"))
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
    tuned = finetune(model, pool, np.arange(len(pool)), tmp_path, epochs=8, learning_rate=2e-2, lora_rank=2)
    assert own_loss(tuned) < before - 0.2
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "checkpoints").exists()


def test_the_trainers_first_step_has_the_gradient_of_the_mean_over_response_tokens(tmp_path):
    pool, steps = make_pool((6, 9, 5, 8)), []
    model = make_model("llama", torch.float32)
    reference = add_lora(make_model("llama", torch.float32), 2, 4, seed=5)
    losses = []
    for i in range(4):
        ids = torch.tensor(pool.ids(i), dtype=torch.int64)[None]
        labels = torch.where(torch.tensor(pool.response(i)), ids, -100)
        logits = reference(input_ids=ids).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], labels[0, 1:], ignore_index=-100, reduction="sum"))
    (sum(losses) / pool.response_tokens().sum()).backward()
    expected = {name: p.grad.clone() for name, p in reference.named_parameters() if p.grad is not None}

    class Look(training._Watch):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    original, training._Watch = training._Watch, Look
    try:
        finetune(model, pool, np.arange(4), tmp_path, epochs=1, batch_size=4, lora_rank=2, lora_alpha=4, seed=5)
    finally:
        training._Watch = original
    scale = torch.stack([g.norm() for g in expected.values()]).norm().clamp(min=1.0)  # the trainer clips at 1
    assert steps[0].keys() == expected.keys()
    for name, grad in steps[0].items():
        torch.testing.assert_close(grad, expected[name] / scale, rtol=2e-4, atol=1e-6)


def start(output, pause):
    def work():
        finetune(
            make_model("llama", torch.float32), make_pool(LENGTHS), np.arange(len(LENGTHS)), output, epochs=3, batch_size=4,
            learning_rate=1e-2, lora_rank=2, checkpoint_seconds=0, on_progress=lambda done, total: time.sleep(pause),
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
    whole, resumed = ((path / "adapter_model.safetensors").read_bytes() for path in (tmp_path / "whole", output))
    assert whole == resumed
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 2
