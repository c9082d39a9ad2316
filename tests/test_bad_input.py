"""Whatever is wrong with a file, one message says where, what and what to do; never a library's traceback."""

import copy
import gzip
import json
import os
import re
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from staff.comparison.grid import read_comparison
from staff.data import kinds
from staff.data.rows import read

GOOD = b'{"prompt": "p", "response": "r"}\n'


def chat(*turns):
    return json.dumps({"messages": list(turns)}).encode() + b"\n"


USER, ANSWER = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}

# name -> file name, bytes, message after the file's name ("~" stands for any text)
BAD = {
    # files that are cut, empty, or something else
    "empty file": ("a.jsonl", b"", " is empty; it should hold at least one row"),
    "white space": ("a.jsonl", b" \n\r\n\n", " holds nothing but white space; ~"),
    "byte order mark alone": ("a.jsonl", b"\xef\xbb\xbf", " holds nothing but white space; ~"),
    "no extension, no sense": (
        "notes",
        b"hello world\nhow are you\n",
        ": can't tell what this is; it begins with b'hello world~name it .jsonl~",
    ),
    "cut JSONL": (
        "a.jsonl",
        GOOD + b'{"prompt": "p", "resp',
        ": row 1 (line 2) is not valid JSON (Unterminated string starting at at column 17: '\"resp'); the "
        "file seems cut off here: ~",
    ),
    "cut JSON": (
        "a.json",
        b"[" + GOOD + b',{"prompt": "p"',
        ": row 1 (line 2) is not valid JSON (~the end of the row); the file seems cut off here~",
    ),
    "JSON cut between rows": (
        "a.json",
        b"[" + GOOD,
        ": after row 0 (line 2) there must be a comma or a closing bracket, found the end of the file; ~cut "
        "off~",
    ),
    "JSON cut after a comma": (
        "a.json",
        b"[" + GOOD + b",",
        ": row 1 (line 2) is missing: the list is not closed, the file seems cut off; ~",
    ),
    "cut gzip": (
        "a.jsonl.gz",
        gzip.compress(GOOD * 9)[:-12],
        ": the gzip data is cut or damaged (~); fetch or pack the file again~",
    ),
    "damaged gzip": (
        "a.jsonl",
        gzip.compress(GOOD * 9)[:-8] + b"12345678",
        ": the gzip data is cut or damaged (CRC check failed~",
    ),
    "gzip of nothing": ("a.jsonl.gz", gzip.compress(b""), " is empty; ~"),
    "gzip twice": (
        "a.jsonl.gz",
        gzip.compress(gzip.compress(GOOD)),
        " is gzipped twice; unpack it once with gunzip",
    ),
    "zip": (
        "a.csv",
        b"PK\x03\x04rest",
        " is a zip archive or an Excel workbook; unpack it, or save the sheet as CSV (UTF-8)",
    ),
    "zstd": ("a.jsonl.zst", b"\x28\xb5\x2f\xfdrest", " is compressed with zstd; unpack it with unzstd"),
    "pickle": ("a.jsonl", b"\x80\x04rest", " is a Python pickle; write the rows as JSON Lines"),
    "HTML": ("a.jsonl", b"<!DOCTYPE html>\n<html>", " is an HTML page; download the data file itself"),
    "LFS pointer": (
        "a.jsonl",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        " is a Git LFS pointer, not the data; fetch it with git lfs pull",
    ),
    "UTF-16": (
        "a.csv",
        "prompt,response\n".encode("utf-16"),
        " is UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW",
    ),
    "CSV named JSONL": (
        "a.jsonl",
        b"prompt,response\na,b\n",
        ": row 0 (line 1) is not valid JSON (~if it is CSV or TSV, name the file .csv or .tsv~",
    ),
    "text named Parquet": (
        "a.parquet",
        GOOD,
        " is no Parquet file: it begins with ~, not with b'PAR1'; name it after what it is, or fetch it "
        "again",
    ),
    "text named Arrow": (
        "a.arrow",
        GOOD,
        " is no Arrow file: it begins with ~; name it after what it is, or fetch it again",
    ),
    # encodings
    "Latin-1": (
        "a.jsonl",
        '{"prompt": "ä", "response": "r"}'.encode("latin-1"),
        ": row 0 (line 1) is not UTF-8 (byte 0xe4 at byte 12); convert it, as with iconv~",
    ),
    "mixed encodings": (
        "a.jsonl",
        GOOD + b"\n" + GOOD + b'{"prompt": "\xe4"}',
        ": row 2 (line 4) is not UTF-8 (byte 0xe4 at byte 12)~",
    ),
    "mixed encodings, JSON": (
        "a.json",
        b"[" + GOOD + b"," + GOOD + b',{"prompt": "\xe4"}]',
        ": line 3 is not UTF-8 (byte 0xe4 at byte 81)~",
    ),
    "mixed encodings, CSV": (
        "a.csv",
        b"prompt,response\na,b\n\xe4,b\n",
        ": row 1 (line 3) is not UTF-8 (byte 0xe4 at byte 0)~",
    ),
    "header's encoding": (
        "a.csv",
        b"prompt,response,f\xfcr\na,b,c\n",
        ": line 1: the header is not UTF-8 (byte 0xfc at byte 17)~",
    ),
    "half a surrogate pair": (
        "a.jsonl",
        b'{"prompt": "a", "response": "x \\ud83d"}',
        ": row 0 (line 1) 'response' has half of a surrogate pair (\\ud83d) at character 2; replace it~",
    ),
    # JSON that is no rows
    "an object": (
        "a.json",
        b'{\n "data": []\n}',
        " holds a JSON object over several lines, not a list of rows (its keys: 'data'); give a list, ~",
    ),
    "a wrapper": (
        "a.json",
        b'{"data": [{"prompt": "p"}]}',
        ": row 0 (line 1) looks like a wrapper: its key 'data' holds a list of rows; take it out first~jq "
        "'.data'~",
    ),
    "an empty list": ("a.json", b" [ ] ", " has no rows; it should hold at least one"),
    "a list of texts": (
        "a.json",
        b'["a"]',
        ": row 0 (line 1) is a text, 'a', not an object; a row looks like~",
    ),
    "rows that are lists": (
        "a.jsonl",
        b'["a", "b"]\n["c", "d"]\n',
        ": row 0 (line 1) is a list, ['a', 'b'], not an object~",
    ),
    "a row that is a number": ("a.jsonl", GOOD + b"17\n", ": row 1 (line 2) is a number, 17, not an object~"),
    "a row that is null": ("a.jsonl", b"null\n", ": row 0 (line 1) is null, None, not an object~"),
    "a row over several lines": (
        "a.jsonl",
        b'{\n"prompt": "p",\n"response": "r"\n}\n',
        ": row 0 (line 1) is not valid JSON ~one object a line (jq -c . FILE > rows.jsonl)~",
    ),
    "two objects on a line": (
        "a.jsonl",
        GOOD.strip() + GOOD,
        ": row 0 (line 1) is not valid JSON (Extra data at column 33: ~); put each object on a line of its "
        "own~",
    ),
    "Python's quotes": (
        "a.jsonl",
        b"{'prompt': 'p', 'response': 'r'}\n",
        ": row 0 (line 1) is not valid JSON ~; JSON wants double quotation marks~",
    ),
    "a tab in a text": (
        "a.jsonl",
        b'{"prompt": "a\tb", "response": "r"}\n',
        ": row 0 (line 1) is not valid JSON (Invalid control character ~write it as an escape~",
    ),
    "carriage returns alone": (
        "a.jsonl",
        GOOD.replace(b"\n", b"\r") * 2,
        ": row 0 (line 1) is not valid JSON (Extra data ~line ends are carriage returns alone~",
    ),
    "a comma too many": (
        "a.json",
        b"[" + GOOD + b",\n]",
        ": line 3: a comma before the closing bracket is no JSON; take it away",
    ),
    "no comma": (
        "a.json",
        b"[" + GOOD + GOOD + b"]",
        ': after row 0 (line 2) there must be a comma or a closing bracket, found \'{"prompt"~',
    ),
    "after the list": (
        "a.json",
        b"[" + GOOD + b"]\n[]",
        ": line 3: '[]' after the closing bracket; one file holds one list",
    ),
    "broken inside a list": (
        "a.json",
        b"[" + GOOD + b', {"prompt" "p"}, ' + GOOD * 9 + b"]",
        ": row 1 (line 2) is not valid JSON (Expecting ':' delimiter at column 11: ~",
    ),
    "deep nesting": (
        "a.jsonl",
        GOOD + b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
        ": row 1 (line 2) is nested too deeply; flatten it~",
    ),
    "deep nesting in a list": (
        "a.json",
        b'[{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]",
        ": row 0 (line 1) is nested too deeply; flatten it",
    ),
    "a number of many digits": (
        "a.jsonl",
        b'{"prompt": ' + b"1" * 5000 + b"}\n",
        ": row 0 (line 1) is not valid JSON: Exceeds the limit ~",
    ),
    "a key twice": (
        "a.jsonl",
        b'{"prompt": "p", "prompt": "q", "response": "r"}',
        ": row 0 (line 1) has the key 'prompt' twice; keep one~",
    ),
    "a key twice in a list": (
        "a.json",
        b'[{"prompt": "p", "x": {"y": 1, "y": 2}, "response": "r"}]',
        ": row 0 (line 1) has the key 'y' twice; keep one~",
    ),
    # columns and values
    "unknown columns": (
        "a.jsonl",
        b'{"foo": "a", "bar": "b"}',
        ": row 0 (line 1) has neither 'messages', ~; found 'foo', 'bar'. Name the columns: --columns ~",
    ),
    "nearly the right column": (
        "a.jsonl",
        b'{"Prompt ": "a", "bar": "b"}',
        ": row 0 (line 1) has neither ~; found 'Prompt ', 'bar'. 'Prompt ' looks like 'prompt'. ~",
    ),
    "an empty object": (
        "a.jsonl",
        b"{}\n",
        ": row 0 (line 1) is an empty object; it needs for instance 'prompt' and 'response'~",
    ),
    "two readings": (
        "a.jsonl",
        b'{"prompt": "p", "response": "r", "messages": []}',
        ": row 0 (line 1) can be read as messages or prompt/response; say which with --columns, for "
        "instance messages=messages~",
    ),
    "mixed schemas": (
        "a.jsonl",
        GOOD + chat(USER, ANSWER),
        ": row 1 (line 2) has no 'prompt'; found 'messages' (the format, prompt/response, was found at ~: "
        "row 0; ~ don't mix)~",
    ),
    "a missing value": (
        "a.jsonl",
        GOOD + b'{"prompt": "p", "respnse": "r"}',
        ": row 1 (line 2) has no 'response' (did you mean 'respnse'?); found 'prompt', 'respnse'~",
    ),
    "null": (
        "a.jsonl",
        b'{"prompt": "p", "response": null}',
        ": row 0 (line 1) 'response' is null; it must be text: fill it in, or leave such rows out~",
    ),
    "empty": (
        "a.jsonl",
        b'{"prompt": "p", "response": ""}',
        ": row 0 (line 1) 'response' is empty; fill it in, or leave such rows out with --on-bad-row skip",
    ),
    "blank": (
        "a.jsonl",
        b'{"prompt": " \\n\\u3000", "response": "r"}',
        ": row 0 (line 1) 'prompt' is empty; fill it in, ~",
    ),
    "NaN": (
        "a.jsonl",
        b'{"prompt": "p", "response": NaN}',
        ": row 0 (line 1) 'response' is NaN; it must be text: fill it in~",
    ),
    "a number": (
        "a.jsonl",
        b'{"prompt": "p", "response": 4}',
        ": row 0 (line 1) 'response' is the number 4; it must be text: put it in quotation marks~",
    ),
    "true": (
        "a.jsonl",
        b'{"prompt": "p", "response": true}',
        ": row 0 (line 1) 'response' is true; it must be text~",
    ),
    "nested": (
        "a.jsonl",
        b'{"prompt": "p", "response": {"text": "r"}}',
        ": row 0 (line 1) 'response' is an object, {'text': 'r'}; it must be text~",
    ),
    "a list": (
        "a.jsonl",
        b'{"prompt": "p", "response": ["r"]}',
        ": row 0 (line 1) 'response' is a list, ['r']; it must be text~",
    ),
    "a system that is no text": (
        "a.jsonl",
        b'{"prompt": "p", "response": "r", "system": 3}',
        ": row 0 (line 1) 'system' is the number 3; it must be text or left away~",
    ),
    "a history of no pairs": (
        "a.json",
        b'[{"instruction": "i", "output": "o", "history": ["a"]}]',
        ": row 0 (line 1) 'history': entry 0 is 'a'; it must be a pair of texts~",
    ),
    "tools that are no JSON": (
        "a.json",
        b'[{"messages": [], "tools": "f("}]',
        ": row 0 (line 1) 'messages' is an empty list; fill it in~",
    ),
    # chats
    "no turns": ("a.jsonl", chat(), ": row 0 (line 1) 'messages' is an empty list; fill it in~"),
    "messages of text": (
        "a.jsonl",
        b'{"messages": "hello"}',
        ": row 0 (line 1) 'messages' is text, 'hello'; it must be a list of turns~",
    ),
    "a turn of text": (
        "a.jsonl",
        chat("hello"),
        ": row 0 (line 1) 'messages': turn 0 is a str, 'hello'; it must be an object~",
    ),
    "no role": (
        "a.jsonl",
        chat({"content": "a"}),
        ": row 0 (line 1) 'messages': turn 0 has no 'role'; found 'content'~",
    ),
    "a role that is no text": (
        "a.jsonl",
        chat({"role": 1, "content": "a"}),
        ": row 0 (line 1) 'messages': turn 0 has the role 1, which is no text~",
    ),
    "an unknown role": (
        "a.jsonl",
        chat(USER, {"role": "asistant", "content": "a"}),
        ": row 0 (line 1) 'messages': turn 1 has the unknown role 'asistant' (did you mean 'assistant'?); "
        "known: ~",
    ),
    "no content": (
        "a.jsonl",
        chat(USER, {"role": "assistant"}),
        ": row 0 (line 1) 'messages': turn 1 (assistant) has no 'content'; found 'role'~",
    ),
    "null content": (
        "a.jsonl",
        chat(USER, {"role": "assistant", "content": None}),
        ": row 0 (line 1) 'messages': turn 1 (assistant) is null; it must be text~",
    ),
    "empty content": (
        "a.jsonl",
        chat(USER, {"role": "assistant", "content": " "}),
        ": row 0 (line 1) 'messages': turn 1 (assistant) is empty; fill it in~",
    ),
    "an image": (
        "a.jsonl",
        chat({"role": "user", "content": [{"type": "image_url"}]}),
        ": row 0 (line 1) 'messages': turn 0 (user) has a part of type 'image_url'; only text~",
    ),
    "ends with the user": (
        "a.jsonl",
        chat(USER, ANSWER, USER),
        ": row 0 (line 1) ends with a user turn; take the turns after the last assistant turn away~",
    ),
    "no answer": (
        "a.jsonl",
        chat(USER),
        ": row 0 (line 1) has no assistant turn, so there is nothing to learn; add the answer~",
    ),
    "no loss": (
        "a.jsonl",
        chat(USER, {**ANSWER, "weight": 0}),
        ": row 0 (line 1) takes the loss on no turn: every assistant turn has weight 0; set one to 1~",
    ),
    "half a loss": (
        "a.jsonl",
        chat(USER, {**ANSWER, "loss_weight": 0.5}),
        ": row 0 (line 1) 'messages': turn 1 (assistant): 'loss_weight' is 0.5; only 0 ~",
    ),
    "a call without a name": (
        "a.jsonl",
        chat(USER, {"role": "assistant", "tool_calls": [{"function": {}}]}),
        ": row 0 (line 1) ~a tool call has no name~",
    ),
    "calls that are no list": (
        "a.jsonl",
        chat(USER, {**ANSWER, "tool_calls": "f()"}),
        ": row 0 (line 1) 'messages': turn 1 (assistant): 'tool_calls' is a str, 'f()'; it must be a list~",
    ),
    "half a surrogate pair in a call": (
        "a.jsonl",
        chat(USER, {**ANSWER, "tool_calls": [{"name": "\ud83d"}]}),
        ": row 0 (line 1) 'messages': turn 1 (assistant) can't be written as JSON: ~",
    ),
    # CSV
    "header alone": ("a.csv", b"prompt,response\n", " has no rows; it should hold at least one"),
    "a column twice": (
        "a.csv",
        b"prompt,response,prompt\na,b,c\n",
        ": line 1: the header has the column 'prompt' twice; rename one",
    ),
    "too many fields": (
        "a.csv",
        b"prompt,response\na,b\na,b,c\n",
        ": row 1 (line 3) has 3 fields, the header 2 ('prompt', 'response'); put fields that hold ','~",
    ),
    "too few fields": ("a.csv", b"prompt,response\na\n", ": row 0 (line 2) has 1 fields, the header 2~"),
    "quotation mark never closed": (
        "a.csv",
        b'prompt,response\na,b\nc,"d\ne,f\n',
        ": row 1 (line 3) a quotation mark is never closed: close it, or double it~",
    ),
    "quotation mark not doubled": (
        "a.csv",
        b'prompt,response\n"a "b" c",d\n',
        ": row 0 (line 2) is not valid CSV (',' expected after '\"'); quotation marks inside~",
    ),
    "an empty field": (
        "a.tsv",
        b"question\tanswer\na\t\n",
        ": row 0 (line 2) 'answer' is empty; fill it in~",
    ),
    "CSV without a header": (
        "a.csv",
        b"What is it?,A thing\nWho?,Me\n",
        ": row 0 (line 2) has neither ~; found 'What is it?', 'A thing'. Name the columns~",
    ),
    "old Mac line ends": (
        "a.csv",
        b"prompt,response\ra,b\rc,d\r",
        ": line 1: the header is not valid CSV (new-line character ~carriage returns alone~",
    ),
}


def write(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def said(path, **options):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is the test's subject
        read(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


def matches(message, pattern):
    return re.fullmatch(".*".join(map(re.escape, pattern.split("~"))), message, re.DOTALL) is not None


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_place_and_cure(name, tmp_path):
    file, data, expected = BAD[name]
    path = write(tmp_path, file, data)
    message = said(path)
    assert message.startswith(str(path))
    assert matches(message.removeprefix(str(path)), expected), message


# the row's own faults are its own; a fault that hides where the next row begins ends the reading all the same
SKIPPABLE = [
    n for n in BAD if BAD[n][0] == "a.jsonl" and BAD[n][2].startswith(": row") and "two readings" not in n
]


@pytest.mark.parametrize("name", SKIPPABLE)
def test_with_skip_a_bad_row_is_left_out_and_its_reason_kept(name, tmp_path):
    bad = BAD[name][1].removeprefix(GOOD).strip(b"\n").removeprefix(GOOD)
    if b"\n" in bad:
        return  # several rows
    rows = read(write(tmp_path, "a.jsonl", GOOD + bad + b"\n" + GOOD), on_bad_row="skip")
    assert rows.numbers.tolist() == [0, 2]
    assert [n for n, _ in rows.skipped] == [1]


@pytest.mark.parametrize("name", SKIPPABLE)
def test_a_file_without_a_single_good_row_is_refused_even_with_skip(name, tmp_path):
    _, data, _ = BAD[name]
    if GOOD.strip() not in data:
        assert "rows can be used; the first one, row 0, " in said(
            write(tmp_path, "a.jsonl", data), on_bad_row="skip"
        )


def test_unusable_tools_are_named(tmp_path):
    row = {"messages": [USER, ANSWER], "tools": "f("}
    assert "'tools' is not valid JSON: 'f('" in said([row])
    assert "'tools' is the number 3" in said([{**row, "tools": 3}])
    assert "'tools' is a str, '{}'; it must be a list of tools" in said([{**row, "tools": "{}"}])


# ---- what must not be left out, taken for something else, or guessed ----

LEFT_OUT = {
    "context": (
        {"question": "How many?", "context": "CREATE TABLE head", "answer": "SELECT 1"},
        "to read it too: --columns prompt=question,response=answer,input=context; to leave it out: "
        "--columns ~",
    ),
    "input": (
        {"prompt": "Translate.", "input": "Good day", "response": "Guten Tag"},
        "to read it too: --columns prompt=prompt,response=response,input=input; ~",
    ),
    "system_prompt": (
        {"prompt": "A river.", "completion": "Elbe", "system_prompt": "In Latin."},
        "to read it too: --columns prompt=prompt,response=completion,system=system_prompt; ~",
    ),
    "choices": (
        {"question": "Which?", "choices": ["a", "b"], "answer": "a"},
        "to leave it out: --columns prompt=question,response=answer",
    ),
    "images": (
        {"messages": [USER, ANSWER], "images": ["a.png"]},
        "to leave it out: --columns messages=messages",
    ),
}


@pytest.mark.parametrize("column", LEFT_OUT)
def test_a_column_of_the_prompt_that_would_be_left_out_is_a_stop_that_asks_for_columns(column, tmp_path):
    row, cure = LEFT_OUT[column]
    empty = {**row, column: type(row[column])()}
    path = write(tmp_path, "a.jsonl", b"".join(json.dumps(r).encode() + b"\n" for r in (empty, row)))
    pq.write_table(pa.Table.from_pylist([empty, row]), tmp_path / "a.parquet")
    for data, where in (
        (path, f"{path}: row 1 (line 2)"),
        (tmp_path / "a.parquet", f"{tmp_path / 'a.parquet'}: row 1"),
        ([empty, row], "the data given: row 1"),
    ):
        for on_bad_row in ("error", "skip"):
            message = said(data, on_bad_row=on_bad_row)
            assert message.startswith(f"{where} has the column {column!r}, which ")
            assert matches(message, f"~ has no place for: the prompt would be read without it; {cure}"), (
                message
            )
    told = message.partition("--columns ")[2].partition(";")[0]
    assert len(read([row], columns=told)) == 1, "the cure is one"


def test_hints_lead_on(tmp_path):
    squad = {"question": "Who?", "context": "She.", "answers": {"text": ["she"], "answer_start": [0]}}
    message = said([squad])
    assert "'question' looks like" not in message
    assert "'answers' looks like 'answer', but holds {'text': ['she'], " in message
    pairs = {"source": "x", "conversation": [{"input": "Say a word.", "output": "Mill."}]}
    assert "pairs of input and output in 'conversation', the turns of one conversation" in said([pairs])
    chats = {"dialog": [USER, ANSWER]}
    assert "name that column: --columns messages=dialog" in said([chats])
    prose = b"The mill, a house, and the river are old, and so on\nThe other, with few commas\n"
    assert 'Plain text is given as JSON Lines, one {"text": "..."} a line' in said(
        write(tmp_path, "a.txt", prose)
    )
    named = write(tmp_path, "b.txt", b"de;en\nHaus;house\n")
    assert len(read(named, columns="prompt=de,response=en")) == 1


def test_tab_separated_text_knows_no_quoting(tmp_path):
    corpus = (
        b'prompt\tresponse\nGood day\tGuten Tag\n"Who is there\tWer ist da\nNobody"\tNiemand\nThanks\tDanke\n'
    )
    rows = read(path := write(tmp_path, "a.tsv", corpus))
    assert [(e.turns[0].content, e.turns[1].content) for e in rows.examples()] == [
        ("Good day", "Guten Tag"),
        ('"Who is there', "Wer ist da"),
        ('Nobody"', "Niemand"),
        ("Thanks", "Danke"),
    ]
    assert rows.notes == (
        f"{path} is tab-separated: quotation marks in it are read as text, not round fields",
    )
    rows.write_same(tmp_path / "b.tsv", [1, 2])
    assert (
        tmp_path / "b.tsv"
    ).read_bytes() == b'prompt\tresponse\n"Who is there\tWer ist da\nNobody"\tNiemand\n'
    odd = write(tmp_path, "c.tsv", b'prompt\tresponse\n"Yes," he said.\tJa\n')
    assert read(odd).example(0).turns[0].content == '"Yes," he said.'
    quoted = write(tmp_path, "d.tsv", b'prompt\tresponse\n"a ""b"""\t"c\td"\n')
    assert next(read(quoted).raw([0])) == {"prompt": 'a "b"', "response": "c\td"}
    lines = write(tmp_path, "e.tsv", b'prompt\tresponse\n"a\nb"\tc\n')
    assert "has 1 fields, the header 2 ('prompt', 'response'); tab-separated text knows no quoting" in said(
        lines
    )


@pytest.mark.parametrize("broken", [b'"a "b" c",d\n', b'"a "b\nc",d\ne,f\n', b'e,"f\n'])
def test_a_broken_quotation_mark_ends_the_reading_of_csv_even_with_skip(broken, tmp_path):
    path = write(tmp_path, "a.csv", b"prompt,response\na,b\n" + broken + b"x,y\n")
    assert said(path, on_bad_row="skip").startswith(f"{path}: row 1 (line 3) ")


def test_a_small_gzipped_file_that_unpacks_to_a_large_one_is_refused_with_a_way_round(tmp_path, monkeypatch):
    assert kinds.UNPACKED_AT_LEAST == 8 << 20
    monkeypatch.setattr(kinds, "UNPACKED_AT_LEAST", 1 << 19)
    for name, data in (
        ("a.jsonl.gz", b'{"x": "' + b"a" * 1_250_000),
        ("b.jsonl.gz", b'{"prompt": "p", "response": "r"}\n' * 40_000),
        ("a.json.gz", b"[" + b"[]," * 450_000),
        ("a.csv.gz", b"prompt,response\n" + b"a,b\n" * 320_000),
    ):
        path = write(tmp_path, name, gzip.compress(data))
        message = said(path)
        assert message.startswith(f"{path} unpacks to more than 100 times its size, "), message
        assert message.endswith("raise --max-unpacked, or unpack it with gunzip")
    large = write(tmp_path, "d.jsonl.gz", gzip.compress(GOOD * 40_000))
    assert len(read(large, max_unpacked=10_000)) == 40_000
    small = write(tmp_path, "c.jsonl.gz", gzip.compress(GOOD * 12_000, 1))
    assert len(read(small)) == 12_000, "so little is no danger, however well it is packed"


# ---- names ----


def test_a_missing_file_suggests_the_nearest(tmp_path):
    write(tmp_path, "train.jsonl", GOOD)
    assert (
        said(tmp_path / "trian.jsonl")
        == f"there is no file or folder {tmp_path / 'trian.jsonl'}; did you mean {tmp_path / 'train.jsonl'}?"
    )
    assert said(tmp_path / "train.csv").endswith(f"did you mean {tmp_path / 'train.jsonl'}?")
    assert "data files there: train.jsonl" in said(tmp_path / "zzz")
    assert "there is no folder" in said(tmp_path / "nowhere" / "a.jsonl")
    (tmp_path / "data").mkdir()
    assert said(tmp_path / "dta" / "a.jsonl").endswith(f"did you mean {tmp_path / 'data' / 'a.jsonl'}?")
    assert "holds no data files" in said(tmp_path / "data")
    assert "give a file, a folder" in said("")
    assert "is an address, not a file: download it first" in said("https://x.org/a.jsonl")


def test_what_is_no_file_is_refused(tmp_path):
    assert "it can be a path" in said(17)
    assert "is an empty list" in said([])
    assert "row 0 is 3, not a dict" in said([3])
    assert "row 1 is 'x', not a dict" in said([{"prompt": "p", "response": "r"}, "x"])
    path = write(tmp_path, "a.jsonl", GOOD)
    assert "is given twice" in said([path, path])
    assert "--split, " not in said(path, split="train") or "for hub data sets" in said(path, split="train")
    assert "train_on is 'first'" in said(path, train_on="first")
    assert "on_bad_row is 'ignore'" in said(path, on_bad_row="ignore")
    other = write(tmp_path, "a.csv", b"prompt,response\na,b\n")
    assert "files read together must be of one format" in said([path, other])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    path = write(tmp_path, "a.jsonl", GOOD)
    path.chmod(0)
    assert said(path) == f"{path} can't be read: Permission denied"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("prompt", "'prompt' is not of the form KEY=COLUMN"),
        ("promt=a,response=b", "no key 'promt' (did you mean 'prompt'?)"),
        ("prompt=a", "name either prompt and response, or messages, or text"),
        ("prompt=a,response=b,text=c", "name either"),
        ("prompt=a,prompt=b", "is named twice"),
        ("prompt=prompt,response=respons", "has no 'respons' (did you mean 'response'?)"),
        ("prompt=prompt,response=response,system=sys", "no row has the column 'sys' that --columns names"),
    ],
)
def test_columns_that_make_no_sense_are_refused(columns, message, tmp_path):
    assert message in said(write(tmp_path, "a.jsonl", GOOD), columns=columns)


def test_a_file_that_changes_under_us_is_an_error(tmp_path):
    path = write(tmp_path, "a.jsonl", GOOD * 3)
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["p"], "response": ["r"]}), table)
    rows, tabular = read(path), read(table)
    path.write_bytes(GOOD * 2)
    pq.write_table(pa.table({"prompt": ["p", "q"], "response": ["r", "s"]}), table)
    for changed in (rows, tabular):
        with pytest.raises(ValueError, match="changed while it was in use"):
            changed.example(0)


def test_nothing_is_half_written(tmp_path):
    path = write(tmp_path, "a.jsonl", GOOD * 3)
    rows = read(path)
    with pytest.raises(ValueError, match="is the input itself; write to another file"):
        rows.write_jsonl(path, [0])
    with pytest.raises(OSError, match="File exists"):
        rows.write_jsonl(path / "b.jsonl", [0])
    with pytest.raises(IndexError):
        rows.write_jsonl(tmp_path / "b.jsonl", [0, 99])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


# ---- what is odd and still fine ----


def test_one_row_equal_rows_and_repeated_ids_are_ordinary(tmp_path):
    row = {"id": "same", "prompt": "p", "response": "r"}
    assert len(read([row])) == 1
    assert len(read([row] * 5)) == 5
    assert [e.id for e in read([row] * 2).examples()] == ["same", "same"]


def test_a_row_of_megabytes_is_read(tmp_path):
    row = {"prompt": "p" * 3_000_000, "response": "ü" * 2_000_000}
    for name, text in (
        ("a.jsonl", json.dumps(row)),
        ("a.json", json.dumps([row, row])),
        ("a.csv", f"prompt,response\n{row['prompt']},{row['response']}\n"),
    ):
        path = write(tmp_path, name, text.encode())
        assert dict(next(read(path).raw([0]))) == row


# ---- tables ----


def table_of(tmp_path, **columns):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    return tmp_path / "a.parquet"


def test_mistyped_parquet_columns_are_refused_like_mistyped_values(tmp_path):
    path = table_of(tmp_path, prompt=["p"], response=[4])
    assert said(path).startswith(f"{path}: row 0 'response' is the number 4; it must be text")
    path = table_of(tmp_path, messages=["hello"])
    assert "row 0 'messages' is text, 'hello'; it must be a list of turns" in said(path)
    assert "has neither 'messages'" in said(table_of(tmp_path, foo=["a"], bar=["b"]))
    assert "has no 'promt' (did you mean 'prompt'?)" in said(
        table_of(tmp_path, prompt=["p"], x=["r"]), columns="prompt=promt,response=x"
    )
    assert "has no rows" in said(
        table_of(tmp_path, prompt=pa.array([], pa.string()), response=pa.array([], pa.string()))
    )


def test_bad_parquet_rows_are_numbered_through_row_groups(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"prompt": ["a"] * 9, "response": ["x"] * 7 + [None, "y"]}), path, row_group_size=2
    )
    assert said(path).startswith(f"{path}: row 7 'response' is null; it must be text: fill it in")
    other = tmp_path / "b.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "response": ["x"]}), other)
    assert said([other, path]).startswith(f"{path}: row 7 "), "rows are counted as in the file that is named"


def test_parquet_with_two_columns_of_one_name_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    schema = pa.schema([("prompt", pa.string()), ("prompt", pa.string()), ("response", pa.string())])
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 3, schema=schema), path)
    assert said(path) == f"{path} has two columns named 'prompt'; rename one"


def test_parquet_files_of_two_schemas_are_refused(tmp_path):
    a, b = tmp_path / "a.parquet", tmp_path / "b.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "response": ["x"]}), a)
    pq.write_table(pa.table({"prompt": ["a"], "response": [b"x"]}), b)
    assert (
        said([a, b])
        == f"{b} has other columns than {a} (response: binary); make them alike, or select from each alone"
    )


def test_texts_in_parquet_that_are_not_utf8_are_found(tmp_path):
    path = tmp_path / "a.parquet"
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )
    pq.write_table(pa.table({"prompt": ["p"], "response": bad}), path)
    assert re.search(r"a\.parquet, rows 0 to 0: the data is cut or damaged \(.*Invalid UTF8", said(path))


@pytest.mark.parametrize("damage", ["cut", "footer", "page", "magic alone", "gzip"])
def test_damaged_parquet_is_refused(damage, tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": [f"p{i}" for i in range(999)], "response": ["r"] * 999}), path)
    data = path.read_bytes()
    damaged = {
        "cut": data[:-50],
        "footer": data[:-60] + b"\x00" * 40 + data[-20:],
        "page": data[:40] + b"\xff" * 200 + data[240:],
        "magic alone": b"PAR1",
        "gzip": gzip.compress(data),
    }
    path.write_bytes(damaged[damage])
    assert ("Parquet inside gzip; unpack it" if damage == "gzip" else "the data is cut or damaged (") in said(
        path
    )


# ---- descriptions ----


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"file_name": "../secret.jsonl"}, "names '../secret.jsonl', which lies outside its folder"),
        ({"file_name": "/etc/passwd"}, "names '/etc/passwd', which lies outside its folder"),
        ({"file_name": "gone.jsonl"}, "there is no file or folder"),
        ({"file_name": 3}, "'file_name' is 3; it must be text"),
        ({}, "has no 'file_name' (nor 'hf_hub_url'); found nothing"),
        ("a.jsonl", "is 'a.jsonl'; it must be an object with 'file_name'"),
        (
            {"file_name": "a.jsonl", "formatting": "chatml"},
            "formatting is 'chatml'; it can be alpaca, sharegpt, openai",
        ),
        (
            {"file_name": "a.jsonl", "ranking": True},
            "'ranking' is set: preference pairs have no single response",
        ),
        (
            {"file_name": "a.jsonl", "columns": {"prompt": "p", "response": "r", "images": "i"}},
            "it has 'images'; only text",
        ),
        (
            {"file_name": "a.jsonl", "columns": {"promt": "p"}},
            "unknown column key 'promt' (did you mean 'prompt'?)",
        ),
        (
            {"file_name": "a.jsonl", "columns": {"query": "q"}},
            "'columns' must name 'prompt' and 'response'; found 'query'",
        ),
        ({"file_name": "a.jsonl", "num_samples": 0}, "'num_samples' is 0; it must be a number of rows"),
        ({"hf_hub_url": "text", "folder": "/etc"}, "'hf_hub_url' is 'text'; it must be a hub data set"),
        (
            {"hf_hub_url": "a/b", "folder": "../../etc"},
            "'folder' is '../../etc'; it must be a folder of the hub",
        ),
        ({"hf_hub_url": "a/b", "folder": "/etc"}, "'folder' is '/etc'; it must be a folder of the hub"),
        ({"file_name": "a.jsonl", "columns": ["p"]}, "'columns' is ['p']; it must be an object of names"),
        ({"file_name": "a.jsonl"}, "row 0 (line 1) has no 'instruction'"),
    ],
)
def test_descriptions_of_data_sets_are_checked(entry, message, tmp_path):
    write(tmp_path, "a.jsonl", GOOD)
    write(tmp_path, "dataset_info.json", json.dumps({"mine": entry}).encode())
    assert message in said("mine", dataset_info=tmp_path)


def test_descriptions_that_are_no_descriptions_are_refused(tmp_path):
    info = write(tmp_path, "dataset_info.json", b'{"mine": {"file_name": "a.jsonl"}')
    assert "is not valid JSON: " in said("mine", dataset_info=info)
    info.write_bytes(b"[]")
    assert "holds []; it must be one object" in said("mine", dataset_info=info)
    info.write_bytes(b'{"main": {"file_name": "a.jsonl"}}')
    assert (
        said("mine", dataset_info=info)
        == f"{info} has no entry 'mine' (did you mean 'main'?); its entries: main"
    )
    assert "there is no file or folder" in said("mine", dataset_info=tmp_path / "dataset_inf.json")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": [{"filename": "../../x.arrow"}]}')
    assert "names '../../x.arrow', which lies outside its folder" in said(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": 3}')
    assert "lists no data files; save the data set again" in said(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": [{"filename": "x.arrow"}]}')
    assert "can't be loaded (" in said(tmp_path / "saved")


def test_data_frames_with_holes_are_refused_with_their_row(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"prompt": ["p", "q"], "response": ["r", float("nan")]})
    assert said(frame).startswith("the data given: row 1 'response' is NaN; it must be text: fill it in")
    assert len(read(frame, on_bad_row="skip")) == 1


def test_arrays_in_the_cells_of_a_data_frame_are_lists(tmp_path):
    pandas = pytest.importorskip("pandas")
    vector = [float(i) for i in range(2000)]
    rows = [{"messages": [USER, ANSWER], "vector": vector, "pair": [[1], []], "n": 1}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    frame = pandas.read_parquet(tmp_path / "a.parquet")
    assert type(frame["messages"][0]).__name__ == "ndarray"
    for data in (frame, frame.to_dict("records")):
        opened = read(data)
        assert list(opened.raw([0])) == rows
        assert opened.example(0) == read(rows).example(0)
        opened.write_jsonl(tmp_path / "a.jsonl", [0])
        assert json.loads((tmp_path / "a.jsonl").read_text()) == rows[0]


def test_ids_of_any_kind_are_text_that_can_be_written(tmp_path):
    row = {"prompt": "p", "response": "r"}
    values = ["a", "\ud83d", 7, 7.0, 2.5, True, None, ["x"], float("nan")]
    ids = [e.id for e in read([{**row, "id": v} for v in values]).examples()]
    assert ids == ["a", "\\ud83d", "7", "7", "2.5", None, None, None, None]


def test_standard_input_that_is_empty_says_so(monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert said("-").startswith("standard input is empty; pipe the rows in")


# ---- mutations ----

SEEDS = {
    "a.jsonl": GOOD * 4 + chat(USER, ANSWER).replace(b"messages", b"other"),
    "chat.jsonl": chat(USER, ANSWER) * 3 + chat(USER, {**ANSWER, "loss_weight": 1}),
    "a.json": json.dumps(
        [{"instruction": "i", "input": "ü", "output": "o\n", "history": [["a", "b"]]}] * 4
    ).encode(),
    "share.json": json.dumps(
        [{"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}], "tools": "[]"}]
        * 3
    ).encode(),
    "a.csv": b'prompt,response\r\n"a, ""b""\nc",d\r\ne,f\r\n',
    "a.tsv": "question\tanswer\nü\tx\n".encode(),
    "a.jsonl.gz": gzip.compress(GOOD * 20, mtime=0),
}


def seed_tables():
    sink = pa.BufferOutputStream()
    table = pa.table({"prompt": [f"p{i}" for i in range(20)], "response": ["r"] * 20})
    pq.write_table(table, sink, row_group_size=8)
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    file = pa.BufferOutputStream()
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return {
        "a.parquet": sink.getvalue().to_pybytes(),
        "s.arrow": stream.getvalue().to_pybytes(),
        "f.arrow": file.getvalue().to_pybytes(),
    }


SEEDS |= seed_tables()
PIECES = [
    b"",
    b"\n",
    b"\r",
    b"\0",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b"\\ud800",
    b"\xff",
    b"\xef\xbb\xbf",
    b"null",
    b"NaN",
    b"1e999",
    b"'",
    b"\t",
    b"PAR1",
    b"[" * 3000,
]


@st.composite
def mutated(draw):
    name = draw(st.sampled_from(sorted(SEEDS)))
    data = bytearray(SEEDS[name])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["cut", "delete", "insert", "flip", "repeat"]))
        length = draw(st.integers(1, 12))
        if kind == "cut":
            del data[at:]
        elif kind == "delete":
            del data[at : at + length]
        elif kind == "insert":
            data[at:at] = draw(st.one_of(st.sampled_from(PIECES), st.binary(max_size=6)))
        elif kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "repeat":
            data[at:at] = data[at : at + length] * 3
    if draw(st.booleans()):
        name = draw(st.sampled_from([*sorted(SEEDS), "noname", "x.jsonl.gz", "y.txt"]))
    return name, bytes(data)


@settings(
    max_examples=20_000 if os.environ.get("STAFF_SOAK") == "1" else 500,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=os.environ.get("STAFF_SOAK") != "1",
)
@given(file=mutated(), skip=st.booleans())
def test_mutated_files_are_read_or_refused_and_nothing_else(file, skip, tmp_path):
    name, data = file
    path = write(tmp_path, name, data)
    out = tmp_path / "out"
    refused = None
    try:
        rows = read(path, on_bad_row="skip" if skip else "error")
    except ValueError as error:
        refused = error
    try:
        if refused is not None:
            assert type(refused) is ValueError
            assert str(refused).startswith(str(path))
            assert "\n" not in str(refused)
            return
        examples = list(rows.examples())
        assert len(examples) == len(rows) > 0
        assert all(e.turns[-1].train and e.turns[-1].content.strip() for e in examples)
        assert len(list(rows.raw(range(len(rows))))) == len(rows)
        rows.write_jsonl(out, range(len(rows)))
        assert out.read_bytes().count(b"\n") == len(rows)
        rows.write_same(out, range(len(rows)))
        assert list(read(out, on_bad_row="skip").examples()) == examples or rows.format.startswith("CSV")
    finally:
        path.unlink()
        out.unlink(missing_ok=True)


# ---- settings ----

COMPARISON = {
    "target": "t",
    "output": "o",
    "drafts": {"small": "d"},
    "tasks": {
        "sums": {"train": "a.jsonl", "test": "a.jsonl", "metrics": ["loss"], "select": {"num_regions": 3}}
    },
    "methods": {"random": {}, "mine": {"method": "ccs", "needs": {"scores": "draft/el2n"}, "num_strata": 4}},
    "pruning_rates": [0.5],
    "seeds": [1],
    "finetune": {"epochs": 1, "dtype": "float32"},
}
NONSENSE = [
    "",
    "a\x1bb",
    "../x",
    -1,
    10**400,
    float("nan"),
    float("inf"),
    True,
    None,
    [],
    [[]],
    [{}],
    {},
    {1: [2]},
]


def places(node, at=()):
    yield at
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, part in inside:
        yield from places(part, (*at, name))


@pytest.mark.parametrize("at", list(places(COMPARISON)), ids=str)
def test_a_comparison_of_any_shape_is_read_or_refused_in_one_line(at, tmp_path):
    for value in NONSENSE:
        values = {"all": copy.deepcopy(COMPARISON)}
        node = values
        for name in ("all", *at)[:-1]:
            node = node[name]
        node[("all", *at)[-1]] = value
        path = write(tmp_path, "c.yaml", yaml.safe_dump(values["all"]).encode())
        refused = None
        try:
            read_comparison(path)
        except ValueError as error:
            refused = str(error)
        assert refused is None or (refused.startswith(str(path)) and len(refused.splitlines()) == 1)


def test_a_yaml_file_nested_beyond_measure_is_refused(tmp_path):
    path = write(tmp_path, "c.yaml", b"a: " + b"[" * 5000)
    with pytest.raises(ValueError, match=r"c.yaml: not valid YAML"):
        read_comparison(path)
