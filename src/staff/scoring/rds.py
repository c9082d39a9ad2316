"""How like each sample's hidden states are to those of a few validation rows (RDS+, arXiv 2503.01807). torch
alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from staff.data.tokens import Pool, batches, collate
from staff.scoring.scorer import Scorer


def embed(
    scorer: Scorer,
    pool: Pool,
    positions: np.ndarray,
    batch_tokens: int,
    on_samples: Callable[[int], None] | None = None,
    *,
    weighted: bool = True,
) -> np.ndarray:
    """The last hidden states of each sample's prompt and response, meaned with weights that grow with the
    position (1, 2, 3, ...), at unit length: later tokens have seen more.

    Args:
        positions, batch_tokens, on_samples: as for `Scorer.scores`.
        weighted: False counts every position alike.

    Returns:
        (k, H) float32; zeros for states that are all zero.
    """
    parts, cut = [], batches(pool.lengths[positions], batch_tokens)
    for places in cut:
        batch = collate(pool, positions[places], scorer.device)
        lengths = torch.as_tensor(pool.lengths[positions[places]], device=scorer.device)
        weights = torch.arange(1, batch.input_ids.shape[1] + 1, device=scorer.device).float()
        weights = torch.where(weights <= lengths[:, None], weights if weighted else 1.0, 0.0)
        states = scorer.states(batch).float()
        # padding is left out before it is multiplied: 0 times nan is nan
        means = (weights[..., None] * states.masked_fill(weights[..., None] == 0, 0)).sum(1)
        means /= weights.sum(1, keepdim=True)
        parts.append(torch.nn.functional.normalize(means, dim=1, eps=torch.finfo(means.dtype).tiny).cpu())
        if on_samples:
            on_samples(len(places))
    embedded = np.empty((len(positions), parts[0].shape[1]), np.float32)
    for places, part in zip(cut, parts, strict=True):
        embedded[places] = part.numpy()
    return embedded


def cosines(
    scorer: Scorer,
    pool: Pool,
    rows: np.ndarray,
    positions: np.ndarray,
    batch_tokens: int,
    on_samples: Callable[[int], None] | None = None,
) -> dict[str, np.ndarray]:
    """The cosine between each sample's states and each validation row's, which `methods.rds` picks by.

    The paper embeds with the model that is trained, 4 bytes times H a sample; here the draft does, and what
    is kept is 4 bytes a validation row. One forward pass over the pool.

    Args:
        rows: (q, H) of the validation rows, by `embed`.
        positions, batch_tokens, on_samples: as for `Scorer.scores`.

    Returns:
        "rds" (k, q) float32 in [-1, 1], in the order asked for.

    Raises:
        ValueError: states that are nan or infinite; the message names the positions.
    """
    embedded = embed(scorer, pool, positions, batch_tokens, on_samples)
    return {"rds": _finite(embedded, positions) @ rows.T}


def embed_prompts(
    scorer: Scorer,
    prompts: Pool,
    positions: np.ndarray,
    batch_tokens: int,
    on_samples: Callable[[int], None] | None = None,
) -> dict[str, np.ndarray]:
    """ "prompt_features" (k, H), the mean last hidden states of each prompt, at unit length."""
    means = embed(scorer, prompts, positions, batch_tokens, on_samples, weighted=False)
    return {"prompt_features": _finite(means, positions)}


def _finite(embedded: np.ndarray, positions: np.ndarray) -> np.ndarray:
    bad = np.flatnonzero(~np.isfinite(embedded).all(axis=1))
    if len(bad):
        where = f"(positions {positions[bad[:5]].tolist()})"
        cure = "the model overflows on them; try --dtype float32"
        raise ValueError(f"{len(bad)} samples have hidden states that are nan or infinite {where}: {cure}")
    return embedded
