"""A try-out says which way of choosing helps: by hand where it decides, and once through on tiny models."""

import csv
import dataclasses
import json
import sys

import numpy as np
import pytest
import scipy.stats

import staff
from family import config_of, make_rows, run_staff, write_pool
from staff import pipeline
from staff.comparison.grid import select_config
from staff.comparison.statistics import paired_margin
from staff.config import SelectConfig
from staff.data.rows import read
from staff.tryout import cost, judge
from staff.tryout import run as tryout
from staff.tryout.cost import Tries, no_draft_because, plan_tries, relative_cost, rounds_of
from staff.tryout.run import halves, settled, try_ways
from stubs import stand_in


def config(folder, family=None, **settings):
    models = {name: str(family / name) for name in ("target", "draft")} if family else {}
    values = {
        "data": str(folder / "pool.jsonl"),
        "validation": str(folder / "few.jsonl"),
        "pruning_rate": 0.5,
    }
    values |= {
        "output": str(folder / "x"),
        "max_length": 96,
        "answer_tokens": 2,
        "learning_rate": 1e-2,
        **models,
    }
    return config_of(SelectConfig, **{**values, **settings})


@pytest.fixture
def files(tmp_path):
    write_pool(tmp_path / "pool.jsonl", 48)
    lines = [json.dumps(row) + "\n" for row in make_rows(90)[70:]]
    (tmp_path / "few.jsonl").write_text("".join(lines))
    return tmp_path


def test_a_validation_row_stays_on_its_side_whatever_else_the_file_holds():
    rows = make_rows(80)
    steer, judge = halves(read(rows))
    assert sorted([*steer, *judge]) == list(range(80))
    assert 25 < len(steer) < 55
    fewer = [row for i, row in enumerate(rows) if i % 3]
    also, _ = halves(read(fewer))
    assert {fewer[i]["id"] for i in also} == {rows[i]["id"] for i in steer if i % 3}


def test_the_margin_counts_the_spread_of_seeds_and_of_rows():
    differences = np.array([[1.0, 3.0, 2.0], [3.0, 5.0, 4.0]])  # seeds differ by 2, rows by 1
    of_seeds, of_rows = 2.0 / 2, 1.0 / 3
    freedom = (of_seeds + of_rows) ** 2 / (of_seeds**2 / 1 + of_rows**2 / 2)
    margin, error = paired_margin(differences)
    assert margin == 3.0
    assert error == pytest.approx(np.sqrt(of_seeds + of_rows) * student(freedom))
    assert paired_margin(differences[:1])[1] == pytest.approx(np.sqrt(of_rows) * student(2))
    assert paired_margin(np.zeros((2, 3))) == (0, 0)


def student(freedom):
    """How much wider than a normal at two standard errors."""
    return scipy.stats.t.ppf(scipy.stats.norm.cdf(2), freedom) / 2


@pytest.mark.parametrize(("num_seeds", "of_rows"), [(2, 0.1), (4, 0.1), (4, 3.0), (10, 1.0)])
def test_two_errors_of_few_seeds_hold_what_two_of_many_do(num_seeds, of_rows):
    draws, beyond = np.random.default_rng(num_seeds), []
    for _ in range(2000):
        differences = draws.normal(size=(num_seeds, 1)) + of_rows * draws.normal(size=(1, 40))
        margin, error = paired_margin(differences)
        beyond.append(abs(margin) > 2 * error)
    assert 0.025 < np.mean(beyond) < 0.06  # 0.046 of a normal


def test_the_worse_half_goes_until_one_is_left_beside_random():
    assert [rounds_of(k) for k in (2, 3, 5, 6)] == [(2, 2), (3, 2), (5, 3, 2), (6, 3, 2)]


def test_what_a_try_out_costs_is_known_before_and_too_little_buys_none(files):
    own = config(files, try_cost=0.5, full_epochs=3, answer_tokens=10)
    plan = plan_tries(own, ("random", "dedup"), n=4_000, share=0.5, judges=50)
    # two ways, two seeds each, twice, and the full data; a step of eight rows costs 2 x 8 / 4000 of a pass
    assert (plan.ways, plan.full) == (("random", "dedup"), True)
    assert plan.predicted["share"] <= 0.5
    cells = 2 * sum(plan.rounds) + 2
    by_hand = cells * plan.steps * 16 / 4_000 + (cells + 1) * 50 / 4_000 * (2 + 10 / 200)
    assert plan.predicted["passes"] == pytest.approx(by_hand)
    looked = {"passes": 1.5}  # of a draft of a fifth of the target's cost
    dearer = plan_tries(own, ("random", "dedup"), 4_000, 0.5, 50, looked, 0.2)
    assert dearer.predicted["looking"] == pytest.approx(0.3)
    assert dearer.steps < plan.steps
    assert plan_tries(config(files, try_cost=0.01), ("random", "dedup"), 4_000, 0.5, 50) is None
    short = plan_tries(config(files, try_cost=0.11), ("random", "dedup"), 4_000, 0.5, 50)
    assert (short.ways, short.full) == (("random", "dedup"), False)  # the full data goes first
    small = plan_tries(config(files, try_cost=1.0), ("random", "dedup"), 40, 0.5, 4)
    assert small is None or small.steps <= 9  # never more than the coreset's own training: 3 epochs of 3


def test_rows_of_the_validation_file_in_the_pool_are_named(files):
    lines = (files / "pool.jsonl").read_text().splitlines()
    row = json.loads(lines[7])
    row["response"] = row["response"].upper() + "  "
    with open(files / "few.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"rows that stand in the pool too: 20 \(row 7 of it\)"):
        try_ways(config(files, target="x"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation": None}, "half of them judge"),
        ({"pruning_rate": []}, "how much to keep"),
        ({"method": ["auto", "staff"]}, "auto stands alone"),
        ({"ways": ["dedupe"]}, "did you mean 'dedup'"),
        ({"ways": ["length"], "option": ["par=bottom"]}, "options of random, length, did you mean 'part'"),
        (
            {"option": ["num_strata=3"]},
            "give name=value; of the options of random, less, rds, there are part",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_said_before_any_work(files, settings, message):
    with pytest.raises(ValueError, match=message):
        try_ways(config(files, target="x", **settings))


def test_a_try_out_has_the_coresets_that_would_be_selected(files, family):
    asked = {"budget_tokens": 900, "pruning_rate": [], "option": ["part=bottom"], "validation": None}
    own = config(files, family, **asked, ways=["length"])
    plan = Tries(("random", "length"), on_draft=False, rounds=(2,), full=False, steps=1, predicted={})
    compared = tryout._comparison(own, plan, files / "few.jsonl", files / "few.jsonl", files / "tries")
    chosen = select_config(compared, compared.tasks["tryout"], "length", 42, str(files / "tried"))
    methods = {name: variant.method for name, variant in compared.variants.items()}
    tried = {run.manifest["method"]: run for run in pipeline.select(chosen, methods=methods)}
    (alone,) = pipeline.select(dataclasses.replace(settled(own, {"chosen": "length"}), validation=None))
    assert tried["length"].indices.tolist() == alone.indices.tolist()
    assert 600 < alone.manifest["kept_tokens"] <= 900
    assert settled(own, {"chosen": "dedup"}).option == ()


def test_a_round_on_the_draft_takes_the_place_of_the_first_on_the_target(files):
    ways, own = (
        ("random", "dedup", "length", "coverage", "rds"),
        config(files, try_cost=1.0, answer_tokens=10),
    )
    plan = plan_tries(own, ways, 4_000, 0.5, 50, {"passes": 1.0}, 0.1, on_draft=True)
    assert (plan.ways, plan.on_draft, plan.rounds[:2], plan.full) == (ways, True, (3, 2), True)
    cells = 2 * (sum(plan.rounds) + 1 + 0.1 * 5)  # the draft's are a tenth each
    assert plan.predicted["training"] == pytest.approx(cells * plan.steps * 16 / 4_000)
    row = 50 / 4_000 * (2 + 10 / 200)
    assert plan.predicted["judging"] == pytest.approx((cells + 1.1) * row)
    without = plan_tries(own, ways, 4_000, 0.5, 50, {"passes": 1.0}, 0.1, on_draft=False)
    assert (without.on_draft, without.rounds[0]) == (False, len(without.ways))
    assert not plan_tries(own, ways[:2], 4_000, 0.5, 50, None, 0.1, on_draft=True).on_draft


def test_a_draft_is_faithful_by_the_judging_rows_that_both_models_answered():
    losses = np.random.default_rng(0).normal(size=60)
    draft = {"row": [*range(60)], "loss": [*losses]}
    target = {"row": [*range(1, 60)], "loss": [*(losses[1:] ** 3)]}
    assert tryout._fidelity(draft, target)[1] > 0.9
    assert tryout._fidelity(draft, {**target, "loss": [*losses[:59]]})[1] < 0.6
    assert tryout._fidelity(draft, {"row": [3, 4], "loss": [1.0, 2.0]}) is None


@pytest.mark.parametrize(
    ("draft", "why"),
    [
        ("draft", ""),
        ("target", "target costs as much as the target"),
        ("self:1", "self:1 is no model of its own to fine-tune"),
    ],
)
def test_a_round_on_the_draft_is_one_that_saves_something(files, family, draft, why):
    own = config(files, family, draft=draft if draft == "self:1" else str(family / draft))
    assert no_draft_because(own, relative_cost(own)).removeprefix(f"{family}/") == why


def judge_by(folder, code):
    (folder / "judge.py").write_text(
        f"import json, sys\nrows = [json.loads(line) for line in sys.stdin]\n{code}\n"
    )
    return f"{sys.executable} {folder / 'judge.py'}"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('fine')", "printed 1 lines for 2 rows"),
        ("print('1\\nnonsense')", "line 2 is 'nonsense'; a number a row is asked"),
        ("print('1\\nnan')", "line 2 is nan, which is no figure"),
        ("sys.exit('no judge today')", "ended with 1: no judge today"),
    ],
)
def test_nonsense_from_a_users_judge_is_named(tmp_path, code, message):
    examples = {"row": [0, 1], "id": ["a", None], "prediction": ["x", "y"], "reference": ["x", "z"]}
    (tmp_path / "scores.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=message):
        judge._by_command(judge_by(tmp_path, code), tmp_path, examples)


def test_a_users_judge_is_asked_once_for_each_model(tmp_path):
    examples = {"row": [0, 1], "id": ["a", None], "prediction": ["x", "y"], "reference": ["x", "z"]}
    (tmp_path / "scores.jsonl").write_text("{}")
    command = judge_by(tmp_path, "print(*(float(r['answer'] == r['reference']) for r in rows), sep='\\n')")
    assert judge._by_command(command, tmp_path, examples).tolist() == [1, 0]
    (tmp_path / "judge.py").write_text("")
    assert judge._by_command(command, tmp_path, examples).tolist() == [1, 0]


@pytest.fixture(scope="module")
def tried(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tried")
    write_pool(folder / "pool.jsonl", 48)
    (folder / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(90)[70:]))
    settings = {"ways": ["length"], "try_cost": 4.5, "metric": "loss", "seed": 3}
    own = config(folder, family, method="auto", **settings)
    return folder, own, try_ways(own)


def test_ways_are_tried_at_equal_updates_and_the_table_says_what_came_out(tried):
    folder, _, about = tried
    assert [row["way"] for row in about["ways"]] == ["random", "length"]
    random, length = about["ways"]
    assert (random["margin"], random["error"]) == (0, 0)
    with open(folder / "x" / "tryouts" / "results.csv") as file:
        cells = [row for row in csv.DictReader(file) if row["seed"]]
    assert {row["finetune_steps"] for row in cells} == {str(about["steps"])}
    assert {row["seed"] for row in cells} == {str(300 + i) for i in range(length["seeds"])}
    losses = {
        way: [float(row["loss"]) for row in cells if row["method"] == way] for way in ("random", "length")
    }
    of = {way: np.mean(values) for way, values in losses.items()}
    assert length["margin"] == pytest.approx(of["random"] - of["length"])  # a lower loss is better
    assert length["mean"] == pytest.approx(-of["length"])
    full = [float(row["loss"]) for row in cells if row["method"] == "full data"]
    assert about["full"]["seeds"] == len(full) == 2
    assert about["full"]["margin"] == pytest.approx(np.mean(losses["random"][:2]) - np.mean(full))
    with open(folder / "x" / "tryout.csv") as file:
        assert [row["way"] for row in csv.DictReader(file)] == ["random", "length", "full data"]
    is_above = length["margin"] > 2 * length["error"]
    assert about["chosen"] == ("length" if is_above else "random")
    assert json.loads((folder / "x" / "tryout.json").read_text()) == about
    assert about["predicted"]["share"] <= 4.5
    counted, predicted = about["counted"], about["predicted"]
    assert counted["training"] > 0
    assert counted["passes"] == pytest.approx(sum(counted[name] for name in counted if name[-3:] == "ing"))
    assert counted["looking"] == pytest.approx(predicted["looking"], rel=0.2)
    assert counted["looking"] > 0
    judges = (folder / "x" / "judge.jsonl").read_text().splitlines()
    queries = (folder / "x" / "query.jsonl").read_text().splitlines()
    assert sorted(judges + queries) == sorted((folder / "few.jsonl").read_text().splitlines())
    assert any("judged by loss" in reason for reason in about["reasons"])


def test_a_finished_try_out_is_taken_up_and_the_choice_holds_for_every_rate(tried, family, monkeypatch):
    folder, own, about = tried
    from staff import jobs
    from staff.scoring.scorer import Scorer

    monkeypatch.setattr(jobs, "finetune", None)
    monkeypatch.setattr(Scorer, "scores", None)
    assert try_ways(own) == about
    monkeypatch.undo()
    assert settled(own, {"chosen": "dedup"}).dedup == "near"
    assert settled(own, {"chosen": "drop-suspects"}).drop_suspects
    assert settled(own, {"chosen": "rds"}).validation.endswith("query.jsonl")
    told = run_staff(
        *(
            "select",
            "--data",
            folder / "pool.jsonl",
            "--validation",
            folder / "few.jsonl",
            "--method",
            "auto",
        ),
        *("--target", family / "target", "--draft", family / "draft", "--pruning-rate", "0.5", "0.25"),
        *("--output", folder / "x", "--max-length", "96", "--answer-tokens", "2", "--learning-rate", "1e-2"),
        *("--ways", "length", "--try-cost", "4.5", "--metric", "loss", "--seed", "3"),
    )
    assert told.returncode == 0, told.stderr
    assert f"take       {about['chosen']}" in told.stdout
    for rate, m in ((0.5, 24), (0.25, 36)):
        coreset = folder / "x" / f"{about['chosen']}-{rate:g}" / "coreset.jsonl"
        assert len(coreset.read_text().splitlines()) == m


def test_too_small_a_cost_is_said_and_random_is_the_answer(files, family, caplog):
    run = staff.select(
        files / "pool.jsonl", method="auto", pruning_rate=0.5, output=files / "x", validation=str(files / "few.jsonl"),
        target=str(family / "target"), draft=None, try_cost=0.001, max_length=96, option=["part=bottom"],
    )  # fmt: skip
    assert "none of random, dedup has it" in caplog.text
    assert run.manifest["method"] == "random"
    (reason,) = json.loads((files / "x" / "tryout.json").read_text())["reasons"]
    assert "less than two seeds of two ways take" in reason


def test_the_draft_gives_up_the_worse_half_first_and_a_killed_try_out_goes_on(files, family, monkeypatch):
    from staff import jobs, pipeline

    stand_in(monkeypatch.setattr)
    for part in (tryout, cost):
        monkeypatch.setattr(part, "PAIR", 1)
    monkeypatch.setattr(tryout, "_fidelity", lambda *_: (0.9, 0.8, 0.95))
    monkeypatch.setattr(tryout, "relative_cost", lambda _: 0.3)
    trying = {"ways": ["length", "dedup"], "try_cost": 8.0, "full_epochs": 0.4, "metric": "loss"}
    own = config(files, family, **trying)
    tuned, selected = [], []

    def finetune(config, **how):
        if len(tuned) == 4:
            tuned.append(None)
            raise ZeroDivisionError
        tuned.append(config)
        return real(config, **how)

    def select(config, **how):
        selected.append(config.output)
        return chosen(config, **how)

    real, chosen = jobs.finetune, pipeline.select
    monkeypatch.setattr(jobs, "finetune", finetune)
    monkeypatch.setattr(pipeline, "select", select)
    with pytest.raises(ZeroDivisionError):
        try_ways(own)
    selected.clear()
    about = try_ways(own)
    assert len(selected) == len(set(selected))  # no coreset is chosen again for the target
    on_draft = [made for made in tuned if made and made.model == str(family / "draft")]
    assert [made.data[0].partition("/x/")[2].split("/")[0] for made in on_draft] == ["tryouts"] * 3
    first, *others = about["draft"]["ways"]
    assert (first["way"], {row["way"] for row in others}) == ("random", {"length", "dedup"})
    best = max(others, key=lambda row: row["margin"])["way"]
    assert [row["way"] for row in about["ways"]] == ["random", best]
    assert about["predicted"]["training"] < about["counted"]["training"] * 3
    assert any("on the draft (Spearman 0.90" in reason for reason in about["reasons"])
    assert f"draft, {best}" in tryout.describe_tries(about, "x")
    monkeypatch.setattr(jobs, "finetune", None)
    assert try_ways(own) == about
