"""Every way a run can end: killed, stopped, out of disk or memory, damaged, changed under its feet. It goes
on to the same bytes."""

import json
import logging
import multiprocessing
import os
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

import staff
from family import SETTINGS, config_of, finish, make_rows, results, run_staff, start, write_pool
from staff import cli, files, jobs
from staff.config import FinetuneConfig
from staff.models import finetune as training
from staff.models import load as models
from staff.runs import pieces, store
from staff.scoring import scorer as score
from staff.scoring import shards as memory
from tiny import make_model, make_pool

SOAK = os.environ.get("STAFF_SOAK") == "1"
STAGES = ["read", "tokenise", "fine-tune the draft", "score on the draft", "verify on the target"]


@pytest.fixture(scope="module")
def whole(family, tmp_path_factory):
    """A run that ran through, and how long each stage took."""
    folder = tmp_path_factory.mktemp("ends")
    data = write_pool(folder / "pool.jsonl")
    process, receive = start(data, folder / "x", family)
    began, first = time.monotonic(), {}
    while True:
        try:
            first.setdefault(receive.recv()[0], time.monotonic() - began)
        except EOFError:
            break
    assert finish(process, receive) is None
    ends = [*list(first.values())[1:], time.monotonic() - began]
    return folder, dict(zip(first, np.subtract(ends, list(first.values())), strict=True))


@pytest.fixture
def again(whole, family):
    """Finish a run's folder, and hold it to the bytes of the run that ran through."""
    folder, _ = whole

    def finish_it(output, **settings):
        assert (
            finish(*start(folder / "pool.jsonl", output, family, **{"checkpoint_seconds": 60, **settings}))
            is None
        )
        assert results(output) == results(folder / "x")
        left = [path for path in output.rglob(".*") if path.is_file() and path.name != files.MARK]
        assert not left, "half-written files were left"

    return finish_it


@pytest.fixture
def copy(whole, tmp_path):
    """A finished run in a folder of its own."""
    return Path(shutil.copytree(whole[0] / "x", tmp_path / "x"))


def unfinish(output):
    """As if the run had been killed just before it wrote its results."""
    (output / "manifest.json").unlink()
    (output / "work" / "selection.npz").unlink()


def tuned(whole, output):
    """A run as if it had been killed once its draft was tuned."""
    made_later = shutil.ignore_patterns("scores-*", "selection.npz", "manifest.json")
    return Path(shutil.copytree(whole[0] / "x", output, ignore=made_later))


def one(output, pattern):
    (found,) = (output / "work").glob(pattern)
    return found


def flip(path):
    content = bytearray(path.read_bytes())
    for part in range(1, 8):  # in one place it might hit a date in a header, which nobody misses
        content[len(content) * part // 8] ^= 0x10
    path.write_bytes(content)


def killed_at(stage, done, *where, **settings):
    """Kill a run once it tells that so much of a stage is done."""
    process, receive = start(*where, pause=60, at=lambda s, d: s == stage and d >= done, **settings)
    while True:
        at, so_far = receive.recv()
        if at == stage and so_far >= done:
            break
    process.kill()
    process.join()
    receive.close()


# ---- killed ----


@pytest.mark.parametrize("round", range(20 if SOAK else 1))
def test_a_run_killed_at_a_random_moment_of_any_stage_ends_with_the_same_bytes(
    round, whole, again, family, tmp_path
):
    folder, seconds = whole
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    for stage in [STAGES[(round + 2) % len(STAGES)], *(chance.choices(STAGES, k=2) if SOAK else ())]:
        process, receive = start(folder / "pool.jsonl", tmp_path / "x", family)
        try:
            while receive.recv()[0] != stage:
                pass
            time.sleep(chance.uniform(0, 1.1 * seconds[stage]))
        except EOFError:  # it was over before that: the stage had been done
            pass
        process.kill()
        process.join()
        receive.close()
    sys.stdout.write(f"killed around {stage}, seed {seed}\n")  # pytest shows it where the test fails
    again(tmp_path / "x")


def test_the_lock_of_a_killed_run_holds_nobody_up_and_a_living_one_names_its_process(
    whole, again, family, tmp_path
):
    folder, _ = whole
    process, receive = start(folder / "pool.jsonl", tmp_path / "x", family, pause=0.5)
    receive.recv()
    said = finish(*start(folder / "pool.jsonl", tmp_path / "x", family))
    assert f"is in use by process {process.pid} on {platform.node()}: wait for it, stop it" in said
    process.kill()
    process.join()
    assert (
        tmp_path / "x" / "work" / "holder.txt"
    ).read_text() == f"process {process.pid} on {platform.node()}\n"
    again(tmp_path / "x")


def test_a_fine_tuning_of_ones_own_is_finished_after_a_kill_and_known_by_checksums(
    family, tmp_path, caplog, monkeypatch
):
    write_pool(tmp_path / "pool.jsonl", 30)
    settings = {
        "data": (str(tmp_path / "pool.jsonl"),),
        "model": str(family / "draft"),
        "epochs": 1,
        "checkpoint_seconds": 0,
    }
    ran_through = jobs.finetune(config_of(FinetuneConfig, output=str(tmp_path / "a"), **settings))
    assert not list(ran_through.glob("work/*-*"))

    class Killed(BaseException):
        pass

    def kill(stage, done, total):
        if stage == "fine-tune the model" and done == 3:
            raise Killed

    killed = config_of(FinetuneConfig, output=str(tmp_path / "b"), **settings)
    with pytest.raises(Killed):
        jobs.finetune(killed, on_progress=kill)
    assert list((tmp_path / "b").glob("work/adapter-*/checkpoints/checkpoint-2"))
    jobs.finetune(killed)
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "b" / "adapter_model.safetensors"
    ).read_bytes()
    flip(tmp_path / "b" / "adapter_model.safetensors")
    jobs.finetune(killed)
    assert f"{tmp_path / 'b' / 'adapter_model.safetensors'} is damaged; it is made again" in caplog.messages
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "b" / "adapter_model.safetensors"
    ).read_bytes()
    with pytest.raises(ValueError, match=r"epochs: 1\.0 -> 2\.0"):
        jobs.finetune(config_of(FinetuneConfig, output=str(tmp_path / "b"), **{**settings, "epochs": 2}))
    monkeypatch.setattr(training, "train_lora", lambda *_, **__: pytest.fail("trained again"))
    jobs.finetune(killed, update=True)


# ---- no room, no right ----


def no_file_above(size):
    """Like a full disk, within any library: a write beyond it fails halfway."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def fails_at_opening(number, error, folder):
    """The `number`-th file that is opened for writing below a folder can't be."""

    def arm():
        opened = 0

        def watch(event, arguments):
            nonlocal opened
            if event == "open" and str(arguments[0]).startswith(str(folder)):
                writes = "wax+" if isinstance(arguments[1], str) else ""
                if (
                    any(letter in arguments[1] for letter in writes)
                    if writes
                    else (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
                ):
                    opened += 1
                    if opened == number:
                        raise OSError(error, os.strerror(error), str(arguments[0]))

        sys.addaudithook(watch)

    return arm


@pytest.mark.parametrize("size", [6000] if not SOAK else [*range(200, 8000, 600), 12_000, 18_000, 24_000])
def test_a_disk_that_is_full_halfway_through_a_file_is_one_message_and_the_run_goes_on(
    size, whole, again, family, tmp_path
):
    said = finish(*start(whole[0] / "pool.jsonl", tmp_path / "x", family, before=no_file_above(size)))
    if said is not None:  # every file is smaller
        assert "the disk is full. Free some space" in said
        assert "\n" not in said
        assert not (tmp_path / "x" / "coreset.jsonl").exists()
    again(tmp_path / "x")


@pytest.mark.parametrize("number", [40] if not SOAK else range(2, 140, 4))
def test_a_disk_that_is_full_at_any_file_is_one_message_and_the_run_goes_on(
    number, whole, again, family, tmp_path
):
    before = fails_at_opening(number, 28, tmp_path)
    said = finish(*start(whole[0] / "pool.jsonl", tmp_path / "x", family, before=before))
    assert said is None or "the disk is full" in said
    again(tmp_path / "x")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_real_full_disk_that_is_cleared_bit_by_bit_ends_with_the_same_bytes(
    small_disk, whole, again, family
):
    failures = 0
    for size in range(48, 2000, 60 if SOAK else 250):
        said = finish(*start(whole[0] / "pool.jsonl", small_disk / "x", family, checkpoint_seconds=0.2))
        if said is None:
            break
        assert "the disk is full" in said
        failures += 1
        subprocess.run(["mount", "-o", f"remount,size={size}k", small_disk], check=True)
    assert failures > 1
    again(small_disk / "x")


def test_a_folder_that_can_only_be_read_is_one_message(small_disk, whole, family):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    said = finish(*start(whole[0] / "pool.jsonl", small_disk / "x", family))
    assert (
        said
        == f"{small_disk / 'x'} can't be written to: Read-only file system; name another folder with output"
    )


# ---- damaged ----


@pytest.mark.parametrize(
    "name",
    [
        "coreset.jsonl",
        "indices.npy",
        "regions.csv",
        "scores.parquet",
        "cost.json",
        "manifest.json",
        "work/selection.npz",
    ],
)
def test_a_result_with_flipped_bytes_is_named_and_made_again(name, copy, again):
    flip(copy / name)
    again(copy)
    assert f"warning: {copy / name} is damaged; it is made again" in (copy / "work" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("pattern", "without"),
    [
        ("pool-*/tokens.npz", ()),
        ("scores-*/scores.npz", ()),
        ("scores-*/ledger-00000.npz", ()),
        ("size-*/size.json", ()),
        ("draft-*/adapter_model.safetensors", ("scores-*/scores.npz",)),
        ("draft-*/finished.json", ("scores-*/scores.npz",)),
        ("begun.json", ()),
        ("hashes.json", ()),
    ],
)
def test_a_piece_of_work_with_flipped_bytes_is_named_and_made_again(pattern, without, copy, again):
    unfinish(copy)
    for name in without:
        one(copy, name).unlink()
    damaged = next((copy / "work").glob(pattern))
    flip(damaged)
    again(copy)
    assert f"{damaged} is damaged; it is made again" in (copy / "work" / "log.txt").read_text()


def test_files_that_were_cut_off_or_emptied_are_mended(copy, again):
    unfinish(copy)
    for name in ("account.jsonl", "begun.json", "hashes.json", "log.txt"):
        path = copy / "work" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for place, path in enumerate(sorted((copy / "work").glob("*/key.json"))):
        path.write_bytes(path.read_bytes()[: 30 * (place % 2)])
    again(copy)
    assert all(
        json.loads(path.read_text())["reading"]["max_length"] == 1024
        for path in copy.glob("work/pool-*/key.json")
    )
    cost = json.loads((copy / "cost.json").read_text())
    assert cost["stages"]
    for path in (copy / "work").glob("*.json*"):
        path.write_bytes(b"")
    unfinish(copy)
    again(copy)


def test_no_flipped_bit_of_a_file_of_scores_goes_unseen(tmp_path, caplog):
    arrays = {"effort": np.arange(5, dtype=np.float32), "loss": np.ones(5, np.float32)}
    path = tmp_path / "scores.npz"
    files.write_arrays(path, arrays)
    content = path.read_bytes()
    caplog.set_level(logging.ERROR)
    for at in range(len(content)):
        for bit, reads in ((0, files.read_arrays), (5, files.read_arrays), (3, files.map_arrays)):
            damaged = bytearray(content)
            damaged[at] ^= 1 << bit
            path.write_bytes(damaged)
            read = reads(path)
            assert read is None or {name: (a.dtype, a.tolist()) for name, a in read.items()} == {
                name: (a.dtype, a.tolist()) for name, a in arrays.items()
            }


def test_a_damaged_part_of_the_ledger_costs_that_part_alone(tmp_path, caplog):
    calls = []

    def score(positions, *_):
        calls.append(positions.tolist())
        return {"positions": positions, "scores": (positions * 10).astype(np.float32)}

    def make(parts, asked):
        shards = memory.Shards(tmp_path, "ledger", parts, np.ones(6, np.int64), 64)
        return memory.read_shards(
            shards, lambda missing: memory.make_shards(lambda: (score, 1), shards, missing)
        )

    first = store.Ledger(tmp_path, make, part=2)
    first(np.arange(6))
    whole = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    flip(tmp_path / "ledger-00001.npz")
    calls.clear()
    assert store.Ledger(tmp_path, make, part=2)(np.arange(6)).tolist() == [0, 10, 20, 30, 40, 50]
    assert calls == [[2, 3]]
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == whole
    assert "ledger-00001.npz is damaged" in caplog.text


def test_a_damaged_shard_is_scored_again_and_said(whole, again, family, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "SHARD", 16)
    output = tmp_path / "x"
    killed_at("score on the draft", 33, whole[0] / "pool.jsonl", output, family)
    damaged = one(output, "scores-*/shard-00000.npz")
    flip(damaged)
    assert finish(*start(whole[0] / "pool.jsonl", output, family)) is None
    assert f"{damaged} is damaged; it is made again" in (output / "work" / "log.txt").read_text()
    assert (output / "coreset.jsonl").read_bytes() == (whole[0] / "x" / "coreset.jsonl").read_bytes()


def test_the_newest_whole_checkpoint_is_taken_whatever_the_clock_says(tmp_path, caplog):
    def tune(output, on_progress=None):
        pool = make_pool((6, 9, 5, 8, 7, 6, 9, 4))
        settings = {
            "epochs": 4,
            "batch_size": 2,
            "learning_rate": 1e-2,
            "lora_rank": 2,
            "checkpoint_seconds": 0,
        }
        training.train_lora(
            make_model("llama", torch.float32),
            pool,
            np.arange(8),
            output,
            on_progress=on_progress,
            **settings,
        )
        return (output / "adapter_model.safetensors").read_bytes()

    class Killed(BaseException):
        pass

    def clock_goes_back_then_kill(done, total, figures):
        for checkpoint in (tmp_path / "b" / "checkpoints").glob("checkpoint-*"):
            at = 10**9 - int(checkpoint.name.split("-")[1])  # the newer, the older by the clock
            os.utime(checkpoint, (at, at))
        if done == 9:
            raise Killed

    ran_through = tune(tmp_path / "a")
    with pytest.raises(Killed):
        tune(tmp_path / "b", clock_goes_back_then_kill)
    kept = sorted(path.name for path in (tmp_path / "b" / "checkpoints").iterdir())
    assert kept == ["checkpoint-7", "checkpoint-8"]
    flip(tmp_path / "b" / "checkpoints" / "checkpoint-8" / "optimizer.pt")
    steps = []
    assert tune(tmp_path / "b", lambda done, *_: steps.append(done)) == ran_through
    assert steps[0] == 8
    assert "checkpoint-8/optimizer.pt is damaged" in caplog.text


def test_a_clock_that_goes_back_changes_nothing(again, family, tmp_path):
    def backwards():
        now = time.time()
        time.time = lambda: now - 1000 * time.monotonic()

    again(tmp_path / "x", before=backwards)


def test_unpacked_weights_with_flipped_bytes_are_unpacked_again(tmp_path, caplog, monkeypatch):
    made = []

    class Written:
        config = object()

        def save_pretrained(self, folder):
            made.append(folder)
            (folder / "model.safetensors").write_bytes(bytes(100))

    monkeypatch.setattr(models, "load_model", lambda *_: Written())
    monkeypatch.setattr(models, "load_tokenizer", lambda *_: Written())
    source = models.Source("m.gguf", tmp_path, "m.gguf")
    (tmp_path / "u").mkdir()
    (tmp_path / "u" / "key.json").write_text("{}")
    (tmp_path / "u" / "model-00001-of-00002.safetensors").write_text("of an unpacking that was killed")
    for _ in range(2):
        assert models.unpack_gguf(source, tmp_path / "u", torch.float32).folder == tmp_path / "u"
    assert len(made) == 2  # the weights, the tokenizer
    assert sorted(path.name for path in (tmp_path / "u").iterdir()) == [
        "finished.json",
        "key.json",
        "model.safetensors",
    ]
    flip(tmp_path / "u" / "model.safetensors")
    models.unpack_gguf(source, tmp_path / "u", torch.float32)
    assert len(made) == 4
    assert "model.safetensors is damaged; it is made again" in caplog.text


# ---- changed under its feet ----


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("pool.jsonl", "tokenise"),
        ("target", "verify on the target"),
        *([("pool.jsonl", "verify on the target"), ("draft", "score on the draft")] if SOAK else ()),
    ],
)
def test_a_file_that_changes_while_it_is_read_is_named_and_nothing_made_of_it_is_kept(
    name, stage, whole, again, family, tmp_path
):
    shutil.copytree(family, tmp_path / "family")
    data = tmp_path / "pool.jsonl"
    shutil.copy(whole[0] / "pool.jsonl", data)
    path = data if name == "pool.jsonl" else tmp_path / "family" / name / "model.safetensors"
    content = path.read_bytes()

    rest = {"pause": 0.5, "at": lambda at, done: at == stage}
    process, receive = start(data, tmp_path / "x", tmp_path / "family", checkpoint_seconds=60, **rest)
    while receive.recv()[0] != stage:
        pass
    altered = bytearray(content)
    altered[-3] ^= 1
    path.write_bytes(altered)
    said = finish(process, receive)
    assert "changed while" in said
    assert (str(path) if name == "pool.jsonl" else f"{name}=") in said
    assert not (tmp_path / "x" / "coreset.jsonl").exists()
    path.write_bytes(content)
    assert finish(*start(data, tmp_path / "x", tmp_path / "family", checkpoint_seconds=60)) is None
    assert results(tmp_path / "x") == results(whole[0] / "x")


# ---- out of memory ----


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def short(holds, error=OUT_OF_MEMORY):
    """A machine whose memory holds so many padded tokens of a batch."""

    def arm():
        hidden = score.Scorer._hidden

        def within_memory(self, batch, *rest):
            if batch.input_ids.numel() > holds:
                raise error
            return hidden(self, batch, *rest)

        score.Scorer._hidden = within_memory

    return arm


def test_out_of_memory_halves_the_budget_which_is_written_down_said_and_kept_by_a_resumed_run(
    whole, family, tmp_path
):
    data, allocator = (
        whole[0] / "pool.jsonl",
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
    )
    a, b = (tuned(whole, tmp_path / name) for name in "ab")
    assert finish(*start(data, a, family, before=short(130))) is None
    log = (a / "work" / "log.txt").read_text()
    assert re.search(r"out of memory: shard 0 is scored in batches of \d+ tokens at most, not 512", log)
    assert log.count("out of memory") > 2  # more than once for the draft, and for the target
    killed_at("verify on the target", 1, data, b, family, before=short(130, allocator))
    for scores in (*b.glob("work/scores-*/ledger-0*.npz"), *b.glob("work/scores-*/scores.npz")):
        scores.unlink()
    # memory is plenty now: the budgets stay as they were written down
    assert finish(*start(data, b, family)) is None
    assert results(a) == results(b)


def test_gradients_against_validation_rows_halve_their_batches_and_go_on_where_they_were_killed(
    whole, family, tmp_path, monkeypatch
):
    monkeypatch.setattr(memory, "SHARD", 16)
    settings = {
        "method": "less",
        "validation": str(write_pool(tmp_path / "wanted.jsonl", 4)),
        "update": True,
    }
    data, piece = whole[0] / "pool.jsonl", "work/similarity-*/{}"
    tuned(whole, tmp_path / "a"), tuned(whole, tmp_path / "b")
    assert finish(*start(data, tmp_path / "a", family, before=short(130), **settings)) is None
    assert (
        "out of memory: shard 0 is scored in batches of" in (tmp_path / "a" / "work" / "log.txt").read_text()
    )
    killed_at("gradients of the draft", 33, data, tmp_path / "b", family, before=short(130), **settings)
    (kept,) = (tmp_path / "b").glob(piece.format("shard-00000.npz"))
    before = kept.stat().st_mtime_ns
    process, receive = start(data, tmp_path / "b", family, **settings)
    while receive.recv()[0] != "gradients of the draft":
        pass
    assert kept.stat().st_mtime_ns == before, "a shard that was there was made again"
    assert finish(process, receive) is None
    for name in ("coreset.jsonl", piece.format("similarity.npz")):
        ((a,), (b,)) = ((tmp_path / run).glob(name) for run in "ab")
        assert a.read_bytes() == b.read_bytes()
    assert files.read_arrays(b)["similarity"].std() > 0


def test_a_budget_that_was_lowered_counts_for_its_shard_alone(tmp_path):
    budgets = memory.Budgets(tmp_path / "budgets.json", 4096)
    budgets.lower(3, 2048)
    budgets.lower(3, 1024)
    budgets.lower(7, 512)
    for known in (budgets, memory.Budgets(tmp_path / "budgets.json", 4096)):
        assert [known.of(shard) for shard in (0, 2, 3, 6, 7, 9)] == [4096, 4096, 1024, 4096, 512, 4096]


def test_a_sample_that_does_not_fit_alone_is_named(whole, family, tmp_path):
    said = finish(*start(whole[0] / "pool.jsonl", tmp_path / "x", family, before=short(20), draft_epochs=0))
    assert "of the data does not fit into memory alone, with its" in said
    assert "max_length" in said


def fail_training(error):
    def compute_loss(*_, **__):
        raise error

    training._ResponseTrainer.compute_loss = compute_loss


def test_out_of_memory_while_tuning_names_the_batch_size(whole, family, tmp_path):
    before = lambda: fail_training(torch.OutOfMemoryError("CUDA out of memory"))  # noqa: E731
    said = finish(*start(whole[0] / "pool.jsonl", tmp_path / "x", family, before=before))
    assert "out of memory while fine-tuning with batch_size=8: lower it" in said


# ---- stopped by Ctrl-C ----


def takes_long(entered, *_, **__):
    """One product that Python can't interrupt, of many seconds."""
    entered.set()
    side = torch.ones(7000, 7000)
    while True:
        torch.mm(side, side)


@pytest.mark.parametrize("step", ["loading", "tokenising", "scoring", "saving"])
def test_ctrl_c_inside_a_long_step_gives_the_terminal_back_within_two_seconds(
    step, whole, again, family, tmp_path
):
    entered = multiprocessing.get_context("fork").Event()
    stderr = tmp_path / "stderr"

    def before():
        os.dup2(os.open(stderr, os.O_CREAT | os.O_WRONLY), 2)
        cli._stop_at_once()
        long = partial(takes_long, entered)
        if step == "loading":
            models.load_model = long
        elif step == "tokenising":  # the tokenizer's own code, on all of a large text at once

            def tokenise(examples, tokenizer, *_, **__):
                entered.set()
                while True:
                    tokenizer(["word " * 10_000] * 200)

            pieces.tokenise = tokenise
        elif step == "scoring":
            score.Scorer._hidden = long
        else:
            torch.save = long

    process, receive = start(whole[0] / "pool.jsonl", tmp_path / "x", family, before=before)
    try:
        assert entered.wait(60)
        time.sleep(0.3)
        began = time.monotonic()
        os.kill(process.pid, signal.SIGINT)
        process.join(10)
        assert time.monotonic() - began < 2
    finally:
        process.kill()
        receive.close()
    assert process.exitcode == 130
    assert "staff: stopped; the same command goes on from here" in stderr.read_text()
    if step == "saving":
        again(tmp_path / "x")


# ---- what is left behind: provenance, log, terminal ----


def test_a_finished_run_is_recognised_within_three_seconds_and_without_torch(whole, family):
    folder, _ = whole
    code = "import sys; from staff import cli\ntry: cli.main()\nfinally: print('torch' in sys.modules, 'transformers' in sys.modules)"
    flags = [
        f"--{name.replace('_', '-')}={value}" for name, value in {**SETTINGS, "draft_epochs": 1.25}.items()
    ]
    flags += [f"--target={family / 'target'}", f"--draft={family / 'draft'}"]
    began = time.monotonic()
    command = [
        sys.executable,
        "-c",
        code,
        "select",
        "--data",
        folder / "pool.jsonl",
        "--output",
        folder / "x",
        "--quiet",
        *flags,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("False False\n", "")
    assert time.monotonic() - began < 3


def test_the_manifest_says_what_the_run_was_made_of_and_its_config_makes_it_again_elsewhere(whole, tmp_path):
    folder, _ = whole
    manifest = json.loads((folder / "x" / "manifest.json").read_text())
    assert manifest["versions"]["torch"] == version("torch")  # torch itself may add +cu130 to it
    assert set(manifest["inputs"]) == {"data", "draft", "target"}
    assert manifest["settings"]["num_regions"] == 5
    assert (manifest["seed"], manifest["device"], manifest["dtype"]) == (
        42,
        "cpu",
        str(models.pick_dtype("auto", torch.device("cpu")))[6:],
    )
    in_checkout = (Path(staff.__file__).parents[2] / ".git").exists() and shutil.which("git")
    assert bool(re.fullmatch(r"[0-9a-f]{40}(\+changed)?", manifest["commit"] or "")) == bool(in_checkout)
    (tmp_path / "elsewhere").mkdir()
    data = shutil.copy(folder / "pool.jsonl", tmp_path / "elsewhere" / "renamed.jsonl")
    done = run_staff(
        "select",
        "--config",
        folder / "x" / "config.yaml",
        "--data",
        data,
        "--output",
        tmp_path / "y",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert results(folder / "x") == results(tmp_path / "y")
    assert "\x1b" not in done.stderr + done.stdout  # no terminal: no colours, no bars
    assert "\r" not in done.stderr
    assert {line.split(":")[0] for line in done.stderr.splitlines()} == set(
        STAGES
    )  # and no library has its say
    assert json.loads(done.stdout)["inputs"] == manifest["inputs"]


def test_the_log_has_stages_and_versions_and_no_text_of_the_user(whole):
    log = (whole[0] / "x" / "work" / "log.txt").read_text()
    for part in (*STAGES, f"torch {version('torch')}", "done"):
        assert part in log
    assert "What is" not in log
    assert all(row["response"] not in log for row in make_rows(60))


def test_exit_codes_are_those_of_the_readme(tmp_path):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert "Exit status: 0 done; 2 something that you can mend" in readme
    assert run_staff("methods").returncode == 0
    failed = run_staff(
        "select",
        "--data",
        tmp_path / "no.jsonl",
        "--method",
        "random",
        "--budget",
        1,
        "--output",
        tmp_path / "x",
    )
    assert failed.returncode == 2
    assert len(failed.stderr.splitlines()) == 1
    reads = subprocess.Popen(
        [sys.executable, "-m", "staff.cli", "methods"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    reads.stdout.close()
    assert (reads.wait(), reads.stderr.read()) == (1, b"")


def test_a_budget_settled_once_is_kept_whatever_is_told_later(tmp_path):
    budgets = memory.Budgets(tmp_path / "budgets.json", None)
    budgets.settle(2048)
    budgets.lower(3, 500)
    again = memory.Budgets(tmp_path / "budgets.json", None)
    again.settle(65536)
    assert [again.of(shard) for shard in (0, 2, 3, 9)] == [2048, 2048, 500, 2048]
    assert [again.agree("threads", threads) for threads in (2, 8)] == [2, 2]
