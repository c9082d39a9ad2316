"""What a user gets by typing nothing, and what --preset paper keeps as it was."""

import json
import sys

import numpy as np
import pytest

import staff
from family import RESULTS, make_rows, write_pool
from staff import graph
from staff.config import DEFAULT_METHOD, PRESETS, SelectConfig
from staff.methods import METHODS
from staff.report.facts import BY_SCORES
from staff.report.run_page import run_page
from staff.runs.summary import HONEST, summary


@pytest.fixture(scope="module")
def models(family):
    return {"target": str(family / "target"), "draft": str(family / "draft")}


@pytest.fixture(scope="module")
def untold(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("default")
    write_pool(folder / "pool.jsonl", 60)
    return staff.select(str(folder / "pool.jsonl"), pruning_rate=0.8, output=folder / "x", **models)


def test_the_default_asks_the_target_nothing_and_costs_the_drafts_pass_and_that_over_the_answers(untold):
    assert untold.manifest["method"] == DEFAULT_METHOD
    assert set(untold.cost["stages"]) >= {"score on the draft", "score on the draft without prompts"}
    assert not any("target" in stage for stage in untold.cost["stages"])
    assert untold.cost["passes"] == pytest.approx(untold.cost["sum"]["passes"], rel=0.3)
    assert untold.cost["sum"]["verified_share"] == 0
    assert 0 < untold.cost["sum"]["alone"] < 1
    assert untold.cost["verdict"].startswith("the draft is the cheaper way")
    assert set(untold.scores["weight"].to_pylist()) == {5.0}
    said = summary(untold, SelectConfig())
    assert all(line in said for line in HONEST)
    assert "+ u) r + v" in said


def test_the_default_is_the_tables_own_entry_on_the_runs_own_numbers(untold, models, tmp_path):
    table = untold.scores.to_pydict()
    features = {}
    derive = graph.derive

    def watch(made, array, seed):
        features[made] = derive(made, array, seed)
        return features[made]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "derive", watch)
        again = staff.select(make_rows(60), pruning_rate=0.8, output=tmp_path / "x", **models)
    assert again.indices.tolist() == untold.indices.tolist()
    given = {"scores": np.array(table["effort"]), "clusters": features["unit_clusters"]}
    own = METHODS[DEFAULT_METHOD].select(60, budget=12, rng=np.random.default_rng(42), **given)
    assert (
        own.indices.tolist() == untold.indices.tolist()
    )  # a random draft's prompts hardly matter: no suspects


def test_rows_that_look_wrong_are_counted_and_have_no_weight(models, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys.modules["staff.methods.spread"], "READS_PROMPTS", 9
    )  # of a draft of random weights
    run = staff.select(make_rows(40), pruning_rate=0.8, output=tmp_path / "x", **models)
    weights = run.scores["weight"].to_pylist()
    suspects = [row for row, weight in enumerate(weights) if weight is None]
    assert suspects
    assert run.manifest["suspects"] == len(suspects)
    assert set(suspects).isdisjoint(run.indices)
    assert f"{len(suspects)} rows look wrong" in summary(run, SelectConfig())


def test_plain_texts_have_no_prompts_and_ones_own_scores_need_no_model(models, tmp_path):
    texts = [{"text": row["response"] * 3} for row in make_rows(30)]
    run = staff.select(texts, pruning_rate=0.5, output=tmp_path / "texts", **models)
    assert "score on the draft without prompts" not in run.cost["stages"]
    assert len(run.indices) == 15
    (tmp_path / "s.csv").write_text("row,score\n" + "".join(f"{i},{(7 * i) % 30}\n" for i in range(30)))
    own = staff.select(texts, pruning_rate=0.8, scores=str(tmp_path / "s.csv"), output=tmp_path / "own")
    assert np.diff(sorted((7 * i) % 30 for i in own.indices)).tolist() == [5] * 5  # every fifth by score
    assert BY_SCORES in own.summary()
    assert HONEST[0] not in own.summary()
    assert BY_SCORES in run_page([own.facts], {}, None)


def test_the_papers_preset_is_the_papers_method_to_the_bytes(models, tmp_path):
    small = {
        "pruning_rate": 0.7,
        "learning_rate": 1e-2,
        "draft_epochs": 0.5,
        "num_regions": 5,
        "verification_budget": 3,
    }
    by_name = staff.select(make_rows(40), preset="paper", output=tmp_path / "one", **{**small, **models})
    told = {**PRESETS["paper"], **small, **models, "method": "staff"}
    by_hand = staff.select(make_rows(40), output=tmp_path / "two", **told)
    assert by_name.manifest["method"] == "staff"
    for name in (*RESULTS, "config.yaml"):
        mine, other = ((run.path / name).read_bytes() for run in (by_name, by_hand))
        assert mine.replace(b"/one\n", b"/two\n") == other
    table = by_name.scores.to_pydict()
    target = np.array([np.nan if effort is None else effort for effort in table["target_effort"]])
    options = {"hard_cutoff": 0.1, "allocation": "released", "pick": "top", "verification": "fixed"}
    rule = METHODS["staff"].select(
        40,
        budget=12,
        rng=np.random.default_rng(42),
        scores=np.array(table["effort"]),
        verify=target.__getitem__,
        num_regions=5,
        verification_budget=3,
        **options,
    )
    assert rule.indices.tolist() == by_name.indices.tolist()
    assert json.loads((by_name.path / "manifest.json").read_text())["settings"]["scope"] == "last-value"
