"""Nobody's files: an input is never written over, and a folder that isn't ours is left alone."""

import json
import os

import pytest

import staff
from family import config_of, make_rows, write_pool
from staff import jobs
from staff.config import FinetuneConfig, ScoreConfig
from staff.runs import summary as console

HALF = {"method": "random", "pruning_rate": 0.5}


def test_a_coreset_is_no_input_of_the_run_that_wrote_it(tmp_path):
    pool = write_pool(tmp_path / "pool.jsonl")
    run = staff.select(str(pool), output=tmp_path / "x", **HALF)
    coreset = run.path / "coreset.jsonl"
    before = coreset.read_bytes()
    for kind in (os.link, os.symlink):
        kind(coreset, tmp_path / f"{kind.__name__}.jsonl")
    for name in ("x/coreset.jsonl", "link.jsonl", "symlink.jsonl"):
        with pytest.raises(ValueError, match=r"coreset.jsonl|link.jsonl.*it would be overwritten"):
            staff.select(str(tmp_path / name), output=tmp_path / "x", update=True, **HALF)
        assert coreset.read_bytes() == before


def test_a_run_may_take_a_file_from_beside_it(tmp_path):
    pool = write_pool(tmp_path / "pool.jsonl")
    first = staff.select(str(pool), output=tmp_path / "x", **HALF)
    assert len(staff.select(str(first.path / "coreset.jsonl"), output=tmp_path / "y", **HALF).indices) == 15
    with pytest.raises(ValueError, match=r"is a run's folder; name its coreset: .*x/coreset.jsonl"):
        staff.select(str(first.path), output=tmp_path / "z", **HALF)


def test_scores_are_not_written_over_what_they_are_of(family, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(make_rows(6)), tmp_path / "rows.parquet")
    before = (tmp_path / "rows.parquet").read_bytes()
    shared = {"data": str(tmp_path / "rows.parquet"), "model": str(family / "draft")}
    with pytest.raises(ValueError, match="is the output itself: it would be overwritten"):
        jobs.score(config_of(ScoreConfig, output=str(tmp_path / "rows.parquet"), **shared))
    assert (tmp_path / "rows.parquet").read_bytes() == before
    with pytest.raises(ValueError, match="it would be overwritten"):
        jobs.finetune(config_of(FinetuneConfig, output=str(family / "draft"), **shared))


def test_a_folder_with_a_work_folder_in_it_is_somebodys_own(tmp_path):
    theirs = tmp_path / "project"
    (theirs / "work" / "model-v1").mkdir(parents=True)
    (theirs / "config.yaml").write_text("mine")
    (theirs / "work" / ".notes.7").write_text("mine")
    before = sorted(theirs.rglob("*"))
    with pytest.raises(ValueError, match="holds files that are not a run's"):
        staff.select(make_rows(6), output=theirs, **HALF)
    assert sorted(theirs.rglob("*")) == before
    assert (theirs / "config.yaml").read_text() == "mine"


def test_a_run_of_an_earlier_version_is_refused_by_name(tmp_path):
    old = tmp_path / "old"
    (old / "work").mkdir(parents=True)
    (old / "work" / "begun.json").write_text(json.dumps({"settings": {}, "inputs": {}}))
    with pytest.raises(ValueError, match=r"no .staff.json.*name an empty or a new folder"):
        staff.select(make_rows(6), output=old, **HALF)


def test_a_grid_killed_before_its_tables_gets_them(tmp_path):
    grid = {"methods": ["random"], "pruning_rates": [0.5, 0.75], "output": tmp_path / "x"}
    staff.select_grid(make_rows(8), **grid)
    table = (tmp_path / "x" / "overlap.csv").read_bytes()
    (tmp_path / "x" / "overlap.csv").unlink()
    staff.select_grid(make_rows(8), **grid)
    assert (tmp_path / "x" / "overlap.csv").read_bytes() == table


def test_what_a_terminal_would_obey_is_shown():
    assert console.visible("a\x1b[31mred\rb\u202e\n\u00e9") == "a\\x1b[31mred\\rb\\u202e\n\u00e9"


def test_an_option_of_the_wrong_kind_is_told_before_anything_is_read():
    with pytest.raises(ValueError, match="num_strata is a number, as in num_strata=50"):
        staff.select("nothing.jsonl", method="ccs", pruning_rate=0.5, target="t", option=("num_strata=many",))
