"""The whole run: what it writes, what the target saw, and that a killed one ends with the same bytes."""

import json
import time

import numpy as np
import pytest

import staff
from family import SETTINGS, config_of, make_rows, run_staff, write_pool
from staff import jobs
from staff.config import FinetuneConfig
from staff.runs import pieces


def choose(family, data, output, **settings):
    settings = {"target": str(family / "target"), "draft": str(family / "draft"), **SETTINGS, **settings}
    return staff.select(data, output=output, **settings)


@pytest.fixture(scope="module")
def finished(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return choose(family, str(write_pool(folder / "pool.jsonl")), folder / "x")


def test_a_run_keeps_m_rows_of_the_users_own_bytes_in_order(finished):
    lines = (finished.path.parent / "pool.jsonl").read_bytes().splitlines(keepends=True)
    assert (finished.path / "coreset.jsonl").read_bytes() == b"".join(lines[i] for i in finished.indices)
    assert len(finished.indices) == 18
    assert (
        np.load(finished.path / "indices.npy").tolist()
        == finished.indices.tolist()
        == sorted(set(finished.indices))
    )
    assert finished.scores["row"].to_pylist() == list(range(60))
    assert finished.scores.schema.field("effort").type == "float"
    kept = [
        row
        for row, is_kept in zip(range(60), finished.scores["selected"].to_pylist(), strict=True)
        if is_kept
    ]
    assert kept == finished.indices.tolist()
    assert [json.dumps(row).encode() for row in finished.coreset] == [
        lines[i].strip() for i in finished.indices
    ]


def test_the_regions_file_and_the_cost_file_say_what_happened(finished):
    header, *lines = (finished.path / "regions.csv").read_text().splitlines()
    assert header == "region,lower,upper,size,verified,ratio,budget,selected,ratio_low,ratio_high,even_budget"
    cells = [line.split(",") for line in lines]
    assert sum(int(row[3]) for row in cells) == 54  # the hardest tenth was set aside
    assert sum(int(row[4]) for row in cells) == len(finished.selection.verified) > 0
    cost = json.loads((finished.path / "cost.json").read_text())
    assert set(cost["stages"]) == {
        "tokenise",
        "fine-tune the draft",
        "load models",
        "score on the draft",
        "verify on the target",
    }
    assert cost["stages"]["score on the draft"]["samples"] == 60
    assert cost["stages"]["verify on the target"]["samples"] == len(finished.selection.verified)
    terms = cost["sum"]
    assert terms["passes"] == pytest.approx(
        (2 * 1 * 1 + 1) * terms["relative_cost"] + len(finished.selection.verified) / 60
    )
    manifest = json.loads((finished.path / "manifest.json").read_text())
    assert (manifest["n"], manifest["m"], manifest["seed"]) == (60, 18, 42)
    assert manifest["fidelity"] == json.loads(json.dumps(finished.fidelity.as_dict()))
    assert (finished.fidelity.verdict, finished.fidelity.spearman) == ("unknown", None)
    assert finished.fidelity.reason.startswith("too few to say: ")


def test_the_target_saw_the_drawn_positions_and_nothing_else(family, tmp_path, monkeypatch):
    from staff.scoring import scorer as score

    seen = {}
    original = score.Scorer.scores

    def watch(self, pool, positions, *args, **kwargs):
        blocks = self.model.config.num_hidden_layers
        seen.setdefault(blocks, []).extend(np.asarray(positions).tolist())
        return original(self, pool, positions, *args, **kwargs)

    monkeypatch.setattr(score.Scorer, "scores", watch)
    monkeypatch.setattr("staff.scoring.selfcheck.check", lambda *_: {"seconds": 0})
    run = choose(family, make_rows(60), tmp_path / "x")
    assert sorted(seen[4]) == run.selection.verified.tolist()  # the target has 4 blocks
    assert sorted(seen[2]) == list(range(60))  # the draft 2
    assert all(region.verified == (3 if region.size > 3 else 0) for region in run.selection.regions)


def test_what_is_verified_serves_every_pruning_rate(finished, family):
    before = finished.cost["stages"]["verify on the target"]["samples"]
    run = choose(family, str(finished.path.parent / "pool.jsonl"), finished.path.parent / "y")
    again = staff.select(
        str(finished.path.parent / "pool.jsonl"), output=run.path, update=True, target=str(family / "target"), draft=str(family / "draft"),
        **{**SETTINGS, "pruning_rate": 0.3},
    )  # fmt: skip
    assert len(again.indices) == 42
    assert again.selection.verified.tolist() == finished.selection.verified.tolist()
    assert again.cost["stages"]["verify on the target"]["samples"] == before  # nothing was scored again
    assert again.cost["stages"]["score on the draft"]["samples"] == 60


def test_a_finished_run_is_taken_as_it_is_and_a_damaged_one_is_mended(finished, family, monkeypatch):
    def again():
        return choose(family, str(finished.path.parent / "pool.jsonl"), finished.path)

    with monkeypatch.context() as patch:
        patch.setattr(pieces, "Pieces", lambda *_: pytest.fail("worked again"))
        taken = again()
    assert taken.indices.tolist() == finished.indices.tolist()
    assert taken.selection.regions == finished.selection.regions or any(
        np.isnan(r.ratio) for r in taken.selection.regions
    )
    loaded = staff.load_run(str(finished.path))
    assert loaded.scores.equals(finished.scores)
    coreset = finished.path / "coreset.jsonl"
    whole = coreset.read_bytes()
    coreset.write_bytes(whole[:-10])
    again()
    assert coreset.read_bytes() == whole


def test_changed_settings_and_a_changed_pool_are_named_not_mixed(family, tmp_path):
    data = write_pool(tmp_path / "pool.jsonl", 30)
    choose(family, str(data), tmp_path / "x")
    with pytest.raises(ValueError, match="num_regions: 5 -> 6"):
        choose(family, str(data), tmp_path / "x", num_regions=6)
    with open(data, "a") as file:
        file.write(json.dumps({"prompt": "new", "response": "row"}) + "\n")
    with pytest.raises(ValueError, match="data changed since"):
        choose(family, str(data), tmp_path / "x")


@pytest.mark.parametrize("method", ["direct", "random"])
def test_methods_without_a_draft_never_touch_one(method, family, tmp_path):
    models = {} if method == "random" else {"target": str(family / "target")}
    run = staff.select(make_rows(40), output=tmp_path / "x", method=method, pruning_rate=0.5, **models)
    assert len(run.indices) == 20
    assert not list((tmp_path / "x" / "work").glob("draft-*"))
    assert ("score on the target" in run.cost["stages"]) == (method == "direct")


def test_a_self_made_draft_untuned_and_in_scope_lora_runs_through(family, tmp_path):
    run = staff.select(
        make_rows(40),
        output=tmp_path / "x",
        target=str(family / "target"),
        draft="self:2",
        scope="lora",
        **{**SETTINGS, "draft_epochs": 0},
    )
    assert len(run.indices) == 12
    assert run.cost["sum"]["epochs"] == 0
    assert len(run.selection.verified)


def test_a_runs_config_and_its_rows_are_found_from_any_folder(family, tmp_path, monkeypatch):
    home, other = tmp_path / "home", tmp_path / "other"
    for folder in (home, other):
        folder.mkdir()
    monkeypatch.chdir(home)
    write_pool(home / "pool.jsonl", 20)
    (home / "t").symlink_to(family / "target")
    settings = {"method": "direct", "target": "t", "budget": 5, "num_regions": 2}
    run = staff.select("pool.jsonl", output="runs/x", **settings)
    before = (run.path / "manifest.json").read_bytes()
    monkeypatch.chdir(other)
    again = run_staff("select", "--config", home / "runs" / "x" / "config.yaml")
    assert again.returncode == 0, again.stderr
    assert (home / "runs" / "x" / "manifest.json").read_bytes() == before, "it is the finished run"
    assert len(staff.load_run(home / "runs" / "x").coreset) == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "staf"}, "method staf: there is no such method; did you mean 'staff'?"),
        ({"pruning_rate": None}, "say how much to keep"),
        ({"budget": 99, "pruning_rate": None}, "only 12 usable rows"),
        ({"pruning_rate": 0.99}, "leaves none of 12 rows"),
        ({"target": "no/such/folder"}, "there is no such folder or .gguf file"),
        ({"target": ""}, "target"),
        ({"draft": "nowhere.gguf"}, "draft='nowhere.gguf': there is no such file"),
        ({"draft": None}, "needs a small draft"),
        ({"draft": "self:9"}, "only 4 blocks"),
        ({"device": "cuda:7"}, "not to be had here"),
    ],
)
def test_what_cannot_work_is_one_clear_error(settings, message, family, tmp_path):
    with pytest.raises(ValueError, match=message):
        choose(family, make_rows(12), tmp_path / "x", **settings)
    assert not (tmp_path / "x" / "coreset.jsonl").exists()


def test_a_pool_of_three_rows_works(family, tmp_path):
    run = choose(family, make_rows(3), tmp_path / "x")
    assert len(run.indices) == 1
    assert not len(run.selection.verified)


def test_an_empty_response_stops_the_run_or_is_left_out_and_listed(family, tmp_path):
    rows = make_rows(20)
    rows[7]["response"] = ""
    with pytest.raises(ValueError, match="row 7"):
        choose(family, rows, tmp_path / "x")
    run = choose(family, rows, tmp_path / "y", on_bad_row="skip")
    assert run.manifest["n"] == 19
    assert 7 not in run.indices
    assert run.indices.max() > 7  # numbers stay those of the input
    assert json.loads((tmp_path / "y" / "skipped.jsonl").read_text())["row"] == 7


def test_a_model_can_be_fine_tuned_on_the_coreset_and_loaded_again(finished, family, tmp_path):
    from peft import AutoPeftModelForCausalLM

    config = config_of(
        FinetuneConfig,
        data=(str(finished.path / "coreset.jsonl"),),
        model=str(family / "target"),
        output=str(tmp_path / "a"),
        epochs=1,
    )
    path = jobs.finetune(config)
    began = time.monotonic()
    assert jobs.finetune(config) == path
    assert time.monotonic() - began < 2
    with pytest.raises(ValueError, match=r"is no run's folder: another command made it \(adapter\)"):
        staff.load_run(path)
    assert AutoPeftModelForCausalLM.from_pretrained(path).peft_config["default"].r == 8
