"""STAFF: speculate on a draft, verify on the target, share the budget out (arXiv 2410.01296)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from staff.methods import verification as verifying
from staff.methods.strata import (
    allocate,
    check_scores,
    highest,
    members_of,
    set_hardest_aside,
    split,
    take_back,
    weights_of,
)
from staff.types import Region, Selection

PICKS = ("top", "random")
NORMALISATIONS = (None, "minmax")
VERIFICATIONS = ("fixed", "adaptive")


def staff(
    n: int,
    *,
    budget: int,
    rng: np.random.Generator,
    scores: np.ndarray,
    verify: Callable[[np.ndarray], np.ndarray] | None = None,
    num_regions: int | None = None,
    verification_budget: int | None = None,
    verification: str = "fixed",
    verification_error: float = 0.03,
    verified_at_most: int | None = None,
    allocation: str = "released",
    pick: str = "top",
    hard_cutoff: float = 0.1,
    normalise: str | None = None,
) -> Selection:
    """Choose a coreset by speculative score, its budget shared out by what the target says (STAFF, Algorithm
    1).

    1. The hardest floor(hard_cutoff * n) samples are set aside; the rest are cut into K regions of equal
       width.
    2. From each region B_i of more than b_v samples, b_v are drawn and scored on the target:
       V_i = sum of target scores / sum of draft scores over those drawn (Eq. 3).
    3. Regions, smallest first, get a budget in proportion to V_i (Eq. 4, see `strata.allocate`).
    4. Each region gives that many samples. What the budgets leave over is drawn at random from uncut samples
       not taken, then from the hardest ones, easiest first, so that the coreset has exactly m samples. (The
       released code never returns a cut sample and fails where it would have to.)

    The draws, the picks and the fill each have a random stream of their own, so what is verified depends
    neither on the budget nor on `pick`: one set of target scores serves every pruning rate.

    Args:
        n: the pool's size, in samples.
        budget: m, in samples, 0 <= m <= n.
        rng: the source of all randomness.
        scores: (n,) speculative scores >= 0, higher is harder.
        verify: positions (k,) sorted -> target scores (k,); called once, or once a round. None: V_i = 1
            everywhere.
        num_regions: K; None: as many as the pool bears, `verification.default_regions`. The paper has 50.
        verification_budget: b_v, samples of a region that the target scores; regions of b_v or fewer are not
            verified. None: `verification.default_verified`. The paper has 10.
        verification: "fixed", b_v of every region, or "adaptive": at most K * b_v, where V_i is least certain
            (`verification.adaptive`).
        verification_error: where adaptive verification stops: the summed standard errors of the V_i as a
            share of their sum.
        verified_at_most: where adaptive verification stops at the latest, K samples or more, or none where K
            is 1; None: K * b_v.
        allocation: "released" or "paper", the budget rule.
        pick: "top", highest score first as released, or "random", inside a region.
        hard_cutoff: fraction of the pool set aside as hardest, in [0, 1).
        normalise: "minmax" verifies the whole pool and scales both sides to [0, 1] before the ratio, as the
            released script does. For experiments: it needs the very pass over the target that STAFF avoids.

    Returns:
        Selection with regions; `filled` and `filled_from_cut` count step 4.

    Raises:
        ValueError: nan among the scores, an unknown option, or a region whose drawn draft scores are all 0
            while the target's are not (V_i would be infinite).
    """
    scores = check_scores(scores, n)
    if not 0 <= budget <= n:
        raise ValueError(f"the budget must be between 0 and the pool's {n} samples; found {budget}")
    if (scores < 0).any():
        raise ValueError("scores must not be negative: an effort score is a norm")
    if pick not in PICKS:
        raise ValueError(f"pick must be one of {', '.join(PICKS)}; found {pick!r}")
    if normalise not in NORMALISATIONS:
        raise ValueError(f"normalise must be one of {NORMALISATIONS}; found {normalise!r}")
    if verification not in VERIFICATIONS:
        raise ValueError(f"verification must be one of {', '.join(VERIFICATIONS)}; found {verification!r}")
    if num_regions is None:
        num_regions = verifying.default_regions(n)
    if verification_budget is None:
        verification_budget = verifying.default_verified(n, num_regions)
    if verification_budget < 1:
        raise ValueError(f"verification_budget must be 1 or more; found {verification_budget}")
    draws, picks, fill = rng.spawn(3)

    kept, cut = set_hardest_aside(scores, hard_cutoff)
    edges, region_of_kept = split(scores[kept], num_regions)
    members = [kept[places] for places in members_of(region_of_kept, num_regions)]
    sizes = np.array([len(positions) for positions in members])

    if verify is not None and normalise == "minmax":
        target = _minmax(verifying.ask(verify, np.arange(n)))
        ratios = verifying.fixed(_minmax(scores), members, verification_budget, target.__getitem__, draws)
        ratios = dataclasses.replace(ratios, verified=np.arange(n))
    elif verify is None:
        ratios = verifying.unverified(len(members))
    elif verification == "fixed":
        ratios = verifying.fixed(scores, members, verification_budget, verify, draws)
    else:
        most = num_regions * verification_budget if verified_at_most is None else verified_at_most
        ratios = verifying.adaptive(scores, members, verification_error, most, verify, draws)
    verified = ratios.verified
    budgets = allocate(ratios.values, sizes, budget, allocation)
    even = allocate(np.ones(num_regions), sizes, budget, allocation) if len(verified) else None

    is_taken = np.zeros(n, bool)
    for positions, region_budget in zip(members, budgets, strict=True):
        is_taken[_pick(scores, positions, int(region_budget), pick, picks)] = True
    missing = budget - int(np.count_nonzero(is_taken))
    spare = kept[~is_taken[kept]]
    filled = fill.choice(spare, min(missing, len(spare)), replace=False) if missing else spare[:0]
    from_cut = take_back(scores, cut, missing - len(filled))
    is_taken[filled] = is_taken[from_cut] = True

    region_of = np.full(n, -1, np.int64)
    region_of[kept] = region_of_kept
    selected = np.bincount(region_of[is_taken & (region_of >= 0)], minlength=num_regions)
    drawn = np.bincount(region_of[verified[region_of[verified] >= 0]], minlength=num_regions)
    regions = tuple(
        Region(
            lower=float(edges[i]),
            upper=float(edges[i + 1]),
            size=int(sizes[i]),
            verified=int(drawn[i]),
            ratio=float(ratios.values[i]),
            ratio_low=float(ratios.low[i]),
            ratio_high=float(ratios.high[i]),
            budget=int(budgets[i]),
            selected=int(selected[i]),
            even_budget=None if even is None else int(even[i]),
        )
        for i in range(num_regions)
    )
    weights = None
    if pick == "random":
        weights = weights_of(members, budgets, n, len(filled) / max(len(spare), 1))
    counts = len(filled), len(from_cut)
    return Selection(np.flatnonzero(is_taken), regions, region_of, verified, *counts, weights)


def _pick(
    scores: np.ndarray, positions: np.ndarray, region_budget: int, pick: str, picks: np.random.Generator
) -> np.ndarray:
    if pick == "random":
        return picks.choice(positions, region_budget, replace=False)
    return positions[highest(scores[positions], region_budget)]


def _minmax(scores: np.ndarray) -> np.ndarray:
    spread = scores.max() - scores.min()
    return (scores - scores.min()) / spread if spread else np.zeros_like(scores)
