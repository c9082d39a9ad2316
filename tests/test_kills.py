"""Killed at any file that it writes, renames or removes, a command goes on to the same bytes and the same account."""

import csv
import gc
import io
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from pathlib import Path

import pytest

import staff
from family import SETTINGS, comparison_file, config_of, make_rows
from staff import jobs
from staff.comparison import diversity, evaluate, grid
from staff.comparison import run as comparing
from staff.config import EvaluateConfig, FinetuneConfig, ScoreConfig
from staff.data import metrics
from staff.runs import account, answers, asked
from staff.scoring import shards
from stubs import stand_in

SOAK = os.environ.get("STAFF_SOAK") == "1"
PARTS = 4 if SOAK else 1  # of a walk, so that two processes share it
STEP = {"select": 29, "grid": 53, "score": 11, "finetune": 19, "evaluate": 9, "compare": 113}  # without soak
OF_NO_MATTER = {"log.txt", "holder.txt"}
COMPARISON = """
target: ${STAFF_MODELS}/target
drafts: {small: "${STAFF_MODELS}/draft"}
tasks:
  sums: {train: "${STAFF_DATA}/pool.jsonl", test: "${STAFF_DATA}/test.jsonl", metrics: [rougeL, loss]}
methods: {staff: {}}
pruning_rates: [0.5]
seeds: [1]
select: {num_regions: 4, verification_budget: 2, draft_epochs: 1, dtype: float32}
finetune: {epochs: 1, checkpoint_seconds: 0, dtype: float32}
evaluate: {max_new_tokens: 4, dtype: float32}
"""


def select(root, folder, family, **settings):
    models = {"target": str(family / "target"), "draft": str(family / "draft")}
    plain = {**models, **SETTINGS, "checkpoint_seconds": 0}
    staff.select(str(folder / "pool.jsonl"), output=root / "x", **{**plain, **settings})


def select_grid(root, folder, family):
    models = {"target": str(family / "target"), "draft": str(family / "draft")}
    settings = {**models, **SETTINGS, "checkpoint_seconds": 0, "balance_layers": True, "scope": "last-block"}
    del settings["pruning_rate"]
    grid = {"methods": ["staff", "s2l"], "pruning_rates": [0.5, 0.75]}
    staff.select_grid(str(folder / "pool.jsonl"), output=root / "x", **grid, **settings)


def one_model(kind, output, **settings):
    def work(root, folder, family):
        named = {"data": (str(folder / "pool.jsonl"),), "model": str(family / "draft")}
        config = config_of(kind, output=str(root / output), **named, **settings)
        {ScoreConfig: jobs.score, FinetuneConfig: jobs.finetune, EvaluateConfig: evaluate.evaluate}[kind](
            config
        )

    return work


def asking(method, **settings):
    """A method that has a model answer while it runs."""

    def work(root, folder, family):
        plain = {"dtype": "float32", "max_new_tokens": 4, "checkpoint_seconds": 0, "budget": 6, **settings}
        columns = "prompt=prompt,response=response,id=id"
        models = {"target": str(family / "target"), "draft": str(family / "draft")}
        rated = str(folder / "rated.jsonl")
        staff.select(rated, output=root / "x", method=method, columns=columns, **models, **plain)

    return work


def compare(root, folder, family):
    comparing.compare(grid.read_comparison(folder / "c.yaml", str(root / "x")))


COMMANDS = {
    "select": select,
    "grid": select_grid,
    "score": one_model(ScoreConfig, "scores.parquet", scope="last-block", balance_layers=True),
    "finetune": one_model(FinetuneConfig, "x", epochs=1, checkpoint_seconds=0),
    "evaluate": one_model(EvaluateConfig, "answers.jsonl", max_new_tokens=4),
    "compare": compare,
    "whisper": asking("whisper"),
    "mods": asking("mods", quality_column="quality", option=["alpha=2", "seed_share=0.2"], target_epochs=1),
}
WALKS = [(command, "stubs") for command in STEP]
WALKS += [
    (command, "models") for command in ("select", "score", "finetune", "evaluate", "whisper", "mods") if SOAK
]


@pytest.fixture(scope="module")
def inputs(family, tmp_path_factory):
    """A pool, test rows and a comparison's file; what processes need is imported before they are forked."""
    from sklearn.decomposition import TruncatedSVD  # noqa: F401

    metrics.judge_answers(["a word"], ["a word"])
    diversity.text_space(row["prompt"] for row in make_rows(9))
    gc.freeze()
    with comparison_file(family, tmp_path_factory.mktemp("kills"), COMPARISON, 8) as path:
        rated = [json.dumps(row | {"quality": i % 5}) + "\n" for i, row in enumerate(make_rows(20))]
        (path.parent / "rated.jsonl").write_text("".join(rated))
        yield path.parent


def in_a_fork(work, *arguments, before=()):
    """A process that does a piece of work, its files cut into several shards; not waited for."""

    def begin():
        gc.freeze()
        shards.SHARD, answers.ROWS_A_SHARD, asked.ANSWERS_A_SHARD = 16, 16, 4
        for step in before:
            step()
        work(*arguments)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=begin)
    process.start()
    return process


def kept_before_every_change(root, copies, wanted):
    """Keep a folder as a kill would leave it before each file that is opened to write, renamed or removed."""
    states, last, busy = 0, None, False

    def before(event, arguments):
        nonlocal states, last, busy
        if busy or not _changes(event, arguments, root):
            return
        busy = True
        state = [
            (str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in sorted(root.rglob("*"))
        ]
        if [seen for seen in state if Path(seen[0]).name not in OF_NO_MATTER] != last:
            last = [seen for seen in state if Path(seen[0]).name not in OF_NO_MATTER]
            if wanted(states):
                shutil.copytree(root, copies / f"{states:05d}", symlinks=True)
            states += 1
        busy = False

    def arm():
        sys.addaudithook(before)

    return arm


def _changes(event, arguments, root):
    """An operation, as Python tells it before it is done, that changes something below a folder."""
    path, at = arguments[0] if arguments else None, -1
    if event == "open":
        mode, flags = arguments[1:]
        if not (set(mode) & set("wax+") if isinstance(mode, str) else flags & (os.O_WRONLY | os.O_RDWR)):
            return False
    elif event in ("os.remove", "os.rmdir"):
        at = arguments[-1]
    elif event not in ("os.rename", "os.mkdir"):
        return False
    if not isinstance(path, str | os.PathLike):
        return False
    path = Path(os.readlink(f"/proc/self/fd/{at}") if at != -1 else "/", path)
    return path.is_relative_to(root)


def contents(root):
    """Every file below a folder: its bytes; of what holds seconds or a date, the rest."""
    found = {}
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        if not path.is_file() or path.name in {*OF_NO_MATTER, account.FILE} or "lock" in name:
            continue
        if path.suffix == ".json":
            found[name] = _without_times(json.loads(path.read_text()))
        elif path.name == "results.csv":
            found[name] = [_without_times(row) for row in csv.DictReader(io.StringIO(path.read_text()))]
        else:
            found[name] = path.read_bytes()
    for path in root.rglob(account.FILE):
        found[str(path.relative_to(root))] = {
            s: _without_times(n) for s, n in account.spent(path.parent).items()
        }
    return found


def _without_times(value):
    """Without dates, and of seconds whether they are known."""
    if not isinstance(value, dict):
        return value
    words = ("repeated_seconds", "ended", "checksum", "cost.json")
    kept = {k: v for k, v in value.items() if not any(word in k for word in words)}
    return {k: v in ("", None) if "seconds" in k else _without_times(v) for k, v in kept.items()}


def seconds(root):
    """What each account below a folder holds, by stage."""
    stages = {path.parent: account.spent(path.parent) for path in root.rglob(account.FILE)}
    return {
        (work.relative_to(root), stage): numbers["seconds"]
        for work, of in stages.items()
        for stage, numbers in of.items()
    }


def ends_alike(command, family, inputs, root, before, whole):
    """Go on in a folder, to the same bytes and operations; no second that was counted is lost."""
    had = seconds(root)
    process = in_a_fork(COMMANDS[command], root, inputs, family, before=before)
    process.join()
    has = seconds(root)
    assert process.exitcode == 0
    assert contents(root) == whole
    assert all(has[stage] >= spent for stage, spent in had.items() if stage in has)


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize(("command", "models"), WALKS)
def test_a_command_killed_at_any_file_ends_with_the_same_bytes_and_account(
    command, models, part, family, inputs, tmp_path
):
    root, copies = tmp_path / "root", tmp_path / "copies"
    root.mkdir()
    before = [stand_in] if models == "stubs" else []
    step = STEP[command] if not SOAK else 1 if models == "stubs" or command == "finetune" else 5
    keep = kept_before_every_change(root, copies, lambda number: number % (step * PARTS) == step * part)
    began = time.monotonic()
    process = in_a_fork(COMMANDS[command], root, inputs, family, before=[*before, keep])
    process.join()
    took, whole = time.monotonic() - began, contents(root)
    assert process.exitcode == 0
    for killed in sorted(copies.iterdir()):
        sys.stdout.write(f"{command} killed at {killed.name}\n")  # pytest shows it where the test fails
        shutil.rmtree(root)
        shutil.copytree(killed, root, symlinks=True)
        ends_alike(command, family, inputs, root, before, whole)
    shutil.rmtree(root)
    root.mkdir()
    process = in_a_fork(COMMANDS[command], root, inputs, family, before=before)
    process.join(random.uniform(0.2, 0.9) * took)  # and one as it comes, wherever it may be
    process.kill()
    process.join()
    ends_alike(command, family, inputs, root, before, whole)


def test_scores_of_a_finished_cell_that_were_damaged_are_made_again(family, inputs, tmp_path):
    in_a_fork(compare, tmp_path, inputs, family, before=[stand_in]).join()
    whole = contents(tmp_path)
    (scores,) = tmp_path.glob("x/cells/sums/staff-0.5/*/scores.jsonl")
    scores.write_bytes(scores.read_bytes()[:-9])
    ends_alike("compare", family, inputs, tmp_path, [stand_in], whole)
