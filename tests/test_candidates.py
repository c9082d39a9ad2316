"""Drafts compared before one is chosen: `staff drafts`."""

import dataclasses
import json

import numpy as np
import pytest

from staff import candidates
from staff.config import DraftsConfig, Engine, Reading
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


def test_a_picture_over_the_data_is_refused_before_any_work(found):
    config = dataclasses.replace(found[0], picture=found[0].data[0])
    with pytest.raises(ValueError, match=r"--data .* is the output itself"):
        candidates.compare_drafts(config)


def test_what_is_missing_of_data_and_target_is_named():
    with pytest.raises(ValueError, match=r"the data with --data FILE\n.* with --target MODEL"):
        candidates.compare_drafts(DraftsConfig(candidates=("self:1",)))


def test_candidates_named_twice_or_as_the_target_is_called_here(found, family, monkeypatch):
    monkeypatch.chdir(family)
    named = ("draft", "target", "draft")
    config = dataclasses.replace(found[0], target="draft", candidates=named, rows=20)
    rows = candidates.compare_drafts(config)["drafts"]
    assert [row["candidate"] for row in rows] == ["draft", "draft", "target", "target"]
    costs = [row["relative_cost"] for row in rows]
    assert costs[0] == 1 < costs[2]


def test_more_blocks_than_there_are_is_one_message(found):
    with pytest.raises(ValueError, match=r"^self:9: the target has only 4 blocks"):
        candidates.compare_drafts(dataclasses.replace(found[0], candidates=("self:9",)))


def test_a_longer_row_than_a_draft_has_positions_is_named(found, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    from family import make_tokenizer

    sizes = {"vocab_size": 259, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "short")
    make_tokenizer().save_pretrained(tmp_path / "short")
    with pytest.raises(ValueError, match=r"row .* positions"):
        candidates.compare_drafts(dataclasses.replace(found[0], candidates=(str(tmp_path / "short"),)))


def test_the_command_reads_and_loads_as_the_comparison_did(found):
    config, result, _ = found
    reading = Reading(columns="prompt=a b", train_on="all", split="train")
    config = dataclasses.replace(
        config, reading=reading, engine=Engine(trust_remote_code=True, load_in="8bit")
    )
    told = candidates._advice(result["drafts"], config)
    assert "--columns 'prompt=a b' --train-on all" in told
    assert "--split train" in told
    assert "--load-in 8bit --trust-remote-code --pruning-rate" in told
