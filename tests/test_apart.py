"""Fine-tuning by two processes that share each step: the loss curve of one process."""

import json
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from family import config_of, make_rows
from staff import jobs
from staff.config import FinetuneConfig
from staff.models import apart
from staff.models.files import ADAPTER

PROCESSES = pytest.mark.skipif(os.environ.get("STAFF_SOAK") != "1", reason="ten seconds each: make soak")


def tune(folder, family, processes, **settings):
    """The losses of the steps, and the adapter's weights."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_rows(13)))
    plain = {"epochs": 3, "batch_size": 4, "learning_rate": 1e-2, "dtype": "float32"}
    output = folder / str(processes)
    named = {"data": (str(data),), "model": str(family / "draft"), "output": str(output)}
    jobs.finetune(config_of(FinetuneConfig, processes=processes, **{**named, **plain, **settings}))
    told = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in told if "loss" in line], load_file(output / ADAPTER[1])


class Forked:
    """One process in place of those that accelerate launches, without importing everything again."""

    def __init__(self, command, **_):
        self.process = multiprocessing.get_context("fork").Process(
            target=apart.main, args=(Path(command[-1]),)
        )
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        self.returncode = self.process.exitcode
        return self.returncode


def test_a_process_takes_up_what_it_was_left_and_tells_what_ended_it(family, tmp_path, monkeypatch):
    one, weights = tune(tmp_path, family, 1)
    monkeypatch.setattr(apart, "subprocess", SimpleNamespace(Popen=Forked, DEVNULL=None))
    other, others = tune(tmp_path, family, 2)
    assert other == one
    assert all((others[name] == matrix).all() for name, matrix in weights.items())
    assert not (tmp_path / "2" / "work" / "launch").exists()
    with pytest.raises(ValueError, match="in 2 processes ended: fine-tuning diverged, the loss is nan"):
        tune(tmp_path / "2", family, 2, learning_rate=1e30)


@PROCESSES
def test_two_processes_have_the_loss_curve_of_one_at_the_same_global_batch(family, tmp_path):
    """13 samples in steps of 4: the last step of an epoch has one, and one process then has none."""
    one, weights = tune(tmp_path, family, 1)
    two, others = tune(tmp_path, family, 2)
    assert len(one) == 12
    np.testing.assert_allclose(two, one, rtol=2e-4)
    assert one[-1] < one[0]
    for name, matrix in weights.items():
        np.testing.assert_allclose(others[name], matrix, atol=2e-3, err_msg=name)
    assert not (tmp_path / "2" / "work" / "launch").exists()


@PROCESSES
def test_what_ends_the_processes_is_said(family, tmp_path):
    with pytest.raises(
        ValueError, match="fine-tuning in 2 processes ended: fine-tuning diverged, the loss is nan"
    ):
        tune(tmp_path, family, 2, learning_rate=1e30)
