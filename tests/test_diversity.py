"""How diverse coresets are: distances and clusters worked by hand, a space always the same, older folders."""

import csv
import json

import numpy as np
import pytest
import yaml

from family import comparison_file
from staff.comparison import diversity
from staff.comparison import run as comparing
from staff.comparison.grid import FULL, UNTOUCHED, read_comparison
from staff.comparison.run import compare
from staff.comparison.tables import diversity_table, report

YAML = """
target: ${STAFF_MODELS}/target
tasks:
  sums: {train: "${STAFF_DATA}/pool.jsonl", test: "${STAFF_DATA}/test.jsonl", metrics: [rougeL, bleu]}
methods: {random: {}, length: {}}
pruning_rates: [0.5]
seeds: [1, 2]
select: {dtype: float32}
finetune: {max_steps: 1, dtype: float32}
evaluate: {max_new_tokens: 2, dtype: float32}
"""
TOPICS = ("river water fish swim", "engine wheel road drive", "violin bow string play")


def texts(n=90):
    """A third of each topic, its words in shares that differ from text to text."""
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(TOPICS[i % 3].split(), 12)) for i in range(n)]


@pytest.fixture(scope="module")
def file(family, tmp_path_factory):
    with comparison_file(family, tmp_path_factory.mktemp("diversity"), YAML, 4) as path:
        yield path


@pytest.fixture(scope="module")
def finished(file, tmp_path_factory):
    comparison = read_comparison(file, str(tmp_path_factory.mktemp("out") / "x"))
    compare(comparison)
    return comparison


def rows_of(comparison):
    with open(comparison.output / "results.csv") as table:
        return list(csv.DictReader(table))


def test_the_nearest_distance_is_that_of_every_pair_looked_at():
    space = diversity.text_space(texts())
    dense = np.zeros(tuple(space["shape"]))
    for row, (start, stop) in enumerate(zip(space["indptr"][:-1], space["indptr"][1:], strict=True)):
        dense[row, space["indices"][start:stop]] = space["data"][start:stop]
    assert np.linalg.norm(dense, axis=1) == pytest.approx(np.ones(90))
    chosen = np.arange(0, 90, 4)
    similar = dense[chosen] @ dense[chosen].T - 2 * np.eye(len(chosen))
    assert diversity.apart(space, chosen)["nearest"] == pytest.approx((1 - similar.max(1)).mean(), abs=1e-6)


def test_cutting_the_products_up_changes_nothing_and_asking_a_few_samples_little(monkeypatch):
    space = diversity.text_space(texts(300))
    whole = diversity.apart(space, np.arange(300))
    monkeypatch.setattr(diversity, "SIMILARITIES_AT_ONCE", 1000)
    assert diversity.apart(space, np.arange(300)) == whole
    monkeypatch.setattr(diversity, "NUM_ASKED", 100)
    assert diversity.apart(space, np.arange(300))["nearest"] == pytest.approx(whole["nearest"], rel=0.2)


def test_a_coreset_of_one_topic_covers_its_clusters_alone_and_copies_lie_at_no_distance():
    pool = texts()
    space = diversity.text_space(pool)
    assert len(np.unique(space["labels"])) == 9
    one, all_topics = np.arange(0, 90, 3), np.arange(30)
    of_one = len(np.unique(space["labels"][one])) / 9
    assert diversity.apart(space, one)["clusters"] == of_one < diversity.apart(space, all_topics)["clusters"]
    assert diversity.apart(space, np.arange(90))["clusters"] == 1
    twice = diversity.text_space([*pool[:6], *pool[:6]])
    assert diversity.apart(twice, np.arange(12))["nearest"] == pytest.approx(0, abs=1e-6)
    apart = diversity.text_space(["river water", "engine wheel", "violin bow"])
    assert diversity.apart(apart, np.arange(3)) == {"nearest": 1, "clusters": 1}


def test_the_same_texts_make_the_same_space_to_the_byte():
    one, other = diversity.text_space(texts()), diversity.text_space(iter(texts()))
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)


@pytest.mark.parametrize(
    "pool", [["one"], ["?!", "..."], ["same"] * 25, ["", "a"], ["水は川を流れる", "車は道を走る"]]
)
def test_odd_pools_have_a_space_too(pool):
    space = diversity.text_space(pool)
    found = diversity.apart(space, np.arange(len(pool)))
    assert found["clusters"] == 1
    assert np.isnan(found["nearest"]) == (len(pool) == 1)
    assert diversity.apart(space, np.empty(0, np.int64))["clusters"] == 0


def test_every_coreset_has_its_figures_and_the_report_a_table(finished):
    rows = rows_of(finished)
    for row in rows:
        assert (row["nearest"] == "") == (row["clusters"] == "") == (row["method"] == UNTOUCHED)
    of_all = [row for row in rows if row["method"] == FULL]
    assert {row["clusters"] for row in of_all} == {"1.0"}
    assert len({row["nearest"] for row in of_all}) == 1
    seeds = [row["nearest"] for row in rows if row["method"] == "random"]
    assert len(set(seeds)) == 2
    text = report(finished.output, {"sums": ("rougeL", "bleu")}, plots=False)
    assert f"/ {np.mean([float(value) for value in seeds]):.3f} /" in text.split("# Diversity")[1]
    assert text.count("the corpus BLEU is in results.csv") == 1
    lines = text.split("| rougeL: wins-ties-losses against | random | length |")[1].splitlines()
    assert lines[2].startswith("| random |  | ")
    won, tied, lost = lines[2].split("|")[3].strip().split("-")
    assert lines[3] == f"| length | {lost}-{tied}-{won} |  |"
    assert int(won) + int(tied) + int(lost) == 1


def test_a_folder_from_before_gets_its_columns_and_no_cell_is_done_again(finished, monkeypatch):
    before = (finished.output / "results.csv").read_text()
    cells = {path: path.stat().st_mtime_ns for path in finished.output.glob("cells/**/cell.json")}
    for path in (
        *finished.output.glob("cells/**/diversity.json"),
        *finished.output.glob("selections/*/space-*.npz"),
    ):
        path.unlink()
    monkeypatch.setattr(comparing, "_work", lambda *_: pytest.fail("a cell was done again"))
    compare(finished)
    assert (finished.output / "results.csv").read_text() == before
    monkeypatch.setattr(diversity, "text_space", lambda *_: pytest.fail("the space was made again"))
    monkeypatch.setattr(diversity, "apart", lambda *_: pytest.fail("a coreset was looked at again"))
    compare(finished)
    assert (finished.output / "results.csv").read_text() == before
    assert {path: path.stat().st_mtime_ns for path in cells} == cells


def test_a_space_that_was_damaged_is_made_again(finished):
    before = (finished.output / "results.csv").read_text()
    (space,) = finished.output.glob("selections/*/space-*.npz")
    space.write_bytes(space.read_bytes()[:-100])
    for path in finished.output.glob("cells/**/diversity.json"):
        path.unlink()
    compare(finished)
    assert (finished.output / "results.csv").read_text() == before


def test_rows_that_were_skipped_leave_gaps_and_one_coreset_alone_lies_in_the_run_folder(
    file, family, tmp_path
):
    lines = (file.parent / "pool.jsonl").read_text().splitlines()
    lines[3] = lines[20] = json.dumps({"prompt": "no answer", "response": ""})
    (tmp_path / "pool.jsonl").write_text("\n".join(lines) + "\n")
    values = yaml.safe_load(YAML) | {"methods": ["length"], "seeds": [1], "full": False, "untouched": False}
    values["tasks"]["sums"] |= {"train": str(tmp_path / "pool.jsonl"), "reading": {"on_bad_row": "skip"}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    comparison = read_comparison(tmp_path / "c.yaml", str(tmp_path / "x"))
    compare(comparison)
    (row,) = rows_of(comparison)
    indices = np.load(tmp_path / "x" / "selections" / "sums" / "seed1" / "indices.npy")
    assert indices.max() > 38
    kept = [json.loads(line) for i, line in enumerate(lines) if i not in (3, 20)]
    space = diversity.text_space(f"{row['prompt']}\n{row['response']}" for row in kept)
    chosen = [i for i, given in enumerate(kept) if int(given["id"][1:]) in indices]
    assert {name: float(row[name]) for name in ("nearest", "clusters")} == diversity.apart(
        space, np.array(chosen)
    )


def test_a_coreset_that_is_gone_is_said_and_left_open(finished, caplog):
    (lost,) = (path for path in finished.output.glob("selections/sums/seed2/length-0.5/manifest.json"))
    (figures,) = finished.output.glob("cells/sums/length-0.5/seed2/diversity.json")
    text = lost.read_text()
    lost.unlink()
    figures.unlink()
    compare(finished)
    assert "cells/sums/length-0.5/seed2: its coreset is not there any more" in caplog.text
    assert [row["nearest"] == "" for row in rows_of(finished) if row["method"] == "length"] == [False, True]
    lost.write_text(text)
    compare(finished)


def test_the_table_means_over_seeds_and_marks_what_is_not_known():
    columns = ("task", "method", "pruning_rate", "seed", "distinct2", "nearest", "clusters")
    given = [
        ("t", "a", "0.5", "1", "0.5", "0.25", "1.0"),
        ("t", "a", "0.5", "2", "0.7", "0.35", "0.5"),
        ("t", "a", "0.9", "1", "0.9", "", ""),
        ("t", "b", "0.5", "1", "0.1", "nan", "0.25"),
        ("t", FULL, "", "1", "0.2", "0.1", "1.0"),
        ("t", UNTOUCHED, "", "", "", "", ""),
        ("u", "c", "0.1", "1", "0.1", "0.1", "0.1"),
    ]
    lines = diversity_table([dict(zip(columns, values, strict=True)) for values in given], "t").splitlines()
    assert lines == [
        "| distinct-2 / nearest / clusters | 50% pruned | 90% pruned |",
        "| --- | --- | --- |",
        "| a | 0.600 / 0.300 / 75% | 0.900 / ? / ? |",
        "| b | 0.100 / ? / 25% |  |",
        "| full data | 0.200 / 0.100 / 100% |  |",
    ]
