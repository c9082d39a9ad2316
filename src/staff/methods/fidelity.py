"""How alike two models rank the same samples. numpy alone."""

from __future__ import annotations

import numpy as np


def spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    """Spearman's rank correlation, equal values sharing the mean of their ranks.

    Args:
        first, second: (k,) numbers of the same samples.

    Returns:
        in [-1, 1]; None where it is not defined: fewer than three samples, or all of one side equal.
    """
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(average_ranks(first), average_ranks(second))[0, 1])


def average_ranks(values: np.ndarray) -> np.ndarray:
    """(k,) ranks from 1 on; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    behind = np.cumsum(counts)
    return (behind - (counts - 1) / 2)[place]
