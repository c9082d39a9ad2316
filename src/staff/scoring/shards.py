"""The shards of a pass over a pool: fixed positions, each whole or absent, in batches that memory bears."""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from staff.data.tokens import batches
from staff.files import hold, is_out_of_memory, read_arrays, read_checked, write_arrays, write_checked

logger = logging.getLogger(__name__)

# samples whose scores are written together; batches never cross one, so a resumed run cuts them alike
SHARD = 512
ROUNDS = 3  # so often is a shard made again that can't be read once it was written
SUMS = "norm_sums"  # (sites,), of a shard's "site_norms"
Arrays = dict[str, np.ndarray]


class Score(Protocol):
    """Numbers of some samples: what a scorer is to the loop."""

    def __call__(
        self, positions: np.ndarray, batch_tokens: int, on_samples: Callable[[int], None] | None = None
    ) -> Arrays:
        """(k,) positions -> arrays of k rows, in batches of at most so many padded tokens."""


@dataclass(frozen=True, eq=False)
class Shards:
    """A pass cut into parts, each of which whoever takes it leaves in a file of its own.

    Attributes:
        folder, prefix: where the files lie and what their names begin with.
        positions: number -> (k,) pool positions.
        lengths: (n,) tokens of each sample of the pool.
        batch_tokens: padded tokens of a batch at most, in place of what the device bears.
        size: samples of each where they are the whole pool in order; 0: positions of one's own choice.
    """

    folder: Path
    prefix: str
    positions: Mapping[int, np.ndarray]
    lengths: np.ndarray
    batch_tokens: int | None = None
    size: int = 0

    def file(self, number: int) -> Path:
        return self.folder / f"{self.prefix}-{number:05d}.npz"

    @property
    def budgets(self) -> Budgets:
        return Budgets(self.folder / f"{self.prefix}-budgets.json", self.batch_tokens)


class _Ranges(Mapping[int, np.ndarray]):
    """The shards of a whole pool, by number: made when they are asked for, since there may be many."""

    def __init__(self, n: int, size: int):
        self._n, self._size = n, size

    def __len__(self) -> int:
        return -(-self._n // self._size)

    def __iter__(self) -> Any:
        return iter(range(len(self)))

    def __getitem__(self, number: int) -> np.ndarray:
        return np.arange(number * self._size, min((number + 1) * self._size, self._n))


def shards_of(
    lengths: np.ndarray, path: Path, prefix: str = "shard", batch_tokens: int | None = None, size: int = 0
) -> Shards:
    """The whole pool in shards beside the file that they will make.

    Args:
        size: samples of a shard; 0: SHARD.
    """
    size = size or SHARD
    return Shards(path.parent, prefix, _Ranges(len(lengths), size), lengths, batch_tokens, size)


class Budgets:
    """Padded tokens of a batch, by shard: what was settled at the start, and less for a shard whose memory
    ran out.

    On disk, a file for each such shard, so that whoever makes it again cuts its batches alike and ends with
    the same bytes; no shard hangs on another.

    Args:
        path: a file of the pass that they are for.
        given: the budget of every shard; None: what `settle` is told, the first time.
    """

    def __init__(self, path: Path, given: int | None):
        self._path, self._given = path, given

    def settle(self, tokens: int) -> None:
        """Begin with `tokens`, unless it is known or given."""
        if self._given is None:
            self.agree("tokens", tokens)

    def agree(self, name: str, value: int) -> int:
        """What the pass was begun with under a name: of several processes the first has its way. Written
        down, so that a resume on other hardware goes on alike."""
        known = read_checked(self._path) or {}
        if name not in known:
            with hold(self._path.with_suffix(".lock"), wait=True):
                known = read_checked(self._path) or {}
                if name not in known:
                    known[name] = value
                    write_checked(self._path, known)
        return known[name]

    def of(self, shard: int) -> int:
        """The budget of a shard, in padded tokens."""
        lowered = read_checked(self._lowered(shard))
        return lowered["tokens"] if lowered else self._given or (read_checked(self._path) or {})["tokens"]

    def lower(self, shard: int, tokens: int) -> None:
        """At most `tokens` for this shard."""
        write_checked(self._lowered(shard), {"tokens": tokens})

    def _lowered(self, shard: int) -> Path:
        return self._path.with_name(f"{self._path.stem}-{shard:05d}.json")


def make_shards(
    make: Callable[[], tuple[Score, int]],
    shards: Shards,
    missing: list[int],
    *,
    name_of: Callable[[int], str] = str,
    on_samples: Callable[[int], None] | None = None,
    on_shard: Callable[[np.ndarray, float], None] | None = None,
) -> None:
    """Make some shards in this process, one after the other.

    Args:
        make: called first: what scores, and the padded tokens that its device bears.
        name_of: pool position -> what messages call the sample.
        on_samples: called with the number of samples just done; a negative one where they are begun again.
        on_shard: called with (positions, seconds) before a shard is kept.
    """
    score, bears = make()
    shards.budgets.settle(bears)
    for number in missing:
        began = time.monotonic()
        part = score_within(score, shards, number, name_of, on_samples)
        if on_shard:
            on_shard(shards.positions[number], time.monotonic() - began)
        write_arrays(shards.file(number), part)


def read_shards(
    shards: Shards, run: Callable[[list[int]], None], on_samples: Callable[[int], None] | None = None
) -> dict[int, Arrays]:
    """What the files of a pass hold; those that are missing or damaged are made first.

    All norms at once may not fit into memory: of "site_norms" their sums alone are kept, in SUMS.

    Args:
        run: makes the files of these numbers.
        on_samples: called with the samples of each file that is there at the start.

    Raises:
        ValueError: a file is damaged however often it is written.
    """
    parts: dict[int, Arrays] = {}
    for attempt in range(ROUNDS):
        missing = []
        for number in shards.positions:
            if number not in parts:
                part = read_arrays(shards.file(number))
                if part is None:
                    missing.append(number)
                else:
                    norms = part.pop("site_norms", None)
                    parts[number] = part if norms is None else {**part, SUMS: norms.sum(0, dtype=np.float64)}
                    if on_samples and not attempt:
                        on_samples(len(shards.positions[number]))
        if not missing:
            return parts
        run(missing)
    raise ValueError(f"{shards.file(missing[0])} can't be read back as it was written: is the disk damaged?")


def score_by_shards(
    shards: Shards,
    path: Path,
    run: Callable[[list[int]], None],
    on_samples: Callable[[int], None] | None = None,
) -> Arrays:
    """What a pass over a whole pool gives; left in one file at the end, and its shards removed.

    Args:
        run: makes the shards of these numbers (`make_shards`, or workers).
        on_samples: told of the samples that are there already.

    Returns:
        arrays of n rows. Where a shard has "site_norms" (`level`), "effort" is levelled by their means over
        the pool; the norms themselves are not returned.
    """
    parts = read_shards(shards, run, on_samples)
    ordered = [parts[number] for number in sorted(parts)]
    sums = [part.pop(SUMS) for part in ordered if SUMS in part]
    scores = {name: np.concatenate([part[name] for part in ordered]) for name in ordered[0]}
    if sums:
        means: np.ndarray = sum(sums[1:], sums[0]) / len(shards.lengths)  # in this order: the same bytes
        norms = (read_arrays(shards.file(number)) for number in sorted(parts))
        scores["effort"] = np.concatenate([level(part["site_norms"], means) for part in norms if part])
        assert len(scores["effort"]) == len(shards.lengths), "a shard that was saved is gone"
    write_arrays(path, scores)
    remove_shards(path)
    return scores


def remove_shards(path: Path) -> None:
    """Clear what lies beside a finished file: its run may have been killed right behind the last shard."""
    for shard in path.parent.glob("*shard-[0-9]*"):
        shard.unlink(missing_ok=True)


def level(site_norms: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Efforts with the norm of each weight divided by its mean, so that wide layers do not drown the others.

    Args:
        site_norms: (k, sites).
        means: (sites,); a weight whose mean is 0 never has a gradient, and is left out.

    Returns:
        (k,) sqrt of the sum of (norm / mean)^2, in the type of site_norms.
    """
    shares = np.divide(site_norms, means, out=np.zeros(site_norms.shape), where=means > 0)
    return np.sqrt(np.square(shares).sum(1)).astype(site_norms.dtype)


def score_within(
    score: Score,
    shards: Shards,
    number: int,
    name_of: Callable[[int], str] = str,
    on_samples: Callable[[int], None] | None = None,
) -> Arrays:
    """Score a shard in batches that fit: its token budget is halved for as long as memory runs out.

    Raises:
        ValueError: a sample does not fit alone.
    """
    positions, budgets, lengths = shards.positions[number], shards.budgets, shards.lengths
    while True:
        budget, done = budgets.of(number), 0

        def count(samples: int) -> None:
            nonlocal done
            done += samples
            if on_samples:
                on_samples(samples)

        try:
            return score(positions, budget, count)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # here, not in the handler: the error holds the frames whose tensors are in the way
        if on_samples and done:
            on_samples(-done)
        _free_memory()
        cut = batches(lengths[positions], budget)
        behind = np.cumsum([len(places) for places in cut])
        failed = cut[min(int(np.searchsorted(behind, done % len(positions), side="right")), len(cut) - 1)]
        if len(failed) == 1:
            position = int(positions[failed[0]])
            raise ValueError(
                f"{name_of(position)} does not fit into memory alone, with its {lengths[position]} tokens: "
                "lower --max-length, take a smaller model or scope, or another --device"
            )
        largest = max(len(places) * int(lengths[positions[places]].max()) for places in cut)
        lowered = min(budget, largest) // 2
        budgets.lower(number, lowered)
        logger.warning(
            "out of memory: shard %d is scored in batches of %d tokens at most, not %d",
            number,
            lowered,
            budget,
        )


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
