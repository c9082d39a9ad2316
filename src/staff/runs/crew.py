"""A run's workers, as its driver sees them: what they are offered, how far they are, what ended them.

They speak through files in the run's folder alone, so it is all one whether they are processes of this
machine, ranks that torchrun or Slurm started on others, or Ray's actors. The driver holds no model.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from staff import files
from staff.config import Spread
from staff.models.files import Source
from staff.runs.store import RunFolder
from staff.scoring.shards import Shards

logger = logging.getLogger(__name__)

OFFER = "offer.json"  # in work/: the pass whose shards may be taken
TRIES = 3  # so often is a shard given out, and so often may a worker end as it starts
ANEW = 3  # exit status of a worker that told of a failure: another one is to go on
LOOK_SECONDS = 0.05
LONELY_SECONDS = 30.0  # without any worker, until it is said how they are started


class Process(Protocol):
    """A worker that the driver started."""

    def poll(self) -> int | None:
        """How it ended, None while it lives; minus the number of the signal that killed it."""

    def kill(self) -> None: ...


def workers_folder(work: Path) -> Path:
    return work / "workers"


def file_name(text: str) -> str:
    return re.sub(r"[^\w-]", "_", text)


def worker_threads(spread: Spread) -> int:
    """CPU threads of each worker: as asked for, else the cores shared out; 1 where others start them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return spread.threads or (max(1, cores // (spread.workers or 1)) if spread.engine == "local" else 1)


SMALL = 64 << 20  # bytes of a model's files: with fewer, several threads wait for each other at every product


def own_threads(spread: Spread, source: Source, device: str) -> int | None:
    """CPU threads of a process that scores alone, where it is not torch that says how many."""
    is_small = device == "cpu" and sum(path.stat().st_size for path in source.files()) < SMALL
    return spread.threads or (1 if is_small else None)


def has_workers(spread: Spread) -> bool:
    """Are there others who make the shards?"""
    return bool(spread.workers) or spread.engine == "files"


def threads_of(spread: Spread, source: Source, device: str) -> int:
    """CPU threads of whoever makes the shards: each worker's, or this process's."""
    if has_workers(spread):
        return worker_threads(spread)
    import torch

    return own_threads(spread, source, device) or torch.get_num_threads()


class Signs:
    """What workers say of themselves, a file each: host, process, the shard they are at, how far, a count.

    Args:
        timeout: seconds without a change after which a worker that is at something is taken for hung.
    """

    def __init__(self, work: Path, timeout: float):
        self._folder, self._timeout = workers_folder(work), timeout
        self._seen: dict[str, tuple[Any, float]] = {}  # its last sign and when, by this process's clock

    def look(self) -> dict[str, dict[str, Any]]:
        """Name -> sign; "hung" is in it."""
        found, now = {}, time.monotonic()
        for path in sorted(self._folder.glob("*.json")):
            sign = files.read_checked(path)
            if sign is None:
                continue
            if self._seen.get(path.stem, (None, 0))[0] != sign:
                self._seen[path.stem] = sign, now
            is_at = sign["offer"] is not None and not sign["cause"]
            hung = is_at and now - self._seen[path.stem][1] > self._timeout
            found[path.stem] = {**sign, "hung": hung}
        return found

    def forget(self, name: str) -> None:
        (self._folder / f"{name}.json").unlink(missing_ok=True)


def launch(path: Path, name: str, rank: int, count: int, threads: int) -> Process:
    """Start a worker on this machine; what it writes to the terminal goes to a file beside its sign."""
    command = [sys.executable, "-m", "staff.cli", "worker", "--run", str(path), "--name", name, "--quiet"]
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "OMP_NUM_THREADS": threads}
    environment = {**os.environ, **{key: str(value) for key, value in ranks.items()}}
    with open(workers_folder(path / "work") / f"{name}.txt", "wb") as log:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )


class Crew:
    """The workers of a run, started at the first pass and ended with the run.

    Args:
        spread: how many, and who starts them.
    """

    def __init__(self, run: RunFolder, spread: Spread):
        self._run, self._spread = run, spread
        self._signs = Signs(run.work, spread.worker_timeout)
        self._processes: dict[str, tuple[Process, int]] = {}  # by name; and its rank
        self._ended: Counter[Any] = Counter()  # times that workers ended at a shard, or before any
        self._said: set[str] = set()
        self._offer = run.work / OFFER
        workers_folder(run.work).mkdir(exist_ok=True)
        self._offer.unlink(missing_ok=True)  # of a run that was over
        run.at_close.callback(self.close)

    def make(
        self,
        offer: Mapping[str, Any],
        shards: Shards,
        missing: list[int],
        on_samples: Callable[[int], None] | None = None,
    ) -> None:
        """Have some shards of a pass made.

        Args:
            offer: what a worker needs to know to score them (worker.py).
            on_samples: called with the number of samples just done.

        Raises:
            ValueError: a shard that can't be made, once the others are; names it, the host and the cause.
        """
        told = {**offer, "id": files.fingerprint([dict(offer), time.time()]), "missing": missing}
        told |= {"timeout": self._spread.worker_timeout, "directory": os.getcwd()}
        for number in missing:
            shards.file(number).with_suffix(".failed").unlink(missing_ok=True)
        files.write_checked(self._offer, told)
        left, failed, under_way = set(missing), dict[int, str](), 0
        began, pause = time.monotonic(), LOOK_SECONDS
        try:
            while left - set(failed):
                looked = time.monotonic()
                signs = self._signs.look()
                self._mind(signs, told["id"], offer["threads"], failed)
                there = set(os.listdir(shards.folder))
                before = len(left)
                for number in sorted(left):
                    if shards.file(number).name in there and self._accept(shards.file(number), number):
                        left.discard(number)
                        failed.pop(number, None)
                        if on_samples:
                            on_samples(len(shards.positions[number]) - under_way)
                            under_way = 0
                    elif shards.file(number).with_suffix(".failed").name in there:
                        self._failed(shards.file(number).with_suffix(".failed"), number, failed)
                at = [
                    sign for sign in signs.values() if sign["offer"] == told["id"] and sign["shard"] in left
                ]
                now = sum(sign["done"] for sign in at)
                if on_samples and now != under_way and before == len(left):
                    on_samples(now - under_way)
                    under_way = now
                if not signs and not self._processes and time.monotonic() - began > LONELY_SECONDS:
                    self._say(f"no worker has come yet; start some with: staff worker --run {self._run.path}")
                pause = max(LOOK_SECONDS, 5 * (time.monotonic() - looked))  # a long list is looked at seldom
                time.sleep(pause)
        finally:
            self._offer.unlink(missing_ok=True)
            for number in missing:  # of shards that two workers made
                shards.file(number).with_suffix(".json").unlink(missing_ok=True)
        if failed:
            raise ValueError("\n".join(failed[number] for number in sorted(failed)))

    def _accept(self, path: Path, number: int) -> bool:
        """Is a shard that has come as its worker made it? What the worker had to say is said here."""
        record = files.read_checked(path.with_suffix(".json"))
        if record is None:
            return True  # taken up before, or its checksums must do
        who = f"worker {record['process']} on {record['host']}"
        for text in record["said"]:
            self._say(f"{who}: {text}")
        if files.hash_file(path) != record["sha256"]:
            logger.warning("%s is not as %s made it: shard %d is done again", path, who, number)
            path.unlink()
            return False
        path.with_suffix(".json").unlink()
        return True

    def _failed(self, path: Path, number: int, failed: dict[int, str]) -> None:
        """A shard's failure: what a user can mend would come again, anything else is tried again."""
        record = files.read_checked(path)
        if number in failed or record is None:
            return
        self._ended[number] += 1
        told = f"shard {number} failed on {record['host']}, process {record['process']}: {record['cause']}"
        if record["is_certain"] or self._ended[number] >= TRIES:
            failed[number] = told
            self._say(f"{told}; the others go on")
        else:
            logger.warning("%s; it is done again", told)
            path.unlink()

    def _mind(self, signs: Mapping[str, Any], offer: str, threads: int, failed: dict[int, str]) -> None:
        """Start workers, replace those that ended, end those that hang."""
        for name, sign in signs.items():
            who, own = f"worker {sign['process']} on {sign['host']}", self._processes.get(name)
            at = "loading a model" if sign["shard"] is None else f"shard {sign['shard']}"
            if sign["hung"]:
                seconds = self._spread.worker_timeout
                logger.warning("%s gave no sign for %g s, at %s: it is done again", who, seconds, at)
                own[0].kill() if own else self._signs.forget(name)
            elif own is None and sign["host"] == platform.node() and not files.is_alive(sign["process"]):
                if sign["offer"]:
                    logger.warning("%s ended at %s: it is done again", who, at)
                self._signs.forget(name)
            elif own is None and sign["cause"]:
                self._say(f"{who} takes no part: {sign['cause']}")
        for name, (process, rank) in list(self._processes.items()):
            code = process.poll()
            if code is None:
                continue
            del self._processes[name]
            sign = signs.get(name)
            self._signs.forget(name)
            if sign and sign["cause"]:
                raise ValueError(f"worker {rank} on {sign['host']}: {sign['cause']}")
            if code == ANEW:
                continue
            shard = sign["shard"] if sign and sign["offer"] == offer else None
            self._ended[shard] += 1
            ended = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            at = "" if shard is None else f" at shard {shard}: it is done again"
            logger.warning("worker %d ended (%s)%s", rank, ended, at)
            if shard is not None and self._ended[shard] >= TRIES:
                cure = "is there memory for so many? Lower --workers or --batch-tokens"
                failed[shard] = f"shard {shard}: {TRIES} workers ended at it ({ended}): {cure}"
            elif shard is None and self._ended[None] >= TRIES * (self._spread.workers or 1):
                log = workers_folder(self._run.work) / f"{name}.txt"
                last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
                raise ValueError(f"workers end as they start ({ended}): {''.join(last) or log}")
        ranks = {rank for _, rank in self._processes.values()}
        for rank in range(self._spread.workers or 0 if self._spread.engine != "files" else 0):
            if rank not in ranks:
                name = f"{file_name(platform.node())}-{os.getpid()}-{rank}-{sum(self._ended.values())}"
                made = self._start(self._run.path, name, rank, self._spread.workers or 1, threads)
                self._processes[name] = made, rank

    def _start(self, *of: Any) -> Process:
        if self._spread.engine == "ray":
            from staff.runs.on_ray import start_actor

            return start_actor(self._spread.ray_address, *of)
        return launch(*of)

    def _say(self, text: str) -> None:
        """Once, however many workers say so."""
        if text not in self._said:
            self._said.add(text)
            logger.warning("%s", text)

    def close(self) -> None:
        """End the workers: those that this process started at once, others as they look."""
        files.write_checked(self._offer, {"over": True})
        for name, (process, _) in self._processes.items():
            process.kill()
            self._signs.forget(name)
        for process, _ in self._processes.values():
            while process.poll() is None:
                time.sleep(0.01)
        self._processes.clear()
