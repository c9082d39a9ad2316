"""The terminal: one clear message for what is wrong, a summary for what is done, and Ctrl-C at once."""

import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from family import run_staff as run
from family import write_pool

STAFF = [sys.executable, "-m", "staff.cli"]
SMALL = [
    "--method",
    "staff",
    "--pruning-rate",
    "0.7",
    "--num-regions",
    "5",
    "--verification-budget",
    "3",
    "--draft-epochs",
    "1",
    "--batch-tokens",
    "512",
]


def models(family):
    return ["--target", family / "target", "--draft", family / "draft"]


@pytest.fixture(scope="module")
def done(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    write_pool(folder / "pool.jsonl")
    return folder, run(
        "select", "--data", folder / "pool.jsonl", *models(family), *SMALL, "--output", folder / "x"
    )


def test_the_summary_says_what_was_kept_what_it_cost_and_how_to_go_on(done, family):
    folder, result = done
    assert result.returncode == 0, result.stderr
    said = result.stdout
    for part in (
        "60 samples",
        "coreset    18 samples, 30% of the pool",
        " samples verified on the target (",
        "V_i from",
        "fidelity   unknown: too few to say: 15 samples were verified",
        "without a draft (direct)",
        "(2 T f + 1) r + v",
    ):
        assert part in said
    assert f"staff finetune --data {folder / 'x' / 'coreset.jsonl'} --model {family / 'target'}" in said
    assert "fine-tune the draft: 8 of 8" in result.stderr
    assert "Traceback" not in result.stderr


def test_json_is_one_line_and_quiet_says_nothing_and_a_yaml_file_is_flags_typed_earlier(done):
    folder, _ = done
    result = run("select", "--config", folder / "x" / "config.yaml", "--json", "--quiet")
    assert result.stderr == ""
    assert json.loads(result.stdout)["m"] == 18
    assert run("select", "--config", folder / "x" / "config.yaml", "--quiet").stdout == ""


def test_the_same_config_in_another_folder_gives_the_same_bytes(done):
    folder, _ = done
    assert run("select", "--config", folder / "x" / "config.yaml", "--output", folder / "y").returncode == 0
    for name in ("coreset.jsonl", "indices.npy", "regions.csv"):
        assert (folder / "x" / name).read_bytes() == (folder / "y" / name).read_bytes()


def test_scores_can_be_written_alone_and_taken_up_again(done, family):
    folder, _ = done
    result = run(
        "score",
        "--data",
        folder / "pool.jsonl",
        "--model",
        family / "draft",
        "--output",
        folder / "s.parquet",
        "--quiet",
    )
    assert result.returncode == 0, result.stderr
    assert not (folder / "s.unfinished").exists()
    result = run(
        "select",
        "--data",
        folder / "pool.jsonl",
        "--scores",
        folder / "s.parquet",
        "--budget",
        7,
        "--output",
        folder / "z",
        "--json",
    )
    assert json.loads(result.stdout)["m"] == 7
    assert "warning: none verified" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["selct"], "there is no command 'selct'; did you mean select?"),
        (["select", "--pruning-rte", "0.5"], "there is no --pruning-rte; did you mean --pruning-rate?"),
        (["select", "--data", "POOL", "--pruning-rate", "1.2", "--output", "o"], "in [0, 1); found 1.2"),
        (["select", "--data", "POOL", "--output", "o"], "say how much to keep"),
        (
            [
                "select",
                "--data",
                "nothing.jsonl",
                "--method",
                "random",
                "--pruning-rate",
                "0.5",
                "--output",
                "o",
            ],
            "nothing.jsonl",
        ),
        (["select", "--data", "POOL", "--pruning-rate", "0.5", "--output", "o"], "--target"),
        (
            ["select", "--data", "POOL", "--target", "TARGET", "--pruning-rate", "0.5", "--output", "o"],
            "self:8 keeps 8 of the target's own blocks",
        ),
        (
            [
                "select",
                "--data",
                "POOL",
                "--target",
                "some/model",
                "--draft",
                "self:2",
                "--budget",
                "3",
                "--output",
                "o",
            ],
            "the hub did not give it",
        ),
        (["select", "--data", "POOL", "--method", "random", "--pruning-rate", "0.5"], "--output"),
        (["select", "--config", "none.yaml"], "none.yaml: can't be read"),
        (
            ["select", "--data", "POOL", "--scores", "none.npy", "--budget", "3", "--output", "o"],
            "none.npy: there is no such file",
        ),
        (["finetune", "--model", "TARGET", "--output", "o"], "--data"),
        (
            ["finetune", "--data", "POOL", "--model", "TARGET", "--output", "o", "--max-steps", "0"],
            "--max-steps must lie in [1, inf)",
        ),
        (["score", "--data", "POOL", "--model", "TARGET", "--output", "o.csv"], "ends in .parquet"),
    ],
)
def test_what_is_wrong_is_one_message_without_a_traceback(arguments, message, family, tmp_path):
    write_pool(tmp_path / "pool.jsonl", 10)
    names = {"POOL": str(tmp_path / "pool.jsonl"), "TARGET": str(family / "target")}
    result = run(*(names.get(word, word) for word in arguments), cwd=tmp_path)
    assert result.returncode == 2
    assert message in " ".join(result.stderr.replace("│", "").split())
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "o").exists()


def test_help_and_version_are_quick_and_name_every_command():
    began = time.monotonic()
    said = subprocess.run([*STAFF, "--help"], capture_output=True, text=True).stdout
    assert all(f"  {name}" in said for name in ("select", "score", "finetune", "methods"))
    assert run("--version").stdout.startswith("staff 0.")
    assert time.monotonic() - began < 20
    assert "K, intervals of equal width" in " ".join(run("select", "--help").stdout.replace("│", "").split())


def test_ctrl_c_gives_the_terminal_back_at_once_and_the_same_command_goes_on(family, tmp_path):
    write_pool(tmp_path / "pool.jsonl", 400)
    command = [
        *STAFF,
        "select",
        "--data",
        "pool.jsonl",
        *map(str, models(family)),
        *SMALL,
        "--output",
        "x",
        "--draft-epochs",
        "200",
    ]
    terminal, side = pty.openpty()
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=side, stderr=side, env={**os.environ, "TERM": "xterm"}
    )
    os.close(side)
    seen = b""
    while b"fine-tune the draft" not in seen:
        seen += os.read(terminal, 4096)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    while b"goes on from here" not in seen:
        seen += os.read(terminal, 4096)
    assert process.wait() == 130
    assert time.monotonic() - began < 2
    assert b"\x1b[?25h" in seen.split(b"fine-tune the draft")[-1]  # the cursor is shown again
    os.close(terminal)
    assert (
        run("select", *command[4:], "--draft-epochs", "200", "--max-length", "64", cwd=tmp_path).stderr.count(
            "max_length: 1024 -> 64"
        )
        == 1
    )


@pytest.mark.parametrize("given", [["--preset", "paper"], ["--preset=paper"]])
def test_a_preset_on_the_command_line_stands_below_flags_and_a_file(given, tmp_path):
    from staff import cli

    (tmp_path / "c.yaml").write_text("num_regions: 9\n")
    config, _ = cli._parse(
        "select", ["--config", str(tmp_path / "c.yaml"), *given, "--verification-budget", "4"]
    )
    assert (config.draft_epochs, config.num_regions, config.verification_budget) == (3.0, 9, 4)
