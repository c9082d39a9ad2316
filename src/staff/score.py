"""One pass over a pool: effort, loss, EL2N and entropy of every sample. Torch ends at the return of this file."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from staff import scopes
from staff.gradnorm import efforts
from staff.pool import Batch, Pool, batches, collate

SHARD = 512  # samples whose scores are written together; batches never cross one, so a resumed run cuts them alike
QUANTITIES = ("effort", "loss", "el2n", "entropy")


class Scorer:
    """A model ready to score: its sites and head are found, its parameters frozen.

    Args:
        model: a causal language model, perhaps with an adapter, on its device.
        scope: a key of `scopes.SCOPES`.
        batch_tokens: padded tokens of a batch at most.

    Raises:
        ValueError: the model has no such scope, or an unknown head.
    """

    def __init__(self, model: torch.nn.Module, scope: str = "last-value", batch_tokens: int = 4096, padding_side: str = "right"):
        self.model = model.eval().requires_grad_(False)
        self.batch_tokens = batch_tokens
        self.padding_side = padding_side
        self.device = next(model.parameters()).device
        self.head = scopes.head_of(model)
        self.sites = scopes.sites(model, scope)

    def scores(
        self, pool: Pool, positions: Sequence[int] | np.ndarray, on_samples: Callable[[int], None] | None = None
    ) -> dict[str, np.ndarray]:
        """Score some samples of a pool.

        Args:
            positions: (k,) pool positions, in any order.
            on_samples: called after each batch with the number of its samples.

        Returns:
            each of QUANTITIES as (k,) float32 (float64 for a float64 model), in the order asked for.

        Raises:
            ValueError: a score is nan or infinite; the message names the positions.
        """
        positions = np.asarray(positions)
        cut = batches(pool.lengths[positions], self.batch_tokens)
        parts = []
        for places in cut:
            parts.append(self._batch(collate(pool, positions[places], self.device, padding_side=self.padding_side)))
            if on_samples:
                on_samples(len(places))
        order = np.argsort(np.concatenate(cut)) if cut else np.empty(0, np.int64)
        found = {
            name: torch.cat([part[name] for part in parts]).cpu().numpy()[order] if parts else np.empty(0, np.float32)
            for name in QUANTITIES
        }
        bad = positions[~np.isfinite(found["effort"])]
        if len(bad):
            raise ValueError(
                f"{len(bad)} samples have an effort that is nan or infinite (positions {bad[:5].tolist()}): "
                "the model overflows on them; try --dtype float32"
            )
        return found

    def _batch(self, batch: Batch) -> dict[str, torch.Tensor]:
        def forward():
            extra = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids} if batch.attention_mask is not None else {}
            return scopes.decoder(self.model)(input_ids=batch.input_ids, use_cache=False, **extra).last_hidden_state

        return efforts(forward, self.head, self.sites, batch)


def score_shards(
    scorer: Callable[[], Scorer],
    pool: Pool,
    load: Callable[[int], dict[str, np.ndarray] | None],
    save: Callable[[int, dict[str, np.ndarray]], None],
    on_samples: Callable[[int], None] | None = None,
    shard: int = SHARD,
) -> dict[str, np.ndarray]:
    """Score a pool shard by shard, taking from disk what is there.

    Args:
        scorer: called once, at the first shard that is missing.
        load, save: shard number -> its scores or None; keep a shard's scores. Shard j holds the positions
            j * shard to (j + 1) * shard.
        on_samples: called with the number of samples that were just done, those from disk included.

    Returns:
        each of QUANTITIES, (n,).
    """
    made: list[Scorer] = []
    parts = []
    for number, start in enumerate(range(0, len(pool), shard)):
        positions = np.arange(start, min(start + shard, len(pool)))
        part = load(number)
        if part is None:
            if not made:
                made.append(scorer())
            part = made[0].scores(pool, positions, on_samples)
            save(number, part)
        elif on_samples:
            on_samples(len(positions))
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) if parts else np.empty(0, np.float32) for name in QUANTITIES}
