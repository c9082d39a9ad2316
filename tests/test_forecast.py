"""What a comparison will take, by hand from given speeds; and the command, on tiny models."""

import json

import numpy as np
import pytest

from family import write_pool
from staff import cli
from staff.comparison import forecast as forecasting
from staff.comparison.grid import read_comparison
from staff.models.load import Size
from staff.timing import Look, Speed

YAML = """
target: {family}/target
draft: {family}/draft
tasks:
  sums: {{train: {data}/pool.jsonl, test: {data}/test.jsonl}}
methods:
  random:
  staff:
  loss:
  staff-tuned: {{method: staff, draft_epochs: 2}}
pruning_rates: [0.5, 0.75]
seeds: [1, 2]
select: {{num_regions: 4, verification_budget: 2}}
finetune: {{epochs: 3}}
evaluate: {{max_new_tokens: 4}}
output: {data}/x
"""


@pytest.fixture
def file(family, tmp_path):
    for name, n in (("pool", 40), ("test", 10)):
        write_pool(tmp_path / f"{name}.jsonl", n)
    path = tmp_path / "comparison.yaml"
    path.write_text(YAML.format(family=family, data=tmp_path))
    return path


def test_what_variants_share_is_counted_once_a_seed(file, monkeypatch):
    size, some = Size(10, 1, 1), np.arange(40)
    scores = {"effort": np.linspace(1, 2, 40, dtype=np.float32), "loss": np.ones(40, np.float32)}
    looks = {
        "target": Look(Speed(1.0, 2.0, 5.0), size, 1000, 400, some, scores),
        "draft": Look(Speed(0.1, 0.2), size, 1000, 400, some, scores),
    }
    monkeypatch.setattr(forecasting, "look_at_models", lambda config, rows, tell: (rows, looks))
    monkeypatch.setattr(forecasting, "_time_answers", lambda *_: 0.5)
    found = forecasting.forecast(read_comparison(file))
    (row,) = found["tasks"].values()
    verify = 8 / 40 * 1000
    untuned = 5 + 100 + verify  # random, staff and loss: one pass of the draft, for both seeds
    tuned = 5 + 2 * 200 + 100 + verify
    assert row["models"] == 1 + 2 * (1 + 4 * 2)
    assert row["selection_seconds"] == pytest.approx(untuned + verify + 2 * tuned)
    on_all, each = 3 * 1000 * 2.0, [1.0, *[0.5, 0.25] * 4]
    assert row["finetune_seconds"] == pytest.approx(2 * sum(share * on_all + 5 for share in each))
    assert row["evaluate_seconds"] == pytest.approx(19 * (10 * 4 * 0.5 + 5))
    assert found["seconds"] == pytest.approx(sum(value for name, value in row.items() if name != "models"))


def test_staff_plan_reads_a_comparisons_file(file, capsys):
    cli.plan(["--config", str(file), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["timed"] is True
    assert all(value > 0 for value in found["tasks"]["sums"].values())
    with pytest.raises(ValueError, match="is a comparison, which says all itself; leave out --seed"):
        cli.plan(["--config", str(file), "--seed", "3"])
    said = forecasting.describe_forecast(found)
    assert said.splitlines()[2].split()[:2] == ["sums", "19"]


def test_models_that_are_not_here_are_told_by_their_size(file, family, monkeypatch):
    monkeypatch.setattr("staff.models.files.is_at_hand", lambda name: name.startswith("/"))
    file.write_text(file.read_text().replace(f"{family}/target", "Qwen/Qwen2.5-7B"))
    found = forecasting.forecast(read_comparison(file))
    assert (found["timed"], found["tasks"]["sums"]["evaluate_seconds"]) == (False, None)
    assert "by its size alone" in forecasting.describe_forecast(found)
