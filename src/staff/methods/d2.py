"""D2 Pruning: difficulty and diversity by message passing on a graph of neighbours (Maharana et al. 2024,
arXiv 2310.07931)."""

from __future__ import annotations

import heapq

import numpy as np

from staff.methods.features import check_features, check_neighbours, neighbour_distances
from staff.methods.strata import check_scores, set_hardest_aside, take_back
from staff.types import Selection

REVERSE_MESSAGES = ("weighted", "absolute")


def d2(
    n: int,
    *,
    budget: int,
    rng: np.random.Generator,
    scores: np.ndarray,
    features: np.ndarray,
    neighbours: np.ndarray,
    num_neighbours: int = 5,
    gamma: float = 0.1,
    reverse_message: str = "weighted",
    hard_cutoff: float = 0.1,
    unit_distance: str | None = "median",
) -> Selection:
    """Pick the densest sample again and again, each pick discounting its neighbours (D2 Pruning, Section 3).

    1. The hardest floor(hard_cutoff * n) samples are set aside, as mislabelled; they neither send nor get
       messages.
    2. Forward message: density_i = S_i + sum over neighbours j of exp(-distance_ij) * S_j.
    3. Greedily, highest density first; a pick i lowers each of its neighbours j by exp(-gamma * distance_ij)
       * density_i ("weighted") or by density_i ("absolute").

    As released (gamma for the reverse message alone, distances not squared, messages along a sample's own
    list of neighbours) save for two things. Distances are measured in units of their median
    (`unit_distance`): the hidden states of a language model lie tens of units apart, where exp(-distance) is
    0 and nothing is left of the method but the score; None takes them as they are. And the graph is one, for
    the whole pool: the paper has a graph for each class, which generation does not have. The paper searches
    num_neighbours in {1, 5, 10, 15}, gamma in 0 .. 1 and the cutoff for every pruning rate; the defaults are
    those of its CIFAR-10 example, and STAFF's cutoff.

    Args:
        n: the pool's size, in samples.
        budget: m, in samples, 0 <= m <= n.
        rng: not used; there is nothing to draw.
        scores: (n,) finite numbers, higher is harder.
        features: (n, d) float, what distances are measured between.
        neighbours: (n, k) int positions of each sample's nearest others, nearest first; -1 for none.
        num_neighbours: how many of the k to use.
        gamma: how fast the reverse message fades with distance.
        reverse_message: "weighted" or "absolute".
        hard_cutoff: fraction of the pool set aside as hardest, in [0, 1).
        unit_distance: "median" or None.

    Returns:
        Selection; `filled_from_cut` counts cut samples taken back, easiest first, where m is more than the
        cut left.

    Raises:
        ValueError: arrays that don't fit, or an option out of range.
    """
    scores = check_scores(scores, n)
    if reverse_message not in REVERSE_MESSAGES:
        raise ValueError(
            f"reverse_message must be one of {', '.join(REVERSE_MESSAGES)}; found {reverse_message!r}"
        )
    if unit_distance not in (None, "median"):
        raise ValueError(f"unit_distance must be 'median' or None; found {unit_distance!r}")
    features = check_features(features, n)
    neighbours = check_neighbours(neighbours, n, num_neighbours)
    kept, cut = set_hardest_aside(scores, hard_cutoff)
    is_kept = np.zeros(n, bool)
    is_kept[kept] = True

    is_edge = (neighbours >= 0) & is_kept[neighbours] & is_kept[:, None]
    distances = neighbour_distances(features, neighbours)
    if unit_distance == "median":
        distances /= _median(distances[is_edge])
    density = scores + (np.exp(-distances) * scores[neighbours] * is_edge).sum(axis=1)
    discounts = np.exp(-gamma * distances) if reverse_message == "weighted" else np.ones_like(distances)
    chosen = _walk(density, kept, np.where(is_edge, neighbours, -1), discounts, min(budget, len(kept)))
    back = take_back(scores, cut, budget - len(chosen))
    return Selection(np.sort(np.concatenate([chosen, back])), filled_from_cut=len(back))


def _walk(
    densities: np.ndarray, kept: np.ndarray, neighbours: np.ndarray, discounts: np.ndarray, count: int
) -> np.ndarray:
    """Take the highest density `count` times, lowest position first where equal, discounting neighbours as we
    go."""
    # A density changes only when a neighbour is picked, so a heap whose stale entries are skipped picks what
    # an argmax over all would, in O(log n) a pick instead of O(n).
    density: list[float] = densities.tolist()
    heap = [(-density[i], i) for i in kept.tolist()]
    heapq.heapify(heap)
    is_taken = bytearray(len(density))
    chosen: list[int] = []
    while len(chosen) < count:
        negative, i = heapq.heappop(heap)
        if is_taken[i] or -negative != density[i]:
            continue
        is_taken[i] = 1
        chosen.append(i)
        for j, discount in zip(neighbours[i].tolist(), discounts[i].tolist(), strict=True):
            if j >= 0 and not is_taken[j]:
                density[j] -= discount * density[i]
                heapq.heappush(heap, (-density[j], j))
    return np.array(chosen, np.int64)


def _median(distances: np.ndarray) -> float:
    middle = float(np.median(distances)) if len(distances) else 0.0
    return middle if middle > 0 else 1.0
