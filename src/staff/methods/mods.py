"""Good rows, spread, and of the rest those that the model still answers badly (MoDS, arXiv 2311.15653)."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from staff.methods.features import check_features, farthest_first
from staff.methods.strata import check_scores, highest
from staff.types import Selection

logger = logging.getLogger(__name__)

Rewards = Callable[[np.ndarray, np.ndarray], np.ndarray]


def mods(
    n: int,
    *,
    budget: int,
    rng: np.random.Generator,
    features: np.ndarray,
    quality: np.ndarray,
    rewards: Rewards,
    alpha: float = 0.0,
    beta: float | None = None,
    seed_share: float = 0.05,
) -> Selection:
    """Keep a spread seed of good samples, and then the good ones that a target tuned on the seed answers
    badly (MoDS, Du et al. 2023, arXiv 2311.15653).

    Good is a quality above alpha. The seed is k-center over the good samples' prompts. The target is tuned
    on it (`--target-epochs`) and answers the prompts of all other good samples; where an answer's reward is
    below beta the sample is necessary. k-center over those, begun with the seed, fills up to m. The seed does
    not hang on m, so one tuned target and its answers serve every rate; at a rate that keeps no more than the
    seed it is neither tuned nor asked.

    With `--quality-model` quality and reward are that model's logit, of a row's own answer and of the
    target's. With `--quality-column` the column is the quality, 0 or more, and a target's answer is worth
    that times its likeness to the row's own (`--likeness`, as a share): no model then judges anything.

    Where ours departs: m is given, where the paper keeps all that is necessary; so the seed is a share of the
    pool, and where too few samples are necessary the other good ones fill up by the same k-center, and after
    those the others, best quality first, both counted. Answers are greedy, not beams. No sample counts twice.
    Prompts are compared by the draft's mean last hidden states, not BERT's. Alpha and beta are 0 in the paper
    on Alpaca, and -1 on a mixture.

    Costs a forward pass of the draft over the prompts, of the quality model over the pool and over the
    answers, the tuning of the target on the seed, and the answers, which by the clock is most of it.

    Args:
        n: the pool's size, in samples.
        budget: m, in samples, 0 <= m <= n.
        rng: draws the first sample of the seed.
        features: (n, d) float, of the prompts.
        quality: (n,) finite numbers.
        rewards: (seed, positions) -> (k,) rewards of the answers to these positions by a target tuned on the
            seed; -inf for an answer without a word.
        alpha: quality above which a sample is good.
        beta: reward below which it is necessary; None: as alpha.
        seed_share: share of the pool that is the seed, at least one sample.

    Returns:
        Selection; `filled` counts good samples that were not necessary, `filled_from_cut` those not good.

    Raises:
        ValueError: a seed_share out of (0, 1], or nan among the numbers.
    """
    if np.shape(quality) != (n,):
        raise ValueError(f"quality must be one number a sample, ({n},); found shape {np.shape(quality)}")
    features, quality = check_features(features, n), check_scores(quality, n)
    if not 0 < seed_share <= 1:
        raise ValueError(f"seed_share must be a share of the pool, in (0, 1]; found {seed_share}")
    if budget in (0, n):
        return Selection(np.arange(budget))
    good = np.flatnonzero(quality > alpha)
    if len(good) in (0, n):
        which = "no sample" if len(good) == 0 else "every sample"
        logger.warning(
            "mods: %s has a quality above alpha=%g; they go from %.3g to %.3g",
            *(which, alpha, quality.min(), quality.max()),
        )
    picks, filled = np.empty(0, np.int64), 0
    if len(good):
        size = min(max(1, round(seed_share * n)), len(good))
        first = int(rng.integers(len(good)))
        picks = good[farthest_first(features[good], min(size, budget), [first])]
        if size < min(budget, len(good)):
            others = np.setdiff1d(good, picks)
            found = np.asarray(rewards(np.sort(picks), others), np.float64)
            if found.shape != others.shape or np.isnan(found).any():
                raise ValueError(f"{np.isnan(found).sum()} of {len(others)} rewards are nan")
            is_necessary = found < (alpha if beta is None else beta)
            picks = _spread(features, picks, others[is_necessary], budget)
            filled = max(0, min(budget - len(picks), int((~is_necessary).sum())))
            picks = _spread(features, picks, others[~is_necessary], budget)
    missing = budget - len(picks)
    bad = np.flatnonzero(quality <= alpha)
    back = bad[highest(quality[bad], missing)]
    return Selection(np.sort(np.concatenate([picks, back])), filled=filled, filled_from_cut=missing)


def _spread(features: np.ndarray, picks: np.ndarray, others: np.ndarray, budget: int) -> np.ndarray:
    """The picks, and of the others again and again the one farthest from all, until there are m."""
    both = np.concatenate([picks, others])
    return both[farthest_first(features[both], min(budget, len(both)), np.arange(len(picks)))]
