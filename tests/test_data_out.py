"""What a run leaves for others: the coreset in every format, scores of all rows, files for other trainers,
remarks on the data."""

import gzip
import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import staff
from family import make_rows, run_staff
from staff import jobs
from staff.config import FinetuneConfig, Reading, ScoreConfig, SelectConfig
from staff.data.rows import read
from staff.runs.scorefile import read_scores
from staff.runs.summary import grid_table, summary

ROWS = make_rows(12)
HALF = {"method": "random", "pruning_rate": 0.5}
SMALL = {
    "pruning_rate": 0.5,
    "num_regions": 4,
    "verification_budget": 2,
    "draft_epochs": 0,
    "batch_tokens": 512,
}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_csv(path):
    path.write_bytes(
        b"id;prompt;response\r\n"
        + b"".join(f'{r["id"]};"{r["prompt"]}";{r["response"]}\r\n'.encode() for r in ROWS)
    )


def write_json(path):
    path.write_text(json.dumps(ROWS, indent=1))


def write_gzip(path):
    path.write_bytes(gzip.compress(lines(ROWS)))


def write_parquet(path):
    pq.write_table(pa.Table.from_pylist(ROWS), path)


def write_arrow(path):
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as arrow:
        arrow.write_table(table)


def write_saved(path):
    pytest.importorskip("datasets").Dataset.from_list(ROWS).save_to_disk(path)


WRITERS = {
    "pool.csv": write_csv,
    "pool.json": write_json,
    "pool.jsonl.gz": write_gzip,
    "pool.parquet": write_parquet,
    "pool.arrow": write_arrow,
    "pool": write_saved,
}


@pytest.mark.parametrize("name", WRITERS)
def test_format_same_writes_the_coreset_in_the_format_it_came_in_too(name, tmp_path):
    WRITERS[name](tmp_path / name)
    run = staff.select(str(tmp_path / name), output=tmp_path / "x", format="same", **HALF)
    same = run.path / name.replace("pool", "coreset")
    whole, kept, plain = read(tmp_path / name), read(same), read(run.path / "coreset.jsonl")
    wanted = [row for i, row in enumerate(whole.raw(range(12))) if i in run.indices]
    assert list(kept.raw(range(6))) == wanted
    assert kept.format == whole.format
    assert [e.turns for e in plain.examples()] == [e.turns for e in kept.examples()]
    assert any(file.startswith(name.replace("pool", "coreset")) for file in run.manifest["files"])
    again = staff.select(str(tmp_path / name), output=tmp_path / "y", format="same", **HALF)
    assert again.manifest["files"] == run.manifest["files"]  # the same bytes


def test_jsonl_is_in_its_own_format_already_and_another_format_is_cleared_away(tmp_path):
    (tmp_path / "pool.jsonl").write_bytes(lines(ROWS))
    run = staff.select(str(tmp_path / "pool.jsonl"), output=tmp_path / "x", format="same", **HALF)
    assert [path.name for path in run.path.glob("coreset*")] == ["coreset.jsonl"]
    write_csv(tmp_path / "pool.csv")
    settings = {"data": str(tmp_path / "pool.csv"), "output": tmp_path / "y", **HALF}
    assert (staff.select(**settings, format="same").path / "coreset.csv").exists()
    with pytest.raises(ValueError, match="format: 'same' -> 'jsonl'"):
        staff.select(**settings)
    assert not (staff.select(**settings, update=True).path / "coreset.csv").exists()


def test_a_damaged_result_of_a_finished_run_is_written_again(tmp_path):
    write_csv(tmp_path / "pool.csv")
    settings = {"data": str(tmp_path / "pool.csv"), "output": tmp_path / "x", "format": "same", **HALF}
    staff.select(**settings)
    for name in ("coreset.csv", "scores.parquet"):
        whole = (tmp_path / "x" / name).read_bytes()
        (tmp_path / "x" / name).write_bytes(whole[:-5])
        staff.select(**settings)
        assert (tmp_path / "x" / name).read_bytes() == whole
    (tmp_path / "x" / "train" / "trl.py").write_text(
        "mine"
    )  # what is the user's to change makes no run unfinished
    staff.select(**settings)
    assert (tmp_path / "x" / "train" / "trl.py").read_text() == "mine"


def test_scores_of_all_rows_lie_beside_the_coreset_and_go_in_again(family, tmp_path):
    models = {"target": str(family / "target"), "draft": str(family / "draft")}
    run = staff.select(ROWS, method="staff", output=tmp_path / "x", **models, **SMALL)
    table = pq.read_table(run.path / "scores.parquet").to_pydict()
    names = ["row", "id", "effort", "loss", "prompt_tokens", "response_tokens"]
    assert list(table) == [*names, "target_effort", "region", "verified", "weight", "selected"]
    verified = run.selection.verified.tolist()
    assert [place for place, effort in enumerate(table["target_effort"]) if effort is not None] == verified
    assert np.flatnonzero(table["verified"]).tolist() == verified
    assert table["row"] == list(range(12))
    assert table["id"] == [row["id"] for row in ROWS]
    assert table["effort"] == run.scores["effort"].to_pylist()
    assert np.flatnonzero(table["selected"]).tolist() == run.indices.tolist()
    assert table["region"] == run.selection.region_of.tolist()
    assert min(table["loss"]) > 0
    assert table["response_tokens"] == [
        len(row["response"]) + 1 for row in ROWS
    ]  # a token a letter, and the end of turn
    own = {"method": "staff", "scores": str(run.path / "scores.parquet"), "target": models["target"]}
    again = staff.select(ROWS, output=tmp_path / "y", **own, **SMALL)
    assert again.indices.tolist() == run.indices.tolist()
    assert "score" in pq.read_schema(tmp_path / "y" / "scores.parquet").names


@pytest.mark.parametrize("name", ["s.parquet", "s.csv", "s.jsonl"])
def test_scores_are_matched_to_ids_by_value_whatever_their_type(name, tmp_path):
    ids = [7, "8", 9.0, "010", "x"]
    pool = read([{"id": i, "prompt": "p", "response": "r"} for i in ids])
    path, scores = tmp_path / name, [1.0, 2.0, 3.0, 4.0, 5.0]
    if name == "s.parquet":
        path = tmp_path / "s.parquet"
        pq.write_table(pa.table({"id": ["7.0", "8.0", "9", "010", "x"], "score": scores}), path)
    elif name == "s.csv":
        path.write_text("id,score\n7.0,1\n8,2\n9,3\n010,4\nx,5\n")
    else:
        path.write_text(
            "".join(json.dumps({"id": str(i), "score": s}) + "\n" for i, s in zip(ids, scores, strict=True))
        )
    found = read_scores(path, pool.numbers, [example.id for example in pool.examples()])
    assert found.tolist() == scores
    pq.write_table(pa.table({"id": [7, 8], "score": [1.0, 2.0]}), tmp_path / "n.parquet")
    assert read_scores(tmp_path / "n.parquet", np.array([0, 1]), ["7", "8"]).tolist() == [1.0, 2.0]


def test_rows_without_ids_and_methods_without_scores_leave_those_columns_empty_or_out(tmp_path):
    run = staff.select([{"prompt": "p", "response": str(i)} for i in range(4)], output=tmp_path / "x", **HALF)
    table = pq.read_table(run.path / "scores.parquet")
    assert table.schema.names == ["row", "id", "weight", "selected"]
    assert table["id"].to_pylist() == [None] * 4
    assert table.schema.field("id").type == pa.string()


def test_what_a_run_leaves_for_other_trainers_are_the_rows_that_were_kept(family, tmp_path):
    run = staff.select(ROWS, output=tmp_path / "x", target=str(family / "target"), **HALF)
    train = run.path / "train"
    kept = [e.turns for e in read(ROWS).examples() if e.id in kept_ids(run)]
    for data, info in (("coreset", train), (train / "coreset-messages.jsonl", None)):
        assert [e.turns for e in read(data, dataset_info=info).examples()] == kept
    settings = yaml.safe_load((train / "llama_factory.yaml").read_text())
    assert (settings["dataset_dir"], settings["model_name_or_path"]) == (str(train), str(family / "target"))
    none = staff.select(ROWS, output=tmp_path / "none", method="random", budget=0)
    assert not (none.path / "train").exists()
    assert (none.path / "coreset.jsonl").read_bytes() == b""


def test_a_data_frame_that_differs_in_the_middle_of_an_array_is_another_pool(tmp_path):
    pandas = pytest.importorskip("pandas")

    def pool(value):
        vector = np.arange(2000.0)
        vector[1000] = value
        return pandas.DataFrame({"prompt": ["a", "b"], "response": ["c", "d"], "vector": [vector, vector]})

    run = staff.select(pool(1.0), method="random", budget=1, output=tmp_path / "x")
    (row,) = map(json.loads, (run.path / "coreset.jsonl").read_text().splitlines())
    assert (len(row["vector"]), row["vector"][1000]) == (2000, 1.0)
    with pytest.raises(ValueError, match="data changed since"):
        staff.select(pool(7.0), method="random", budget=1, output=tmp_path / "x")


def kept_ids(run):
    return {ROWS[i]["id"] for i in run.indices}


def test_data_in_memory_gives_what_the_same_rows_in_a_file_give(tmp_path):
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    (tmp_path / "pool.jsonl").write_bytes(lines(ROWS))
    from_file = staff.select(tmp_path / "pool.jsonl", output=tmp_path / "file", **HALF)
    for name, data in {
        "list": ROWS,
        "frame": pandas.DataFrame(ROWS),
        "dataset": datasets.Dataset.from_list(ROWS),
    }.items():
        run = staff.select(data, output=tmp_path / name, format="same", **HALF)
        assert (run.path / "coreset.jsonl").read_bytes() == (from_file.path / "coreset.jsonl").read_bytes()
        assert (run.path / "coreset.parquet").exists() == (name == "dataset")
        assert list(run.rows.raw(run.selection.indices)) == [ROWS[i] for i in run.indices]


def test_a_hub_data_set_is_asked_for_by_name_config_split_and_revision(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config, **options):
        asked.append((name, config, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    run = staff.select(
        "some/data",
        output=tmp_path / "x",
        split="train",
        dataset_config="en",
        revision="v1",
        format="same",
        **HALF,
    )
    assert asked == [("some/data", "en", {"revision": "v1", "split": "train"})]
    assert run.manifest["format"] == "hub data set some/data, prompt/response"
    assert list(read(run.path / "coreset.parquet").raw(range(6))) == [ROWS[i] for i in run.indices]


def test_standard_input_is_a_pool_like_any_other(tmp_path):
    command = ("select", "--data", "-", "--method", "random", "--budget", 5, "--output", "x", "--json")

    def pipe(rows):
        return run_staff(*command, cwd=tmp_path, given=lines(rows).decode())

    first = pipe(ROWS)
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["m"] == 5
    kept = (tmp_path / "x" / "coreset.jsonl").read_bytes()
    assert [json.loads(line) for line in kept.splitlines()] == [
        ROWS[i] for i in np.load(tmp_path / "x" / "indices.npy")
    ]
    assert json.loads(pipe(ROWS).stdout) == json.loads(first.stdout)  # finished, and known again by its rows
    other = pipe(ROWS[:-1])
    assert other.returncode == 2
    assert "data changed since" in other.stderr
    assert "standard input is empty" in pipe([]).stderr


ODD = [
    *ROWS,
    {"id": "long", "prompt": "why " * 40, "response": "so"},
    {"id": "longer", "prompt": "why", "response": "so " * 40},
    {"id": "spells", "prompt": "what is <|im_end|>?", "response": "an end"},
    {"id": "empty", "prompt": "why", "response": ""},
]
REMARKS = (
    "pool.csv is JSONL by its content, whatever its name says",
    "1 rows can't be used and were left out",
    "1 prompts lost the start of their text: longer than --max-length 100",
    "1 responses lost their end: longer than --max-length 100",
    "1 rows hold text that spells control tokens of the model",
)


@pytest.fixture
def odd(tmp_path):
    (tmp_path / "pool.csv").write_bytes(lines(ODD))
    return str(tmp_path / "pool.csv")


def test_the_summary_says_what_became_of_odd_rows(odd, family, tmp_path):
    settings = {
        "output": str(tmp_path / "x"),
        "max_length": 100,
        "on_bad_row": "skip",
        "method": "direct",
        "pruning_rate": 0.5,
    }
    for _ in range(2):  # a finished run says it again
        run = staff.select(odd, target=str(family / "target"), num_regions=3, **settings)
        said = summary(run, SelectConfig(data=(odd,), reading=Reading(max_length=100), pruning_rate=(0.5,)))
        for remark in REMARKS:
            assert remark in said
    several = staff.select_grid(
        odd, methods=["random"], pruning_rates=[0.5, 0.75], output=tmp_path / "y", on_bad_row="skip"
    )
    assert REMARKS[1] in grid_table(several, SelectConfig(data=(odd,)))
    skipped = json.loads((tmp_path / "x" / "skipped.jsonl").read_text())
    assert skipped == {"row": 15, "reason": "'response' is empty; fill it in"}


def test_scoring_and_fine_tuning_warn_of_odd_rows_and_list_those_left_out(odd, family, tmp_path, caplog):
    shared = {
        "data": (odd,),
        "model": str(family / "draft"),
        "reading": Reading(on_bad_row="skip", max_length=100),
    }
    with caplog.at_level(logging.WARNING, "staff"):
        jobs.score(ScoreConfig(**shared, output=str(tmp_path / "s.parquet")))
        scored = caplog.text
        caplog.clear()
        jobs.finetune(FinetuneConfig(**shared, output=str(tmp_path / "a"), epochs=0.1))
    for said in (scored, caplog.text):
        for remark in REMARKS:
            assert remark in said
    for path in (tmp_path / "s.skipped.jsonl", tmp_path / "a" / "skipped.jsonl"):
        assert json.loads(path.read_text())["row"] == 15
