"""Workers: the same bytes whoever makes a shard, and whatever ends one of them."""

import gc
import json
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

import staff
from family import config_of, make_rows, run_staff, write_pool
from staff import files
from staff.comparison.evaluate import evaluate
from staff.config import EvaluateConfig, Spread
from staff.models import adapters, load
from staff.models.files import resolve
from staff.runs import answers, crew, on_ray, pieces, store, worker
from staff.runs.store import RunFolder
from staff.scoring import scorer as scoring
from staff.scoring import shards

KILLS = 20 if os.environ.get("STAFF_SOAK") == "1" else 3
RESULTS = ("coreset.jsonl", "indices.npy", "regions.csv", "scores.parquet")
FORK = multiprocessing.get_context("fork")
IMPORTED = adapters, load  # what workers need, before they are forked


class Forked:
    """A worker as `crew.launch` starts it, without importing everything again.

    Attributes:
        faults: called with its rank in each worker first.
    """

    faults = None

    def __init__(self, path, name, rank, count, threads):
        def begin():
            gc.freeze()
            logging.getLogger("staff").handlers.clear()  # the driver's log
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
            if Forked.faults:
                Forked.faults(rank)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            worker.work(Path(path), pieces.OPENERS, name, 60)
            os._exit(0)

        self.process = FORK.Process(target=begin)
        self.process.start()

    def poll(self):
        return self.process.exitcode

    def kill(self):
        self.process.kill()


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    monkeypatch.setattr(crew, "launch", Forked)
    monkeypatch.setattr(shards, "SHARD", 8)
    monkeypatch.setattr(Forked, "faults", None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    write_pool(folder / "wanted.jsonl", 4)
    return write_pool(folder / "pool.jsonl", 60)


def select(data, family, output, **settings):
    models = {"target": str(family / "target"), "draft": str(family / "draft"), "dtype": "float32"}
    plain = {
        "method": "staff",
        "num_regions": 4,
        "verification_budget": 3,
        "scope": "last-block",
        "threads": 1,
    }
    return staff.select(data, output=output, pruning_rate=0.5, **{**models, **plain, **settings})


@pytest.fixture(scope="module")
def alone(data, family, tmp_path_factory):
    """What one process makes of the pool."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD", 8)
        run = select(data, family, tmp_path_factory.mktemp("alone") / "x")
    return bytes_of(run.path)


def bytes_of(path):
    numbers = {
        str(p.relative_to(path)): p.read_bytes() for p in path.glob("work/*-*/*.npz") if "rows-" not in p.name
    }
    return numbers | {name: (path / name).read_bytes() for name in RESULTS}


def in_background(work, *arguments, **settings):
    process = FORK.Process(target=lambda: (work(*arguments, **settings), os._exit(0)))
    process.start()
    return process


@pytest.mark.parametrize("workers", [1, 3])
def test_the_bytes_do_not_hang_on_the_number_of_workers(workers, alone, data, family, tmp_path):
    run = select(data, family, tmp_path / "x", workers=workers)
    assert bytes_of(run.path) == alone
    assert run.cost["stages"]["score on the draft"]["samples"] == 60
    assert not list(run.path.glob("work/workers/*.json"))


def test_features_prompts_snapshots_and_validation_go_through_workers_too(data, family, tmp_path):
    settings = {
        "methods": ["staff", "less_round_robin", "moderate"],
        "budget": 5,
        "validation": str(data.parent / "wanted.jsonl"),
        **{"drop_suspects": True, "balance_layers": True, "draft_epochs": 1, "dedup": "exact", "threads": 1},
        **{"target": str(family / "target"), "draft": str(family / "draft"), "dtype": "float32"},
        **{"num_regions": 2, "verification_budget": 3, "scope": "last-block"},
    }
    rows = make_rows(24) + make_rows(3)
    staff.select_grid(rows, output=tmp_path / "one", **settings)
    staff.select_grid(rows, output=tmp_path / "two", workers=2, **settings)
    one, two = (
        {str(p.relative_to(tmp_path / n)): p.read_bytes() for p in (tmp_path / n).glob("**/*.np[zy]")}
        for n in ("one", "two")
    )
    assert one == {name: arrays for name, arrays in two.items() if "/rows-" not in name}
    assert {Path(name).name for name in one} > {
        "similarities.npz",
        "scores.npz",
        "site_means.npz",
        "indices.npy",
    }


def answered(data, family, output, **settings):
    """The bytes that `staff evaluate` leaves, and the figures of its summary."""
    named = {"data": (str(data.parent / "asked.jsonl"),), "model": str(family / "target")}
    plain = {"output": str(output), "max_new_tokens": 6, "dtype": "float32", "threads": 1}
    found = evaluate(config_of(EvaluateConfig, **{**named, **plain, **settings}))
    return output.read_bytes(), {name: found[name] for name in ("metrics", "loss", "settings", "made_of")}


def test_answers_come_from_workers_too_whose_failure_is_told_and_the_rest_kept(
    data, family, tmp_path, monkeypatch
):
    monkeypatch.setattr(answers, "ROWS_A_SHARD", 4)
    rows = make_rows(13)
    rows[5]["prompt"] = "Say \0 and nothing else, at length"
    (data.parent / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = answered(data, family, tmp_path / "one.jsonl")
    assert answered(data, family, tmp_path / "two.jsonl", workers=2) == one

    def fails(rank):
        plain = answers.Answerer.losses

        def losses(self, pool, positions):
            if 5 in positions:
                raise ValueError("row 5 is cursed")
            return plain(self, pool, positions)

        answers.Answerer.losses = losses

    monkeypatch.setattr(Forked, "faults", fails)
    with pytest.raises(ValueError, match=r"^shard 0 failed on \S+, process \d+: row 5 is cursed$"):
        answered(data, family, tmp_path / "x.jsonl", workers=2)
    kept = list(tmp_path.glob("x.unfinished/work/answers-*/shard-*.npz"))
    assert len(kept) == 3
    monkeypatch.setattr(Forked, "faults", None)
    made = []
    monkeypatch.setattr(answers.Answerer, "__init__", watched(answers.Answerer.__init__, made))
    assert answered(data, family, tmp_path / "x.jsonl") == one
    assert len(made) == 1
    assert not (tmp_path / "x.unfinished").exists()


def watched(call, made):
    return lambda *given: made.append(given) or call(*given)


def test_a_small_model_alone_computes_on_one_thread(family, monkeypatch):
    source = resolve(str(family / "draft"))
    assert crew.own_threads(Spread(), source, "cpu") == 1
    assert crew.own_threads(Spread(threads=3), source, "cpu") == 3
    assert crew.own_threads(Spread(), source, "cuda") is None
    monkeypatch.setattr(crew, "SMALL", 1000)
    assert crew.own_threads(Spread(), source, "cpu") is None


# ---- what ends a worker ----


def slow(rank):
    """Batches that take a moment, so that there is something to kill."""
    plain = scoring.Scorer._hidden

    def hidden(self, batch, *rest):
        time.sleep(0.03 * len(batch.counts))
        return plain(self, batch, *rest)

    scoring.Scorer._hidden = hidden


def test_killed_workers_and_drivers_at_random_moments_leave_the_same_bytes(
    alone, data, family, tmp_path, monkeypatch
):
    monkeypatch.setattr(Forked, "faults", slow)
    monkeypatch.setattr(crew, "TRIES", 99)
    output, dice = tmp_path / "x", random.Random(int(time.time()))
    kinds = ["worker", "driver", *(dice.choice(["worker", "worker", "driver"]) for _ in range(KILLS - 2))]
    driver = in_background(select, data, family, output, workers=2)
    for kind in kinds:
        time.sleep(dice.uniform(0.1, 0.8))
        signs = [files.read_checked(path) for path in output.glob("work/workers/*.json")]
        doomed = [sign["process"] for sign in signs if sign] if kind == "worker" else [driver.pid]
        with suppress(ProcessLookupError, IndexError):
            os.kill(dice.choice(doomed), signal.SIGKILL)
        if kind == "driver":
            driver.join()
            driver = in_background(select, data, family, output, workers=2)
    driver.join(120)
    assert driver.exitcode == 0
    assert bytes_of(output) == alone
    assert not list(output.glob("work/*/*shard-[0-9]*"))


def test_a_worker_that_hangs_is_ended_and_its_shard_done_again(
    alone, data, family, tmp_path, monkeypatch, caplog
):
    def hangs(rank):
        plain = scoring.Scorer.scores

        def scores(*given, **named):
            with suppress(FileExistsError):
                (tmp_path / "hung").touch(exist_ok=False)
                time.sleep(99)
            return plain(*given, **named)

        scoring.Scorer.scores = scores

    monkeypatch.setattr(Forked, "faults", hangs)
    monkeypatch.setattr(pieces.selfcheck, "check", lambda *_: {"skipped": "here"})
    run = select(data, family, tmp_path / "x", workers=2, worker_timeout=4)
    assert bytes_of(run.path) == alone
    assert re.search(r"gave no sign for 4 s, at shard \d: it is done again", caplog.text)


def test_a_shard_that_is_not_as_its_worker_made_it_is_said_and_done_again(
    alone, data, family, tmp_path, monkeypatch, caplog
):
    def corrupts(rank):
        write = files.write_arrays

        def corrupting(path, arrays, *rest):
            write(path, arrays, *rest)
            if path.name == "shard-00002.npz" and not (tmp_path / "flipped").exists():
                (tmp_path / "flipped").touch()
                path.write_bytes(path.read_bytes()[:-40])

        worker.files.write_arrays = corrupting

    monkeypatch.setattr(Forked, "faults", corrupts)
    run = select(data, family, tmp_path / "x", workers=2)
    assert bytes_of(run.path) == alone
    assert "shard-00002.npz is not as worker" in caplog.text


def fails_at(position, error, times, flags):
    """Scoring that fails at a position, so many times in all."""

    def arm(rank):
        plain = scoring.Scorer.scores

        def scores(self, pool, positions, *rest, **named):
            if position in positions and len(positions) > 2 and len(list(flags.iterdir())) < times:
                (flags / f"{rank}-{time.monotonic_ns()}").touch()
                raise error
            return plain(self, pool, positions, *rest, **named)

        scoring.Scorer.scores = scores

    return arm


def test_a_failure_names_shard_host_and_cause_and_the_other_shards_are_done(
    data, family, tmp_path, monkeypatch
):
    (flags := tmp_path / "flags").mkdir()
    monkeypatch.setattr(Forked, "faults", fails_at(17, ValueError("row 17 is cursed"), 99, flags))
    with pytest.raises(ValueError, match=r"^shard 2 failed on \S+, process \d+: row 17 is cursed$"):
        select(data, family, tmp_path / "x", workers=2)
    there = sorted(path.name for path in (tmp_path / "x").glob("work/scores-*/shard-0*.npz"))
    assert there == [f"shard-{number:05d}.npz" for number in range(8) if number != 2]
    assert len(list(flags.iterdir())) == 1


def test_a_fault_that_passes_is_said_and_tried_again(alone, data, family, tmp_path, monkeypatch, caplog):
    (flags := tmp_path / "flags").mkdir()
    monkeypatch.setattr(Forked, "faults", fails_at(17, RuntimeError("CUDA error: nvlink"), 2, flags))
    run = select(data, family, tmp_path / "x", workers=2)
    assert bytes_of(run.path) == alone
    assert caplog.text.count("RuntimeError: CUDA error: nvlink; it is done again") == 2


# ---- workers that others start ----


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "8"}, (4, 8)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, (2, 4)),
    ],
)
def test_a_rank_is_what_torchrun_or_slurm_says(environment, expected):
    assert worker.rank_of(environment) == expected


def test_ranks_started_by_others_share_a_run_and_end_with_it(alone, data, family, tmp_path):
    output = tmp_path / "x"
    ranks = [Forked(output, None, rank, 2, 1) for rank in range(2)]  # before there is a run at all
    run = select(data, family, output, engine="files")
    assert bytes_of(run.path) == alone
    for rank in ranks:
        rank.process.join(20)
        assert rank.poll() == 0
    assert len(list(output.glob("work/account-*.jsonl"))) == 2


@pytest.fixture
def offer(data, family, tmp_path, monkeypatch):
    """What a driver offers its workers for the first pass."""
    shutil.copytree(family / "draft", tmp_path / "draft")
    found = []

    def keep(self, offer, *_, **__):
        found.append(offer)
        raise KeyboardInterrupt

    monkeypatch.setattr(crew.Crew, "make", keep)
    with pytest.raises(KeyboardInterrupt):
        select(data, family, tmp_path / "x", engine="files", draft=str(tmp_path / "draft"))
    return found[0]


def joined(tmp_path):
    return RunFolder.joined(tmp_path / "x", tmp_path / "hashes.json")


def test_a_worker_with_other_versions_is_refused_by_name(offer, tmp_path):
    pieces.Pieces.of_offer(joined(tmp_path), offer)
    offer["engine"]["versions"]["torch"] = "2.5.0"
    with pytest.raises(ValueError, match=r"made with others: torch: '2.5.0' -> '2\."):
        pieces.Pieces.of_offer(joined(tmp_path), offer)


def test_a_worker_with_other_weights_is_refused_by_name(offer, tmp_path):
    weights = tmp_path / "draft" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"draft holds other files than the driver's .*draft: its weights"):
        pieces.Pieces.of_offer(joined(tmp_path), offer)


def test_an_offer_is_some_kilobytes_and_a_shard_of_it_a_number(offer):
    assert len(json.dumps(offer)) < 5000
    assert offer["size"] == 8
    assert offer["positions"] == {}


def test_workers_that_do_not_load_are_told_of_by_the_driver(data, family, tmp_path, monkeypatch):
    def refused(rank):
        store.version_of = lambda package: "0.1"

    monkeypatch.setattr(Forked, "faults", refused)
    with pytest.raises(
        ValueError, match=r"worker [01] on \S+: the driver's scores are made with others: numpy"
    ):
        select(data, family, tmp_path / "x", workers=2)


def test_workers_of_the_command_line_make_the_same_bytes(alone, data, family, tmp_path, monkeypatch):
    monkeypatch.undo()
    models = ["--target", family / "target", "--draft", family / "draft", "--dtype", "float32"]
    plain = [
        "--method",
        "staff",
        "--num-regions",
        4,
        "--verification-budget",
        3,
        "--scope",
        "last-block",
        "--threads",
        1,
    ]
    done = run_staff(
        *("select", "--data", data, "--pruning-rate", 0.5, "--output", tmp_path / "x", "--workers", 1),
        *(*models, *plain),
    )
    assert done.returncode == 0, done.stderr
    assert {name: (tmp_path / "x" / name).read_bytes() for name in RESULTS} == {n: alone[n] for n in RESULTS}


def test_ray_is_started_again_where_it_was_too_slow(caplog):
    tries = []

    def too_slow(until, **how):
        tries.append(how)
        if len(tries) < until:
            raise Exception("The current node timed out during startup.")

    on_ray.start_here(partial(too_slow, 2), num_cpus=1)
    assert tries == [{"num_cpus": 1}] * 2
    assert "it is tried again: The current node timed out" in caplog.text
    with pytest.raises(ValueError, match="did not start in 3 tries: The current node timed out"):
        on_ray.start_here(partial(too_slow, 9))
    assert len(tries) == 5
