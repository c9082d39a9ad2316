"""Efforts taken during the last epoch: those of a scoring pass where the model stands still, whole after a kill, never by accident."""

import dataclasses
import time

import numpy as np
import pytest
import torch

import staff
from family import SETTINGS, write_pool
from staff.config import SelectConfig
from staff.files import SEAL, read_arrays
from staff.methods import METHODS, cost
from staff.models.finetune import finetune
from staff.pipeline import select
from staff.scoring.scorer import Scorer
from test_finetune import LENGTHS, finish
from tiny import make_model, make_pool

STAFF = dataclasses.replace(METHODS["staff"], needs={"scores": "draft/effort_running"})


@pytest.mark.parametrize("layout", ["llama", "phi3", "gpt-neox", "gemma3"])
@pytest.mark.parametrize("scope", ["last-value", "last-block", "linear"])
def test_of_a_model_that_stands_still_they_are_a_scoring_passes_own(layout, scope, tmp_path):
    pool, positions = make_pool(LENGTHS), np.arange(1, len(LENGTHS))  # 43: the last batch is short
    settings = {"epochs": 2, "batch_size": 4, "lora_rank": 2, "learning_rate": 0.0}
    tuned = finetune(make_model(layout, torch.float32), pool, positions, tmp_path, running=scope, **settings)
    expected = Scorer(tuned, scope).scores(pool, positions)["effort"]
    np.testing.assert_allclose(read_arrays(tmp_path / "running.npz")["effort"], expected, rtol=2e-4)


def test_taking_them_changes_no_byte_of_the_adapter(tmp_path):
    pool = make_pool(LENGTHS)
    settings = {"epochs": 2, "batch_size": 4, "lora_rank": 2, "learning_rate": 1e-2}
    for name, scope in (("with", "last-block"), ("without", None)):
        finetune(
            make_model("llama", torch.float32),
            pool,
            np.arange(len(pool)),
            tmp_path / name,
            running=scope,
            **settings,
        )
    with_them, without = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("with", "without")
    )
    assert with_them == without


def start(output, pause):
    from torch import multiprocessing

    def work():
        finetune(
            make_model("llama", torch.float32), make_pool(LENGTHS), np.arange(len(LENGTHS)), output, epochs=2, batch_size=4, lora_rank=2,
            learning_rate=1e-2, checkpoint_seconds=0, running="last-value", on_progress=lambda done, total: time.sleep(pause),
        )  # fmt: skip

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def test_a_run_killed_in_its_last_epoch_ends_with_the_same_efforts(tmp_path):
    assert finish(start(tmp_path / "whole", 0)) == 0
    process, deadline = start(tmp_path / "killed", 0.1), time.monotonic() + 60
    while not any(
        (tmp_path / "killed" / "checkpoints" / f"checkpoint-{step}" / SEAL).exists() for step in range(15, 20)
    ):
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    assert finish(start(tmp_path / "killed", 0)) == 0
    whole, resumed = (read_arrays(tmp_path / name / "running.npz")["effort"] for name in ("whole", "killed"))
    assert np.isfinite(whole).all()
    assert whole.tobytes() == resumed.tobytes()


def test_a_run_that_asks_for_them_makes_no_scoring_pass_over_the_draft(family, tmp_path):
    data = write_pool(tmp_path / "pool.jsonl", 40)
    config = SelectConfig(
        data=str(data),
        target=str(family / "target"),
        draft=str(family / "draft"),
        output=str(tmp_path / "x"),
        method="mine",
        **SETTINGS,
    )
    (run,) = select(config, methods={"mine": STAFF})
    assert "score on the draft" not in run.cost["stages"]
    assert len(run.indices) == 12
    (kept,) = (tmp_path / "x" / "work").glob("draft-*/running.npz")
    np.testing.assert_array_equal(run.scores, read_arrays(kept)["effort"])
    assert cost(STAFF) == "2·T·r + v"


def test_by_default_none_are_taken(family, tmp_path):
    data = write_pool(tmp_path / "pool.jsonl", 24)
    staff.select(
        str(data),
        target=str(family / "target"),
        draft=str(family / "draft"),
        output=tmp_path / "x",
        **SETTINGS,
    )
    assert not list((tmp_path / "x" / "work").glob("*/running.npz"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"draft_epochs": 0.5}, "must be a whole number"),
        ({"draft_epochs": 0}, "must be a whole number"),
        ({"draft_share": 0.5}, "--draft-share 1"),
        ({"scope": "lora"}, "--scope last-value"),
        ({"loss": "sum"}, "--loss mean"),
    ],
)
def test_what_can_not_be_had_is_said_before_any_model_loads(settings, said, tmp_path):
    values = {
        "data": "nowhere.jsonl",
        "target": "nowhere",
        "draft": "nowhere",
        "output": str(tmp_path / "x"),
        "method": "mine",
    }
    with pytest.raises(ValueError, match=said):
        select(SelectConfig(**{**values, **SETTINGS, **settings}), methods={"mine": STAFF})
