"""`staff diagnose` finds what was put into a pool, and says when it can't tell."""

import json

import numpy as np
import pytest

from family import config_of, make_rows, run_staff
from staff import diagnosis
from staff.config import DiagnoseConfig
from staff.data.rows import read
from staff.diagnosis import copied_rows, copies, diagnose, script_of

WORDS = [
    "the",
    "river",
    "runs",
    "past",
    "an",
    "old",
    "mill",
    "where",
    "nobody",
    "has",
    "ground",
    "corn",
    "since",
]


def text_of(number, length=14):
    return " ".join(
        WORDS[(number * 5 + i * (number % 4 + 1)) % len(WORDS)] + str(number) for i in range(length)
    )


def rows_of(pairs):
    return read([{"prompt": prompt, "response": response} for prompt, response in pairs])


def test_clusters_of_copies_are_counted_and_named():
    pytest.importorskip("datasketch")
    pairs = [(f"Say it: {text_of(i)}", text_of(i + 100)) for i in range(6)]
    pairs += [pairs[2], pairs[2], (pairs[4][0], pairs[4][1] + " indeed"), pairs[2]]
    found = copies(rows_of(pairs))
    assert (found["exact"], found["rows"], found["share"], found["clusters"]) == (3, 4, 0.4, 2)
    assert found["largest"] == [
        {"rows": 4, "first": 2, "others": [6, 7, 9]},
        {"rows": 2, "first": 4, "others": [8]},
    ]


def test_a_test_row_in_the_pool_is_found_and_a_common_instruction_is_none():
    instruction = "Answer the question below in one short and friendly sentence please.\n"
    pool = [(instruction + text_of(i), text_of(i + 200)) for i in range(60)]
    tests = [(instruction + text_of(i + 500), text_of(i + 700)) for i in range(8)]
    tests += [pool[7], (pool[9][0], pool[9][1] + " and more"), (instruction + "new", "short")]
    pool.append((instruction + "old", "short"))
    found = copied_rows(rows_of(pool), rows_of(tests))
    assert found["rows"] == 11
    assert [(one["row"], one["of"]) for one in found["examples"]] == [(8, 7), (9, 9)]
    assert found["copied"] == 2


@pytest.mark.parametrize(
    ("text", "script"),
    [("a dog", "Latin"), ("Әлем сөз a", "Cyrillic"), ("漢字ばかり漢字漢字", "Cjk"), ("12 + 7", "none")],
)
def test_a_row_has_the_script_of_most_of_its_letters(text, script):
    (example,) = rows_of([(text, "1")]).examples()
    assert script_of(example) == script


def ratios_with(wrong_share, apart, n=600, seed=0):
    """Loss ratios of a pool with wrong answers, and of exchanged ones, that lie so far apart."""
    rng = np.random.default_rng(seed)
    is_wrong = np.arange(n) < wrong_share * n
    ratios = np.exp(rng.normal(np.where(is_wrong, 0.1, 0.1 - apart), 0.15))
    return ratios, (rng.permutation(n)[:200], np.exp(rng.normal(0.1, 0.15, 200)))


def test_wrong_answers_are_found_by_a_model_that_can_tell():
    rows = rows_of([("p", f"r {i}") for i in range(600)])
    found = diagnosis._answers(rows, *ratios_with(0.3, 1.0))
    assert found["tells"]
    assert 0.3 <= found["at_most"] < 0.42
    assert found["right"] > 0.9
    assert set(found["examples"]) <= set(range(180))
    clean = diagnosis._answers(rows, *ratios_with(0.0, 1.0))
    assert clean["tells"]
    assert clean["at_most"] < 0.05


def test_a_model_that_cant_tell_says_so():
    rows = rows_of([("p", f"r {i}") for i in range(600)])
    found = diagnosis._answers(rows, *ratios_with(0.3, 0.02))
    assert not found["tells"]
    assert found["at_most"] is None
    assert found["right"] is None
    low, high = found["curve"][1:]
    assert low < 0.55 < high + 0.05


def test_rows_unlike_the_validation_rows_are_counted():
    rng = np.random.default_rng(0)
    centre, far = rng.normal(size=(2, 16))
    like = lambda k: centre + 0.2 * rng.normal(size=(k, 16))  # noqa: E731
    features = np.concatenate([like(70), far + 0.2 * rng.normal(size=(30, 16))])
    found = diagnosis._strangers(rows_of([("p", f"r {i}") for i in range(100)]), features, like(50))
    assert 0.3 <= found["share"] < 0.4
    assert set(found["examples"]) <= set(range(70, 100))
    assert diagnosis._strangers(rows_of([("p", "r")]), features[:1], like(9)) is None


@pytest.mark.parametrize(
    ("sources", "strangers", "validation", "says"),
    [
        ({}, None, None, "one clean task, no query: "),
        ({}, {"share": 0.05}, "v.jsonl", "one clean task, with rows like its query: "),
        ({}, None, "v.jsonl", "one clean task: "),  # too few rows of it
        ({"source": {"a": 0.5, "b": 0.5}}, None, None, "without such rows: "),
    ],
)
def test_one_clean_task_is_said_of_no_pool_of_several_kinds(sources, strangers, validation, says):
    found = {"signs": [], "test": None, "validation": None, "sources": sources, "scripts": {"Latin": 1.0}}
    found |= {"answers": {"tells": True}, "strangers": strangers}
    told = diagnosis._advice(found, DiagnoseConfig(data="x", model="d", validation=validation))
    (tie,) = [line for line in told if "expect a tie with random" in line]
    assert tie.startswith(says + "selection will buy cost, not quality")
    assert any(line.startswith("several kinds of rows") for line in told) == bool(sources)


@pytest.fixture(scope="module")
def looked(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnosis")
    rows = make_rows(60)
    rows += [{**rows[3], "id": f"again {i}"} for i in range(8)]
    for i, row in enumerate(rows):
        row["source"] = "ab"[i % 2]
    for name, some in (("pool", rows), ("few", make_rows(90)[70:]), ("test", make_rows(66)[58:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    settings = {
        "data": str(folder / "pool.jsonl"),
        "model": str(family / "draft"),
        "output": str(folder / "d.json"),
    }
    settings |= {
        "validation": str(folder / "few.jsonl"),
        "test": str(folder / "test.jsonl"),
        "max_length": 64,
    }
    return folder, settings, diagnose(config_of(DiagnoseConfig, **settings, target=str(family / "target")))


def test_one_look_at_a_pool_says_all_of_it(looked):
    folder, _, found = looked
    assert json.loads((folder / "d.json").read_text()) == json.loads(json.dumps(found))
    assert not list(folder.glob("d.unfinished"))
    assert (found["n"], found["rows"]) == (68, 68)
    assert found["copies"]["exact"] == 8
    assert found["sources"] == {"source": {"a": 0.5, "b": 0.5}}
    assert found["scripts"] == {"Latin": 1.0}
    assert [(one["row"], one["of"]) for one in found["test"]["examples"]][:2] == [(0, 58), (1, 59)]
    assert found["lengths"]["truncated"] == found["target_lengths"]["truncated"] > 0
    assert not found["answers"]["tells"]  # random weights
    assert set(found["signs"]) >= {"leak", "copies"}
    said = "\n".join(found["advice"])
    assert " of 8 test rows stand in the pool" in said
    assert "can't tell wrong answers" in said
    assert "--drop-suspects" not in said
    assert "of the rows repeat others: --dedup near" in said
    assert "--max-length 64" in said


def test_equal_seeds_give_equal_findings_and_a_killed_look_goes_on(looked, monkeypatch):
    folder, settings, _ = looked
    again = {**settings, "output": str(folder / "again.json"), "rows": 40}
    strangers = diagnosis._strangers
    monkeypatch.setattr(diagnosis, "_strangers", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        diagnose(config_of(DiagnoseConfig, **again))
    monkeypatch.setattr(diagnosis, "_strangers", strangers)
    from staff.scoring.scorer import Scorer

    monkeypatch.setattr(Scorer, "scores", None)  # nothing is scored again
    first = diagnose(config_of(DiagnoseConfig, **again))
    monkeypatch.undo()
    assert first["rows"] == 40
    assert diagnose(config_of(DiagnoseConfig, **again)) == first
    # a pass over 40 of 68 rows, one of their answers alone, both of exchanged ones, one over query rows
    assert 2 * 40 / 68 < first["passes"] < (4 * 40 + 20) / 68


def test_blocks_of_the_target_look_at_a_pool(looked, family):
    folder, settings, _ = looked
    own = {**settings, "model": "self:2", "rows": 40, "output": str(folder / "self.json")}
    with pytest.raises(ValueError, match="self:2: say whose blocks these are with --target"):
        diagnose(config_of(DiagnoseConfig, **own))
    own["target"] = str(family / "target")
    first, last = (
        diagnose(config_of(DiagnoseConfig, **own, draft_blocks=which))["answers"]
        for which in ("first", "last")
    )
    assert first["curve"] != last["curve"]


def test_texts_without_prompts_have_no_answers_to_doubt(family, tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text_of(i)}) + "\n" for i in range(30)))
    told = run_staff(
        "diagnose", "--data", "t.jsonl", "--model", family / "draft", "--chat-template", "none", cwd=tmp_path
    )
    assert told.returncode == 0, told.stderr
    assert "one clean task, no query: selection will buy cost, not quality" in told.stdout
    assert "answers" not in told.stdout.split("\n\n")[0]
    assert json.loads((tmp_path / "diagnosis.json").read_text())["answers"] is None


def test_what_is_wrong_is_said_in_one_line(family, tmp_path, pool_file):
    told = run_staff(
        "diagnose", "--data", pool_file, "--model", family / "draft", "--output", "x.txt", cwd=tmp_path
    )
    assert (told.returncode, told.stderr.count("\n")) == (2, 1)
    assert "findings are written as JSON" in told.stderr
