"""Pick for each of a few rows of the task in turn what is most like it (RDS+, arXiv 2503.01807)."""

from __future__ import annotations

import numpy as np

from staff.methods.features import check_features
from staff.methods.strata import highest
from staff.types import Selection


def round_robin(n: int, *, budget: int, rng: np.random.Generator, similarities: np.ndarray) -> Selection:
    """Let each validation row in turn take the sample most like it that is not yet taken, until m are (RDS+,
    Ivison et al. 2025, arXiv 2503.01807).

    So no kind of row that the task asks for goes without, as it may where samples are ranked by their mean
    similarity. Rows take turns in the order of the file; the last round ends where m is reached. RDS+ is this
    pick on the cosine of position-weighted mean hidden states; `less_round_robin` is it on the cosine of
    gradients (LESS, Xia et al. 2024, arXiv 2402.04333), each validation row's kept apart.

    Where ours departs: states and gradients are the draft's, not those of the model that will be trained.
    Costs one pass of the draft over the pool (for `rds` without gradients), and for each validation row a
    sort of the m samples most like it, 4 bytes times m.

    Args:
        n: the pool's size, in samples.
        budget: m, in samples, 0 <= m <= n.
        rng: not used; there is nothing to draw.
        similarities: (n, q) float, of each sample to each validation row; of equal ones the earlier sample is
            taken.

    Raises:
        ValueError: nan among the similarities, or not a single validation row.
    """
    similarities = check_features(similarities, n, "similarities")
    if budget and not similarities.shape[1]:
        raise ValueError("similarities are to no validation row; give at least one")
    # fewer than m are taken before the last pick, so no row needs more than its m best
    best = [_descending(column, budget).data for column in similarities.T]
    next_of = [0] * len(best)
    taken = bytearray(n)
    chosen: list[int] = []
    while len(chosen) < budget:
        for row in range(min(len(best), budget - len(chosen))):
            own, at = best[row], next_of[row]
            while taken[own[at]]:
                at += 1
            next_of[row] = at + 1
            taken[own[at]] = 1
            chosen.append(own[at])
    return Selection(np.sort(np.array(chosen, np.int64)))


def _descending(scores: np.ndarray, count: int) -> np.ndarray:
    """Positions of the `count` highest scores, highest first; of equal scores the earlier positions."""
    found = highest(scores, count)
    return found[np.argsort(-scores[found], kind="stable")].astype(np.int32)
