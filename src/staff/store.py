"""The run directory: files whole or absent, pieces by fingerprint, one run at a time, the ledger of target calls.

    config.yaml  inputs.json  work/  then coreset.jsonl  indices.npy  regions.csv  cost.json  manifest.json

A piece of `work/` lies in a folder named by a fingerprint of exactly what determines it, with that written out in its
key.json, so a resumed run takes what fits and never what doesn't.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Make a file whole or not at all: written beside its place, flushed to disk, renamed over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(aside)
        with open(aside, "rb") as written:
            os.fsync(written.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Named arrays as .npz: no pickle, a checksum for each inside, equal arrays give equal bytes."""

    def write(aside: Path) -> None:
        with open(aside, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    write_aside(path, write)


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """What `write_arrays` wrote, or None where there is nothing whole: then it is made again."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, KeyError):
        logger.warning("%s is damaged; it is made again", path)
        return None


def fingerprint(key: Any) -> str:
    """12 hexadecimal digits of SHA-256 over a key's canonical JSON."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


def hash_file(path: Path, remembered: dict[str, list] | None = None) -> str:
    """SHA-256 of a file; taken from `remembered` where its size and modification time are the same."""
    status = path.stat()
    seen = [status.st_size, status.st_mtime_ns]
    name = str(path.resolve())
    if remembered is not None and remembered.get(name, [])[:2] == seen:
        return remembered[name][2]
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if remembered is not None:
        remembered[name] = [*seen, digest]
    return digest


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The fields of two mappings that differ, each as "name: before -> now"."""
    names = [*before, *(name for name in now if name not in before)]
    return [f"{name}: {before.get(name)!r} -> {now.get(name)!r}" for name in names if before.get(name) != now.get(name)]


class RunDirectory:
    """A run's folder, held by this process until `close`.

    Args:
        path: made where it does not exist.

    Raises:
        ValueError: it can't be written to, another process holds it, or it holds other files than a run's.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.work = self.path / "work"
        self._is_new = not self.path.exists() or not any(self.path.iterdir()) if not self.path.is_file() else False
        if self.path.is_dir() and not self.work.is_dir() and any(self.path.iterdir()):
            raise ValueError(f"{self.path} holds files that are not a run's: name an empty or a new folder with --output")
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock = _hold(self.work / "lock")
        except (PermissionError, NotADirectoryError, FileExistsError, OSError) as error:
            if isinstance(error, BlockingIOError):
                holder = (self.work / "lock").read_text().strip() or "another process"
                raise ValueError(f"{self.path} is in use by {holder}: wait for it, stop it, or name another --output") from None
            raise ValueError(f"{self.path} can't be written to: {error.strerror}; name another folder with --output") from None
        self._hashes_path = self.work / "hashes.json"
        self._hashes: dict[str, list] = _read_json(self._hashes_path) or {}

    def close(self) -> None:
        """Let go of the folder; one in which nothing was begun is left as it was found."""
        if self._is_new and not (self.work / "begun.json").exists():
            remove(self.work)
            with contextlib.suppress(OSError):
                self.path.rmdir()
        self._lock.close()

    def hash_file(self, path: Path) -> str:
        """SHA-256 of a file, remembered in the run."""
        known = len(self._hashes), self._hashes.get(str(path.resolve()))
        digest = hash_file(path, self._hashes)
        if known != (len(self._hashes), self._hashes.get(str(path.resolve()))):
            write_json(self._hashes_path, self._hashes)
        return digest

    def begin(self, config: Mapping[str, Any], inputs: Mapping[str, Any], update: bool) -> None:
        """Write down what this run is made of, or compare with what it was made of.

        Args:
            config: the settings that matter to the results.
            inputs: name -> fingerprint of every file that goes in.
            update: go on with other settings or inputs; what still fits is kept.

        Raises:
            ValueError: settings or inputs have changed since; each is named.
        """
        path = self.work / "begun.json"
        before = _read_json(path)
        now = {"settings": dict(config), "inputs": dict(inputs)}
        if before is not None and not update:
            settings = differences(before["settings"], now["settings"])
            if settings:
                raise ValueError(
                    f"{self.path} was begun with other settings:\n  " + "\n  ".join(settings) + "\n"
                    "Name another --output, or add --update to keep what still fits and do the rest again"
                )
            changed = [line.split(":")[0] for line in differences(before["inputs"], now["inputs"])]
            if changed:
                raise ValueError(
                    f"{', '.join(changed)} changed since {self.path} was begun. Name another --output, "
                    "or add --update to keep what still fits and do the rest again"
                )
        if before != json.loads(json.dumps(now)):
            write_json(path, now)

    def piece(self, kind: str, key: Mapping[str, Any]) -> Path:
        """The folder of a piece of work, made by its first caller: work/KIND-FINGERPRINT, the key in key.json."""
        path = self.work / f"{kind}-{fingerprint(key)}"
        if not (path / "key.json").exists():
            write_json(path / "key.json", key)
        return path

    def spend(self, **entry: Any) -> None:
        """Append a line to the account of work done: stage, seconds, samples, tokens, and what else is known."""
        with open(self.work / "account.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def account(self) -> dict[str, dict[str, float]]:
        """What each stage took over all the times this run was started: stage -> summed numbers."""
        total: dict[str, dict[str, float]] = {}
        path = self.work / "account.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a killed run
            stage = total.setdefault(entry.pop("stage"), {})
            for name, value in entry.items():
                stage[name] = stage.get(name, 0) + value
        return total


def _hold(path: Path):
    """An exclusive lock that the system drops with the process, whatever its end."""
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 -- closed by RunDirectory.close
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # no flock on Windows: runs there are not guarded against each other
        pass
    except BlockingIOError:
        file.close()
        raise
    file.truncate(0)
    file.write(f"process {os.getpid()}\n")
    file.flush()
    return file


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


class Ledger:
    """The target's scores of single samples, on disk: each is asked for once, whoever asks again.

    Args:
        path: its folder.
        score: (positions, ascending) -> scores; called for what is missing, a part at a time.
        part: positions scored and written together.
        on_progress: called with (done, asked) after each part.
    """

    def __init__(
        self, path: Path, score: Callable[[np.ndarray], np.ndarray], part: int = 128, on_progress: Callable[[int, int], None] | None = None
    ):
        self._path, self._score, self._part, self._on_progress = path, score, part, on_progress
        self._files = 0
        self._known: dict[int, float] = {}
        while (kept := read_arrays(self._file())) is not None:
            self._known.update(zip(kept["positions"].tolist(), kept["scores"].tolist(), strict=True))
            self._files += 1

    def _file(self) -> Path:
        return self._path / f"ledger-{self._files:05d}.npz"

    def __len__(self) -> int:
        """Samples that the target has scored."""
        return len(self._known)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """(k,) positions -> (k,) float32 scores."""
        missing = np.unique([p for p in positions.tolist() if p not in self._known]).astype(np.int64)
        for start in range(0, len(missing), self._part):
            asked = missing[start : start + self._part]
            scores = np.asarray(self._score(asked), np.float32)
            write_arrays(self._file(), {"positions": asked, "scores": scores})
            self._files += 1
            self._known.update(zip(asked.tolist(), scores.tolist(), strict=True))
            if self._on_progress:
                self._on_progress(len(positions) - len(missing) + start + len(asked), len(positions))
        return np.array([self._known[p] for p in positions.tolist()], np.float32)


def remove(path: Path) -> None:
    """Delete a folder of unfinished work."""
    shutil.rmtree(path, ignore_errors=True)
