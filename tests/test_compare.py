"""A small comparison from YAML to tables: shared work is done once, a killed one goes on, figures agree."""

import csv
import errno
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from family import TEMPLATE, comparison_file, make_tokenizer, run_staff
from staff import jobs
from staff.comparison import run as comparing
from staff.comparison import tables as results
from staff.comparison.grid import FULL, UNTOUCHED, read_comparison
from staff.comparison.run import compare
from staff.comparison.statistics import resample, resampled_means
from staff.comparison.tables import Difference, Judged, compare_cells, corrected, quality_table, report, tally
from staff.config import SelectConfig, from_mapping
from staff.files import is_alive, read_checked, write_checked
from staff.methods import METHODS
from staff.models import load as models
from staff.planning import staff_passes
from staff.runs.account import cost_of_run
from staff.types import Stage
from stubs import stand_in

YAML = """
target: ${STAFF_MODELS}/target
drafts: {small: "${STAFF_MODELS}/draft"}
tasks:
  sums: {train: "${STAFF_DATA}/pool.jsonl", test: "${STAFF_DATA}/test.jsonl", metrics: [rougeL, loss]}
methods:
  random: {}
  staff: {}
  staff-paper: {method: staff, allocation: paper, verify: null}
  ccs-draft: {method: ccs, needs: {scores: draft/el2n}, num_strata: 4}
pruning_rates: [0.5, 0.75]
seeds: [1, 2]
select: {scope: last-value, num_regions: 4, verification_budget: 2, draft_epochs: 1, learning_rate: 3e-3, batch_tokens: 512,
  dtype: float32}
finetune: {epochs: 1, learning_rate: 1e-2, dtype: float32}
evaluate: {max_new_tokens: 4, dtype: float32}
"""


@pytest.fixture(scope="module")
def file(family, tmp_path_factory):
    with comparison_file(family, tmp_path_factory.mktemp("compare"), YAML, 8) as path:
        yield path


@pytest.fixture(autouse=True)
def stubs(monkeypatch):
    """Of what is compared the models are stand-ins, where a test does not take them out again."""
    stand_in(monkeypatch.setattr)


@pytest.fixture(scope="module")
def finished(file, tmp_path_factory):
    comparison = read_comparison(file, str(tmp_path_factory.mktemp("out") / "x"))
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch.setattr)
        compare(comparison)
    with open(comparison.output / "results.csv") as table:
        return comparison, list(csv.DictReader(table))


def test_lengths_are_of_the_rows_that_are_trained_on_and_every_cell_has_the_same_day(family, tmp_path):
    template = "{{ strftime_now('%Y-%m-%d') }}{% if 'no' in messages[0].content %}{{ raise_exception('no') }}{% endif %}"
    shutil.copytree(family / "target", tmp_path / "target")
    make_tokenizer(template + TEMPLATE).save_pretrained(tmp_path / "target")
    rows = [{"prompt": prompt, "response": "c" * (i + 1)} for i, prompt in enumerate(["a", "no", "b"])]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = YAML.replace("${STAFF_MODELS}", str(tmp_path)).replace("${STAFF_DATA}/test", "${STAFF_DATA}/pool")
    text = text.replace("${STAFF_DATA}", str(tmp_path)).replace(
        "{train", "{reading: {on_bad_row: skip}, train"
    )
    (tmp_path / "x.yaml").write_text(text.replace("drafts: {small", "# {small"))
    comparison = read_comparison(tmp_path / "x.yaml", str(tmp_path / "x"))
    comparison.output.mkdir()
    comparing._begin(comparison, False)
    begun = comparison.output / "begun.json"
    settings = read_checked(begun)["settings"]
    write_checked(begun, {"settings": {**settings, "template_date": "2025-12-31"}})
    comparing._begin(comparison, False)
    grid = comparing._open(comparison)
    (task,) = grid.comparison.tasks.values()
    assert {of["template_date"] for of in (task.select, task.finetune, task.evaluate)} == {"2025-12-31"}
    for _ in range(2):
        lengths = comparing._lengths(grid, task)
        assert lengths["rows"].tolist() == [0, 2]
        assert lengths["responses"].tolist() == [2, 4]
        assert np.diff(lengths["tokens"]).tolist() == [2]


def of(rows, method, rate=None, seed=None):
    wanted = ("" if rate is None else str(rate), "" if seed is None else str(seed))
    (found,) = [
        row for row in rows if row["method"] == method and (row["pruning_rate"], row["seed"]) == wanted
    ]
    return found


def test_every_cell_has_a_row_and_every_figure_its_cost(finished):
    comparison, rows = finished
    assert len(rows) == 1 + 2 * (1 + 4 * 2)
    assert [int(of(rows, name, 0.75, 1)["m"]) for name in comparison.variants] == [10] * 4
    row = of(rows, "staff", 0.5, 2)
    assert all(row[name] != "" for name in comparing.COLUMNS)
    assert float(row["total_passes"]) == pytest.approx(
        float(row["select_passes"]) + float(row["finetune_passes"])
    )
    assert of(rows, "random", 0.5, 1)["select_passes"] == "0.0"
    assert of(rows, UNTOUCHED)["finetune_seconds"] == ""


def test_what_a_method_costs_is_the_designs_sum_and_its_own_part_alone(finished):
    comparison, rows = finished
    run = json.loads(
        (comparison.output / "selections" / "sums" / "seed1" / "staff-0.5" / "cost.json").read_text()
    )
    terms = run["sum"]
    row = of(rows, "staff", 0.5, 1)
    # samples differ in length: verified tokens are not their exact share; tuning spares the last block a way
    # back
    assert float(row["select_passes"]) == pytest.approx(
        staff_passes(**{k: v for k, v in terms.items() if k != "passes"}), rel=0.25
    )
    without = of(rows, "staff-paper", 0.5, 1)
    assert without["verified"] == "0"
    verified = run["stages"]["verify on the target"]
    assert float(row["select_flops"]) - float(without["select_flops"]) == pytest.approx(verified["flops"])
    assert float(without["select_flops"]) == float(of(rows, "ccs-draft", 0.75, 1)["select_flops"])


def test_a_method_counts_all_that_it_would_have_done_alone():
    parts = [
        ("score", "draft"),
        ("states", "draft", "over prompts"),
        ("converse", "target", "tuned on the seed"),
    ]
    parts += [("tune", "target", "on the seed"), ("rate", "", "of the data"), ("rate", "", "of the target")]
    parts += [
        ("score", "raw_draft"),
        ("score", "raw_draft", "without prompts"),
        ("converse", "draft"),
        ("dedup",),
    ]
    stages = {Stage(*part): {"flops": 2.0**i, "seconds": 1.0} for i, part in enumerate(parts)}
    run = SimpleNamespace(cost=cost_of_run(stages), selection=SimpleNamespace(verified=()))

    def cost(name, **settings):
        return comparing.selection_cost(METHODS[name], from_mapping(SelectConfig, settings, "x"), run)[
            "flops"
        ]

    assert cost("random") == 0
    assert cost("loss") == 2**0
    assert cost("mods") == 2**1 + 2**2 + 2**3 + 2**4 + 2**5
    assert cost("whisper") == 2**8
    suspects = cost("random", drop_suspects=True)
    assert suspects == 2**6 + 2**7
    assert cost("whisper", drop_suspects=True, dedup="exact") == 2**8 + 2**9 + suspects


def test_cells_share_one_run_folder_and_variants_choose_otherwise(finished):
    comparison, _ = finished
    selections = comparison.output / "selections" / "sums"
    assert sorted(path.name for path in selections.iterdir() if path.is_dir()) == ["seed1", "seed2"]
    stages = json.loads((selections / "seed1" / "staff-0.5" / "cost.json").read_text())["stages"]
    assert stages["fine-tune the draft"]["samples"] == stages["score on the draft"]["samples"] == 40
    chosen = {
        name: np.load(selections / "seed1" / f"{name}-0.75" / "indices.npy").tolist()
        for name in comparison.variants
    }
    assert len({tuple(indices) for indices in chosen.values()}) == 4


def test_a_finished_comparison_is_taken_as_it_is_and_a_new_rate_adds_its_cells(
    finished, file, monkeypatch, tmp_path
):
    comparison, _ = finished
    with monkeypatch.context() as patch:
        patch.setattr(models, "load_model", lambda *_, **__: pytest.fail("a model was loaded again"))
        compare(comparison)
    values = yaml.safe_load(file.read_text())
    values |= {"pruning_rates": [0.5, 0.75, 0.9], "methods": {"random": {}}, "output": str(comparison.output)}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    tuned = []
    original = jobs.finetune
    monkeypatch.setattr(
        jobs,
        "finetune",
        lambda config, **kwargs: tuned.append(config.output) or original(config, **kwargs),
    )
    compare(read_comparison(tmp_path / "more.yaml"))
    assert [path.split("cells/")[1] for path in tuned] == [
        "sums/random-0.9/seed1/adapter",
        "sums/random-0.9/seed2/adapter",
    ]
    values["finetune"]["epochs"] = 2
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(ValueError, match="sums: finetune"):
        compare(read_comparison(tmp_path / "more.yaml"))
    compare(comparison)  # results.csv as it was


def figures(path):
    """What does not depend on the clock."""
    with open(path / "results.csv") as table:
        return [
            {name: value for name, value in row.items() if not name.endswith("seconds")}
            for row in csv.DictReader(table)
        ]


def start(file, output):
    process = multiprocessing.get_context("fork").Process(
        target=lambda: compare(read_comparison(file, str(output)))
    )
    process.start()
    return process


def test_a_killed_comparison_goes_on_and_two_processes_share_it(finished, file, tmp_path):
    values = yaml.safe_load(file.read_text()) | {
        "methods": {"random": {}, "staff": {}},
        "pruning_rates": [0.75],
        "untouched": False,
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    process = start(tmp_path / "c.yaml", tmp_path / "y")
    while not list(tmp_path.glob("y/cells/*/random-0.75/*/cell.json")):
        assert process.is_alive()
        process.join(0.05)
    process.kill()
    process.join()
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("y/cells/**/cell.json")}
    pair = [start(tmp_path / "c.yaml", tmp_path / "y") for _ in range(2)]
    for process in pair:
        process.join()
        assert process.exitcode == 0
    assert all(path.stat().st_mtime_ns == at for path, at in done.items())
    rows = figures(tmp_path / "y")
    assert len(rows) == 6
    assert all(row in figures(finished[0].output) for row in rows)


@pytest.fixture
def small(file, tmp_path):
    """A comparison of one cell, to be broken off at every file."""
    values = yaml.safe_load(file.read_text())
    values |= {
        "methods": {"staff": {}},
        "pruning_rates": [0.75],
        "seeds": [1],
        "full": False,
        "untouched": False,
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return read_comparison(tmp_path / "c.yaml", str(tmp_path / "x"))


def write_and_report(comparison):
    compare(comparison)
    report(comparison.output, {"sums": ("rougeL", "loss")}, plots=False)


def test_a_full_disk_at_any_file_ends_in_the_same_figures(finished, small, monkeypatch):
    replace, number, last, said = os.replace, [0], [0], []

    def full(source, target):
        number[0] += 1
        if number[0] == last[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    while not (small.output / "results.md").exists() or number[0] >= last[0]:
        number[0], last[0] = 0, last[0] + 1
        try:
            write_and_report(small)
        except ValueError as error:
            said.append(str(error))
            assert "the disk is full" in said[-1]
            assert "\n" not in said[-1]
    assert len(said) >= 8
    (row,) = rows = figures(small.output)
    assert rows == [other for other in figures(finished[0].output) if other["folder"] == row["folder"]]


@pytest.mark.parametrize("name", ["results.md", "differences.csv", "sums-loss-by-cost.png"])
def test_a_full_disk_under_a_table_is_one_message_and_the_next_report_is_whole(name, finished, monkeypatch):
    comparison, _ = finished
    replace = os.replace

    def full(source, target):
        if target.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(ValueError, match="the disk is full"):
            report(comparison.output, {"sums": ("loss",)})
    assert report(comparison.output, {"sums": ("loss",)}) == (comparison.output / "results.md").read_text()


def test_a_folder_that_is_not_ours_is_left_alone(small):
    small.output.mkdir()
    (small.output / "results.csv").write_text("somebody,else\n")
    with pytest.raises(ValueError, match=r"holds files that are not a comparison's .*--output"):
        compare(small)
    assert [path.name for path in small.output.iterdir()] == ["results.csv"]
    assert (small.output / "results.csv").read_text() == "somebody,else\n"


def test_the_report_has_both_tables_and_the_plots(finished):
    comparison, _ = finished
    text = report(comparison.output, {"sums": ("rougeL", "loss")})
    assert "| rougeL | 50% pruned | 75% pruned |" in text
    assert "| staff-paper |" in text
    assert f"| {FULL} |" in text
    assert "against random | wins | ties | losses" in text
    assert "| fine-tuning on all |" in text
    for picture in ("differences", "by-rate", "by-cost"):
        assert (comparison.output / f"sums-loss-{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert (
        "Which choice of data trains the better model?" in (comparison.output / "comparison.html").read_text()
    )
    assert (comparison.output / "results.md").read_text() == text
    with open(comparison.output / "differences.csv") as table:
        pairs = list(csv.DictReader(table))
    assert len(pairs) == 2 * 2 * 4 * 3
    one, other = (
        next(p for p in pairs if (p["first"], p["second"]) == names)
        for names in [("staff", "random"), ("random", "staff")]
    )
    assert float(one["difference"]) == pytest.approx(-float(other["difference"]))


def cell(mean, noise=1.0, seed=0, drawn=resample(3, 100, np.random.default_rng(0))):  # noqa: B008 -- one set of resamples for all
    values = mean + noise * np.random.default_rng(seed).normal(size=(3, 100))
    values += mean - values.mean()
    return Judged(values, resampled_means(values, drawn))


def test_bold_and_arrows_stand_only_where_the_paired_interval_allows_them():
    judged = {
        ("random", 0.5): cell(30),
        ("far", 0.5): cell(32, seed=1),
        ("near", 0.5): cell(30.01, seed=2),
        ("low", 0.5): cell(25, seed=3),
    }
    differences = corrected(compare_cells(judged, "t", "rougeL"))
    lines = quality_table(judged, differences, "t", "rougeL").splitlines()
    assert lines[3].startswith("| far | **32.00** [")
    assert lines[3].endswith("↑ |")
    assert "**" not in lines[2] + lines[4] + lines[5]
    assert "↑" not in lines[4]
    assert lines[5].endswith("↓ |")
    said = tally(differences, "rougeL")
    assert "| far | 1 | 0 | 0 | none |" in said
    assert "| near | 0 | 1 | 0 | none |" in said
    assert "| low | 0 | 0 | 1 | t 50% |" in said
    two_best = {**judged, ("also", 0.5): cell(32, seed=4)}
    assert "**" not in quality_table(
        two_best, corrected(compare_cells(two_best, "t", "rougeL")), "t", "rougeL"
    )


def test_of_a_loss_less_is_better_and_the_correction_counts_every_test():
    judged = {("random", 0.5): cell(2, 0.1), ("less", 0.5): cell(1, 0.1, 1)}
    found = {(d.first, d.second): d for d in compare_cells(judged, "t", "loss")}
    assert found["less", "random"].outcome == "win"
    assert found["less", "random"].difference == pytest.approx(1)
    tests = [
        Difference("t", "rougeL", rate, "a", "random", -1, -2, 0, p)
        for rate, p in [(0.5, 0.01), (0.8, 0.03), (0.9, 0.02)]
    ]
    assert [d.corrected for d in corrected(tests)] == pytest.approx([0.03, 0.04, 0.04])


def test_a_cell_without_every_seed_is_left_out(finished):
    comparison, rows = finished
    fewer = [
        row
        for row in rows
        if not (row["method"] == "staff" and row["pruning_rate"] == "0.5" and row["seed"] == "2")
    ]
    judged = results.judge_cells(comparison.output, fewer, "sums", "rougeL")
    assert ("staff", 0.5) not in judged
    assert judged["staff", 0.75].values.shape == (2, 8)
    assert judged[UNTOUCHED, None].values.shape == (2, 8)
    assert not math.isnan(judged[FULL, None].mean)


def test_several_drafts_make_a_variant_each_of_what_speculates(file, tmp_path):
    values = yaml.safe_load(file.read_text())
    values["drafts"] = {"a": "${STAFF_MODELS}/draft", "b": "self:2"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    comparison = read_comparison(tmp_path / "c.yaml", "x")
    names = ["random", "staff@a", "staff@b", "staff-paper@a", "staff-paper@b", "ccs-draft@a", "ccs-draft@b"]
    assert list(comparison.variants) == names
    assert comparison.group("staff@b") == ["staff@b", "staff-paper@b", "ccs-draft@b"]
    assert comparison.variants["staff-paper@a"].method.fixed == {"allocation": "paper"}
    assert METHODS["staff"].fixed == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": None}, "needs seeds"),
        ({"seeds": ["x"]}, "seeds must be whole numbers"),
        ({"pruning_rates": [1.5]}, r"in \[0, 1\); found 1.5"),
        ({"methods": {"staf": {}}}, "there is no method 'staf'"),
        ({"methods": {"staff": {"alocation": "paper"}}}, "did you mean 'allocation'"),
        ({"methods": {"random": {"needs": {"scores": "draft/loss"}}}}, "needs: there is no 'scores'"),
        ({"tasks": {"a": {"train": "x"}}}, "needs a test file"),
        ({"tasks": {"a/b": {"train": "x", "test": "y"}}}, "becomes a folder"),
        ({"finetune": {"epoch": 1}}, "did you mean 'epochs'"),
        ({"finetune": {"seed": 1}}, "seed is set by the comparison itself"),
        ({"metrics": ["rouge"]}, "there is no metric 'rouge'"),
        ({"target": "${STAFF_NOWHERE}/x"}, "STAFF_NOWHERE, which is not set"),
        ({"pruning_rate": 0.5}, "did you mean 'pruning_rates'"),
    ],
)
def test_what_is_wrong_in_the_yaml_is_named_before_any_work(change, message, file, tmp_path):
    values = yaml.safe_load(file.read_text()) | change
    if "metrics" in change:
        del values["tasks"]["sums"]["metrics"]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(ValueError, match=message):
        read_comparison(tmp_path / "c.yaml", str(tmp_path / "x"))


def test_the_command_goes_from_the_yaml_to_the_tables(finished, file):
    comparison, _ = finished
    result = run_staff("compare", "--config", file, "--output", comparison.output)
    assert result.returncode == 0, result.stderr
    assert "# Cost of selection" in result.stdout
    assert "results.md" in result.stdout
    result = run_staff("compare", "--output", "x")
    assert (result.returncode, "--config FILE.yaml" in result.stderr) == (2, True)


def test_cells_with_models_are_tuned_scored_and_told_with_their_losses(file, tmp_path, monkeypatch):
    monkeypatch.undo()
    values = yaml.safe_load(file.read_text())
    values |= {"methods": {"staff": {}}, "pruning_rates": [0.5], "seeds": [1]}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    compare(comparison := read_comparison(tmp_path / "c.yaml", str(tmp_path / "x")))
    with open(comparison.output / "results.csv") as table:
        rows = list(csv.DictReader(table))
    assert [row["finetune_steps"] for row in rows] == ["", "5", "3"]  # 40 samples and 20, 8 a step
    losses = {float(row["loss"]) for row in rows}
    assert len(losses) == 3
    assert max(losses) < math.log(259) + 0.1
    run = json.loads(next(comparison.output.glob("selections/**/cost.json")).read_text())
    assert float(rows[2]["select_passes"]) == pytest.approx(run["sum"]["passes"], rel=0.25)


def test_seeds_of_an_untuned_draft_share_its_passes_and_choose_as_they_would_alone(
    file, tmp_path, monkeypatch
):
    monkeypatch.undo()
    text = file.read_text().replace("draft_epochs: 1", "draft_epochs: 0").replace("ccs-draft", "# ccs-draft")
    (tmp_path / "c.yaml").write_text(text)
    comparison = read_comparison(tmp_path / "c.yaml", str(tmp_path / "x"))
    grid = comparing._open(comparison)
    of_seed = {}
    for seed in (1, 2):
        cell = comparing.Cell("sums", "staff", 0.5, seed)
        of_seed[seed] = comparing._selection(grid, cell, {}, lambda *_: None)
    cost = [run.cost["stages"]["score on the draft"] for run in of_seed.values()]
    assert cost[0] == cost[1]
    assert cost[0]["samples"] == 40
    shutil.rmtree(tmp_path / "x" / "selections" / "sums" / "seed1")
    shutil.rmtree(tmp_path / "x" / "selections" / "sums" / "seed2")
    alone = comparing._selection(grid, comparing.Cell("sums", "staff", 0.5, 2), {}, lambda *_: None)
    assert alone.indices.tolist() == of_seed[2].indices.tolist()
    assert alone.indices.tolist() != of_seed[1].indices.tolist()


def test_what_hangs_on_a_seed_is_each_seeds_own_and_is_counted_once(file, tmp_path, monkeypatch):
    monkeypatch.undo()
    text = file.read_text().replace("draft_epochs: 1", "draft_epochs: 0, max_new_tokens: 4, target_epochs: 1")
    text = text.replace("staff-paper: {method: staff, allocation: paper, verify: null}", "whisper: {}")
    text = text.replace("needs: {scores: draft/el2n}", "needs: {scores: tuned_target/el2n}")
    (tmp_path / "c.yaml").write_text(text)
    comparison = read_comparison(tmp_path / "c.yaml", str(tmp_path / "x"))
    runs, _ = comparing.choose(comparison)
    one, two = ({str(s): row for s, row in of[0].cost["stages"].items()} for of in runs.values())
    assert one["score on the draft"] == two["score on the draft"]  # made once, and told of both
    assert one["tokenise"] == two["tokenise"]
    of_each = [
        "fine-tune the target",
        "score on the tuned target",
        "answer on the draft",
        "verify on the target",
    ]
    assert set(of_each) < one.keys() == two.keys()
    for stage in of_each:
        assert two[stage]["samples"] <= one[stage]["samples"] * (2 if stage[0] == "v" else 1.2), stage
        assert two[stage]["seconds"] != one[stage]["seconds"]


def test_processes_beside_a_comparison_start_with_it_and_end_with_it(tmp_path):
    begun = tmp_path / "begun"
    code = f"import os, time; open({str(begun)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    with comparing._at_work([[sys.executable, "-S", "-c", code]]):
        while not begun.exists() or not begun.read_text():
            time.sleep(0.01)
    assert not is_alive(int(begun.read_text()))
