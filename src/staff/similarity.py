"""How like each sample's gradient is to those of a few validation rows (LESS, arXiv 2402.04333). torch alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from staff.gradnorm import gradient_matrix, inner_products
from staff.pool import Pool, batches, collate
from staff.score import Scorer


def mean_direction(scorer: Scorer, validation: Pool) -> list[torch.Tensor]:
    """The mean of the validation rows' gradients, each scaled to length 1.

    The mean cosine between a sample and the validation rows is then one inner product with it:
    mean_v cos(g, g_v) = <g / |g|, mean_v g_v / |g_v|>.

    Args:
        scorer: its scope says on which weights; LESS looks at the LoRA matrices (scope "lora").
        validation: a few dozen rows of the task.

    Returns:
        a matrix for each site, in float32 or wider.
    """
    total: list[torch.Tensor] = []
    for position in range(len(validation)):
        batch = collate(validation, [position], scorer.device)
        matrices = scorer.measure(batch, gradient_matrix)
        norm = torch.stack([matrix.square().sum() for matrix in matrices]).sum().sqrt()
        scaled = [matrix[0] / norm.clamp(min=torch.finfo(norm.dtype).tiny) for matrix in matrices]
        total = [before + now for before, now in zip(total, scaled, strict=True)] if total else scaled
    return [matrix / len(validation) for matrix in total]


def similarities(scorer: Scorer, pool: Pool, directions: list[torch.Tensor], on_done: Callable[[int], None] | None = None) -> np.ndarray:
    """Mean cosine between each sample's gradient and the validation rows'.

    LESS stores random projections of all gradients, divided by Adam's second moments, at several checkpoints; here the
    inner products come out of the pass itself, exact, so nothing is projected or stored. They are taken at the end of
    the draft's tuning, on plain gradients.

    Args:
        directions: of `mean_direction`.
        on_done: called with the samples done.

    Returns:
        (n,) float32 in [-1, 1]; 0 for a sample without a gradient.
    """
    found = np.zeros(len(pool), np.float32)
    done = 0
    for places in batches(pool.lengths, scorer.batch_tokens):
        batch = collate(pool, places, scorer.device)
        both = scorer.measure(batch, inner_products(directions))  # a (B, 2) for each site: with the direction, with itself
        dot, square = torch.stack(both).sum(0).unbind(1)
        found[places] = torch.where(square > 0, dot / square.sqrt(), 0.0).float().cpu().numpy()
        done += len(places)
        if on_done:
            on_done(done)
    return found
