"""Drafts compared before one is chosen: `staff drafts`."""

import json

import numpy as np
import pytest

from staff import candidates
from staff.config import DraftsConfig
from staff.scoring.scorer import Scorer


@pytest.fixture(scope="module")
def found(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafts")
    data = folder / "pool.jsonl"
    rng = np.random.default_rng(0)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [
        {
            "prompt": " ".join(rng.choice(words, 4)),
            "response": " ".join(rng.choice(words, int(rng.integers(1, 9)))),
        }
        for _ in range(60)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DraftsConfig(
        data=str(data), target=str(family / "target"), candidates=(str(family / "draft"), "self:1"), rows=40
    )
    told = []
    result = candidates.compare_drafts(config, lambda stage, done, total: told.append((stage, done, total)))
    return config, result, told


def test_each_candidate_has_both_scopes_its_cost_and_a_verdict_with_an_interval(found, family):
    _, result, told = found
    assert (result["rows"], result["n"]) == (40, 60)
    assert [(row["candidate"], row["scope"]) for row in result["drafts"]] == [
        (name, scope) for name in (str(family / "draft"), "self:1") for scope in candidates.BOTH_SCOPES
    ]
    for row in result["drafts"]:
        assert 0 < row["relative_cost"] < 1
        assert row["passes"] == pytest.approx(row["relative_cost"] + result["verified_share"])
        assert row["tuned_passes"] == pytest.approx(7 * row["relative_cost"] + result["verified_share"])
        value, low, high = row["fidelity"]["spearman"]
        assert low < value < high
        assert row["fidelity"]["samples"] == 40
    assert {stage for stage, done, total in told if done == total == 40} == {
        f"score on {name}" for name in ("target", str(family / "draft"), "self:1")
    }


def test_the_numbers_are_those_of_a_scoring_pass_of_its_own(found, family):
    from dataclasses import replace
    from itertools import islice

    import torch
    from scipy.stats import spearmanr

    from staff.data import rows
    from staff.data.tokens import tokenise
    from staff.models import load

    config, result, _ = found
    read = rows.read(list(config.data))
    drawn = np.sort(np.random.default_rng(42).permutation(60)[:40])
    read = replace(read, numbers=read.numbers[drawn])
    efforts = {}
    for name in ("target", "draft"):
        source = load.resolve(str(family / name))
        pool = tokenise(islice(read.examples(), 60), load.load_tokenizer(source, False), 1024)
        dtype = load.pick_dtype("auto", torch.device("cpu"))
        model = load.load_model(source, dtype, torch.device("cpu"), False)
        efforts[name] = Scorer(model, "last-value").scores(pool, np.arange(40))["effort"]
    expected = spearmanr(efforts["draft"], efforts["target"])[0]
    assert result["drafts"][0]["fidelity"]["spearman"][0] == pytest.approx(expected, abs=0.02)


def test_the_advice_is_a_command_and_never_a_draft_that_is_not_trusted(found):
    config, result, _ = found
    rows = result["drafts"]
    assert "staff select --data" in result["advice"]
    if not any(row["pays"] and row["fidelity"]["verdict"] in ("good", "usable") for row in rows):
        assert "--method direct" in result["advice"]
    good = [{**row, "pays": True, "fidelity": {**row["fidelity"], "verdict": "good"}} for row in rows]
    assert f"--draft {good[0]['candidate']}" in candidates._advice(good, config)
    dear = [{**row, "pays": False} for row in good]
    assert "--method direct" in candidates._advice(dear, config)
    text = candidates.describe_drafts(result)
    assert "self:1" in text
    assert "last-block" in text


def test_the_picture_is_a_whole_png(found, tmp_path):
    pytest.importorskip("matplotlib")
    assert candidates.draw_drafts(found[1], tmp_path / "drafts.png")
    assert (tmp_path / "drafts.png").read_bytes()[:4] == b"\x89PNG"


def test_without_candidates_it_says_what_to_name(family, tmp_path):
    (tmp_path / "pool.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(ValueError, match="name drafts to compare with --candidates"):
        candidates.compare_drafts(
            DraftsConfig(data=str(tmp_path / "pool.jsonl"), target=str(family / "target"))
        )
