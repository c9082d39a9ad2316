"""How like each sample's gradient is to those of a few validation rows (LESS, arXiv 2402.04333). torch alone."""

from __future__ import annotations

from collections.abc import Callable

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


class Likeness:
    """Mean cosine between each sample's gradient and the validation rows', in batches, as `memory.score_within` asks for it.

    LESS stores random projections of all gradients, divided by Adam's second moments, at several checkpoints; here the
    inner products come out of the pass itself, exact, so nothing is projected or stored. They are taken at the end of
    the draft's tuning, on plain gradients.

    Args:
        directions: of `mean_direction`.
    """

    def __init__(self, scorer: Scorer, directions: list[torch.Tensor]):
        self._scorer, self._directions = scorer, directions
        self.first_tokens, self.batch_tokens = scorer.first_tokens, scorer.batch_tokens

    def scores(
        self, pool: Pool, positions: np.ndarray, on_samples: Callable[[int], None] | None = None
    ) -> dict[str, np.ndarray]:
        """Of some samples of a pool.

        Args:
            positions: (k,) pool positions.
            on_samples: called after each batch with the number of its samples.

        Returns:
            "similarity" (k,) float32 in [-1, 1], in the order asked for; 0 for a sample without a gradient.
        """
        found = np.zeros(len(positions), np.float32)
        for places in batches(pool.lengths[positions], self.batch_tokens):
            batch = collate(pool, positions[places], self._scorer.device)
            both = self._scorer.measure(
                batch, inner_products(self._directions)
            )  # a (B, 2) for each site: with the direction, with itself
            dot, square = torch.stack(both).sum(0).unbind(1)
            found[places] = torch.where(square > 0, dot / square.sqrt(), 0.0).float().cpu().numpy()
            if on_samples:
                on_samples(len(places))
        return {"similarity": found}
