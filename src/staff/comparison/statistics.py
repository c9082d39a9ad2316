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
    too narrow. The spread of few seeds is poorly known, so the error is as much wider as Student's t is at
    two standard errors, by Satterthwaite's degrees of freedom (1946): two errors hold what they do of a
    normal. Of one seed rows alone are known.

    Args:
        differences: (S, N), a row a seed and a column a test row.
    """
    from scipy.special import ndtr, stdtrit

    means = [differences.mean(1 - axis) for axis in range(2) if differences.shape[axis] > 1]
    variances = np.array([of.var(ddof=1) / len(of) for of in means])
    variance = variances.sum()
    if not variance:
        return float(differences.mean()), 0.0
    freedom = variance**2 / sum(own**2 / (len(of) - 1) for own, of in zip(variances, means, strict=True))
    return float(differences.mean()), float(np.sqrt(variance) * stdtrit(freedom, ndtr(2)) / 2)


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
