"""Settings as flags: what a parser takes, how it words an error, what help and completion show."""

import dataclasses
import shutil
import subprocess

import pytest

from staff import cli, config, flags
from staff.comparison.grid import TEMPLATE, read_comparison

KINDS = {name: kind for name, (kind, _) in cli.SETTINGS.items() if kind}


def parsed(*words, command="select"):
    return cli._parse(command, list(words))[0]


def helped(command):
    return " ".join(cli._parser(command).format_help().split())


@pytest.mark.parametrize("command", KINDS)
def test_every_setting_has_a_flag_a_group_and_a_sentence(command):
    known = flags.flags_in(cli._parser(command))
    for name in config.names_of(KINDS[command]):
        assert len(known[f"--{name.replace('_', '-')}"][1]) > 10


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_an_example_that_its_parser_takes(command):
    example = next(line for line in cli.COMMANDS[command].__doc__.splitlines() if f"staff {command}" in line)
    words = example.partition(f"staff {command}")[2].replace('"', "").replace(")", "").split("#")[0].split()
    flags.parse(cli._parser(command), words)


def test_values_come_as_their_types_and_a_list_may_be_given_in_parts():
    made = parsed("--data", "a", "b", "--data=c", "--pruning_rate", "0.5", "--pruning-rate", "0.8", "--seed", "3",
                  "--learning-rate", "1e-3", "--no-public", "--draft-share", "1")  # fmt: skip
    assert (made.data, made.pruning_rate, made.seed) == (("a", "b", "c"), (0.5, 0.8), 3)
    assert (made.training.learning_rate, made.public, made.draft_share) == (1e-3, False, 1.0)
    assert parsed("--data", "-").data == ("-",)


def test_a_flag_stands_over_the_file_and_none_takes_its_setting_back(tmp_path):
    (tmp_path / "c.yaml").write_text("draft: D\nscope: linear\nmax_length: 64\n")
    made = parsed("--config", str(tmp_path / "c.yaml"), "--draft", "None", "--max-length", "32")
    assert (made.draft, made.scoring.scope, made.reading.max_length) == (None, "linear", 32)
    assert dataclasses.replace(made, draft="D") == parsed(
        "--draft=D", "--scope", "linear", "--max-length", "32"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pruning-rte", "0.5"], "there is no --pruning-rte; did you mean --pruning-rate?"),
        (["--zzz"], "there is no --zzz; staff select --help lists what there is"),
        (["more"], "'more' belongs to no flag; a value stands behind its own, as in --data more"),
        (["--seed"], "--seed: expected one argument"),
        (["--seed", "x"], "--seed must be a whole number; found 'x'"),
        (["--dtype", "int3"], "--dtype must be one of auto, float32, bfloat16, float16; found 'int3'"),
        (["--public=yes"], "ignored explicit argument 'yes'"),
    ],
)
def test_what_is_wrong_is_said_in_one_way(words, message):
    with pytest.raises(ValueError, match=r".") as error:
        parsed(*words)
    assert message in str(error.value)


def test_help_has_named_groups_marks_what_is_required_and_explains_choices():
    said = helped("select")
    for group in flags.PLACES.keys() - {"others"}:
        assert f" {group}: --" in said
    assert "--data FILE ... (required) The pool" in said
    assert " selection: --pruning-rate N" in said
    machine = said.partition(" machine: --")[2]
    assert all(flag in machine for flag in ("--device-map", "--max-memory", "--processes", "--accelerate-"))
    assert "usage: staff select --data FILE --output PATH [settings]" in said
    assert "last-value: its value projection alone, as in the paper" in said
    assert "90 % of word triples" in said
    assert all(
        f" {key}:" in f" {helped('compare')}" for key in ("tasks", "pruning_rates", "metrics", "seeds")
    )


def test_all_that_is_missing_is_said_at_once():
    with pytest.raises(ValueError, match="several things are missing") as error:
        cli.select([])
    for part in ("--data FILE", "--output PATH", "--target MODEL", "needs a small draft", "how much to keep"):
        assert part in str(error.value)
    for command in ("finetune", "score", "evaluate"):
        with pytest.raises(ValueError, match=r"--data FILE\n.*--model MODEL\n.*--output PATH"):
            cli.COMMANDS[command]([])
    with pytest.raises(ValueError, match=r"^name the data with --data FILE$"):
        cli.inspect([])


def test_the_comparison_that_init_writes_is_one(tmp_path, capsys):
    path = tmp_path / "comparison.yaml"
    cli.init([str(path)])
    found = read_comparison(path)
    assert set(found.tasks) == {"support"}
    assert "staff-tuned" in found.variants
    assert path.read_text() == TEMPLATE
    with pytest.raises(ValueError, match="is there already"):
        cli.init([str(path)])
    assert f"staff compare --config {path}" in capsys.readouterr().out


def completed(script, *words):
    ask = f"COMP_WORDS=(staff {' '.join(words)}); COMP_CWORD={len(words)}; _staff; echo ${{COMPREPLY[@]}}"
    return subprocess.run(
        ["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True
    ).stdout.split()


def test_a_shell_completes_commands_flags_and_choices(capsys):
    cli.completion(["bash"])
    script = capsys.readouterr().out
    assert completed(script, "fin") == ["finetune"]
    assert completed(script, "select", "--sco") == ["--scores", "--scope"]
    assert completed(script, "select", "--scope", "last") == ["last-value", "last-block"]
    cli.completion(["fish"])
    fish = capsys.readouterr().out
    assert "-n '__fish_seen_subcommand_from select' -l dtype" in fish
    if shutil.which("fish"):
        subprocess.run(["fish", "-n", "-c", fish], check=True)
    with pytest.raises(ValueError, match="no completion for tcsh; for bash, zsh, fish"):
        cli.completion(["tcsh"])
