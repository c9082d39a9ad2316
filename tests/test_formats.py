"""Every format goes in, rows come out untouched, and an example is what the model should see."""

import csv
import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from staff.data.kinds import peek
from staff.data.rows import Turn, read
from staff.data.text import read_json_list

DATA = Path(__file__).parent / "data" / "formats"
ROWS = [
    {"id": f"r{i}", "prompt": f"Question {i}?\nSay.", "response": f'Answer {i}: “ü”, "q"', "n": i}
    for i in range(7)
]


def jsonl(path, rows=ROWS):
    path.write_bytes(b"".join(json.dumps(r).encode() + b"\n" for r in rows))
    return path


def turns(rows, i=0):
    return [(t.role, t.content, t.train) for t in rows.example(i).turns]


FOUND = {
    "alpaca.json": ("JSON, Alpaca", 8),
    "alpaca_system_history.json": ("JSON, Alpaca", 4),
    "alpaca_en_demo.json": ("JSON, Alpaca", 3),
    "sharegpt.json": ("JSON, ShareGPT", 6),
    "sharegpt_multiturn.json": ("JSON, ShareGPT", 3),
    "sharegpt_toolcall.json": ("JSON, ShareGPT", 3),
    "openai_messages.jsonl": ("JSONL, messages", 6),
    "openai_messages_multiturn.jsonl": ("JSONL, messages", 3),
    "openai_messages_parts.jsonl": ("JSONL, messages", 3),
    "prompt_completion.jsonl": ("JSONL, prompt/completion", 6),
    "prompt_response.jsonl": ("JSONL, prompt/response", 8),
    "prompt_response.jsonl.gz": ("JSONL (gzip), prompt/response", 8),
    "prompt_response.csv": ("CSV, prompt/response", 8),
    "prompt_response.parquet": ("Parquet, prompt/response", 8),
    "messages.parquet": ("Parquet, messages", 6),
    "question_answer.tsv": ("CSV, question/answer", 8),
}


@pytest.mark.parametrize("name", FOUND)
def test_real_files_are_recognised_and_every_row_makes_an_example(name):
    rows = read(DATA / name)
    assert (rows.format, len(rows)) == FOUND[name]
    examples = list(rows.examples())
    assert len(examples) == len(rows)
    for i, example in enumerate(examples):
        assert example.turns[-1].role == "assistant"
        assert example.turns[-1].train
        assert rows.example(i) == example
    assert rows.numbers.tolist() == list(range(len(rows)))
    assert rows.skipped == []
    assert [p.name for p in rows.paths] == [name]


def test_every_entry_of_a_dataset_info_reads_the_rows_its_file_has():
    info = json.loads((DATA / "dataset_info.json").read_text())
    for name, entry in info.items():
        rows = read(name, dataset_info=DATA)
        columns = "prompt=prompt,response=translation" if name == "column_named_response" else None
        assert list(rows.examples()) == list(read(DATA / entry["file_name"], columns=columns).examples()), (
            name
        )
    (note,) = read("alpaca_en_demo", dataset_info=DATA / "dataset_info.json").notes
    assert note == "num_samples is 100: rows are drawn at random, each once, of 3"
    assert len(read(DATA / "sharegpt.json", dataset_info=DATA)) == 6, "a file that one entry describes"


# ---- what the model sees ----


def one(row, **options):
    return turns(read([row], **options))


@pytest.mark.parametrize(
    "keys",
    [("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("instruction", "output")],
)
def test_a_prompt_and_a_response_are_two_turns(keys):
    assert one(dict(zip(keys, ("Q", "A"), strict=True))) == [("user", "Q", False), ("assistant", "A", True)]


def test_alpaca_joins_instruction_and_input_and_puts_system_and_history_first():
    row = {"instruction": "I", "input": "X", "output": "O", "system": "S", "history": [["u", "a"]]}
    told = [
        ("system", "S", False),
        ("user", "u", False),
        ("assistant", "a", False),
        ("user", "I\nX", False),
        ("assistant", "O", True),
    ]
    assert one(row) == told
    assert one(row, train_on="all")[2] == ("assistant", "a", True)
    assert one({"instruction": "I", "input": "", "output": "O", "system": None, "history": []}) == [
        ("user", "I", False),
        ("assistant", "O", True),
    ]
    assert one({"instruction": "", "input": "X", "output": "O"})[0] == ("user", "X", False)


def test_the_original_alpaca_files_text_column_does_not_get_in_the_way():
    assert (
        read([{"instruction": "I", "input": "", "output": "O", "text": "I O"}]).format
        == "rows in memory, Alpaca"
    )


def test_a_text_column_is_one_trained_turn():
    assert read([{"text": "all of it"}]).example(0).turns == (Turn("text", "all of it", True),)


CHAT = [("system", "S"), ("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2")]


def test_the_loss_is_on_the_last_assistant_turn_or_on_all():
    row = {"messages": [{"role": r, "content": c} for r, c in CHAT]}
    assert [t for _, _, t in one(row)] == [False, False, False, False, True]
    assert [t for _, _, t in one(row, train_on="all")] == [False, False, True, False, True]


def test_sharegpt_names_are_mapped_and_calls_are_the_assistants():
    names = ["human", "function_call", "observation", "gpt"]
    row = {
        "conversations": [{"from": n, "value": n} for n in names],
        "system": "S",
        "tools": '[{"name": "f"}]',
    }
    assert one(row, train_on="all") == [
        ("system", "S", False),
        ("user", "human", False),
        ("assistant", "function_call", True),
        ("tool", "observation", False),
        ("assistant", "gpt", True),
    ]
    assert read([row]).example(0).tools == [{"name": "f"}]


def test_a_turns_other_fields_come_through_as_they_are():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "messages": [
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ],
        "tools": [{"name": "f"}],
    }
    example = read([row]).example(0)
    assert example.turns[1] == Turn("assistant", "", True, {"tool_calls": [call]})
    assert example.turns[1].text == '{"name": "f", "arguments": {"x": 1}}'
    assert example.tools == [{"name": "f"}]
    thinking = {"role": "assistant", "content": "56", "reasoning_content": "7 * 8", "weight": 1, "name": None}
    (_, turn) = read([{"messages": [{"role": "user", "content": "7 * 8?"}, thinking]}]).example(0).turns
    assert turn == Turn("assistant", "56", True, {"reasoning_content": "7 * 8"})


def test_nulls_that_arrow_adds_to_turns_calls_and_tools_are_taken_out_again(tmp_path):
    def call(**arguments):
        return {"type": "function", "function": {"name": "f", "arguments": arguments}}

    def row(**arguments):
        asked = {"role": "user", "content": "u"}
        calls = {"role": "assistant", "content": "", "tool_calls": [call(**arguments)]}
        return {"messages": [asked, calls], "tools": [{"name": "f", "parameters": arguments}]}

    rows = [row(x=1), row(y="2")]
    table = pa.Table.from_pylist(rows)
    assert table["messages"][0].as_py()[0]["tool_calls"] is None, "Arrow gives every struct every key"
    pq.write_table(table, tmp_path / "a.parquet")
    read_again = read(tmp_path / "a.parquet")
    assert list(read_again.examples()) == list(read(rows).examples())
    assert read_again.example(1).turns[1].fields == {"tool_calls": [call(y="2")]}
    assert read_again.example(1).tools == rows[1]["tools"]


def test_content_parts_stay_parts_and_are_read_as_one_text_whatever_their_key():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}, {"text": "c"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]}
    (_, turn) = read([row]).example(0).turns
    assert (turn.content, turn.text) == (parts, "abc")


def test_a_weight_of_0_takes_the_loss_off_a_turn_and_what_follows_the_last_loss_is_left_away():
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "loss_weight": 1.0}]
    turns += [{"role": "user", "content": "v"}, {"role": "assistant", "content": "b", "weight": 0}]
    assert one({"messages": turns}, train_on="all") == [("user", "u", False), ("assistant", "a", True)]


def test_trl_prompts_and_completions_may_be_lists_of_messages():
    row = {
        "prompt": [{"role": "user", "content": "u"}],
        "completion": [{"role": "assistant", "content": "a"}],
    }
    assert one(row) == [("user", "u", False), ("assistant", "a", True)]


def test_columns_names_any_two_columns():
    rows = read([{"de": "Haus", "en": "house", "who": 7}], columns="prompt=de,response=en,id=who")
    assert turns(rows) == [("user", "Haus", False), ("assistant", "house", True)]
    assert rows.example(0).id == "7"
    assert (
        turns(
            read(
                [{"t": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}],
                columns="messages=t",
            )
        )[1][1]
        == "a"
    )


def test_words_like_na_and_null_are_answers(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,response\nSodium?,NA\nNothing?,null\nNumber?,1.0\nNone?,None\nNaN?,nan\n")
    assert [e.turns[1].content for e in read(path).examples()] == ["NA", "null", "1.0", "None", "nan"]


def test_control_characters_and_special_tokens_stay_as_they_are():
    text = "\x00 \x1b[31m <|im_end|> </s> \u2028 \ufeff"
    assert one({"prompt": text, "response": text})[1][1] == text


# ---- containers ----


def write_json(path):
    path.write_text(json.dumps(ROWS, indent=1))


ONE_LINE = [{**row, "prompt": row["prompt"].replace("\n", " ")} for row in ROWS]  # TSV knows no line breaks


def write_csv(path, delimiter=",", end="\r\n", rows=ROWS):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter, lineterminator=end)
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path):
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=3)


def write_arrow(path, new=pa.ipc.new_file):
    table = pa.Table.from_pylist(ROWS)
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def write_bom(path):
    jsonl(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))


CONTAINERS = {
    "a.jsonl": jsonl,
    "a.ndjson": jsonl,
    "bom_crlf.jsonl": write_bom,
    "jsonl_named.json": jsonl,
    "a.json": write_json,
    "json_named.jsonl": write_json,
    "one_line.jsonl": lambda p: p.write_text(json.dumps(ROWS)),
    "a.csv": write_csv,
    "lf.csv": lambda p: write_csv(p, end="\n"),
    "semicolon.csv": lambda p: write_csv(p, ";"),
    "pipe.csv": lambda p: write_csv(p, "|"),
    "a.tsv": lambda p: write_csv(p, "\t", rows=ONE_LINE),
    "comma.tsv": write_csv,
    "parquet_named.jsonl": write_parquet,
    "a.parquet": write_parquet,
    "a.arrow": write_arrow,
    "stream.arrow": lambda p: write_arrow(p, pa.ipc.new_stream),
    "no_extension": jsonl,
}
TEXT = [name for name in CONTAINERS if not name.endswith((".parquet", ".arrow")) and "parquet" not in name]


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_gives_the_same_rows_and_writes_them_back(name, tmp_path):
    path = tmp_path / name
    CONTAINERS[name](path)
    rows = read(path)
    is_csv = rows.format.startswith("CSV")
    given = ONE_LINE if name == "a.tsv" else ROWS
    expected = [{k: str(v) if is_csv else v for k, v in row.items()} for row in given]
    assert list(rows.raw(range(len(rows)))) == expected
    assert list(rows.raw([5, 0, 3])) == [expected[5], expected[0], expected[3]]
    assert list(rows.raw([1, 1, 2, 2])) == [expected[1]] * 2 + [expected[2]] * 2
    assert [e.id for e in rows.examples(2, 4)] == ["r2", "r3"]
    rows.write_jsonl(tmp_path / "out.jsonl", [1, 2, 6])
    assert list(map(json.loads, (tmp_path / "out.jsonl").read_text(encoding="utf-8-sig").splitlines())) == [
        expected[i] for i in (1, 2, 6)
    ]
    rows.write_same(tmp_path / f"same_{name}", [1, 2, 6])
    again = read(tmp_path / f"same_{name}")
    assert list(again.raw(range(3))) == [expected[i] for i in (1, 2, 6)]
    assert again.format == rows.format
    assert list(tmp_path.glob(".*")) == []
    assert pickle.loads(pickle.dumps(rows)).example(3) == rows.example(3), (
        "worker processes get rows by pickle"
    )


@pytest.mark.parametrize("name", TEXT)
def test_text_is_read_gzipped_too_whatever_the_name(name, tmp_path):
    path = tmp_path / name
    CONTAINERS[name](path)
    plain = read(path)
    zipped = tmp_path / f"zipped_{name}"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    rows = read(zipped)
    assert list(rows.raw(range(7))) == list(plain.raw(range(7)))
    rows.write_same(tmp_path / "same.gz", [2, 4])
    plain.write_same(tmp_path / "same", [2, 4])
    assert gzip.decompress((tmp_path / "same.gz").read_bytes()) == (tmp_path / "same").read_bytes()


def test_jsonl_lines_come_back_byte_for_byte(tmp_path):
    lines = [
        b'{"prompt":"a",  "response": "b", "x": 1.10}\n',
        b'{"response":"\\u00fc","prompt":"\xc3\xbc"}\r\n',
        b' {"prompt": "c","response": "d"}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines[0] + b"\n  \n" + lines[1] + lines[2])
    rows = read(path)
    assert rows.numbers.tolist() == [0, 1, 2], "blank lines are no rows"
    for write in (rows.write_jsonl, rows.write_same):
        write(tmp_path / "out.jsonl", [2, 0, 1])
        assert (tmp_path / "out.jsonl").read_bytes() == lines[2] + b"\n" + lines[0] + lines[1]


def test_parquet_comes_back_with_its_schema_and_values(tmp_path):
    schema = pa.schema(
        [
            pa.field("prompt", pa.large_string(), metadata={"k": "v"}),
            ("response", pa.dictionary(pa.int8(), pa.string())),
            ("t", pa.timestamp("ms", "UTC")),
        ],
        metadata={"about": "me"},
    )
    table = pa.table(
        [
            ["a", "b", "c"],
            pa.array(["x", "y", "x"]).dictionary_encode().cast(schema.field(1).type),
            [1, None, 3],
        ],
        schema=schema,
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    rows = read(tmp_path / "a.parquet")
    rows.write_same(tmp_path / "b.parquet", [0, 2])
    back = pq.read_table(tmp_path / "b.parquet")
    assert back.schema.equals(table.schema, check_metadata=True)
    assert back.equals(table.take([0, 2]))
    rows.write_jsonl(tmp_path / "b.jsonl", [0, 1])
    assert json.loads((tmp_path / "b.jsonl").read_text().splitlines()[0]) == {
        "prompt": "a",
        "response": "x",
        "t": "1970-01-01T00:00:00.001000+00:00",
    }


def test_values_json_has_no_word_for_are_written_as_the_nearest(tmp_path):
    read(
        [
            {
                "prompt": "p",
                "response": "r",
                "nan": float("nan"),
                "b": b"\x00",
                "np": np.int64(3),
                "half": "\ud83d",
                5: {1},
            }
        ]
    ).write_jsonl(tmp_path / "a", [0])
    row = json.loads((tmp_path / "a").read_text())
    assert row == {
        "prompt": "p",
        "response": "r",
        "nan": None,
        "b": "AA==",
        "np": 3,
        "half": "\ud83d",
        "5": "{1}",
    }


def test_a_name_that_says_something_else_is_noted(tmp_path):
    write_json(tmp_path / "a.jsonl")
    assert read(tmp_path / "a.jsonl").notes == (
        f"{tmp_path / 'a.jsonl'} is JSON by its content, whatever its name says",
    )
    assert read(jsonl(tmp_path / "b.json")).notes == (), "JSON Lines named .json are common"


def test_several_entries_are_read_together_if_they_are_laid_out_alike(tmp_path):
    jsonl(tmp_path / "a.jsonl", ROWS[:2])
    jsonl(tmp_path / "b.jsonl", ROWS[2:])
    pair = {"columns": {"prompt": "prompt", "response": "response"}}
    info = {
        "a": {"file_name": "a.jsonl", **pair},
        "b": {"file_name": "b.jsonl", **pair},
        "c": {"file_name": "b.jsonl"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    assert list(read(["a", "b"], dataset_info=tmp_path).raw(range(7))) == ROWS
    with pytest.raises(ValueError, match="a and c are laid out differently; select from each alone"):
        read(["a", "c"], dataset_info=tmp_path)
    with pytest.raises(ValueError, match="--columns and --dataset-info both say which column holds what"):
        read("a", dataset_info=tmp_path, columns="prompt=prompt,response=id")


def test_an_entry_of_plain_texts_reads_back_and_num_samples_draws_rows(tmp_path):
    jsonl(tmp_path / "texts.jsonl", [{"text": f"text {i}"} for i in range(9)])
    entry = {"file_name": "texts.jsonl", "columns": {"prompt": "text"}}
    info = {"all": entry, "some": {**entry, "num_samples": 4}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    assert [e.turns[0].content for e in read("all", dataset_info=tmp_path).examples()] == [
        f"text {i}" for i in range(9)
    ]
    some = read("some", dataset_info=tmp_path)
    assert some.notes == ("num_samples is 4: rows are drawn at random, each once, of 9",)
    assert some.numbers.tolist() == sorted(set(some.numbers.tolist()))
    assert len(some) == 4
    assert some.numbers.tolist() == read("some", dataset_info=tmp_path).numbers.tolist()
    assert [e.turns[0].content for e in some.examples()] == [f"text {i}" for i in some.numbers]
    with pytest.raises(ValueError, match="some can't be read together with other data"):
        read(["all", "some"], dataset_info=tmp_path)


def test_several_files_are_counted_through(tmp_path):
    paths = [jsonl(tmp_path / "a.jsonl", ROWS[:3]), jsonl(tmp_path / "b.jsonl", ROWS[3:])]
    for data in (paths, tmp_path, [str(p) for p in paths]):
        rows = read(data)
        assert rows.numbers.tolist() == list(range(7))
        assert list(rows.raw([6, 1, 3])) == [ROWS[6], ROWS[1], ROWS[3]]
        rows.write_jsonl(tmp_path / "out", range(7))
        assert (tmp_path / "out").read_bytes() == b"".join(p.read_bytes() for p in paths)
    tables = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    pq.write_table(pa.Table.from_pylist(ROWS[:3]), tables[0])
    pq.write_table(pa.Table.from_pylist(ROWS[3:]), tables[1])
    assert list(read(tables).raw([6, 1, 3])) == [ROWS[6], ROWS[1], ROWS[3]]


def test_a_folder_with_several_splits_asks_for_one(tmp_path):
    jsonl(tmp_path / "train-00000.jsonl", ROWS[:3])
    jsonl(tmp_path / "train-00001.jsonl", ROWS[3:5])
    jsonl(tmp_path / "test.jsonl", ROWS[5:])
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match=r"several splits \(test, train\); choose with --split"):
        read(tmp_path)
    assert len(read(tmp_path, split="train")) == 5
    with pytest.raises(ValueError, match=r"no file of the split 'validation'; its files: test\.jsonl"):
        read(tmp_path, split="validation")


def test_standard_input_is_read_more_than_once_and_its_copy_goes_away(monkeypatch):
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(b"".join(json.dumps(r).encode() + b"\n" for r in ROWS)))
    )
    rows = read("-")
    assert list(rows.raw(range(7))) == ROWS
    assert len(list(rows.examples())) == 7
    (path,) = rows.paths
    assert path.exists()
    del rows
    assert not path.exists()


def test_nothing_is_left_of_standard_input_when_the_process_is_killed(tmp_path):
    code = "import os, sys; from staff.data.rows import read; print(len(read('-'))); os.kill(os.getpid(), 9)"
    killed = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(ROWS[0]).encode(),
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
    )
    assert killed.returncode == -9
    if Path("/proc/self/fd").is_dir():
        assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_with_a_name_is_read_like_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = subprocess.Popen(
        ["sh", "-c", 'printf \'{"prompt": "p", "response": "r"}\\n\' > "$1"', "sh", tmp_path / "pipe"]
    )
    rows = read(tmp_path / "pipe")
    assert writer.wait() == 0
    assert len(list(rows.examples())) == len(list(rows.examples())) == 1


def test_times_to_the_nanosecond_and_string_views_are_read_with_pandas_or_without(tmp_path):
    table = pa.table(
        {
            "prompt": pa.array(["p", "q", "s"]).cast(pa.string_view()),
            "response": ["r", "s", "t"],
            "at": pa.array([1, 2001, 3], pa.timestamp("ns", "UTC")),
            "took": pa.array([1, 2001, 3], pa.duration("ns")),
            "time": pa.array([1, 2001, 3], pa.time64("ns")),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet")
    rows.write_jsonl(tmp_path / "a.jsonl", [0, 1])
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[1]) == {
        "prompt": "q",
        "response": "s",
        "at": "1970-01-01T00:00:00.000002+00:00",
        "took": "0:00:00.000002",
        "time": "00:00:00.000002",
    }
    rows.write_same(tmp_path / "b.parquet", [0, 2])
    assert pq.read_table(tmp_path / "b.parquet").to_pydict() == table.slice(0, 1).to_pydict() | {
        name: [table[name][0].as_py(), table[name][2].as_py()] for name in table.column_names
    }


def test_times_that_python_has_no_word_for_are_read_as_text(tmp_path):
    columns = {
        "prompt": ["p", "q"],
        "response": ["r", "s"],
        "zone": pa.array([0, 1], pa.timestamp("us", "No/Where")),
        "far": pa.array([0, 2**60], pa.timestamp("ms")),
        "day": pa.array([0, 2**31 - 1], pa.date32()),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    read(tmp_path / "a.parquet").write_jsonl(tmp_path / "a.jsonl", range(2))
    first, second = map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
    assert (first["zone"], first["day"]) == ("1970-01-01 00:00:00.000000", "1970-01-01")
    assert second["zone"] == "1970-01-01 00:00:00.000001"
    assert all(isinstance(second[name], str) for name in ("far", "day"))


def test_bad_rows_are_left_out_and_counted_and_numbers_stay_the_files(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '\n{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": ""}\nnonsense\n[1]\n{"prompt": "c", "response": "d"}\n'
    )
    rows = read(path, on_bad_row="skip")
    assert rows.numbers.tolist() == [0, 4]
    assert [n for n, _ in rows.skipped] == [1, 2, 3]
    assert "'response' is empty" in rows.skipped[0][1]
    assert [e.turns[0].content for e in rows.examples()] == ["a", "c"]
    assert list(rows.raw([1])) == [{"prompt": "c", "response": "d"}]
    table = pa.table({"prompt": ["a", "b", None, "d"], "response": ["x", " ", "y", "z"]})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet", on_bad_row="skip")
    assert rows.numbers.tolist() == [0, 3]
    assert [(n, r.split(";")[0]) for n, r in rows.skipped] == [
        (1, "'response' is empty"),
        (2, "'prompt' is null"),
    ]
    assert [e.turns[0].content for e in rows.examples()] == ["a", "d"]
    rows.write_same(tmp_path / "b.parquet", [1])
    assert pq.read_table(tmp_path / "b.parquet").to_pylist() == [{"prompt": "d", "response": "z"}]


def test_parquet_and_the_same_rows_in_memory_are_read_alike(tmp_path):
    """Oracle: what is fast for columns agrees with pyarrow's own conversion, row by row."""
    texts = ["a", "", " ", None, "ü", "\u3000", "\x00"]
    roles = ["user", "assistant", "gpt", "nobody", None]
    rng = np.random.default_rng(0)
    chats = []
    for _ in range(300):
        turns = [
            {
                "role": roles[rng.integers(5)],
                "content": texts[rng.choice(7, p=[0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])],
            }
            for _ in range(rng.integers(4))
        ]
        chats.append([None, turns][int(rng.random() < 0.9)])
    pairs = [(texts[rng.integers(7)], texts[rng.integers(7)]) for _ in range(300)]
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    for table in (
        pa.table({"messages": pa.array(chats, kind)}),
        pa.table({"prompt": [p for p, _ in pairs], "response": [r for _, r in pairs]}),
    ):
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=70)
        rows = read(tmp_path / "a.parquet", on_bad_row="skip")
        slow = read(table.to_pylist(), on_bad_row="skip")
        assert rows.numbers.tolist() == slow.numbers.tolist()
        assert rows.skipped == slow.skipped
        assert list(rows.examples()) == list(slow.examples())
        assert 0 < len(rows) < 300


def test_rows_that_whole_columns_show_to_be_fine_are_not_looked_at_one_by_one(tmp_path):
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    for good, bad in (
        ({"prompt": "p", "response": "r"}, {"prompt": "p", "response": " "}),
        ({"messages": chat}, {"messages": chat[:1]}),
        ({"instruction": "i", "input": "", "output": "o"}, {"instruction": "", "input": "x", "output": "o"}),
    ):
        pq.write_table(pa.Table.from_pylist([good, bad, good]), tmp_path / "a.parquet")
        rows = read(tmp_path / "a.parquet", on_bad_row="skip")
        assert [row for _, row in rows.source.scan(rows.layout)] == [None, bad, None]


def test_columns_of_any_type_come_out_as_pyarrow_has_them(tmp_path):
    inner = pa.struct([("x", pa.list_(pa.int32())), ("y", pa.large_string())])
    table = pa.table(
        {
            "prompt": ["p"] * 4,
            "response": ["r"] * 4,
            "nested": pa.array(
                [[{"x": [1, None], "y": "ü"}, None], None, [], [{"x": None}]], pa.list_(inner)
            ),
            "one": pa.array([None, {"x": []}, {"y": "z"}, None], inner),
            "many": pa.array([[["a"], None], [], None, [[]]], pa.large_list(pa.list_(pa.string()))),
            "word": pa.array(["a", None, "a", "b"]).dictionary_encode(),
            "pair": pa.array([[1, 2], None, [3, 4], [5, 6]], pa.list_(pa.int8(), 2)),
            "none": pa.nulls(4),
        }
    ).slice(1)
    pq.write_table(table, tmp_path / "a.parquet")
    assert list(read(tmp_path / "a.parquet").raw(range(3))) == table.to_pylist()
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as arrow:
        arrow.write_table(table)
    assert list(read(tmp_path / "a.arrow").raw(range(3))) == table.to_pylist()


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"), max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.sampled_from("abcü"), values, max_size=3), min_size=1, max_size=5),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
)
def test_a_json_list_gives_the_rows_and_the_line_each_begins_on(rows, indent, ascii_only):
    """Oracle: json.loads of the whole."""
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        file.write(text.encode("utf-8", "surrogatepass"))
        file.flush()
        read_rows = list(read_json_list(peek(Path(file.name), "name", 100)))
    assert [row for _, row in read_rows] == rows
    lines = text.split("\n")
    assert all(lines[line - 1].lstrip(" [").startswith("{") for line, _ in read_rows)
    assert [line for line, _ in read_rows] == sorted(line for line, _ in read_rows)


@pytest.mark.parametrize("cut", range(1, 75))
def test_a_cut_json_list_is_seen_to_be_cut(cut, tmp_path):
    data = '[\n{"prompt": "ü\\u00fc\\n", "n": -1.5e3},\n{"prompt": true, "m": [null, {}]}]'.encode()
    (tmp_path / "a.json").write_bytes(data[:-cut] if cut < len(data) else b"[")
    with pytest.raises(ValueError, match=r"cut off|not UTF-8|correct"):
        list(read_json_list(peek(tmp_path / "a.json", "name", 100)))


# ---- other libraries' data ----


def test_a_data_set_saved_to_disk_is_read_and_written_as_one(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "saved", num_shards=2)
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(tmp_path / "both")
    rows = read(tmp_path / "saved")
    assert rows.format == "Dataset, prompt/response"
    assert list(rows.raw(range(7))) == ROWS
    rows.write_same(tmp_path / "some", [1, 5])
    back = datasets.load_from_disk(tmp_path / "some")
    assert back.to_list() == [ROWS[1], ROWS[5]]
    assert back.features == data.features
    assert back._fingerprint != data._fingerprint
    assert len(read(tmp_path / "both")) == 7
    assert len(read(tmp_path / "both", split="test")) == 1


def test_objects_of_datasets_and_pandas_are_rows(tmp_path):
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    data = datasets.Dataset.from_list(ROWS)
    for some in (
        data,
        data.select(range(7)),
        datasets.DatasetDict(train=data, test=data),
        pandas.DataFrame(ROWS),
        ROWS,
        tuple(ROWS),
    ):
        rows = read(some)
        assert list(rows.raw([6, 2])) == [ROWS[6], ROWS[2]]
        assert [e.id for e in rows.examples()] == [r["id"] for r in ROWS]
    shuffled = read(data.select([3, 1, 0]))
    assert list(shuffled.raw(range(3))) == [ROWS[3], ROWS[1], ROWS[0]]
    shuffled.write_same(tmp_path / "a.parquet", [0, 2])
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == [ROWS[3], ROWS[0]]


def test_a_hub_data_set_is_loaded_through_the_librarys_own_call(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(name, config, **options):
        calls.append((name, config, options))
        data = datasets.Dataset.from_list(ROWS)
        return data if options["split"] else datasets.DatasetDict(train=data, test=data.select([0]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read("somebody/some-data", config="en", split="train[:50%]", revision="abc")
    assert calls == [("somebody/some-data", "en", {"split": "train[:50%]", "revision": "abc"})]
    assert rows.format == "hub data set somebody/some-data, prompt/response"
    assert list(rows.raw(range(7))) == ROWS
    assert len(read("somebody/some-data")) == 7, "the train split if none is named"
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: 1 / 0)
    with pytest.raises(
        ValueError,
        match=r"as a hub data set it can't be loaded \(division by zero\); check the name",
    ):
        read("somebody/some-data")


def test_importing_and_reading_text_loads_no_heavy_library():
    code = "import sys; from staff.data.rows import read; read(sys.argv[1]); print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code, DATA / "prompt_response.jsonl"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "set()\n"


def test_memory_stays_bounded_while_a_long_file_is_read(tmp_path):
    """A few MiB for 12 MB of text: where rows begin, a block, and the one row at hand."""
    import tracemalloc

    row = {"prompt": "p" * 500, "response": "r" * 500}
    (tmp_path / "a.jsonl").write_bytes((json.dumps(row).encode() + b"\n") * 12_001)
    pq.write_table(pa.Table.from_pylist([row] * 12_001), tmp_path / "a.parquet", use_dictionary=False)
    for name in ("a.jsonl", "a.parquet"):
        tracemalloc.start()
        rows = read(tmp_path / name)
        for _ in rows.examples():
            pass
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(rows) == 12_001
        assert peak < 7 * 1024 * 1024
