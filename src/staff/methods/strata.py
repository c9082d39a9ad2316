"""Split a pool by score and share a budget out over the parts (STAFF, Section 3; CCS, Algorithm 1)."""

from __future__ import annotations

import numpy as np

ALLOCATIONS = ("released", "paper")


def check_scores(scores: np.ndarray, n: int, name: str = "scores") -> np.ndarray:
    """The scores as (n,) float64, or an error that names the samples that have none.

    Raises:
        ValueError: not one number a sample, or some are nan or infinite.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (n,):
        raise ValueError(f"{name} must be one number a sample, ({n},); found shape {scores.shape}")
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        named = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise ValueError(
            f"{len(bad)} of {len(scores)} {name} are nan or infinite (positions {named}): score them again "
            f"or leave them out"
        )
    return scores


def highest(scores: np.ndarray, count: int) -> np.ndarray:
    """Positions of the `count` highest scores, ascending; of equal scores the earlier positions. Linear in n.

    Args:
        scores: (n,) finite numbers.
        count: 0 <= count <= n.
    """
    if count == 0:
        return np.empty(0, np.int64)
    # a full sort of 20,000,000 scores would take seconds
    threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
    is_high = scores > threshold
    ties = np.flatnonzero(scores == threshold)
    is_high[ties[: count - np.count_nonzero(is_high)]] = True
    return np.flatnonzero(is_high)


def set_hardest_aside(scores: np.ndarray, hard_cutoff: float) -> tuple[np.ndarray, np.ndarray]:
    """Part the hardest samples from the rest: floor(hard_cutoff * n) of the highest scores, never all of
    them.

    Args:
        scores: (n,) float64, higher is harder.
        hard_cutoff: fraction of the pool set aside, in [0, 1).

    Returns:
        (kept, cut): positions, ascending. Of equal scores the later positions are cut.
    """
    if not 0 <= hard_cutoff < 1:
        raise ValueError(
            f"hard_cutoff is the fraction of the pool set aside as hardest, in [0, 1); found {hard_cutoff}"
        )
    # 1e-9: 0.29 * 100 is 28.999999999999996, and 29 samples
    num_cut = min(int(hard_cutoff * len(scores) + 1e-9), len(scores) - 1)
    if num_cut <= 0:
        return np.arange(len(scores)), np.empty(0, np.int64)
    threshold = np.partition(scores, len(scores) - num_cut)[len(scores) - num_cut]
    is_cut = scores > threshold
    ties = np.flatnonzero(scores == threshold)
    is_cut[ties[len(ties) - (num_cut - np.count_nonzero(is_cut)) :]] = True
    return np.flatnonzero(~is_cut), np.flatnonzero(is_cut)


def take_back(scores: np.ndarray, cut: np.ndarray, count: int) -> np.ndarray:
    """The `count` easiest of the samples set aside, ascending positions; of equal scores the earlier ones."""
    return cut[highest(-scores[cut], count)]


def split(scores: np.ndarray, num_regions: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut the range of the scores into intervals of equal width (STAFF, Section 3.2).

    Args:
        scores: (n,) float64.
        num_regions: K >= 1.

    Returns:
        edges, (K + 1,) float64 from the lowest score to the highest, and region_of, (n,) int64 in [0, K). A
        score on an edge belongs to the lower region, as in the released code; equal scores all fall into
        region 0.
    """
    if num_regions < 1:
        raise ValueError(f"num_regions must be 1 or more; found {num_regions}")
    if len(scores) == 0:
        return np.zeros(num_regions + 1), np.empty(0, np.int64)
    edges = np.linspace(scores.min(), scores.max(), num_regions + 1)
    edges[-1] = scores.max()
    if edges[-1] == edges[0]:
        return edges, np.zeros(len(scores), np.int64)
    # a division says where each score should fall, the edges where it does: three times as fast as a search
    # for each
    region_of = np.clip(
        ((scores - edges[0]) / (edges[-1] - edges[0]) * num_regions).astype(np.int64), 0, num_regions - 1
    )
    is_off = (scores <= edges[region_of]) | (scores > edges[region_of + 1])
    region_of[is_off] = np.searchsorted(edges[1:], scores[is_off], side="left")
    return edges, region_of


def members_of(region_of: np.ndarray, num_regions: int) -> list[np.ndarray]:
    """The positions in each region, ascending.

    Args:
        region_of: (n,) integers in [0, num_regions).
        num_regions: K.

    Returns:
        K arrays of int64 positions, empty ones included.
    """
    # numpy sorts integers of 8 and 16 bits by radix, ten times faster than wider ones
    order = np.argsort(region_of.astype(np.min_scalar_type(num_regions)), kind="stable")
    return (
        np.split(order, np.cumsum(np.bincount(region_of, minlength=num_regions))[:-1]) if num_regions else []
    )


def weights_of(members: list[np.ndarray], budgets: np.ndarray, n: int, filled: float = 0.0) -> np.ndarray:
    """1 / the probability with which each sample is drawn, where m_i of each part are drawn at random.

    Args:
        members: k arrays of positions.
        budgets: (k,) m_i.
        n: the pool's size, in samples.
        filled: share of those of all parts not drawn so that are drawn afterwards.

    Returns:
        (n,) float64; 1 for samples of no part, and of one that nothing is drawn of.
    """
    weights = np.ones(n)
    for positions, budget in zip(members, budgets, strict=True):
        if len(positions) and (budget or filled):
            chance = budget / len(positions)
            weights[positions] = 1 / (chance + (1 - chance) * filled)
    return weights


def allocate(ratios: np.ndarray, sizes: np.ndarray, budget: int, rule: str = "released") -> np.ndarray:
    """Share the selection budget out over the regions, smallest first (STAFF, Eq. 4).

    released: m_i = min(|B_i|, floor(left * V_i / sum of V over this and later regions))
    paper:    m_i = min(|B_i|, left, floor(left * V_i / regions left))

    "left" is the budget not yet granted. Regions of equal size go in the order given (lower scores first),
    empty ones are passed over. A region without a ratio gets min(|B_i|, floor(left / regions left)). Where V
    is 0 for this and all later regions they count as equal. The paper's rule has no cap by "left"; without
    it, it could grant more than m.

    Args:
        ratios: (k,) verification ratios V_i >= 0; nan where a region was not verified.
        sizes: (k,) region sizes |B_i|, in samples.
        budget: m, in samples; at most sizes.sum() can be granted.
        rule: "released" or "paper".

    Returns:
        (k,) int64 budgets, each at most its size; they may sum to less than m.

    Raises:
        ValueError: a ratio is negative or infinite, or the rule is unknown.
    """
    ratios, sizes = np.asarray(ratios, np.float64), np.asarray(sizes, np.int64)
    if rule not in ALLOCATIONS:
        raise ValueError(f"allocation must be one of {', '.join(ALLOCATIONS)}; found {rule!r}")
    bad = np.flatnonzero(np.isinf(ratios) | (ratios < 0))
    if len(bad):
        raise ValueError(
            f"region {bad[0]} has the verification ratio {ratios[bad[0]]}; it must be finite and not negative"
        )
    order = np.argsort(sizes, kind="stable")  # smallest first: what a region can't use flows on
    order = order[sizes[order] > 0]
    weights = np.nan_to_num(ratios[order], nan=0.0)
    later = np.cumsum(weights[::-1])[::-1]  # sum of V over this and later regions
    budgets = np.zeros(len(sizes), np.int64)
    left = int(budget)
    for place, region in enumerate(order):
        regions_left = len(order) - place
        if np.isnan(ratios[region]) or later[place] == 0:
            share = left / regions_left
        elif rule == "released":
            share = left * weights[place] / later[place]
        else:
            share = left * weights[place] / regions_left
        # 1e-9: 7.999999999 samples are 8 that lost a bit on the way
        budgets[region] = min(int(sizes[region]), left, int(share + 1e-9))
        left -= int(budgets[region])
    return budgets


def share_by_size(sizes: np.ndarray, budget: int) -> np.ndarray:
    """Share a budget over groups in proportion to their sizes, by largest remainder.

    Args:
        sizes: (g,) samples a group.
        budget: m, 0 <= m <= sizes.sum().

    Returns:
        (g,) int64, each at most its size, summing to m; of equal remainders the earlier group gets the
        sample.
    """
    sizes = np.asarray(sizes, np.int64)
    total = int(sizes.sum())
    if total == 0:
        return np.zeros(len(sizes), np.int64)
    shares, remainders = np.divmod(sizes * budget, total)  # whole numbers: no rounding to argue about
    shares[np.argsort(-remainders, kind="stable")[: budget - int(shares.sum())]] += 1
    return shares
