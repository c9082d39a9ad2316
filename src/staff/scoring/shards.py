"""The one loop over a pool: shards of fixed positions, each whole or absent, in batches that the memory
bears."""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from staff.data.tokens import batches
from staff.files import is_out_of_memory, read_arrays, read_checked, write_arrays, write_checked

logger = logging.getLogger(__name__)

# samples whose scores are written together; batches never cross one, so a resumed run cuts them alike
SHARD = 512
Arrays = dict[str, np.ndarray]


class Score(Protocol):
    """Numbers of some samples: what a scorer is to the loop."""

    def __call__(
        self, positions: np.ndarray, batch_tokens: int, on_samples: Callable[[int], None] | None = None
    ) -> Arrays:
        """(k,) positions -> arrays of k rows, in batches of at most so many padded tokens."""


class Budgets:
    """Padded tokens of a batch, by shard: what was settled at the start, and less from where memory ran out
    on.

    On disk, so that a resumed run cuts its batches as the run that ran through did, and ends with the same
    bytes.

    Args:
        path: a file of the piece of work that they are for.
        given: the budget of the first shard; None: what `settle` is told, the first time.
    """

    def __init__(self, path: Path, given: int | None):
        self._path, self._given = path, [] if given is None else [[0, given]]
        self._steps: list[list[int]] = [*self._given, *(read_checked(path) or {}).get("from_shard", [])]

    def settle(self, tokens: int) -> None:
        """Begin with `tokens`, unless it is known; written down, so that a resume on other hardware cuts
        alike."""
        if not self._steps:
            self._steps = [[0, tokens]]
            self._write()

    def of(self, shard: int) -> int:
        """The budget of a shard, in padded tokens."""
        return [tokens for start, tokens in self._steps if start <= shard][-1]

    def lower(self, shard: int, tokens: int) -> None:
        """From this shard on at most `tokens`; shards before it keep what they had."""
        later = [[start, min(least, tokens)] for start, least in self._steps if start > shard]
        before = [step for step in self._steps if step[0] < shard or step == self._steps[0]]
        self._steps = [*before, [shard, tokens], *later]
        self._write()

    def _write(self) -> None:
        write_checked(self._path, {"from_shard": self._steps[len(self._given) :]})


def score_by_shards(
    make: Callable[[], tuple[Score, int]],
    lengths: np.ndarray,
    path: Path,
    *,
    prefix: str = "shard",
    batch_tokens: int | None = None,
    name_of: Callable[[int], str] = str,
    on_samples: Callable[[int], None] | None = None,
    on_shard: Callable[[np.ndarray, float], None] | None = None,
) -> Arrays:
    """What a pass over a pool gives, shard by shard, taking from disk what is there; left in one file at the
    end.

    Args:
        make: called at the first shard that is missing: what scores, and the padded tokens that its device
            bears.
        lengths: (n,) tokens of each sample.
        path: the file; shards lie beside it, named by the prefix, until they are all there.
        batch_tokens: padded tokens of a batch at most, in place of what the device bears.
        name_of: pool position -> what messages call the sample.
        on_samples: called with the number of samples just done, those from disk included; a negative one
            where they are begun again.
        on_shard: called with (positions, seconds) before a shard is kept.

    Returns:
        arrays of n rows. Where a shard has "site_norms" (`level`), "effort" is levelled by their means over
        the pool; the norms themselves are not returned.
    """

    def file_of(number: int) -> Path:
        return path.parent / f"{prefix}-{number:05d}.npz"

    budgets = Budgets(path.parent / f"{prefix}-budgets.json", batch_tokens)
    score: Score | None = None
    parts: list[Arrays] = []
    sums = None  # of the norms of each weight: all norms at once may not fit, so they stay with the shards
    for number, start in enumerate(range(0, len(lengths), SHARD)):
        positions = np.arange(start, min(start + SHARD, len(lengths)))
        part = read_arrays(file_of(number))
        if part is None:
            if score is None:
                score, bears = make()
                budgets.settle(bears)
            began = time.monotonic()
            part = score_within(score, lengths, positions, budgets, number, name_of, on_samples)
            if on_shard:
                on_shard(positions, time.monotonic() - began)
            write_arrays(file_of(number), part)
        elif on_samples:
            on_samples(len(positions))
        norms = part.pop("site_norms", None)
        if norms is not None:
            shard_sum = norms.sum(0, dtype=np.float64)
            sums = shard_sum if sums is None else sums + shard_sum
        parts.append(part)
    scores = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if sums is not None:
        shards = [read_arrays(file_of(number)) for number in range(len(parts))]
        scores["effort"] = np.concatenate(
            [level(part["site_norms"], sums / len(lengths)) for part in shards if part]
        )
        assert len(scores["effort"]) == len(lengths), "a shard that was saved is gone"
    write_arrays(path, scores)
    remove_shards(path)
    return scores


def remove_shards(path: Path) -> None:
    """Clear what lies beside a finished file: its run may have been killed right behind the last shard."""
    for shard in path.parent.glob("*shard-*.npz"):
        shard.unlink()


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
    lengths: np.ndarray,
    positions: np.ndarray,
    budgets: Budgets,
    shard: int,
    name_of: Callable[[int], str] = str,
    on_samples: Callable[[int], None] | None = None,
) -> Arrays:
    """Score some samples in batches that fit: the token budget is halved for as long as memory runs out.

    Args:
        lengths: (n,) tokens of each sample of the pool.
        positions: (k,) pool positions.
        shard: whose budget holds.

    Raises:
        ValueError: a sample does not fit alone.
    """
    while True:
        budget, done = budgets.of(shard), 0

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
        budgets.lower(shard, lowered)
        logger.warning(
            "out of memory: from shard %d on a batch holds %d tokens at most, not %d", shard, lowered, budget
        )


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
