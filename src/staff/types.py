"""The plain data that passes between stages: Region, Selection, Cost. numpy alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Progress = Callable[[str, int, int], None]  # stage, done, in all


@dataclass(frozen=True)
class Region:
    """One interval of the scores: what it holds and what became of it (STAFF, B_i).

    Attributes:
        lower, upper: the interval's edges, in units of the score. A score on an edge belongs to the lower region.
        size: |B_i|, in samples.
        verified: how many of them the target scored.
        ratio: V_i; nan where the region was not verified.
        budget: m_i, the selection budget granted, in samples.
        selected: samples of it in the coreset, those that filled up a budget left over included.
    """

    lower: float
    upper: float
    size: int
    verified: int
    ratio: float
    budget: int
    selected: int


@dataclass(frozen=True)
class Selection:
    """What a method returns.

    Attributes:
        indices: (m,) int64 pool positions kept, sorted, unique.
        regions: the regions, lowest scores first; empty for methods that have none.
        region_of: (n,) int64, the region of every sample, -1 for those set aside as hardest; None without regions.
        verified: (v,) int64 pool positions that the target scored, sorted.
        filled: samples drawn at random from the uncut ones, because the regions' budgets left some of m over.
        filled_from_cut: samples taken back from the hardest ones for the same reason.
    """

    indices: np.ndarray
    regions: tuple[Region, ...] = ()
    region_of: np.ndarray | None = None
    verified: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    filled: int = 0
    filled_from_cut: int = 0
