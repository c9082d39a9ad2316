"""How alike two coresets are, how nested a method's are across pruning rates, and what chance would give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np


@dataclass(frozen=True)
class Overlap:
    """Two coresets of one pool, side by side.

    Attributes:
        first, second: their names.
        shared: |A ∩ B|, in samples.
        overlap: |A ∩ B| / min(|A|, |B|); 1 where one holds the other; nan where one is empty.
        chance_overlap: what two coresets of these sizes drawn at random would have: max(|A|, |B|) / n, where
            none are always in.
        jaccard: |A ∩ B| / |A ∪ B|; nan where both are empty.
        chance_jaccard: E|A ∩ B| / E|A ∪ B| of two drawn at random, E|A ∩ B| = |A||B| / n, or
            h + (|A| - h)(|B| - h) / (n - h) with h always in; within 1/n of the expected Jaccard index.
    """

    first: str
    second: str
    shared: int
    overlap: float
    chance_overlap: float
    jaccard: float
    chance_jaccard: float


def overlap(first: str, a: np.ndarray, second: str, b: np.ndarray, n: int, held: int = 0) -> Overlap:
    """Lay two coresets side by side.

    Args:
        first, second: what to call them.
        a, b: (m,) unique pool positions.
        n: samples there are to choose from, those that are always in included.
        held: samples that are always in.
    """
    shared = len(np.intersect1d(a, b, assume_unique=True))
    left = n - held
    by_chance = held + ((len(a) - held) * (len(b) - held) / left if left else 0.0)
    return Overlap(
        first,
        second,
        shared,
        _ratio(shared, min(len(a), len(b))),
        _ratio(by_chance, min(len(a), len(b))),
        _ratio(shared, len(a) + len(b) - shared),
        _ratio(by_chance, len(a) + len(b) - by_chance),
    )


def overlaps(coresets: Mapping[str, np.ndarray], n: int, held: int = 0) -> list[Overlap]:
    """How alike methods choose: every pair of coresets, in the order given.

    Args:
        coresets: name -> (m,) unique pool positions; of one pruning rate, to be worth reading.
        n, held: as for `overlap`.
    """
    return [
        overlap(first, coresets[first], second, coresets[second], n, held)
        for first, second in combinations(coresets, 2)
    ]


def nestedness(coresets: Mapping[str, np.ndarray], n: int, held: int = 0) -> list[Overlap]:
    """How nested a method's coresets are across pruning rates: each with the next larger one.

    An overlap of 1 throughout says that each coreset lies inside the next, so that one order of the pool
    serves all rates.

    Args:
        coresets: name (say, the pruning rate) -> (m,) unique pool positions, of one method and seed.
        n, held: as for `overlap`.
    """
    names = sorted(coresets, key=lambda name: len(coresets[name]))
    return [overlap(a, coresets[a], b, coresets[b], n, held) for a, b in pairwise(names)]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
