"""Files are whole or absent, a run has one owner, changed inputs are named, the target is asked once."""

import os
import subprocess
import sys

import numpy as np
import pytest

from staff import files
from staff.runs import account, store
from staff.runs.store import open_run
from staff.types import Stage


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def fails(aside):
        aside.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        files.write_whole(path, fails)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_arrays_that_are_mapped_are_those_that_are_read(tmp_path):
    arrays = {"ids": np.arange(999, dtype=np.int32), "none": np.zeros(0, np.int64), "two": np.ones((3, 4))}
    files.write_arrays(tmp_path / "a.npz", {**arrays, "words": np.array(["a", "bcd"])})
    read, mapped = files.read_arrays(tmp_path / "a.npz"), files.map_arrays(tmp_path / "a.npz")
    assert {n: (a.dtype, a.tolist()) for n, a in mapped.items()} == {
        n: (a.dtype, a.tolist()) for n, a in read.items()
    }
    assert isinstance(mapped["ids"], np.memmap)
    assert files.map_arrays(tmp_path / "none.npz") is None


def test_arrays_come_back_as_they_were_and_equal_arrays_make_equal_bytes(tmp_path):
    arrays = {"a": np.arange(5, dtype=np.float32), "b": np.array([True, False])}
    files.write_arrays(tmp_path / "1.npz", arrays)
    files.write_arrays(tmp_path / "2.npz", arrays)
    back = files.read_arrays(tmp_path / "1.npz")
    assert {name: (array.dtype, array.tolist()) for name, array in back.items()} == {
        n: (a.dtype, a.tolist()) for n, a in arrays.items()
    }
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_a_damaged_file_of_arrays_counts_as_absent(tmp_path, harm):
    path = tmp_path / "a.npz"
    files.write_arrays(path, {"a": np.arange(1000)})
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    path.write_bytes({"flip": bytes(whole), "cut": bytes(whole[:-200]), "empty": b""}[harm])
    assert files.read_arrays(path) is None
    assert files.read_arrays(tmp_path / "never.npz") is None


def test_a_files_hash_is_remembered_until_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    remembered = {}
    first = files.hash_file(path, remembered)
    monkeypatch.setattr(files.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert files.hash_file(path, remembered) == first
    monkeypatch.undo()
    path.write_bytes(b"three")
    assert files.hash_file(path, remembered) != first


def test_a_second_run_in_a_folder_is_told_who_holds_it(tmp_path):
    code = f"from staff.runs.store import open_run\nwith open_run({str(tmp_path / 'x')!r}, 'run'): pass"
    with open_run(tmp_path / "x", "run"):
        held = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert f"is in use by process {os.getpid()}" in held.stderr
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).returncode == 0


def test_a_folder_of_other_files_and_one_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "work").mkdir()
    with (
        pytest.raises(ValueError, match=r"holds files that are not a run's \(there is no .staff.json\)"),
        open_run(tmp_path, "run"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="can't be written to"),
        open_run(tmp_path / "notes.txt" / "x", "run"),
    ):
        pass
    with open_run(tmp_path / "a", "adapter") as run:
        run.begin({}, {}, update=False)
    with (
        pytest.raises(ValueError, match=r"made by another command \(adapter\)"),
        open_run(tmp_path / "a", "run"),
    ):
        pass


def test_a_folder_in_which_nothing_was_begun_is_left_as_it_was_found(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        with pytest.raises(ValueError, match="no such file"), open_run(tmp_path / name, "run"):
            raise ValueError("no such file")
    assert [path.name for path in tmp_path.iterdir()] == [] or not any((tmp_path / "empty").iterdir())


def test_changed_settings_and_inputs_are_named_and_update_accepts_them(tmp_path):
    with open_run(tmp_path / "x", "run") as run:
        run.begin({"pruning_rate": 0.8, "seed": 1}, {"data": "aa"}, update=False)
        run.begin({"pruning_rate": 0.8, "seed": 1}, {"data": "aa"}, update=False)
        with pytest.raises(ValueError, match=r"other settings:\n  pruning_rate: 0.8 -> 0.5\n"):
            run.begin({"pruning_rate": 0.5, "seed": 1}, {"data": "aa"}, update=False)
        with pytest.raises(ValueError, match="data changed since"):
            run.begin({"pruning_rate": 0.8, "seed": 1}, {"data": "bb"}, update=False)
        run.begin({"pruning_rate": 0.5, "seed": 1}, {"data": "bb"}, update=True)
        run.begin({"pruning_rate": 0.5, "seed": 1}, {"data": "bb"}, update=False)


def test_the_account_adds_up_stages_and_forgives_a_cut_last_line(tmp_path):
    stage = Stage("score", "draft")
    account.spend(tmp_path, stage, seconds=1.5, tokens=10)
    account.spend(tmp_path, stage, seconds=2.5, tokens=30)
    with open(tmp_path / "account.jsonl", "a") as file:
        file.write('{"stage": "sco')
    assert account.spent(tmp_path) == {stage: {"seconds": 4.0, "tokens": 40}}


def test_a_part_that_was_lost_and_done_again_counts_its_seconds_twice_and_its_operations_once(tmp_path):
    stage = Stage("score", "draft")
    for part, seconds in [("shard 0", 1.0), ("shard 1", 2.0), ("shard 1", 3.0)]:
        account.spend(tmp_path, stage, once=part, seconds=seconds, flops=10)
    assert account.spent(tmp_path) == {stage: {"seconds": 6.0, "flops": 20, "repeated_seconds": 2.0}}


def test_the_ledger_asks_for_each_sample_once_and_remembers_it_on_disk(tmp_path):
    calls = []

    def make(parts, asked):
        calls.extend(positions.tolist() for positions in parts.values())
        made = {n: {"positions": p, "scores": p * np.float32(10)} for n, p in parts.items()}
        for number, arrays in made.items():
            files.write_arrays(tmp_path / f"ledger-{number:05d}.npz", arrays)
        return made

    ledger = store.Ledger(tmp_path, make, part=2)
    assert ledger(np.array([7, 1, 3])).tolist() == [70, 10, 30]
    assert calls == [[1, 3], [7]]
    again = store.Ledger(tmp_path, make, part=2)
    assert again(np.array([3, 4])).tolist() == [30, 40]
    assert calls == [[1, 3], [7], [4]]
    assert len(again) == 4


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 832 vs 726"),
        RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"),
        RuntimeError("basic_ios::clear: iostream error"),
    ],
    ids=str,
)
def test_a_full_disk_is_one_message_however_a_library_words_it(tmp_path, error):
    with pytest.raises(ValueError, match="the disk is full"), files.failures_are_said(tmp_path / "x"):
        raise error
