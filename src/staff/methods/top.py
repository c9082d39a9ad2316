"""Methods that need no more than one number a sample, or none at all."""

from __future__ import annotations

import numpy as np

from staff.methods.strata import check_scores, highest, weights_of
from staff.types import Selection

PARTS = ("top", "middle", "bottom")


def random(n: int, *, budget: int, rng: np.random.Generator) -> Selection:
    """Draw m samples uniformly, without replacement: the one to beat.

    Args:
        n: the pool's size, in samples.
        budget: m, in samples, 0 <= m <= n.
        rng: the source of all randomness.
    """
    weights = weights_of([np.arange(n)], np.array([budget]), n)
    return Selection(np.sort(rng.choice(n, budget, replace=False)), weights=weights)


def top(n: int, *, budget: int, rng: np.random.Generator, scores: np.ndarray, part: str = "top") -> Selection:
    """Keep the m samples at one end, or in the middle, of the order of the scores.

    GraNd and EL2N keep the highest expected gradient norm and the highest error norm (Paul et al. 2021, arXiv
    2107.07075). The paper averages ten networks early in training (EL2N) or at initialisation (GraNd); here
    one fine-tuned target gives the scores, as in STAFF's comparison. An EL2N score is the mean of |softmax -
    one-hot|_2 over a sample's response tokens, each predicted by the token before it; STAFF's released code
    takes raw logits, not shifted, which is neither EL2N nor an error.

    HES keeps the highest sum of the entropies of the 0.5 % most uncertain response tokens, at least one of
    them (openreview heVn5cNfje); a response of fewer than 400 tokens counts by its one most uncertain token.
    UPD is the mean over response tokens of sigmoid(loss) * max(0, 1 - entropy / log V), V the vocabulary's
    size (D3, arXiv 2503.11441): high where the model was sure of something else. D3 weighs it with a model's
    judgement of quality and with distances; here it stands alone. Both cost nothing beside the draft's one
    pass, and are taken on the draft as it is tuned, where the papers ask the model that is trained.

    LESS keeps the highest mean similarity of a sample's gradient to those of a few validation rows (Xia et
    al. 2024, arXiv 2402.04333; there the highest over several tasks' means, here all rows are of one).

    Args:
        n: the pool's size, in samples.
        budget: m, in samples, 0 <= m <= n.
        rng: not used; there is nothing to draw.
        scores: (n,) finite numbers, higher is harder (for LESS: more alike).
        part: "top", the highest scores; "bottom", the lowest; "middle", as many left out below as above (one
            more above, where their number is odd). Of equal scores the earlier positions are kept; in the
            middle they count as the lower ones.

    Raises:
        ValueError: nan among the scores, or an unknown part.
    """
    scores = check_scores(scores, n)
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}; found {part!r}")
    if part == "top":
        return Selection(highest(scores, budget))
    below = (n - budget) // 2 if part == "middle" else 0
    not_above = highest(-scores, below + budget)
    is_kept = np.zeros(n, bool)
    is_kept[not_above] = True
    is_kept[not_above[highest(-scores[not_above], below)]] = False
    return Selection(np.flatnonzero(is_kept))


def perplexity(
    n: int, *, budget: int, rng: np.random.Generator, scores: np.ndarray, part: str = "middle"
) -> Selection:
    """Keep the samples of middling perplexity, the best of the three parts in Marion et al. 2023 (arXiv
    2309.04564).

    The perplexity of a response is exp of its loss and orders samples as the loss does, so the loss is what
    is taken; the paper prunes pretraining text by the perplexity of all of its tokens.

    Args:
        n: the pool's size, in samples.
        budget: m, in samples, 0 <= m <= n.
        rng: not used.
        scores: (n,) mean cross-entropy over a sample's response tokens, in nats.
        part: "middle", "top" or "bottom", see `top`.
    """
    return top(n, budget=budget, rng=rng, scores=scores, part=part)


def loss_ratios(loss: np.ndarray, alone: np.ndarray) -> np.ndarray:
    """(n,) float64 losses on answers after their prompts, as multiples of those on the answers alone; 1 where
    the answer alone costs nothing."""
    loss, alone = loss.astype(np.float64), alone.astype(np.float64)
    return np.divide(loss, alone, out=np.ones_like(loss), where=alone > 0)


def ifd(
    n: int, *, budget: int, rng: np.random.Generator, scores: np.ndarray, unconditional_loss: np.ndarray
) -> Selection:
    """Keep the highest instruction-following difficulty below 1 (Superfiltering, Li et al. 2024, arXiv
    2402.00530).

    IFD = ppl(response given prompt) / ppl(response). At 1 or more the prompt did not help at all: such
    samples are dropped, as released. Where fewer than m are left, the dropped ones come back, lowest IFD
    first, and are counted; the released code then returns fewer.

    Args:
        n: the pool's size, in samples.
        budget: m, in samples, 0 <= m <= n.
        rng: not used; there is nothing to draw.
        scores: (n,) loss of the response given its prompt, mean over its tokens, in nats.
        unconditional_loss: (n,) loss of the same response without its prompt.

    Returns:
        Selection; `filled_from_cut` counts samples kept with an IFD of 1 or more.
    """
    if np.shape(unconditional_loss) != (n,):
        shape = np.shape(unconditional_loss)
        raise ValueError(f"unconditional_loss must be one number a sample, ({n},); found shape {shape}")
    # the ratio of perplexities, in logarithms: it can't overflow
    log_ifd = check_scores(scores, n) - check_scores(unconditional_loss, n)
    follows = np.flatnonzero(log_ifd < 0)
    chosen = follows[highest(log_ifd[follows], min(budget, len(follows)))]
    dropped = np.flatnonzero(log_ifd >= 0)
    missing = budget - len(chosen)
    back = dropped[highest(-log_ifd[dropped], missing)]
    return Selection(np.sort(np.concatenate([chosen, back])), filled_from_cut=missing)
