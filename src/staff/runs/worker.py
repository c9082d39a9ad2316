"""A worker: takes shards of a pass that a driver offers in a run's folder, and leaves each in its own file.

What it needs to know stands in the offer, some kilobytes a pass; a shard of it is a number. Which worker
makes a shard bears on no byte of it, so two that make the same one do no harm.
"""

from __future__ import annotations

import logging
import os
import platform
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from staff import files
from staff.models.files import Source
from staff.runs import account
from staff.runs.crew import ANEW, LOOK_SECONDS, OFFER, Signs, file_name, workers_folder
from staff.runs.store import RunFolder, content_of
from staff.scoring.shards import Score, Shards, score_within

SIGN_SECONDS = 1.0  # between two signs of life within a shard


@dataclass(frozen=True, eq=False)
class Opened:
    """A pass that is offered, as a worker goes about it.

    Attributes:
        load: what scores, its model loaded; and the padded tokens that its device bears.
        name_of: pool position -> what messages call the sample.
        on_shard: called with (positions, seconds) before a shard is kept.
    """

    shards: Shards
    load: Callable[[], tuple[Score, int]]
    name_of: Callable[[int], str]
    on_shard: Callable[[np.ndarray, float], None]


Opener = Callable[[RunFolder, Mapping[str, Any]], Opened]


def rank_of(environment: Mapping[str, str]) -> tuple[int, int]:
    """This process's place among how many: torchrun's, a Slurm array's or step's; (0, 1) where none says."""
    for rank, world, first in (
        ("RANK", "WORLD_SIZE", ""),
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
        ("SLURM_PROCID", "SLURM_NTASKS", ""),
    ):
        if rank in environment and world in environment:
            return int(environment[rank]) - int(environment.get(first, 0)), int(environment[world])
    return 0, 1


def local_rank(environment: Mapping[str, str]) -> int:
    """This process's place among those of its machine."""
    return int(environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID", 0)))


def driver_left(path: Path, read: Callable[[Path], dict[str, np.ndarray] | None]) -> dict[str, np.ndarray]:
    """Arrays that the driver keeps for its workers.

    Raises:
        ValueError: they are not there, or damaged.
    """
    arrays = read(path)
    if arrays is None:
        raise ValueError(
            f"{path} is not there, or damaged: is the run's folder on a file system that is shared?"
        )
    return arrays


def check_files(run: RunFolder, source: Source, name: str, content: str) -> None:
    """See that a model's files are those of the driver, by their fingerprint.

    Raises:
        ValueError: others; named.
    """
    if content_of(run, source) != content:
        raise ValueError(
            f"{source.folder} holds other files than the driver's {name}: its weights, tokenizer or "
            f"configuration differ. Give this machine the same ones"
        )


def check_engine(of_driver: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """See that versions, dtype and kind of device are those of the driver.

    Raises:
        ValueError: others; named.
    """
    before, now = ({**of.pop("versions"), **of} for of in (dict(of_driver), dict(here)))
    if changed := files.differences(before, now):
        raise ValueError(f"the driver's scores are made with others: {', '.join(changed)}")


class _Orphaned(Exception):
    """The driver that started this worker is gone."""


def work(path: Path, openers: Mapping[str, Opener], name: str | None = None, wait: float = 600.0) -> None:
    """Take shards of a run until its driver says that it is over, or there was nothing to do for long.

    Args:
        path: the run's folder; waited for, too.
        openers: an offer's kind -> what makes a pass of it.
        name: of a worker that a driver on this machine started: it ends with its driver.
        wait: seconds without a shard to make after which it ends.

    Raises:
        ValueError: the offer can't be taken up here: other versions, other weights, no such device.
    """
    began = time.monotonic()
    while not (path / "work").is_dir():
        if time.monotonic() - began > wait:
            raise ValueError(f"{path} is no run's folder: start the driver first, with --engine files")
        time.sleep(LOOK_SECONDS)
    worker = _Worker(path, name)
    try:
        worker.take_offers(openers, wait)
    except _Orphaned:
        pass
    finally:
        worker.close()


class _Worker:
    def __init__(self, path: Path, name: str | None):
        host = platform.node()
        self._name = name or f"{file_name(host)}-{os.getpid()}"
        self._parent = os.getppid() if name else None
        self._run = RunFolder.joined(path, workers_folder(path / "work") / f"{self._name}.hashes")
        account.write_to(self._name)
        self._who = {"host": host, "process": os.getpid()}
        self._sign: dict[str, Any] = {"offer": None, "shard": None, "makes_it": False, "done": 0}
        self._sign |= {"cause": "", "count": 0}
        self._signed = 0.0
        self._said = _Said()
        logging.getLogger("staff").addHandler(self._said)

    def close(self) -> None:
        logging.getLogger("staff").removeHandler(self._said)
        if not self._sign["cause"]:
            (workers_folder(self._run.work) / f"{self._name}.json").unlink(missing_ok=True)

    def sign(self, **values: Any) -> None:
        """Give a sign of life, now and then; at once where it says something new."""
        if self._parent and os.getppid() != self._parent:
            raise _Orphaned
        news = any(self._sign[name] != value for name, value in values.items() if name != "done")
        self._sign |= values
        if news or time.monotonic() - self._signed > SIGN_SECONDS:
            self._signed = time.monotonic()
            self._sign["count"] += 1
            path = workers_folder(self._run.work) / f"{self._name}.json"
            files.write_checked(path, self._who | self._sign, lasts=False)

    def take_offers(self, openers: Mapping[str, Opener], wait: float) -> None:
        busy, at, pause = time.monotonic(), "", LOOK_SECONDS
        while time.monotonic() - busy < wait:
            offer = files.read_checked(self._run.work / OFFER)
            if offer and offer.get("over"):
                return
            if offer and offer["id"] != at:
                at, order = offer["id"], dict[int, None]()
                self.sign(offer=at, shard=None, done=0)
                try:
                    if os.path.isdir(offer["directory"]):  # where relative paths count from
                        os.chdir(offer["directory"])
                    opened = openers[offer["kind"]](self._run, offer)
                    score, bears = opened.load()
                except ValueError as error:
                    self.sign(cause=str(error))
                    raise
                opened.shards.budgets.settle(bears)
                # one that hangs is first seen, ended and told of by the driver
                signs = Signs(self._run.work, 2 * offer["timeout"])
            looked = time.monotonic()
            if offer and not order:  # all once, or once more: a file may turn out damaged
                order = dict.fromkeys(_order(offer["missing"]))
            number = self._next(at, opened.shards, order, signs) if offer else None
            if number is None:
                self.sign(offer=None, shard=None, done=0)
                pause = max(LOOK_SECONDS, 5 * (time.monotonic() - looked))
                time.sleep(pause)
            else:
                self.make(opened, score, number)
                busy = time.monotonic()

    def _next(self, offer: str, shards: Shards, order: dict[int, None], signs: Signs) -> int | None:
        """A shard that is not there and that nobody is at; of two that choose the same one, one goes on."""
        for number in list(order):
            path = shards.file(number)
            if path.exists():
                del order[number]
            elif not path.with_suffix(".failed").exists():
                self.sign(offer=offer, shard=number, makes_it=False, done=0)
                ahead = [
                    name
                    for name, sign in signs.look().items()
                    if not sign["hung"] and (sign["offer"], sign["shard"]) == (offer, number)
                    if sign["makes_it"] or name < self._name
                ]
                # the driver takes its offer back before it clears the shards that are done
                if not ahead and (files.read_checked(self._run.work / OFFER) or {}).get("id") == offer:
                    self.sign(makes_it=True)
                    return number
        return None

    def make(self, opened: Opened, score: Score, number: int) -> None:
        """Make one shard; a failure is written down in its place."""
        shards, done, began = opened.shards, 0, time.monotonic()

        def on_samples(samples: int) -> None:
            nonlocal done
            done += samples
            self.sign(done=done)

        path = shards.file(number)
        try:
            arrays = score_within(score, shards, number, opened.name_of, on_samples)
            opened.on_shard(shards.positions[number], time.monotonic() - began)
        except _Orphaned:
            raise
        except Exception as error:
            is_certain = isinstance(error, ValueError)
            cause = str(error) if is_certain else f"{type(error).__name__}: {error}"
            failed = {**self._who, "cause": cause, "is_certain": is_certain}
            files.write_checked(path.with_suffix(".failed"), failed)
            self.sign(shard=None)
            if not is_certain:
                traceback.print_exc()
                raise SystemExit(ANEW) from error
            return
        record, about = {**self._who, "said": self._said.take()}, path.with_suffix(".json")
        files.write_arrays(
            path, arrays, lambda sha256: files.write_checked(about, {**record, "sha256": sha256}, lasts=False)
        )


def _order(missing: list[int]) -> list[int]:
    """One's own share first, then what the others may have left, from its end."""
    rank, world = rank_of(os.environ)
    own = missing[rank % world :: world]
    return [*own, *sorted(set(missing) - set(own), reverse=True)]


class _Said(logging.Handler):
    """The warnings since the last shard, which the driver says in its own place."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())

    def take(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines
