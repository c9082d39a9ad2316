"""Intervals and tests over seeds and test rows. numpy alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000


@dataclass(frozen=True)
class Resamples:
    """How often each seed and each test row was drawn, in every resample; shared by all cells that are
    compared.

    Attributes:
        seeds: (R, S) shares, each row sums to 1.
        rows: (R, N) shares, each row sums to 1.
    """

    seeds: np.ndarray
    rows: np.ndarray


def resample(
    num_seeds: int, num_rows: int, rng: np.random.Generator, resamples: int = RESAMPLES
) -> Resamples:
    """Draw with replacement on two levels: seeds, then test rows.

    Every seed is judged on the same test rows, so one draw of rows serves all seeds of a resample (the two
    factors are crossed; Owen's pigeonhole bootstrap, 2007). Drawing rows anew for each seed would average
    their noise away. The spread between few seeds is understated, by (S - 1) / S in variance; of one seed
    nothing is known and rows alone vary.
    """

    def shares(size: int) -> np.ndarray:
        return rng.multinomial(size, np.full(size, 1 / size), resamples) / size

    return Resamples(shares(num_seeds), shares(num_rows))


def resampled_means(values: np.ndarray, resamples: Resamples) -> np.ndarray:
    """(R,) means of (S, N) values, a row a seed and a column a test row. Two cells' means are paired:
    subtract them."""
    return np.einsum("rs,rs->r", resamples.seeds, resamples.rows @ values.T)


def paired_margin(differences: np.ndarray) -> tuple[float, float]:
    """The mean of paired differences, and its standard error over seeds and rows both.

    The two variances are added, which counts what seeds and rows have together twice: rather too wide than
    too narrow. Of one seed rows alone are known.

    Args:
        differences: (S, N), a row a seed and a column a test row.
    """
    seeds, rows = differences.shape
    of_seeds = differences.mean(1).var(ddof=1) / seeds if seeds > 1 else 0.0
    of_rows = differences.mean(0).var(ddof=1) / rows if rows > 1 else 0.0
    return float(differences.mean()), float(np.sqrt(of_seeds + of_rows))


def interval(resampled: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of resampled numbers."""
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def p_value(differences: np.ndarray) -> float:
    """Two-sided p of "no difference" by how many resampled differences lie on the other side of 0; at least 2
    / (R + 1)."""
    below, above = int((differences <= 0).sum()), int((differences >= 0).sum())
    return min(1.0, 2 * (1 + min(below, above)) / (1 + len(differences)))


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction for several tests (1979): the smallest p times k, the next times k - 1,
    never falling."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        corrected[i] = largest
    return corrected
