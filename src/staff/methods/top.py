"""Methods that need no more than one score a sample, or none at all."""

from __future__ import annotations

import numpy as np

from staff.types import Selection


def random(scores: np.ndarray, *, budget: int, rng: np.random.Generator) -> Selection:
    """Draw m samples uniformly, without replacement: the one to beat.

    Args:
        scores: (n,) anything; only the length counts.
        budget: m, in samples, 0 <= m <= n.
        rng: the source of all randomness.
    """
    return Selection(np.sort(rng.choice(len(scores), budget, replace=False)))
