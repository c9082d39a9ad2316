"""Which samples the target scores, and what that says of each region: V_i, its interval (STAFF, Eq. 3).

fixed: b_v samples of every region, as the paper has it. adaptive: a few samples of every region, then more
where V_i is least certain, until all of them are known well enough. There V_i is drawn towards a smooth curve
over the regions, since neighbours in score are neighbours in V. ClusterUCB (arXiv 2506.10288) spends a budget
of gradients over clusters too, by an upper confidence bound on the mean; here the ratios themselves are
wanted, so what is spent follows their error. Neither looks at the pruning rate or the budget: one set of
target calls serves every rate. numpy alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from staff.methods.strata import share_by_size

Verify = Callable[[np.ndarray], np.ndarray]

MOST_REGIONS, MOST_VERIFIED = 50, 10  # K and b_v of the paper
FIRST = 2  # samples of each region that adaptive verification begins with
BORROWED = (
    9  # degrees of freedom of a region's spread that come from all regions: as many as ten samples have
)
STIFFNESS = 10.0 ** np.arange(0, 7, 0.5)  # of the curve: from none to a straight line


@dataclass(frozen=True)
class Ratios:
    """V_i of each region. Axes: K regions.

    Attributes:
        values, low, high: (K,) V_i and its interval of 95 %; nan where nothing is known.
        verified: positions that the target scored, sorted.
    """

    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    verified: np.ndarray


def default_regions(n: int) -> int:
    """K for a pool of n samples: the paper's 50 from 12,500 on, and below that as many as hold some dozen
    each.

    With equal widths the outer regions are thin. So K grows with the root of n: at 2,000 samples 20 regions,
    at 500 ten, and those that hold nine tenths of the uncut pool have more samples than are drawn from each.
    """
    return int(np.clip(round((n / 5) ** 0.5), 2, MOST_REGIONS))


def default_verified(n: int, num_regions: int) -> int:
    """b_v: K * b_v is a tenth of the pool or less, but for small pools, of which some two dozen samples are
    drawn."""
    tenth, least = round(0.1 * n / max(num_regions, 1)), -(-24 // max(num_regions, 1))
    return int(np.clip(max(tenth, least), 4, MOST_VERIFIED))


def limits_of_groups(sizes: np.ndarray, num_regions: int | None, count: int | None) -> np.ndarray:
    """(g,) samples that adaptive verification scores of each group at most: K * b_v of all together, by size.

    Args:
        sizes: (g,) samples a group.
        num_regions, count: K and b_v of each group where they are given; else those of a pool of that size.
    """
    n = int(sizes.sum())
    num_regions = num_regions or default_regions(n)
    return share_by_size(sizes, min(n, num_regions * (count or default_verified(n, num_regions))))


def unverified(num_regions: int) -> Ratios:
    """V_i = 1 everywhere, where nothing is asked of a target."""
    nothing = np.full(num_regions, np.nan)
    return Ratios(np.ones(num_regions), nothing, nothing, np.empty(0, np.int64))


def fixed(
    scores: np.ndarray, members: list[np.ndarray], count: int, verify: Verify, draws: np.random.Generator
) -> Ratios:
    """Draw b_v samples of every region that has more, score them all in one call, take the ratios of sums.

    Args:
        scores: (n,) of the draft.
        members: positions of each region.
        count: b_v.
        verify: positions, sorted -> scores of the target.
    """
    drawn = {
        region: _draw(positions, count, draws)
        for region, positions in enumerate(members)
        if len(positions) > count
    }
    nothing = np.full(len(members), np.nan)
    if not drawn:
        return Ratios(nothing, nothing, nothing, np.empty(0, np.int64))
    verified = np.sort(np.concatenate(list(drawn.values())))
    target = np.full(len(scores), np.nan)
    target[verified] = ask(verify, verified)
    taken = [drawn.get(region, verified[:0]) for region in range(len(members))]
    values = np.array([ratio(scores, target, positions, region) for region, positions in enumerate(taken)])
    sizes, counts = (np.array([*map(len, parts)]) for parts in (members, taken))
    left = 1 - counts / np.maximum(sizes, 1)  # what a draw without replacement leaves open of a region
    errors = np.sqrt(left * _spreads(scores, target, taken, values) / np.maximum(counts, 1))
    half = np.where(counts > 0, _student(counts - 1 + BORROWED) * errors, np.nan)
    return Ratios(values, values * np.exp(-half), values * np.exp(half), verified)


def _draw(positions: np.ndarray, count: int, draws: np.random.Generator) -> np.ndarray:
    return draws.choice(positions, count, replace=False)


def adaptive(
    scores: np.ndarray,
    members: list[np.ndarray],
    error: float,
    most: int,
    verify: Verify,
    draws: np.random.Generator,
) -> Ratios:
    """Verify where it matters: until the ratios' errors, taken together, are small enough.

    Every region begins with FIRST samples (one, where `most` holds no more). Then those whose V_i has the
    largest error get one more each, a quarter of the regions in a round, until the sum of errors is at most
    `error` of the sum of ratios, or `most` samples are scored. In a region samples come in an order drawn
    beforehand, so a run that stops earlier scores a part of what one that goes on scores.

    Args:
        scores: (n,) of the draft.
        members: positions of each region.
        error: where to stop, as a share of the ratios' sum; one standard error.
        most: samples at most, over all regions; as many as there are regions, or 0.
        verify: positions, sorted -> scores of the target; called once a round.
    """
    orders = [
        own.permutation(positions) for own, positions in zip(draws.spawn(len(members)), members, strict=True)
    ]
    sizes = np.array([*map(len, members)])
    counts = np.minimum(sizes, min(FIRST if FIRST * len(members) <= most else 1, most))
    target = np.full(len(scores), np.nan)
    while True:
        taken = [order[:count] for order, count in zip(orders, counts, strict=True)]
        verified = np.sort(np.concatenate([*taken, np.empty(0, np.int64)]))
        new = verified[np.isnan(target[verified])]
        if len(new):
            target[new] = ask(verify, new)
        values, errors = smooth_ratios(scores, target, taken, sizes)
        room = np.where(counts < sizes, errors * values, -1.0)
        known = sizes > 0
        enough = (errors * values)[known].sum() <= error * values[known].sum()
        spare = min(most - int(counts.sum()), max(4, len(members) // 4))
        if enough or spare <= 0 or room.max(initial=-1) <= 0:
            half = np.where(known, _student(counts - 1 + BORROWED) * errors, np.nan)
            values = np.where(known, values, np.nan)
            return Ratios(values, values * np.exp(-half), values * np.exp(half), verified)
        worst = np.argsort(-room, kind="stable")[:spare]
        counts[worst[room[worst] > 0]] += 1


def ask(verify: Verify, positions: np.ndarray) -> np.ndarray:
    """The target's scores of some positions.

    Raises:
        ValueError: not one usable score for each.
    """
    answer = np.asarray(verify(positions))
    if answer.shape != positions.shape:
        raise ValueError(
            f"verify was asked for {len(positions)} positions and must give one score for each; found shape "
            f"{answer.shape}"
        )
    is_bad = ~np.isfinite(answer) | (answer < 0)
    if is_bad.any():
        raise ValueError(
            f"the target gave no usable score to {is_bad.sum()} of {len(positions)} samples (positions "
            f"{positions[is_bad][:5].tolist()})"
        )
    return answer


def ratio(scores: np.ndarray, target: np.ndarray, positions: np.ndarray, region: int) -> float:
    """V_i: the sum of the target's scores over the sum of the draft's, of some samples (Eq. 3).

    Raises:
        ValueError: the draft's are all 0 and the target's are not.
    """
    if not len(positions):
        return np.nan
    above, below = target[positions].sum(), scores[positions].sum()
    if below == 0 and above > 0:
        raise ValueError(
            f"region {region} has draft scores of 0 where the target's are not (positions "
            f"{positions[:5].tolist()}): "
            "V_i would be infinite; a draft that has learnt these samples by heart was tuned too long"
        )
    return float(above / below) if below > 0 else 1.0


def smooth_ratios(
    scores: np.ndarray, target: np.ndarray, taken: list[np.ndarray], sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """V_i of every region from the samples of all of them, and its relative standard error.

    The logarithms of the V_i are a curve whose second differences are normal, seen through the spread of the
    samples (Whittaker 1923). How stiff it is follows from the data: an average over STIFFNESS by restricted
    likelihood. What a region's own samples say of themselves is known for sure, so only the unseen rest of it
    follows the curve.

    Returns:
        (values, errors), (K,) each.
    """
    raw = np.array([ratio(scores, target, positions, i) for i, positions in enumerate(taken)])
    counts = np.array([*map(len, taken)])
    has_ratio = raw > 0
    if not has_ratio.any():
        return np.ones(len(raw)), np.zeros(len(raw))
    spreads = np.maximum(_spreads(scores, target, taken, raw), 1e-12)
    logs = np.log(np.where(has_ratio, raw, 1.0))
    weights = np.where(has_ratio, counts / spreads, 0.0)
    bends = np.diff(np.eye(len(raw)), 2, axis=0)
    likelihoods, curves, variances = [], [], []
    for stiffness in STIFFNESS:
        inverse = np.linalg.inv(np.diag(weights) + stiffness * bends.T @ bends + 1e-9 * np.eye(len(raw)))
        curve = inverse @ (weights * logs)
        misfit = (weights * logs * (logs - curve)).sum()
        likelihoods.append((len(bends) * np.log(stiffness) + np.linalg.slogdet(inverse)[1] - misfit) / 2)
        curves.append(curve)
        variances.append(inverse.diagonal())
    belief = np.exp(np.array(likelihoods) - max(likelihoods))[:, None]
    belief /= belief.sum()
    curve = (belief * curves).sum(0)
    variance = (belief * (variances + (np.array(curves) - curve) ** 2)).sum(0)
    seen = counts / np.maximum(sizes, 1)
    values = np.where(has_ratio, seen * np.nan_to_num(raw) + (1 - seen) * np.exp(curve), np.exp(curve))
    values = np.where((raw == 0), 0.0, values)
    errors = np.sqrt((1 - seen) ** 2 * variance + (1 - seen) * spreads / np.maximum(sizes, 1))
    return values, errors


def _spreads(
    scores: np.ndarray, target: np.ndarray, taken: list[np.ndarray], ratios: np.ndarray
) -> np.ndarray:
    """(K,) relative variance of a target score about V_i times the draft's, each region's own drawn towards
    all regions'."""
    squares, freedom = np.zeros(len(taken)), np.zeros(len(taken))
    for region, positions in enumerate(taken):
        if len(positions) > 1 and target[positions].mean() > 0:
            off = (target[positions] - ratios[region] * scores[positions]) / target[positions].mean()
            squares[region], freedom[region] = (off**2).sum(), len(positions) - 1
    common = squares.sum() / max(freedom.sum(), 1)
    return (squares + BORROWED * common) / (freedom + BORROWED)


def _student(freedom: np.ndarray) -> np.ndarray:
    """The 97.5 % point of Student's t, to 0.001 from 9 degrees of freedom on (Cornish and Fisher's
    expansion)."""
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
