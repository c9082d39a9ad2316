"""What a summary tells: first in plain words, then in the paper's; and nothing of it vanishes where coresets or
groups are several."""

import json

import pytest

import staff
from family import make_rows
from staff.config import SelectConfig
from staff.runs.summary import grid_table, summary


@pytest.fixture(scope="module")
def rows():
    made = [{**row, "source": "ab"[i % 3 == 0]} for i, row in enumerate(make_rows(60))]
    made[0]["prompt"] = "\x1b[31mred\n" + "long " * 40
    return made


@pytest.fixture(scope="module")
def runs(rows, family, tmp_path_factory):
    """Lengths come with a tokenizer, and scores with a model."""
    models = {"target": str(family / "target"), "draft": str(family / "draft"), "dtype": "float32"}
    folder = tmp_path_factory.mktemp("summary")
    given = {**models, "num_regions": 4, "verification_budget": 6}
    one = staff.select(rows, method="staff", pruning_rate=0.5, output=folder / "one", **given)
    several = staff.select_grid(
        rows,
        methods=["staff", "loss"],
        pruning_rates=[0.5, 0.8],
        group_by="source",
        shares="a=0.9,rest",
        output=folder / "several",
        **given,
    )
    return one, several


def test_it_compares_what_was_kept_with_the_pool_and_shows_a_row_of_each(runs, rows):
    one, _ = runs
    plain, paper = summary(one, SelectConfig(target="t")).split("in the paper's terms")
    for part in ("coreset    30 samples, 50% of the pool", "tokens of the response", "effort on the draft",
                 "source     a: 66.7% of the pool, ", "kept       row ", "dropped    row ", "fidelity   "):  # fmt: skip
        assert part in plain
    assert "V_i" not in plain
    for part in ("regions    4 with samples, of 4", "V_i from", "cost", "train on it: staff finetune"):
        assert part in paper
    for line in plain.splitlines():
        if line.startswith(("kept ", "dropped ")):
            number = int(line.split()[2].rstrip(","))
            assert (number in one.indices) == line.startswith("kept")
            assert rows[number]["response"][:20] in line
    assert "\x1b" not in plain


def test_a_text_of_the_data_is_escaped_and_cut(rows, tmp_path):
    run = staff.select(rows[:2], method="random", budget=2, output=tmp_path / "x")
    told = staff.load_run(run.path)  # of rows in memory nothing can be read again
    assert "kept  " not in summary(told, SelectConfig())
    (tmp_path / "pool.jsonl").write_text(json.dumps(rows[0]) + "\n")
    run = staff.select(tmp_path / "pool.jsonl", method="random", budget=1, output=tmp_path / "y")
    (line,) = [line for line in summary(run, SelectConfig()).splitlines() if line.startswith("kept")]
    assert r"\x1b[31mred long long" in line
    assert "…" in line
    assert len(line) < 200


def test_of_several_coresets_each_has_its_fidelity_its_warnings_and_its_groups(runs):
    _, several = runs
    told = grid_table(several, SelectConfig(target="t", method=("staff", "loss")))
    assert "middle length" in told
    assert "the pool" in told
    assert "fidelity   of staff-0.5, staff-0.8" in told
    shares = next(line for line in told.splitlines() if line.startswith("groups     a: 66.7% of the pool"))
    assert "90.0% asked for" in shares
    for run in several:
        assert f"of {run.path.name}" in shares
    assert "short      of staff-0.5" not in told or "rows asked for" in told
