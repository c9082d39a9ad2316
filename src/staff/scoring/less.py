"""How like each sample's gradient is to those of a few validation rows (LESS, arXiv 2402.04333). torch
alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from staff.data.tokens import Pool, batches, collate
from staff.scoring.gradnorm import gradient_matrix, inner_products
from staff.scoring.scorer import Scorer


def mean_direction(scorer: Scorer, validation: Pool) -> list[torch.Tensor]:
    """The mean of the validation rows' gradients, each scaled to length 1.

    The mean cosine between a sample and the validation rows is then one inner product with it:
    mean_v cos(g, g_v) = <g / |g|, mean_v g_v / |g_v|>.

    Args:
        scorer: its scope says on which weights; LESS looks at the LoRA matrices (scope "lora").
        validation: a few dozen rows of the task.

    Returns:
        (1, O, I) for each site, in float32 or wider.
    """
    total: list[torch.Tensor] = []
    for scaled in _scaled(scorer, validation):
        total = [before + now for before, now in zip(total, scaled, strict=True)] if total else scaled
    return [matrix[None] / len(validation) for matrix in total]


def directions(scorer: Scorer, validation: Pool) -> list[torch.Tensor]:
    """The validation rows' gradients kept apart, each scaled to length 1: (q, O, I) for each site.

    They stay in memory while the pool is scored, 4 bytes times the scope's weights a row.
    """
    return [torch.stack(matrices) for matrices in zip(*_scaled(scorer, validation), strict=True)]


def _scaled(scorer: Scorer, validation: Pool) -> Iterator[list[torch.Tensor]]:
    for position in range(len(validation)):
        matrices = scorer.measure(collate(validation, [position], scorer.device), gradient_matrix)
        norm = torch.stack([matrix.square().sum() for matrix in matrices]).sum().sqrt()
        yield [matrix[0] / norm.clamp(min=torch.finfo(norm.dtype).tiny) for matrix in matrices]


def similarities(
    scorer: Scorer,
    pool: Pool,
    directions: list[torch.Tensor],
    positions: np.ndarray,
    batch_tokens: int,
    on_samples: Callable[[int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Cosine between each sample's gradient and each validation row's, or the mean over the rows.

    LESS stores random projections of all gradients, divided by Adam's second moments, at several checkpoints;
    here the inner products come out of the pass itself, exact, so nothing is projected or stored. They are
    taken at the end of the draft's tuning, on plain gradients.

    Args:
        directions: (q, O, I) for each site: of `directions`, or of `mean_direction`, where q is 1.
        positions, batch_tokens, on_samples: as for `Scorer.scores`.

    Returns:
        "similarities" (k, q) float32 in [-1, 1], in the order asked for; 0 for a sample without a gradient.
    """
    cosines = np.zeros((len(positions), len(directions[0])), np.float32)
    for places in batches(pool.lengths[positions], 1 if scorer.one_by_one else batch_tokens):
        batch = collate(pool, positions[places], scorer.device)
        # a (B, q + 1) for each site: the inner products with the directions, and with itself
        products = torch.stack(scorer.measure(batch, inner_products(directions))).sum(0)
        dots, squares = products[:, :-1], products[:, -1:]
        cosines[places] = torch.where(squares > 0, dots / squares.sqrt(), 0.0).float().cpu().numpy()
        if on_samples:
            on_samples(len(places))
    return {"similarities": cosines}


def similarity(scorer: Scorer, pool: Pool, mean: list[torch.Tensor], *where: Any) -> dict[str, np.ndarray]:
    """ "similarity" (k,), the mean over the validation rows; see `similarities`."""
    return {"similarity": similarities(scorer, pool, mean, *where)["similarities"][:, 0]}
