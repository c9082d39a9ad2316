"""The run directory: files whole or absent, pieces by fingerprint, one run at a time, the ledger of target calls.

    config.yaml  work/  then coreset.jsonl  indices.npy  regions.csv  cost.json  manifest.json

A piece of `work/` lies in a folder named by a fingerprint of exactly what determines it, with that written out in its
key.json, so a resumed run takes what fits and never what doesn't. Everything that is taken up again has a checksum: what
is damaged is named in a warning and made again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from staff.files import FULL, differences, fingerprint, hash_file, read_arrays, read_checked, remove, write_arrays, write_checked, write_json

logger = logging.getLogger(__name__)

ASIDE = re.compile(r"\.(.+)\.\d+(\.partial)?")


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
        # work/ may be deleted once a run is finished
        is_run = self.work.is_dir() or all((self.path / name).is_file() for name in ("manifest.json", "config.yaml"))
        if self.path.is_dir() and not is_run and any(self.path.iterdir()):
            raise ValueError(f"{self.path} holds files that are not a run's: name an empty or a new folder with --output")
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock = _hold(self.work / "lock")
        except OSError as error:
            if isinstance(error, BlockingIOError):
                holder = (self.work / "lock").read_text().strip() or "another process"
                raise ValueError(f"{self.path} is in use by {holder}: wait for it, stop it, or name another --output") from None
            if error.errno in FULL:
                raise ValueError(f"{self.path}: the disk is full. Free some space, or name another --output") from None
            raise ValueError(f"{self.path} can't be written to: {error.strerror}; name another folder with --output") from None
        self._log = _Log(self.work / "log.txt")
        logging.getLogger("staff").addHandler(self._log)
        self._hashes_path = self.work / "hashes.json"
        self._hashes: dict[str, list] = (read_checked(self._hashes_path) or {}).get("hashes", {})
        for left in (*self.path.glob(".*"), *self.work.rglob(".*")):
            if ASIDE.fullmatch(left.name) and left.is_file():
                left.unlink(missing_ok=True)  # what a killed process was writing
        self._pieces: set[Path] = set()  # whose key.json was looked at
        if (self.work / "begun.json").exists():
            self._log.open()

    def note(self, line: str) -> None:
        """Write a line to work/log.txt, with the time: stages, versions; never a user's text."""
        self._log.write(line)

    def close(self) -> None:
        """Let go of the folder; one in which nothing was begun is left as it was found."""
        logging.getLogger("staff").removeHandler(self._log)
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
            write_checked(self._hashes_path, {"hashes": self._hashes})
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
        before = read_checked(path)
        now = json.loads(json.dumps({"settings": dict(config), "inputs": dict(inputs)}))
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
        if before != now:
            write_checked(path, now)
        self._log.open()

    def piece(self, kind: str, key: Mapping[str, Any]) -> Path:
        """The folder of a piece of work, made by its first caller: work/KIND-FINGERPRINT, the key in key.json."""
        path = self.work / f"{kind}-{fingerprint(key)}"
        about = path / "key.json"
        if path not in self._pieces:
            try:
                whole = about.exists() and fingerprint(json.loads(about.read_text(encoding="utf-8"))) == fingerprint(key)
            except ValueError:
                whole = False
            if not whole:
                if about.exists():
                    logger.warning("%s is damaged; it is made again", about)
                write_json(about, key)
            self._pieces.add(path)
        return path

    def spend(self, **entry: Any) -> None:
        """Append a line to the account of work done: stage, seconds, samples, tokens, and what else is known."""
        with open(self.work / "account.jsonl", "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the last line of a killed run
                    file.write(b"\n")
            file.write(json.dumps(entry).encode() + b"\n")

    def account(self) -> dict[str, dict[str, float]]:
        """What each stage took over all the times this run was started: stage -> summed numbers."""
        total: dict[str, dict[str, float]] = {}
        path = self.work / "account.jsonl"
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                entry = json.loads(line)
                name, numbers = str(entry.pop("stage")), {str(key): value + 0 for key, value in entry.items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # the last line of a killed run
            stage = total.setdefault(name, {})
            for key, value in numbers.items():
                stage[key] = stage.get(key, 0) + value
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


class _Log(logging.Handler):
    """work/log.txt: what is noted, and the warnings of this package. Kept in memory until the run is begun."""

    def __init__(self, path: Path):
        super().__init__(logging.WARNING)
        self._path, self._is_open = path, False
        self._waiting: list[str] = []

    def open(self) -> None:
        self._is_open = True
        waiting, self._waiting = self._waiting, []
        for line in waiting:
            self._append(line)

    def write(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = f"{stamp} {' '.join(text.split())}\n"
        if self._is_open:
            self._append(line)
        else:
            self._waiting.append(line)

    def _append(self, line: str) -> None:
        with contextlib.suppress(OSError), open(self._path, "a", encoding="utf-8") as file:  # no run ends for its log
            file.write(line)

    def emit(self, record: logging.LogRecord) -> None:
        self.write(f"{record.levelname.lower()}: {record.getMessage()}")


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
        self._taken: set[int] = set()
        self._known: dict[int, float] = {}
        for file in sorted(path.glob("ledger-*.npz")):
            kept = read_arrays(file)
            if kept is not None:
                self._known.update(zip(kept["positions"].tolist(), kept["scores"].tolist(), strict=True))
                self._taken.add(int(file.stem.removeprefix("ledger-")))

    @property
    def next(self) -> int:
        """Number of the next part: the first whose file is not there, or is damaged and so asked for again."""
        return next(number for number in range(len(self._taken) + 1) if number not in self._taken)

    def __len__(self) -> int:
        """Samples that the target has scored."""
        return len(self._known)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """(k,) positions -> (k,) float32 scores."""
        missing = np.unique([p for p in positions.tolist() if p not in self._known]).astype(np.int64)
        for start in range(0, len(missing), self._part):
            asked = missing[start : start + self._part]
            scores = np.asarray(self._score(asked), np.float32)
            number = self.next
            write_arrays(self._path / f"ledger-{number:05d}.npz", {"positions": asked, "scores": scores})
            self._taken.add(number)
            self._known.update(zip(asked.tolist(), scores.tolist(), strict=True))
            if self._on_progress:
                self._on_progress(len(positions) - len(missing) + start + len(asked), len(positions))
        return np.array([self._known[p] for p in positions.tolist()], np.float32)
