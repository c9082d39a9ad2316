"""Predictions from two speeds, worked by hand; and the command, which times two tiny models."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from family import TEMPLATE, config_of, make_rows, make_tokenizer, write_pool
from staff import cli, pipeline, timing
from staff import planning as plan
from staff.config import PlanConfig, SelectConfig
from staff.data import tokens
from staff.methods import METHODS
from staff.models import finetune as tuning
from staff.models import load as models
from staff.planning import Job, Speed, advice, most_verified, staff_passes, stages, table
from staff.scoring import scorer as scoring

JOB = Job(
    tokens=1000,
    response_share=0.4,
    draft_epochs=3,
    draft_share=0.5,
    target_epochs=2,
    epochs=2,
    verified_share=0.1,
)
SPEEDS = {
    "target": Speed(scoring=1.0, training=2.0, forward=0.8, answering=5.0),
    "draft": Speed(scoring=0.1, training=0.2, forward=0.075, answering=0.5),
}  # a pass: 1000 s and 100 s


def told(method, job):
    return {str(stage): seconds for stage, seconds in stages(method, job, SPEEDS).items()}


def test_each_methods_stages_are_its_needs_at_these_speeds():
    seconds = {
        name: told(METHODS[name], JOB)
        for name in (
            "random",
            "direct",
            "staff",
            "ccs",
            "ifd",
            "length",
            "s2l",
            "rds",
            "less",
            "mods",
            "whisper",
        )
    }
    assert seconds["random"] == seconds["length"] == {}
    assert seconds["direct"] == {"score on the target": 1000}
    assert seconds["staff"] == pytest.approx(
        {"fine-tune the draft": 300, "score on the draft": 100, "verify on the target": 100}
    )
    assert sum(seconds["staff"].values()) / 1000 == pytest.approx(staff_passes(3, 0.5, 0.1, 0.1))
    assert seconds["ccs"] == {"fine-tune the target": 4000, "score on the tuned target": 1000}
    assert seconds["ifd"] == {"score on the raw draft": 100, "score on the raw draft without prompts": 40}
    # a forward pass alone takes three quarters of a scoring pass here; gradients take all of it
    assert seconds["rds"] == pytest.approx({"fine-tune the draft": 300, "hidden states of the draft": 75})
    assert seconds["less"] == {"fine-tune the draft": 300, "gradients of the draft": 100}
    # 600 tokens of prompts; a seed of 50 tokens, twice; 95 % of the prompts, and of 400 tokens of answers
    assert seconds["mods"] == pytest.approx(
        {
            "fine-tune the draft": 300,
            "hidden states of the draft over prompts": 45,
            "fine-tune the target on the seed": 200,
            "answer on the target tuned on the seed": 0.95 * (600 * 0.8 + 400 * 5),
        }
    )
    # 3/5 prompts a sample, of six samples, read 1.4 times; 3/5 answers
    assert seconds["whisper"] == pytest.approx(
        {"fine-tune the draft": 300, "answer on the draft": 0.6 * (1.4 * 6 * 75 + 400 * 0.5)}
    )
    assert seconds["s2l"] == {"fine-tune the draft": 300, "score on the draft at checkpoints": 400}


def test_a_method_pays_from_the_rate_at_which_what_it_spares_is_what_it_costs():
    rows = {row["method"]: row for row in table(JOB, SPEEDS, (0.5, 0.9))}
    assert rows["staff"]["break_even"] == pytest.approx(500 / 4000)
    assert rows["staff"]["total_seconds"] == pytest.approx({0.5: 2500, 0.9: 900})
    assert rows["ccs"]["break_even"] is None  # it fine-tunes on all first
    assert set(table_names({"target": SPEEDS["target"]})) == {
        "random",
        "direct",
        "grand",
        "el2n",
        "ccs",
        "d2",
        "length",
        "whisper_target",
    }


def table_names(speeds):
    return [row["method"] for row in table(JOB, speeds, (0.5,))]


def test_the_advice_is_the_cheapest_way_that_pays():
    assert advice(JOB, SPEEDS, 0.8).startswith(
        "at 80% pruned: use this draft (--method spread): choosing takes 440 s, 1000 s with --method direct"
    )
    slow = {**SPEEDS, "draft": Speed(0.5, 1.0)}
    assert "score the target directly" in advice(JOB, slow, 0.8)
    assert "train on all, 4000 s, or take --method random" in advice(JOB, slow, 0.2)
    assert "score the target directly" in advice(JOB, {"target": SPEEDS["target"]}, 0.8)


def test_the_command_times_the_models_and_says_what_to_do(family, tmp_path, capsys):
    write_pool(tmp_path / "pool.jsonl", 30)
    flags = [
        "--data",
        str(tmp_path / "pool.jsonl"),
        "--target",
        str(family / "target"),
        "--draft",
        str(family / "draft"),
    ]
    cli.plan([*flags, "--pruning-rate", "0.5", "0.9", "--draft-epochs", "1", "--json"])
    said = capsys.readouterr()
    for stage in ("read", "tokenise: 30 of 30", "load models", "time the target", "time the draft"):
        assert stage in said.err
    made = json.loads(said.out)
    assert made["n"] == 30
    assert all(speed > 0 for model in made["speeds"].values() for speed in model.values())
    assert made["verdict"] == plan.verdict(made["sum"]["passes"], 1, 1, *list(made["sum"].values())[2:5])
    assert [row["method"] for row in made["methods"]] == list(METHODS)
    assert len(made["advice"]) == 2
    assert "pays from" in plan.describe_plan(made)


def test_a_plan_counts_the_rows_that_every_tokenizer_can_use(family, tmp_path, monkeypatch):
    shutil.copytree(family / "draft", tmp_path / "draft")
    refuses = "{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}"
    make_tokenizer(refuses + TEMPLATE).save_pretrained(tmp_path / "draft")
    rows = [{"prompt": prompt, "response": "c"} for prompt in ("a", "no", "b", "d")]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def speed(model, pool, config, n, *more):
        return Speed(n, 1.0), dict.fromkeys(("effort", "loss"), np.ones(len(pool)))

    monkeypatch.setattr(timing, "time_model", speed)
    models = {"target": str(family / "target"), "draft": str(tmp_path / "draft")}
    data = {"data": [str(tmp_path / "pool.jsonl")], "on_bad_row": "skip"}
    made = plan.make_plan(config_of(PlanConfig, **models, **data))
    assert (made["n"], {speed["scoring"] for speed in made["speeds"].values()}) == (3, {3.0})


def test_a_method_that_follows_a_tuning_is_left_out_where_there_is_none():
    job = replace(JOB, draft_epochs=0)
    assert [row["method"] for row in table(job, SPEEDS, (0.5,))] == [
        name for name in METHODS if name != "s2l"
    ]
    assert told(METHODS["staff"], job) == {
        "score on the draft": 100.0,
        "verify on the target": 100.0,
    }


def test_a_selections_file_is_planned_for(tmp_path):
    file = tmp_path / "select.yaml"
    file.write_text(
        "data: p.jsonl\ntarget: T\nmethod: staff\npruning-rate: 0.8\noutput: x\nhard-cutoff: 0.2\n"
    )
    config, _ = cli._parse("plan", ["--config", str(file)])
    assert (config.target, config.pruning_rate, config.hard_cutoff) == ("T", (0.8,), 0.2)
    file.write_text("target: T\nmethods: staff\n")
    with pytest.raises(ValueError, match="there is no setting 'methods'"):
        cli._parse("plan", ["--config", str(file)])


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"in \[0, 1\); found 1"):
        config_of(PlanConfig, pruning_rate=(1.0,))


def test_the_text_has_a_line_a_method_with_the_seconds_of_each_stage():
    made = {
        "n": 5,
        "tokens": 1000,
        "most_verified": 4,
        "verified": 3,
        "verified_regions": 1,
        "num_regions": 2,
        "timed": {"target": True},
        "small": [],
        "full_seconds": 4000,
        "methods": table(JOB, SPEEDS, (0.5,)),
        "advice": ["do so"],
    }
    lines = plan.describe_plan(made).splitlines()
    stages_of = lines[lines.index("method              seconds of each stage") + 1 :]
    assert [line.split()[0] for line in stages_of[: len(METHODS)]] == list(METHODS)
    assert (
        "staff               fine-tune the draft 300.0, score on the draft 100.0, verify on the target 100.0"
        in stages_of
    )
    assert "random              none" in stages_of
    assert stages_of[-2:] == ["", "do so"]
    assert "about 3 samples on the target (60.0%), in 1 of 2 regions" in plan.describe_plan(made)


@pytest.mark.parametrize(("n", "expected"), [(10_000, 500), (200, 160), (12, 10), (11, 0), (1, 0)])
def test_the_target_verifies_no_region_that_its_draw_would_take_whole(n, expected):
    # 200 samples: 20 are cut as hardest, and 180 fill at most 16 regions of 11, ten drawn of each
    assert most_verified(n, 50, 10, 0.1) == expected


def test_a_scope_of_adapters_is_timed_on_a_fresh_one_that_training_does_not_see(
    family, tmp_path, monkeypatch
):
    scored, before_training = [], []
    scorer, train_lora = scoring.Scorer, tuning.train_lora

    def train(model, *rest, **settings):
        before_training.append([name for name, _ in model.named_modules() if "lora" in name])
        return train_lora(model, *rest, **settings)

    monkeypatch.setattr(
        scoring, "Scorer", lambda *rest, **of: scored.append(scorer(*rest, **of)) or scored[-1]
    )
    monkeypatch.setattr(tuning, "train_lora", train)
    monkeypatch.setattr(plan, "SMALL_JOB", 0)
    write_pool(tmp_path / "pool.jsonl", 30)
    data, target = (str(tmp_path / "pool.jsonl"),), str(family / "target")
    made = plan.make_plan(
        config_of(
            PlanConfig, data=data, target=target, scope="lora", lora_rank=4, batch_size=2, dtype="float32"
        )
    )
    assert all(speed > 0 for speed in made["speeds"]["target"].values())
    assert len(scored[0].sites) == 2 * 7 * 4  # A and B of the seven layers of four blocks
    assert before_training == [[]]


def test_the_models_are_quantised_as_a_selection_would(family, tmp_path, monkeypatch):
    asked = []
    load = models.load_model

    def watch(source, dtype, device, trust_remote_code, load_in):
        asked.append((source.folder.name, load_in))
        return load(source, dtype, device, trust_remote_code)

    monkeypatch.setattr(models, "load_model", watch)
    write_pool(tmp_path / "pool.jsonl", 30)
    flags = [
        "--data",
        str(tmp_path / "pool.jsonl"),
        "--target",
        str(family / "target"),
        "--draft",
        str(family / "draft"),
    ]
    cli.plan([*flags, "--load-in", "4bit", "--batch-size", "2"])
    assert asked == [("target", "4bit"), ("draft", "4bit")]


def test_of_a_small_job_the_scoring_alone_is_timed(family, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "train_lora", None)
    monkeypatch.setattr(timing, "_an_answer", None)
    given = {"data": [str(write_pool(tmp_path / "pool.jsonl", 30))], "target": str(family / "target")}
    made = plan.make_plan(config_of(PlanConfig, **given))
    speed = made["speeds"]["target"]
    assert 0 < speed["forward"] < speed["scoring"] < speed["training"]
    assert speed["answering"] == timing.AN_ANSWER * speed["forward"]
    assert "the target's scoring is timed, the rest by operations" in plan.describe_plan(made)


def test_a_plan_says_what_the_run_then_does(family, tmp_path):
    rows = [{**row, "source": "ab"[i % 3 == 0]} for i, row in enumerate(make_rows(300))]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = {"target": str(family / "target"), "draft": str(family / "draft")}
    data = {"data": [str(tmp_path / "pool.jsonl")], "dtype": "float32"}
    for more in ({}, {"group_by": "source"}, {"verification": "adaptive"}, {"verification_budget": 4}):
        made = plan.make_plan(config_of(PlanConfig, **models, **data, **more, batch_size=1))
        output = str(tmp_path / "-".join(more) / "run")
        (run,) = pipeline.select(
            config_of(SelectConfig, **models, **data, **more, method="staff", budget=60, output=output)
        )
        regions, verified = run.selection.regions, len(run.selection.verified)
        assert made["num_regions"] == len(regions)
        assert abs(made["verified_regions"] - sum(r.verified > 0 for r in regions)) <= 0.25 * len(regions)
        assert abs(made["verified"] - verified) <= 0.35 * verified
        assert made["verified"] <= made["most_verified"] or "group_by" in more
        assert made["sum"]["relative_cost"] == pytest.approx(run.cost["sum"]["relative_cost"])
        assert made["verdict"].partition(":")[0] == run.cost["verdict"].partition(":")[0]


def test_a_plain_plan_says_what_a_plain_selection_then_does(family, tmp_path):
    given = {"data": [str(write_pool(tmp_path / "pool.jsonl", 60))], "dtype": "float32", "draft_epochs": 1}
    given |= {"target": str(family / "target"), "draft": str(family / "draft")}
    made = plan.make_plan(config_of(PlanConfig, **given, batch_size=1))
    (run,) = pipeline.select(config_of(SelectConfig, **given, budget=20, output=str(tmp_path / "run")))
    assert (len(run.selection.verified), made["sum"]["verified_share"]) == (0, 0)
    assert made["sum"] == pytest.approx(run.cost["sum"])
    assert made["verdict"] == run.cost["verdict"]


def test_a_draft_of_the_targets_own_blocks_is_tokenised_and_loaded_once(family, tmp_path, monkeypatch):
    loaded, tokenised, load, tokenise = [], [], models.load_model, tokens.tokenise
    monkeypatch.setattr(models, "load_model", lambda *given: loaded.append(1) or load(*given))
    monkeypatch.setattr(tokens, "tokenise", lambda *given: tokenised.append(1) or tokenise(*given))
    data = [str(write_pool(tmp_path / "pool.jsonl", 30))]
    given = {"target": str(family / "target"), "draft": "self:2", "batch_size": 1, "draft_epochs": 1}
    made = plan.make_plan(config_of(PlanConfig, data=data, **given))
    assert (len(loaded), len(tokenised)) == (1, 1)
    assert made["flops"]["draft"] < 0.7 * made["flops"]["target"]
    assert made["speeds"]["draft"]["training"] > 0


def test_a_model_that_is_not_here_is_planned_for_by_its_size(family, tmp_path, monkeypatch):
    monkeypatch.setattr("staff.models.files.is_at_hand", lambda name: "/" in name and name.startswith("/"))
    data = [str(write_pool(tmp_path / "pool.jsonl", 30))]
    names = {"target": "Qwen/Qwen2.5-7B", "draft": "Qwen/Qwen2.5-0.5B"}
    made = plan.make_plan(config_of(PlanConfig, data=data, **names))
    assert (made["verified"], made["timed"]) == (None, {"target": False, "draft": False})
    assert made["sum"]["relative_cost"] == pytest.approx(0.49 / 7.62, rel=1e-3)
    said = plan.describe_plan(made)
    assert "the target and the draft by size alone, and by a plain matrix product" in said
    assert "samples on the target at most" in said
    made = plan.make_plan(config_of(PlanConfig, data=data, **{**names, "draft": str(family / "draft")}))
    assert made["timed"] == {"draft": True, "target": False}
    assert "the target by size alone, and by the speed of the draft" in plan.describe_plan(made)
    with pytest.raises(ValueError, match="is not here, so its blocks can't be timed"):
        plan.make_plan(config_of(PlanConfig, data=data, target="Qwen/Qwen2.5-7B", draft="self:4"))
