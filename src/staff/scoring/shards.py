"""What happens when memory runs out while scoring: smaller batches from that shard on, written down and said."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from staff.data.tokens import Pool, batches
from staff.files import is_out_of_memory, read_checked, write_checked

logger = logging.getLogger(__name__)

SHARD = 512  # samples whose scores are written together; batches never cross one, so a resumed run cuts them alike


class Budgets:
    """Padded tokens of a batch, by shard: what was settled at the start, and less from a shard on where memory ran out.

    On disk, so that a resumed run cuts its batches as the run that ran through did, and ends with the same bytes.

    Args:
        path: a file of the piece of work that they are for.
        first: the budget of the first shard; None: what `settle` is told, the first time.
    """

    def __init__(self, path: Path, first: int | None):
        self._path, self._given = path, [] if first is None else [[0, first]]
        self._steps: list[list[int]] = [*self._given, *(read_checked(path) or {}).get("from_shard", [])]

    def settle(self, tokens: int) -> None:
        """Begin with `tokens`, unless it is known already; written down, so that a resume on other hardware cuts alike."""
        if not self._steps:
            self._steps = [[0, tokens]]
            self._write()

    def _write(self) -> None:
        write_checked(self._path, {"from_shard": self._steps[len(self._given) :]})

    def of(self, shard: int) -> int:
        """The budget of a shard, in padded tokens."""
        return [tokens for start, tokens in self._steps if start <= shard][-1]

    def lower(self, shard: int, tokens: int) -> None:
        """From this shard on at most `tokens`; shards before it keep what they had."""
        later = [[start, min(least, tokens)] for start, least in self._steps if start > shard]
        self._steps = [
            *(step for step in self._steps if step[0] < shard or step == self._steps[0]),
            [shard, tokens],
            *later,
        ]
        self._write()


def score_within(
    scorer: Any,
    pool: Pool,
    positions: np.ndarray,
    budgets: Budgets,
    shard: int,
    name_of: Callable[[int], str],
    on_samples: Callable[[int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Score the samples of a shard in batches that fit: the token budget is halved for as long as memory runs out.

    Args:
        scorer: a `score.Scorer`.
        positions: (k,) pool positions.
        name_of: pool position -> what messages call the sample.
        on_samples: called with the number of samples done; with a negative one where they are begun again.

    Returns:
        as `Scorer.scores`.

    Raises:
        ValueError: a sample does not fit alone.
    """
    lengths = pool.lengths[positions]
    while True:
        budget, done = budgets.of(shard), 0
        scorer.batch_tokens = budget

        def count(samples: int) -> None:
            nonlocal done
            done += samples
            if on_samples:
                on_samples(samples)

        try:
            return scorer.scores(pool, positions, count)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # here, not in the handler: the error holds the frames whose tensors are in the way
        if on_samples and done:
            on_samples(-done)
        _let_go()
        cut = batches(lengths, budget)
        behind = np.cumsum([len(places) for places in cut])
        failed = cut[min(int(np.searchsorted(behind, done % len(positions), side="right")), len(cut) - 1)]
        if len(failed) == 1:
            at = int(failed[0])
            raise ValueError(
                f"{name_of(int(positions[at]))} does not fit into memory alone, with its {lengths[at]} tokens: "
                "lower --max-length, take a smaller model or scope, or another --device"
            )
        largest = max(len(places) * int(lengths[places].max()) for places in cut)
        lowered = min(budget, largest) // 2
        budgets.lower(shard, lowered)
        logger.warning(
            "out of memory: from shard %d on a batch holds %d tokens at most, not %d", shard, lowered, budget
        )


class Fitting:
    """A scorer of shards whose batches fit; what `score.score_shards` asks for.

    Args:
        scorer: a `score.Scorer`.
        name_of: pool position -> what messages call the sample.
    """

    def __init__(self, scorer: Any, budgets: Budgets, name_of: Callable[[int], str]):
        self._scorer, self._budgets, self._name_of = scorer, budgets, name_of

    def scores(
        self, pool: Pool, positions: np.ndarray, on_samples: Callable[[int], None] | None = None
    ) -> dict[str, np.ndarray]:
        shard = int(positions[0]) // SHARD
        return score_within(self._scorer, pool, positions, self._budgets, shard, self._name_of, on_samples)


def _let_go() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
