"""Fine-tuning by two processes that share each step: the loss curve of one process."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from family import config_of, make_rows
from staff import jobs
from staff.config import FinetuneConfig
from staff.models.files import ADAPTER


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


def test_what_ends_the_processes_is_said(family, tmp_path):
    with pytest.raises(
        ValueError, match="fine-tuning in 2 processes ended: fine-tuning diverged, the loss is nan"
    ):
        tune(tmp_path, family, 2, learning_rate=1e30)
