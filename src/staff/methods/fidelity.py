"""How faithful a draft is: how alike draft and target rank the pool, told from the samples that were
verified.

Verified samples are drawn evenly from regions of unequal size, so each stands for |B_i| / b_i samples of the
pool, and each pair for as many pairs. Intervals are of 95 %, by a bootstrap inside regions that knows how few
were drawn and of how many (Rao and Wu 1988). numpy alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

LEAST_VERIFIED = 20  # verified samples below which nothing is said
REPLICATES = 500
PAIRED = 1000  # samples at most that pairs are counted over

# ends of intervals that verdicts hang on, see `judge`
GOOD, GOOD_REST, USABLE, NOTHING_LEFT = 0.8, 0.4, 0.6, 0.2
FREE = {"length": "the responses' length", "loss": "the draft's loss"}

ADVICE = {  # by verdict
    "poor": "don't trust this draft: --method direct scores the target itself, --method random costs "
    "nothing; or another --draft or --scope (`staff drafts` compares some)",
    "unknown": "more --verification-budget or fewer --num-regions say more; --method random costs nothing",
}

Estimate = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class Fidelity:
    """What the verified samples say of a draft; an Estimate is None where it is not defined.

    Attributes:
        spearman, kendall: rank correlation of draft and target.
        without_length: Spearman's, with the rank of the response's length taken out of both.
        adjusted_rand: agreement of the draft's regions with the target's, 0 by chance; the plain Rand index
            and its chance level stand beside it.
        length, loss: Spearman's of the target with what costs nothing: the response's length, the draft's
            loss.
        samples: that this was told from.
        pool_share: of the pool, that these samples stand for: the uncut samples of verified regions.
        verdict: "good", "usable", "poor", or "unknown" where too few were verified.
        reason: the verdict in words.
    """

    samples: int
    pool_share: float
    verdict: str
    reason: str
    spearman: Estimate | None = None
    kendall: Estimate | None = None
    without_length: Estimate | None = None
    adjusted_rand: Estimate | None = None
    rand: float | None = None
    rand_by_chance: float | None = None
    length: Estimate | None = None
    loss: Estimate | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def shown(self) -> str:
        """Spearman's rank correlation with its interval, in words."""
        return "no rank correlation" if self.spearman is None else f"Spearman {within(self.spearman)}"


def within(estimate: Estimate) -> str:
    """A value with its interval, for people."""
    return "{:.2f} ({:.2f} to {:.2f})".format(*estimate)


def fidelity(
    regions: np.ndarray,
    sizes: np.ndarray,
    n: int,
    draft: np.ndarray,
    target: np.ndarray,
    length: np.ndarray | None = None,
    loss: np.ndarray | None = None,
    partition: np.ndarray | None = None,
    firsts: Sequence[int] = (0,),
) -> Fidelity:
    """Judge a draft by verified samples.

    Where a coreset is chosen inside groups, samples are ranked and paired inside them too: what a draft knows
    of the groups themselves decides nothing.

    Args:
        regions: (k,) the region of each verified sample.
        sizes: (K,) |B_i|, samples of each region.
        n: the pool's size, in samples.
        draft, target: (k,) scores of the verified samples.
        length: (k,) tokens of their responses; None where they are not known.
        loss: (k,) the draft's losses of them.
        partition: (k,) the draft's regions, where the samples were not drawn by them.
        firsts: the first region of each group.
    """
    partition = regions if partition is None else partition
    order = np.argsort(regions, kind="stable")[:: max(1, -(-len(regions) // PAIRED))]
    regions, partition, draft, target = (
        np.asarray(part)[order] for part in (regions, partition, draft, target)
    )
    drawn = np.bincount(regions, minlength=len(sizes))
    share = float(np.asarray(sizes)[drawn > 0].sum() / n)
    if len(regions) < LEAST_VERIFIED:
        few = f"{len(regions)} samples were verified, and {LEAST_VERIFIED} are the least that tell"
        few = f"too few to say: {few}"
        return Fidelity(len(regions), share, "unknown", few)
    weights = _replicates(regions, np.asarray(sizes), drawn)
    group = np.searchsorted(firsts, partition, "right") - 1
    pairs = _pair_weights(regions, np.asarray(sizes), drawn) * (group[:, None] == group)
    known = {"length": length, "loss": loss}
    beside = {name: np.asarray(part, float)[order] for name, part in known.items() if part is not None}
    ranks = {
        name: _ranks(part, weights, group)
        for name, part in {"draft": draft, "target": target, **beside}.items()
    }

    def rank_correlation(first: str, second: str) -> np.ndarray:
        return _correlation(ranks[first], ranks[second], weights)

    both = rank_correlation("draft", "target")
    out = None
    if "length" in ranks:
        out = _partial(both, rank_correlation("draft", "length"), rank_correlation("target", "length"))
    of_target = np.empty_like(partition)
    for places in (np.flatnonzero(group == each) for each in np.unique(group)):
        first = firsts[group[places[0]]]
        of_target[places] = first + _equal_widths(target[places], int(partition[places].max()) + 1 - first)
    agreement, plain, chance = _rand(partition, of_target, weights, pairs)
    estimates: dict[str, Any] = {
        "spearman": _interval(both),
        "kendall": _interval(_kendall(draft, target, weights, pairs)),
        "without_length": None if out is None else _interval(out),
        "adjusted_rand": _interval(agreement),
        **{name: _interval(rank_correlation(name, "target")) for name in beside},
    }
    better = []
    for name in beside:
        lead = np.abs(rank_correlation(name, "target")) - both
        if lead[0] - 1.96 * _spread(lead) > 0:
            better.append(FREE[name])
    verdict, reason = judge(estimates, better)
    rand: dict[str, Any] = {"rand": _known(plain[0]), "rand_by_chance": _known(chance[0])}
    return Fidelity(len(regions), share, verdict, reason, **estimates, **rand)


def judge(estimates: Mapping[str, Estimate | None], better: Sequence[str] = ()) -> tuple[str, str]:
    """The verdict on a draft and why, by the ends of the intervals and not by the points.

    The thresholds are from `experiments/fidelity` (four tasks, drafts made worse step by step): from a rank
    correlation of 0.6 on the budgets are right to some twentieth of m, below it to a tenth; only from about
    0.8 on, with something left once length is taken out, does a coreset find more of the target's own than
    chance does.

    Args:
        estimates: of Fidelity, by name.
        better: free predictors that rank the samples better than the draft beyond doubt.
    """
    rank, rest = estimates["spearman"], estimates.get("without_length")
    if rank is None:
        return "unknown", "not defined: all scores of one side are equal"
    if better:
        return (
            "poor",
            f"{' and '.join(better)} alone rank{'s' * (len(better) == 1)} the samples better than the draft",
        )
    if rank[2] < USABLE:
        return "poor", f"its rank correlation is below {USABLE:g} beyond doubt"
    if rest is not None and rest[2] < NOTHING_LEFT:
        return "poor", "it knows nothing but the responses' length"
    if rank[1] >= GOOD and (rest is None or rest[1] >= GOOD_REST):
        return "good", f"its rank correlation is above {GOOD:g} beyond doubt, and not for the length alone"
    if rank[1] >= USABLE and (rest is None or rest[1] > 0):
        return "usable", f"its rank correlation is above {USABLE:g} beyond doubt"
    return "unknown", f"the interval is too wide to say: {rank[1]:.2f} to {rank[2]:.2f}"


def _replicates(regions: np.ndarray, sizes: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """(1 + REPLICATES, k) weights: first those of the samples as drawn, |B_i| / b_i, then of the bootstrap.

    Of b_i samples b_i - 1 are drawn again, with replacement, and the weights are shrunk to what is known of a
    region of which b_i of |B_i| were seen (Rao and Wu 1988): where all were seen, nothing is uncertain. One
    sample says nothing of its region's spread, so such a region is taken together with the next.
    """
    rng = np.random.default_rng(0)  # equal samples give equal intervals
    weights = np.repeat((sizes[regions] / drawn[regions])[None], 1 + REPLICATES, 0)

    def is_alone(joint: list[int]) -> bool:
        return bool(drawn[joint].sum() == 1 < sizes[joint].sum())

    together: list[list[int]] = []
    for region in np.flatnonzero(drawn).tolist():
        if together and is_alone(together[-1]):
            together[-1].append(region)
        else:
            together.append([region])
    if len(together) > 1 and is_alone(together[-1]):
        together[-2:] = [together[-2] + together[-1]]
    for joint in together:
        places, count = np.flatnonzero(np.isin(regions, joint)), int(drawn[joint].sum())
        if count == 1:  # all that there is
            continue
        again = rng.multinomial(count - 1, np.full(count, 1 / count), REPLICATES)
        seen = np.sqrt(1 - count / max(int(sizes[joint].sum()), count))
        weights[1:, places] *= 1 - seen + seen * count / (count - 1) * again
    return weights


def _pair_weights(regions: np.ndarray, sizes: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """(k, k) what the product of two samples' weights is multiplied by to count pairs of the pool: 0 for a
    sample with itself."""
    counts, of = drawn[regions].astype(float), sizes[regions].astype(float)
    inside = np.divide((of - 1) * counts, of * (counts - 1), out=np.zeros(len(of)), where=counts > 1)
    pairs = np.where(regions[:, None] == regions, inside, 1.0)
    np.fill_diagonal(pairs, 0.0)
    return pairs


def _ranks(values: np.ndarray, weights: np.ndarray, group: np.ndarray) -> np.ndarray:
    """(r, k) weighted ranks inside groups: the share of a group below a value, and half of what is equal to
    it."""
    order = np.lexsort((values, group))
    starts = np.r_[True, np.diff(group[order]) > 0]
    firsts = np.flatnonzero(starts | np.r_[True, np.diff(values[order]) > 0])
    of_value = np.add.reduceat(weights[:, order], firsts, axis=1)
    middle = np.cumsum(of_value, 1) - of_value / 2
    counts = np.diff(np.r_[firsts, len(values)])
    ranks = np.empty_like(weights)
    ranks[:, order] = np.repeat(middle, counts, axis=1)
    for each in np.unique(group):
        places = np.flatnonzero(group == each)
        total = weights[:, places].sum(1, keepdims=True)
        ranks[:, places] -= (weights[:, places] * ranks[:, places]).sum(1, keepdims=True) / total
        ranks[:, places] /= total
    return ranks


def _correlation(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(r,) weighted correlations; nan where one side is constant."""
    shares = weights / weights.sum(1, keepdims=True)
    first, second = (part - (shares * part).sum(1, keepdims=True) for part in (first, second))
    with np.errstate(invalid="ignore", divide="ignore"):
        norms = np.sqrt((shares * first**2).sum(1) * (shares * second**2).sum(1))
        return np.where(norms > 0, (shares * first * second).sum(1) / norms, np.nan)


def _partial(both: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Correlations with a third taken out of both sides; 0 where the first is nothing but the third."""
    with np.errstate(invalid="ignore", divide="ignore"):
        rest = (both - first * second) / np.sqrt((1 - first**2) * (1 - second**2))
    return np.where(1 - first**2 < 1e-9, 0.0, rest)


def _over_pairs(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    return ((weights @ values) * weights).sum(1)


def _kendall(first: np.ndarray, second: np.ndarray, weights: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """(r,) Kendall's tau b."""
    one, other = (np.sign(part[:, None] - part) for part in (first, second))
    untied = _over_pairs(weights, pairs * one**2) * _over_pairs(weights, pairs * other**2)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(untied > 0, _over_pairs(weights, pairs * one * other) / np.sqrt(untied), np.nan)


def _rand(
    first: np.ndarray, second: np.ndarray, weights: np.ndarray, pairs: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(r,) adjusted Rand index of two partitions, the plain one, and what chance gives it (Hubert and Arabie
    1985)."""
    one, other = (part[:, None] == part for part in (first, second))
    total, in_one, in_other, in_both = (
        _over_pairs(weights, pairs * part) for part in (np.ones_like(one), one, other, one & other)
    )
    by_chance = in_one * in_other / total
    with np.errstate(invalid="ignore", divide="ignore"):
        adjusted = (in_both - by_chance) / ((in_one + in_other) / 2 - by_chance)
    return adjusted, *((total + 2 * part - in_one - in_other) / total for part in (in_both, by_chance))


def _equal_widths(scores: np.ndarray, count: int) -> np.ndarray:
    """(k,) the interval of each score, of `count` of equal width from the lowest to the highest."""
    spread = np.ptp(scores)
    places = (scores - scores.min()) / (spread if spread else 1) * count
    return np.clip(np.ceil(places).astype(int) - 1, 0, count - 1)


def _interval(replicates: np.ndarray) -> Estimate | None:
    """The first value with 95 % on Fisher's scale, where the spread of a correlation does not hang on its
    size."""
    value = replicates[0]
    if not np.isfinite(value):
        return None
    on_scale = np.arctanh(np.clip(replicates, -1 + 1e-9, 1 - 1e-9))
    middle, half = on_scale[0], 1.96 * _spread(on_scale)
    return float(value), float(np.tanh(middle - half)), float(np.tanh(middle + half))


def _spread(replicates: np.ndarray) -> float:
    """The standard deviation over the bootstrap, of those in which the figure is defined."""
    known = replicates[1:][np.isfinite(replicates[1:])]
    return float(known.std(ddof=1)) if len(known) > 1 else np.inf


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
