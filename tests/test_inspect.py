"""`inspect` says what is in the data, and data can't disturb what is said."""

import json
import subprocess
import sys

import pytest
from rich.text import Text

from family import run_staff
from staff.data.rows import read
from staff.inspection import SPELLS_CONTROL, inspect, render, tokenizer_of


def plain(rows, **options):
    return Text.from_markup(render(inspect(rows, **options)), emoji=False).plain


def make(tmp_path, rows):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" if isinstance(r, dict) else r + "\n" for r in rows))
    return read(path, on_bad_row="skip")


def test_ten_rows_are_reported_as_counted_by_hand(tmp_path):
    long = "the quick brown fox jumps over the lazy dog and runs far away from all of the hunters in the dark green wood today"
    rows = [
        {"id": "a", "prompt": "one two", "response": "x"},
        {"id": "a", "prompt": "one two", "response": "y"},  # equal prompt, id twice
        {"id": "b", "prompt": "one two", "response": "x"},  # equal to row 0
        "nonsense",
        {"id": "c", "prompt": "p", "response": ""},
        {"id": "d", "prompt": long, "response": "r", "meta": None},
        {"id": "e", "prompt": long + " again", "response": "r", "meta": "m"},  # nearly row 5
        {"prompt": "\x1b[31mred", "response": "a b c d"},
    ]
    rows = make(tmp_path, rows)
    report = inspect(rows)
    assert report["format"] == "JSONL, prompt/response"
    assert report["rows"] == 6
    assert [n for n, _ in report["skipped"]] == [3, 4]
    assert report["lengths"]["response words"]["quantiles"]["100%"] == 4
    assert report["lengths"]["prompt words"]["quantiles"] == {
        "0%": 1,
        "5%": 1,
        "25%": 2,
        "50%": 2,
        "75%": 2,
        "95%": 24,
        "100%": 25,
    }
    assert report["duplicates"] == {"rows": 1, "examples": [(0, 2)]}
    assert report["duplicate_prompts"]["rows"] == 2
    assert report["ids"] == {"rows": 5, "different": 4, "most": [("a", 2)]}
    assert report["characters"] == {"control characters": 1}
    columns = {c["name"]: c for c in report["columns"]}
    assert columns["meta"]["kinds"] == {"empty": 1, "str": 1}
    assert columns["meta"]["missing"] == 4
    assert columns["prompt"]["used_as"] == "prompt"
    assert columns["meta"]["used_as"] is None
    assert report["first"][0] == {"row": 0, "pieces": [("user: one two\n", False), ("assistant: x\n", True)]}
    text = plain(rows)
    assert "2 of 8 rows can't be used" in text
    assert "row 3 is not valid JSON" in text
    assert "1 rows repeat an earlier one (rows 2 like 0)" in text
    json.dumps(report)


def test_near_duplicates_are_found_by_a_library(tmp_path):
    pytest.importorskip("datasketch", reason="near-duplicates need datasketch")
    words = [f"w{i}" for i in range(60)]
    rows = [
        {"prompt": " ".join(words), "response": "r"},
        {"prompt": " ".join([*words, "end"]), "response": "r"},
    ]
    rows += [{"prompt": " ".join(f"{w}{k}" for w in words), "response": "r"} for k in range(5)]
    report = inspect(make(tmp_path, rows))
    assert report["near_duplicates"]["rows"] == 1
    assert report["near_duplicates"]["examples"] == [(0, 1)]


def test_data_that_looks_like_markup_or_commands_is_shown_as_it_is(tmp_path):
    nasty = [
        "[bold red]x[/bold red]",
        "[/bright_black]",
        "a\\",
        "\\[b]",
        ":smile:",
        "\x1b]0;title\x07",
        "[link=http://x]y[/link]",
        "\u202e",
    ]
    for text in nasty:
        rows = make(tmp_path, [{"prompt": text, "response": text, text: 1}])
        shown = plain(rows)
        expected = text.replace("\x1b", "\\x1b").replace("\x07", "\\x07").replace("\u202e", "\\u202e")
        assert f"user: {expected}\n" in shown
        assert f"assistant: {expected}\n" in shown
        assert "\x1b" not in shown


def test_long_rows_are_cut_in_the_middle_and_empty_bins_stay_empty(tmp_path):
    report = inspect(
        make(tmp_path, [{"prompt": "p", "response": "a " * 5000}, {"prompt": "p", "response": "a"}])
    )
    text = render(report)
    assert " characters … " in text
    assert len(text) < 4000
    assert sum(report["lengths"]["response words"]["histogram"]) == 2


def test_a_text_column_has_one_length(tmp_path):
    report = inspect(make(tmp_path, [{"text": "a b c"}]))
    assert list(report["lengths"]) == ["words"]
    assert report["duplicate_prompts"] is None


def test_rows_in_memory_and_chats_are_reported_too():
    chat = [
        {"role": r, "content": c}
        for r, c in (("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b"))
    ]
    report = inspect(read([{"messages": chat}], train_on="all"))
    assert report["turns"] == {5: 1}
    assert [t for _, t in report["first"][0]["pieces"]] == [False, False, True, False, True]
    assert "loss on every assistant turn" in render(report)


@pytest.fixture
def tokenizer():
    transformers = pytest.importorskip("transformers")
    import tokenizers

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )


def test_tokens_and_what_will_be_truncated_are_counted(tokenizer, tmp_path):
    pytest.importorskip("staff.data.tokens")
    rows = [("a", "b"), ("a a a a a a a a", "b b"), ("a", "b b b b b b b b"), ("a </s> a", "b")]
    rows = make(tmp_path, [{"prompt": p, "response": r} for p, r in rows])
    report = inspect(rows, tokenizer, max_length=6)
    tokens = report["tokens"]
    assert (tokens["truncated"], tokens["cut_responses"], tokens["cut_examples"]) == (1, 1, [2])
    assert report["lengths"]["tokens"]["quantiles"]["0%"] == 3
    assert report["lengths"]["response tokens"]["quantiles"]["100%"] == 9
    assert report["characters"] == {SPELLS_CONTROL: 1}
    pieces = report["first"][0]["pieces"]
    assert [t for _, t in pieces] == [False, True]
    assert "</s>" in pieces[1][0]
    text = plain(rows, tokenizer=tokenizer, max_length=6)
    assert (
        "with at most 6 tokens: 1 rows lose the start of their prompt's text, 1 the end of their response"
        in text
    )
    assert "responses cut: rows 2; a larger --max-length keeps them" in text


def test_the_counts_agree_with_what_tokenising_does(tokenizer, tmp_path):
    pool = pytest.importorskip("staff.data.tokens")
    rows = make(
        tmp_path, [{"prompt": "a " * (i % 13 + 1), "response": "b " * (i % 11 + 1)} for i in range(143)]
    )
    for max_length in (3, 8, 12, 30):
        tokens = inspect(rows, tokenizer, max_length)["tokens"]
        made = pool.tokenise(rows.examples(), tokenizer, max_length)
        counts = [len(made.marked(mark)) for mark in (pool.SHORTENED, pool.CUT)]
        assert [tokens["truncated"], tokens["cut_responses"]] == counts
        assert tokens["total"] == made.lengths.sum()


def test_inspecting_without_a_model_loads_no_torch(tmp_path):
    rows = make(tmp_path, [{"prompt": "p", "response": "r"}])
    code = "import sys; from staff.data.rows import read; from staff.inspection import *; render(inspect(read(sys.argv[1])))"
    code += "; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code, rows.paths[0]], capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_the_command_shows_what_is_masked_and_cut_and_its_json_is_one_line(family, tmp_path):
    rows = make(tmp_path, [{"prompt": "[b]p[/b] " * 9, "response": "r"}, {"prompt": "p"}])
    said = run_staff("inspect", "--data", rows.paths[0], "--model", family / "target", "--max-length", "60")
    assert (said.returncode, said.stderr) == (0, "")
    for part in (
        "1 of 2 rows can't be used",
        "row 1 has no 'response'",
        "1 rows lose the start of their prompt's text",
        "[b]p[/b] <|im_end|>",
        "assistant\nr<|im_end|>",
    ):
        assert part in said.stdout
    (line,) = run_staff(
        "inspect", "--data", "-", "--json", given=rows.paths[0].read_text()
    ).stdout.splitlines()
    report = json.loads(line)
    assert (report["rows"], report["tokens"]) == (1, None)


def test_the_command_loads_no_weights_and_without_a_model_no_torch(family, tmp_path):
    rows = make(tmp_path, [{"prompt": "p", "response": "r"}])
    code = "import sys; from staff import cli; cli.inspect(sys.argv[1:]); print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code, "--data", rows.paths[0]], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("set()\n")
    tokenizer_alone = tmp_path / "model"
    tokenizer_alone.mkdir()
    for path in (family / "target").iterdir():
        if path.suffix != ".safetensors":
            (tokenizer_alone / path.name).write_bytes(path.read_bytes())
    assert (
        "<|im_start|>assistant"
        in run_staff("inspect", "--data", rows.paths[0], "--model", tokenizer_alone).stdout
    )


def test_of_a_hub_model_the_tokenizers_files_alone_are_fetched(family, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []
    monkeypatch.setattr(
        hub,
        "snapshot_download",
        lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(family / "target"),
    )
    assert tokenizer_of("some/model").eos_token == "<|im_end|>"
    ((name, patterns),) = asked
    assert name == "some/model"
    assert "tokenizer*" in patterns
    assert not any("safetensors" in pattern for pattern in patterns)


def test_an_adapter_without_a_tokenizer_takes_its_bases(family, tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(family / "target")})
    )
    assert tokenizer_of(str(tmp_path)).eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the data with --data FILE"),
        (["--data", "none.jsonl"], "there is no file or folder none.jsonl"),
        (
            ["--data", "pool.jsonl", "--model", "./none"],
            "--model ./none: there is no such folder or .gguf file, and it is not a hub id",
        ),
        (["--data", "pool.jsonl", "--max-length", "1"], "--max-length must lie in [2, inf)"),
        (["--data", "pool.jsonl", "--columns", "prompt=p"], "--columns"),
    ],
)
def test_what_is_wrong_is_one_message(arguments, message, tmp_path):
    (tmp_path / "pool.jsonl").write_text('{"prompt": "p", "response": "r"}\n')
    said = run_staff("inspect", *arguments, cwd=tmp_path)
    assert said.returncode == 2
    assert message in said.stderr
    assert "Traceback" not in said.stderr
