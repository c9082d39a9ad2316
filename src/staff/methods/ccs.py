"""Coverage-centric coreset selection: an even share of every stratum (Zheng et al. 2023, arXiv
2210.15809)."""

from __future__ import annotations

import numpy as np

from staff.methods.strata import allocate, check_scores, members_of, set_hardest_aside, take_back, weights_of
from staff.types import Region, Selection


def ccs(
    n: int,
    *,
    budget: int,
    rng: np.random.Generator,
    scores: np.ndarray,
    num_strata: int = 50,
    hard_cutoff: float = 0.1,
) -> Selection:
    """Cut the hardest samples off, then take an even share of every stratum (CCS, Algorithm 1).

    1. The hardest floor(beta * n) samples are set aside (beta is `hard_cutoff`): many of them are
       mislabelled.
    2. The rest is cut into strata of equal width between the lowest score and 1.0001 times the highest; a
       score on an edge belongs to the upper stratum.
    3. Strata, smallest first, get min(size, floor(left / strata left)) samples, drawn at random.

    Where ours departs: the paper searches beta for every pruning rate (0.3 at 90 % of CIFAR-10); ours is a
    tenth throughout, as in STAFF, unless set. Its released code drops mislabelled samples by a score of its
    own (AUM); here one score serves both. Equal strata go lower scores first; in the released code
    torch.argsort decides. Where m is more than what the cut left, the easiest of the cut samples come back
    and are counted; the released code returns fewer.

    Args:
        n: the pool's size, in samples.
        budget: m, in samples, 0 <= m <= n.
        rng: the source of all randomness.
        scores: (n,) finite numbers, higher is harder.
        num_strata: 50 in the paper.
        hard_cutoff: beta, fraction of the pool set aside as hardest, in [0, 1).

    Returns:
        Selection whose regions are the strata; `filled_from_cut` counts cut samples taken back.
    """
    scores = check_scores(scores, n)
    if num_strata < 1:
        raise ValueError(f"num_strata must be 1 or more; found {num_strata}")
    kept, cut = set_hardest_aside(scores, hard_cutoff)
    edges, stratum_of = _split(scores[kept], num_strata)
    members = [kept[places] for places in members_of(stratum_of, num_strata)]
    sizes = np.array([len(positions) for positions in members])
    budgets = allocate(np.full(num_strata, np.nan), sizes, budget)
    chosen = [
        rng.choice(positions, share, replace=False)
        for positions, share in zip(members, budgets, strict=True)
        if share
    ]
    back = take_back(scores, cut, budget - int(budgets.sum()))
    region_of = np.full(n, -1, np.int64)
    region_of[kept] = stratum_of
    regions = tuple(
        Region(
            float(edges[i]), float(edges[i + 1]), int(sizes[i]), 0, np.nan, int(budgets[i]), int(budgets[i])
        )
        for i in range(num_strata)
    )
    return Selection(
        np.sort(np.concatenate([*chosen, back])).astype(np.int64),
        regions,
        region_of,
        filled_from_cut=len(back),
        weights=weights_of(members, budgets, n),
    )


def _split(scores: np.ndarray, num_strata: int) -> tuple[np.ndarray, np.ndarray]:
    if len(scores) == 0:
        return np.zeros(num_strata + 1), np.empty(0, np.int64)
    highest = scores.max()
    edges = np.linspace(
        scores.min(), highest + 0.0001 * abs(highest), num_strata + 1
    )  # 1.0001 * highest, below 0 too
    return edges, np.searchsorted(edges[1:-1], scores, side="right")
