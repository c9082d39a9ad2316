"""The run folder: one owner, a log, pieces of work by fingerprint, the ledger of target calls.

    .staff.json  config.yaml  work/  then coreset.jsonl  indices.npy  regions.csv  cost.json  manifest.json

A piece of `work/` lies in a folder named by a fingerprint of exactly what determines it, with that written
out in its key.json, so a resumed run takes what fits and never what doesn't. Everything that is taken up
again has a checksum: what is damaged is named in a warning and made again.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import itertools
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from staff import files
from staff.bars import Bars
from staff.runs import account
from staff.types import Progress, Stage

if TYPE_CHECKING:
    from staff.models.files import Source

logger = logging.getLogger(__name__)

PACKAGES = ("numpy", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")


@contextlib.contextmanager
def open_run(path: str | Path, kind: str, on_progress: Progress | None = None) -> Iterator[RunFolder]:
    """A folder of ours, held by this process within the block; failures in it are told in one message.

    Args:
        path: made where it does not exist.
        kind: "run", "adapter" or "scores": what the folder's mark says.
        on_progress: called with (stage, done, in all); each stage that begins has a line in the log.

    Raises:
        ValueError: it can't be written to, another process holds it, or it holds other files than ours;
            inside the
            block: the disk is full, a file can't be written or read, memory ran out.
    """
    with files.failures_are_said(Path(path)):
        run = RunFolder(Path(path), kind, on_progress)
        try:
            yield run
        finally:
            run.close()


class RunFolder:
    """A run's folder; see `open_run`.

    Attributes:
        path: the folder.
        work: where what is unfinished lies.
    """

    def __init__(self, path: Path, kind: str, on_progress: Progress | None):
        from filelock import FileLock, Timeout

        self.path, self.work = path, path / "work"
        files.check_mark(path, kind, "--output")
        self._is_new = not path.exists() or not any(path.iterdir())
        try:
            files.mark(path, kind)
            self.work.mkdir(exist_ok=True)
            self._lock = FileLock(self.work / "lock", timeout=0)
            self._lock.acquire()
        except Timeout:
            holder = self.work / "holder.txt"
            said = holder.read_text().strip() if holder.exists() else "another process"
            raise ValueError(
                f"{path} is in use by {said}: wait for it, stop it, or name another --output"
            ) from None
        except OSError as error:
            if error.errno in files.DISK_FULL:
                raise ValueError(
                    f"{path}: the disk is full. Free some space, or name another --output"
                ) from None
            raise ValueError(
                f"{path} can't be written to: {error.strerror}; name another folder with --output"
            ) from None
        with contextlib.suppress(OSError):
            (self.work / "holder.txt").write_text(f"process {os.getpid()} on {platform.node()}\n")
        self.at_close = contextlib.ExitStack()
        self._log = _Log(self.work / "log.txt")
        logging.getLogger("staff").addHandler(self._log)
        self._on_progress, self._stages = on_progress, set[str]()
        self._hashes_path = self.work / "hashes.json"
        self._hashes: dict[str, list[Any]] = (files.read_checked(self._hashes_path) or {}).get("hashes", {})
        beside = path.parent.glob(f".{glob.escape(path.stem)}.*") if kind == "scores" else ()
        asides = [*path.rglob(".*"), *beside]
        shared = [place for place in asides if "shard-" in place.name or place.parent.name == "workers"]
        files.clear_asides(set(asides) - set(shared), alone=True)
        files.clear_asides(shared, alone=False)  # workers on other machines may be at them
        self._pieces: set[Path] = set()  # whose key.json was looked at
        self.note(
            " ".join([f"staff {version_of('staff-coreset')}", *(f"{p} {version_of(p)}" for p in PACKAGES)])
        )
        if (self.work / "begun.json").exists():
            self._log.open()

    @classmethod
    def joined(cls, path: Path, hashes: Path) -> RunFolder:
        """The folder of a run that another process holds, as its worker: nothing is locked, cleared or
        logged.

        Args:
            hashes: where this process remembers hashes of files.
        """
        run = cls.__new__(cls)
        run.path, run.work, run._is_new, run._pieces = path, path / "work", False, set()
        run._log, run._on_progress, run._stages = _Log(hashes.with_suffix(".log")), None, set()
        run._hashes_path = hashes
        known = (files.read_checked(place) or {} for place in (run.work / "hashes.json", hashes))
        run._hashes = {name: seen for told in known for name, seen in told.get("hashes", {}).items()}
        return run

    def close(self) -> None:
        """Let go of the folder; one in which nothing was begun is left as it was."""
        self.at_close.close()
        logging.getLogger("staff").removeHandler(self._log)
        self._lock.release()
        if self._is_new and not (self.work / "begun.json").exists():
            files.remove(self.work)
            (self.path / files.MARK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.path.rmdir()

    def tell(self, stage: Stage, done: int, total: int, figures: str = "") -> None:
        """Show how far a stage is; its first call is noted in the log.

        Args:
            figures: what else our own bars say of it.
        """
        name = str(stage)
        if name not in self._stages:
            self._stages.add(name)
            self.note(f"{name}: {done} of {total}")
        if isinstance(self._on_progress, Bars):
            self._on_progress(name, done, total, figures)
        elif self._on_progress:
            self._on_progress(name, done, total)

    def counter(self, stage: Stage, total: int) -> Callable[[int], None]:
        """`tell` of one stage, called with how much is done."""
        return lambda done: self.tell(stage, done, total)

    def clock(self, stage: Stage) -> Callable[..., None]:
        """`tell` of one stage that also counts the seconds between its calls, so that a kill loses the last
        alone."""
        began = time.monotonic()

        def step(done: int, total: int, figures: str = "") -> None:
            nonlocal began
            now = time.monotonic()
            account.spend(self.work, stage, seconds=now - began)
            began = now
            self.tell(stage, done, total, figures)

        return step

    def note(self, line: str) -> None:
        """Write a line to work/log.txt, with the time: stages, versions; never a user's text."""
        self._log.write(line)

    def hash_file(self, path: Path) -> str:
        """SHA-256 of a file, remembered in the run."""
        before = self._hashes.get(str(path.resolve()))
        digest = files.hash_file(path, self._hashes)
        if before != self._hashes.get(str(path.resolve())):
            files.write_checked(self._hashes_path, {"hashes": self._hashes})
        return digest

    def begin(self, settings: Mapping[str, Any], inputs: Mapping[str, Any], update: bool) -> None:
        """Write down what this run is made of, or compare with what it was made of.

        Args:
            settings: those that matter to the results.
            inputs: name -> fingerprint of everything that goes in.
            update: go on with other settings or inputs; what still fits is kept.

        Raises:
            ValueError: settings or inputs have changed since; each is named.
        """
        path = self.work / "begun.json"
        before = files.read_checked(path)
        now = json.loads(json.dumps({"settings": dict(settings), "inputs": dict(inputs)}))
        cure = "Name another --output, or add --update to keep what still fits and do the rest again"
        if before is not None and not update:
            changed = files.differences(before["settings"], now["settings"])
            if changed:
                lines = "\n  ".join(changed)
                raise ValueError(f"{self.path} was begun with other settings:\n  {lines}\n{cure}")
            changed = [line.split(":")[0] for line in files.differences(before["inputs"], now["inputs"])]
            if changed:
                raise ValueError(f"{', '.join(changed)} changed since {self.path} was begun. {cure}")
        if before != now:
            files.write_checked(path, now)
        self._log.open()

    def piece(self, kind: str, key: Mapping[str, Any]) -> Path:
        """The folder of a piece of work, made by its first caller: work/KIND-FINGERPRINT, the key in
        key.json."""
        path = self.work / f"{kind}-{files.fingerprint(key)}"
        about = path / "key.json"
        if path not in self._pieces:
            try:
                before = json.loads(about.read_text(encoding="utf-8")) if about.exists() else None
            except ValueError:
                before = None
            if before is None or files.fingerprint(before) != files.fingerprint(key):
                if about.exists():
                    logger.warning("%s is damaged; it is made again", about)
                files.write_json(about, key)
            self._pieces.add(path)
        return path

    def finish(
        self, key: str, about: Mapping[str, Any], names: list[str], folder: Path | None = None
    ) -> dict[str, Any]:
        """Write the manifest, which says that all is there: the key, a checksum of each file, what it was
        made with."""
        folder = folder or self.path
        manifest = {
            "staff": version_of("staff-coreset"),
            "commit": commit(),
            "finished": key,
            "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **about,
            "files": {name: files.hash_file(folder / name) for name in names},
            **machine(),
        }
        files.write_checked(folder / "manifest.json", manifest)
        self.note("done")
        return manifest


def find_finished(folder: Path, key: str | None) -> dict[str, Any] | None:
    """The manifest in a folder, where it has this key (None: any) and its files are as they were written;
    else None."""
    manifest = files.read_checked(folder / "manifest.json")
    if manifest is None or key not in (None, manifest.get("finished")):
        return None
    return None if files.changed_files(folder, manifest["files"]) else manifest


class Inputs(dict[str, str]):
    """What goes into a run: name -> fingerprint of its content, as it was when the run began.

    Args:
        contents: name -> how its fingerprint is taken.
        named: name -> what messages call it.
    """

    def __init__(self, contents: Mapping[str, Callable[[], str]], named: Mapping[str, str]):
        super().__init__({name: content() for name, content in contents.items()})
        self._contents, self._named = contents, named

    def check(self, *names: str) -> None:
        """Look at some of them (none named: all) again, before anything that was made of them is kept.

        Raises:
            ValueError: one changed.
        """
        for name in names or self._contents:
            if name in self._contents and self._contents[name]() != self[name]:
                what = self._named.get(name, name)
                raise ValueError(
                    f"{what} changed while the run was reading it: put it back and go on, or start again "
                    f"with --update"
                )


def content_of(run: RunFolder, source: Source) -> str:
    """A fingerprint of a model's files."""
    return files.fingerprint({path.name: run.hash_file(path) for path in source.files()})


class _Log(logging.Handler):
    """work/log.txt: what is noted, and the warnings of this package. Kept in memory until the run is
    begun."""

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
        with contextlib.suppress(OSError), open(self._path, "a", encoding="utf-8") as file:
            file.write(line)  # no run ends for its log

    def emit(self, record: logging.LogRecord) -> None:
        self.write(f"{record.levelname.lower()}: {record.getMessage()}")


class Ledger:
    """The target's scores of single samples, on disk: each is asked for once, whoever asks again.

    Args:
        path: its folder.
        make: ({number: positions, ascending}, samples asked for in all) -> "positions" and "scores" of each
            part, which it leaves in ledger-NUMBER.npz; called for what is missing.
        part: positions scored and written together.
    """

    def __init__(
        self,
        path: Path,
        make: Callable[[dict[int, np.ndarray], int], Mapping[int, Mapping[str, np.ndarray]]],
        part: int = 128,
    ):
        self._make, self._part = make, part
        self._parts: set[int] = set()
        self._scores: dict[int, float] = {}
        for file in sorted(path.glob("ledger-[0-9]*.npz")):
            arrays = files.read_arrays(file)
            if arrays is not None:
                self._add(int(file.stem.removeprefix("ledger-")), arrays)

    def _add(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        self._parts.add(number)
        self._scores.update(zip(arrays["positions"].tolist(), arrays["scores"].tolist(), strict=True))

    def __len__(self) -> int:
        """Samples that the target has scored."""
        return len(self._scores)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """(k,) positions -> (k,) float32 scores."""
        missing = np.unique([p for p in positions.tolist() if p not in self._scores]).astype(np.int64)
        # numbers whose file is not there, or is damaged and so asked for again
        free = (number for number in itertools.count() if number not in self._parts)
        parts = {next(free): missing[at : at + self._part] for at in range(0, len(missing), self._part)}
        for number, arrays in self._make(parts, len(positions)).items() if parts else ():
            self._add(number, arrays)
        return np.array([self._scores[p] for p in positions.tolist()], np.float32)


def machine() -> dict[str, Any]:
    """What things are made with: versions of the packages that decide about numbers, Python, the kind of
    processor."""
    return {
        "versions": {name: version_of(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def commit() -> str | None:
    """The git commit of the checkout that this package runs from, "+changed" where files differ; None
    elsewhere."""
    import subprocess

    source = Path(__file__).parents[2]
    if not (source.parent / ".git").exists() or source.name != "src":
        return None
    command = [
        "git",
        "-C",
        str(source),
        "describe",
        "--always",
        "--exclude=*",
        "--abbrev=40",
        "--dirty=+changed",
    ]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        return told.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def version_of(package: str) -> str | None:
    """The installed version of a package, None where it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
