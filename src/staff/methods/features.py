"""Methods that choose by where samples lie in feature space; neighbours and clusters come in as arrays."""

from __future__ import annotations

import heapq
import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np

from staff.methods.strata import allocate, members_of, share_by_size, weights_of
from staff.methods.top import top
from staff.types import Selection

log = logging.getLogger(__name__)

SLOW_PAIRS = (
    1_000_000_000  # distances between samples and picks from which k-center says what it is about to do
)
ROWS_A_BLOCK = 4096
FARTHEST_FEW = 2048  # samples that k-center keeps up to date between two looks at the whole pool


def moderate(
    n: int, *, budget: int, rng: np.random.Generator, features: np.ndarray, clusters: np.ndarray
) -> Selection:
    """Keep the samples at a middling distance from their cluster's centre (Moderate-DS, Xia et al. 2023, ICLR
    2023).

    A centre is the median of its cluster's features, coordinate by coordinate, as released. Samples are put
    in the order of their distance to it, over all clusters, and the middle m are kept: as many left out
    nearer as farther away.

    Where ours departs: the paper's clusters are the classes of a classification task; generation has none, so
    they are k-means clusters of the features.

    Args:
        n: the pool's size, in samples.
        budget: m, in samples, 0 <= m <= n.
        rng: not used; there is nothing to draw.
        features: (n, d) float.
        clusters: (n,) integers >= 0, the cluster of each sample.
    """
    features, clusters = check_features(features, n), check_clusters(clusters, n)
    distances = np.zeros(len(features))
    for positions in members_of(clusters, int(clusters.max(initial=-1)) + 1):
        own = features[positions]
        distances[positions] = np.linalg.norm(own - np.median(own, axis=0), axis=1)
    return top(n, budget=budget, rng=rng, scores=distances, part="middle")


def s2l(n: int, *, budget: int, rng: np.random.Generator, clusters: np.ndarray) -> Selection:
    """Take as many from every cluster of loss trajectories as evenness allows (S2L, Yang et al. 2024, arXiv
    2403.07384).

    Samples whose losses over a small model's training run alike have like gradients, so some of each will do.
    Clusters, smallest first, get min(size, floor(left / clusters left)) samples, drawn at random (Algorithm
    1). Unlike the paper's code, clusters of two or fewer are not put off to the end, and sources are not kept
    apart: `--group-by` does that.

    Args:
        n: the pool's size, in samples.
        budget: m, in samples, 0 <= m <= n.
        rng: the source of all randomness.
        clusters: (n,) integers >= 0: the cluster of each sample's losses over the checkpoints of a draft's
            training.
    """
    clusters = check_clusters(clusters, n)
    members = members_of(clusters, int(clusters.max(initial=-1)) + 1)
    sizes = np.array([len(positions) for positions in members])
    return _draw_from(members, allocate(np.full(len(members), np.nan), sizes, budget), rng)


def coverage(n: int, *, budget: int, rng: np.random.Generator, clusters: np.ndarray) -> Selection:
    """Draw at random inside every cluster of like samples, in proportion to its size: no part of the pool is
    left out by chance.

    Stratified sampling with proportional allocation (Neyman 1934, JRSS 97(4)); shares are whole samples by
    largest remainder, so every sample is as likely to be kept as any other but for what rounding does. Costs
    the draft's one pass, and k-means on it. Clusters are those of k-means on the features at unit length
    (spherical, 100 or n / 20). Papers of the kind weigh clusters by their difficulty or take the nearest to a
    centre; this takes neither side.

    Args:
        n: the pool's size, in samples.
        budget: m, in samples, 0 <= m <= n.
        rng: the source of all randomness.
        clusters: (n,) integers >= 0, the cluster of each sample.
    """
    clusters = check_clusters(clusters, n)
    members = members_of(clusters, int(clusters.max(initial=-1)) + 1)
    return _draw_from(members, share_by_size(np.array([len(own) for own in members]), budget), rng)


def _draw_from(members: list[np.ndarray], budgets: np.ndarray, rng: np.random.Generator) -> Selection:
    chosen = [
        rng.choice(positions, share, replace=False)
        for positions, share in zip(members, budgets, strict=True)
        if share
    ]
    weights = weights_of(members, budgets, sum(map(len, members)))
    return Selection(np.sort(np.concatenate([np.empty(0, np.int64), *chosen])), weights=weights)


def kcenter(
    n: int,
    *,
    budget: int,
    rng: np.random.Generator,
    features: np.ndarray,
    num_candidates: int | None = None,
) -> Selection:
    """Pick the sample farthest from all picks so far, again and again (k-center greedy, Sener and Savarese
    2018, arXiv 1708.00489).

    The largest distance of any sample to its nearest pick is at most twice the least possible. The first pick
    is drawn; the paper starts from samples labelled before. Its second, mixed-integer step against outliers
    is left out, as its authors do in most of their runs. The picks are those of the plain greedy walk: only
    the order in which distances are worked out differs, in blocks that are matrix products.

    The work grows with n * m: a quadratic method. It says so from 10^9 distances on; `num_candidates` is the
    way out.

    Args:
        n: the pool's size, in samples.
        budget: m, in samples, 0 <= m <= n.
        rng: draws the first pick, and the candidates.
        features: (n, d) float.
        num_candidates: walk over this many samples, drawn at random, in place of all n; at least m. None:
            over all.

    Returns:
        Selection.
    """
    features = check_features(features, n)
    pool = np.arange(len(features))
    if num_candidates is not None and num_candidates < len(features):
        if num_candidates < budget:
            raise ValueError(f"num_candidates must be at least the budget, {budget}; found {num_candidates}")
        pool = np.sort(rng.choice(len(features), num_candidates, replace=False))
        features = features[pool]
    if len(features) * budget >= SLOW_PAIRS:
        log.warning(
            "k-center measures %d samples against %d picks, %.1e distances; num_candidates=%d would take a "
            "random part of the pool",
            len(features),
            budget,
            len(features) * budget,
            max(2 * budget, len(features) // 10),
        )
    if budget == 0:
        return Selection(np.empty(0, np.int64))
    return Selection(np.sort(pool[farthest_first(features, budget, [int(rng.integers(len(features)))])]))


def ltd(
    n: int,
    *,
    budget: int,
    rng: np.random.Generator,
    features: np.ndarray,
    clusters: np.ndarray,
    templates: np.ndarray | None = None,
) -> Selection:
    """Spread the picks of every cluster: first the sample nearest to its mean, then again and again the one
    farthest from all picks (LTD, Chen et al. 2023, arXiv 2305.09246).

    Features count at unit length. A cluster's share goes by its size, by largest remainder; with `--group-by`
    the groups take the clusters' place, as the paper's tasks do. Costs the draft's one pass, k-means, and
    distances of every sample to its own cluster's picks: with 100 clusters a hundredth of k-center's.

    The paper keeps one prompt template of each task. So does this where `templates` names a column of the
    data that says which template wrote a row: the one with the most rows (of equal ones the first to come),
    of each group of `--group-by`, or of the whole pool without. Where that one has fewer than m rows, the
    others come back, farthest from all picks first, and are counted.

    Where ours departs: the features are a draft's mean last hidden states over the response, not a sentence
    encoder's over prompt and response.

    Args:
        n: the pool's size, in samples.
        budget: m, in samples, 0 <= m <= n.
        rng: not used; there is nothing to draw.
        features: (n, d) float; of equal distances the earlier sample is taken.
        clusters: (n,) integers >= 0, the cluster of each sample.
        templates: (n,) labels; on the command line the column that holds them.
    """
    features, clusters = at_unit_length(check_features(features, n)), check_clusters(clusters, n)
    kept = np.arange(n)
    if templates is not None and n:
        labels = [str(label) for label in templates]
        (most, _), *_ = Counter(labels).most_common(1)
        kept = np.flatnonzero([label == most for label in labels])
    members = members_of(clusters[kept], int(clusters.max(initial=-1)) + 1)
    shares = share_by_size(np.array([len(own) for own in members]), min(budget, len(kept)))
    chosen = [np.empty(0, np.int64)]
    for places, share in zip(members, shares, strict=True):
        if share:
            own = features[kept[places]]
            first = int(np.argmin(np.linalg.norm(own - own.mean(axis=0), axis=1)))
            chosen.append(kept[places[farthest_first(own, int(share), [first])]])
    picked, missing = np.concatenate(chosen), budget - min(budget, len(kept))
    if missing:
        picked = farthest_first(features, budget, picked)
    return Selection(np.sort(picked), filled_from_cut=missing)


def farthest_first(features: np.ndarray, count: int, begun: Sequence[int] | np.ndarray) -> np.ndarray:
    """Positions of `count` picks, those begun with first, then each farthest from those before; of equal
    distances the lowest position."""
    features = features - features.mean(axis=0)  # keeps |x|^2 + |c|^2 - 2 x.c from cancelling
    squares = np.einsum("nd,nd->n", features, features)
    chosen = [int(pick) for pick in begun]
    waiting = list(chosen)  # picks that the distances below do not know of yet
    distances = np.full(
        len(features), np.inf, features.dtype
    )  # squared, to the nearest pick; -1 for the picks themselves
    while True:
        _lower(distances, features, squares, waiting)
        distances[waiting] = -1
        if len(chosen) == count:
            return np.array(chosen, np.int64)
        # Distances only fall. So while one of the farthest few is still farther than all others were when we
        # last looked at them, it is the farthest of all, and only those few need to be kept up to date.
        num_few = min(len(features), FARTHEST_FEW)
        few = np.sort(np.argpartition(-distances, num_few - 1)[:num_few])
        near, near_squares, near_distances = features[few], squares[few], distances[few]
        others = distances.copy()
        others[few] = -1
        bar = others.max()
        waiting = []
        pick = int(np.argmax(distances))
        while True:
            chosen.append(pick)
            waiting.append(pick)
            to_pick = near_squares + squares[pick] - 2 * (near @ features[pick])
            np.minimum(near_distances, np.maximum(to_pick, 0), out=near_distances)
            near_distances[few == pick] = -1
            best = int(np.argmax(near_distances))
            if len(chosen) == count or near_distances[best] <= bar:
                break
            pick = int(few[best])


def _lower(distances: np.ndarray, features: np.ndarray, squares: np.ndarray, picks: list[int]) -> None:
    """Lower each squared distance to that of the nearest of `picks`, in place, as matrix products."""
    centres, centre_squares = features[picks], squares[picks]
    for start in range(0, len(features), ROWS_A_BLOCK):
        rows = slice(start, start + ROWS_A_BLOCK)
        for at in range(0, len(picks), ROWS_A_BLOCK):
            part = slice(at, at + ROWS_A_BLOCK)
            nearest = (centre_squares[part] - 2 * (features[rows] @ centres[part].T)).min(axis=1)
            np.minimum(distances[rows], np.maximum(nearest + squares[rows], 0), out=distances[rows])


def facility_location(
    n: int, *, budget: int, rng: np.random.Generator, features: np.ndarray, neighbours: np.ndarray
) -> Selection:
    """Pick the samples that most others are near to: greedy facility location on a graph of neighbours.

    f(A) = sum over samples i of the highest similarity of i to a member of A, similarity being exp(-distance
    / median neighbour distance) between neighbours (either in the other's list), 1 to itself, and 0
    elsewhere. Greedy is within 1 - 1/e of the best (Nemhauser et al. 1978), lazy evaluation gives the same
    picks (Minoux 1978). With all n - 1 others for neighbours this is the dense, quadratic method; with k it
    is near linear in n * k, and sees nothing of how far apart clusters lie. Below about n / k picks it can't
    reach every sample, and says so.

    Args:
        n: the pool's size, in samples.
        budget: m, in samples, 0 <= m <= n.
        rng: not used; there is nothing to draw.
        features: (n, d) float, what distances are measured between.
        neighbours: (n, k) int positions of each sample's nearest others; -1 for none.
    """
    features = check_features(features, n)
    neighbours = check_neighbours(neighbours, n, neighbours.shape[1] if np.ndim(neighbours) == 2 else 0)
    k = neighbours.shape[1]
    if 0 < budget * (k + 1) < n:
        log.warning(
            "%d picks with %d neighbours each reach at most %d of %d samples: give facility_location more",
            budget,
            k,
            budget * (k + 1),
            n,
        )
    distances = neighbour_distances(features, neighbours)
    is_edge = neighbours >= 0
    middle = float(np.median(distances[is_edge])) if is_edge.any() else 0.0
    similarity = np.exp(-distances[is_edge] / (middle if middle > 0 else 1.0))
    rows = np.repeat(np.arange(n), k)[is_edge.ravel()]
    columns = neighbours[is_edge]

    # all pairs, both ways and with oneself, by the sample that would be picked; a pair in both lists counts
    # twice but to no effect, since what is summed below is taken per covered sample
    picks, covered = (
        np.concatenate([rows, columns, np.arange(n)]),
        np.concatenate([columns, rows, np.arange(n)]),
    )
    values = np.concatenate([similarity, similarity, np.ones(n)])
    unique, at = np.unique(picks * n + covered, return_index=True)
    covered, values = unique % n, values[at]
    starts = np.searchsorted(unique // n, np.arange(n + 1)).tolist()

    best = np.zeros(n)
    gains = np.add.reduceat(values, starts[:-1]) if n else values
    heap = [(-gain, i) for i, gain in enumerate(gains.tolist())]
    heapq.heapify(heap)
    chosen: list[int] = []
    looked_at = [0] * n  # how many picks there were when a sample's gain was last worked out
    while len(chosen) < budget:
        _, i = heap[0]
        reach = slice(starts[i], starts[i + 1])
        if looked_at[i] < len(chosen):
            looked_at[i] = len(chosen)
            gain = np.maximum(values[reach] - best[covered[reach]], 0).sum()
            heapq.heapreplace(heap, (-float(gain), i))
            continue
        heapq.heappop(heap)
        chosen.append(i)
        best[covered[reach]] = np.maximum(best[covered[reach]], values[reach])
    return Selection(np.sort(np.array(chosen, np.int64)))


def neighbour_distances(features: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """(n, k) float64 Euclidean distances from each sample to its neighbours; nothing in particular where
    there is none."""
    distances = np.empty(neighbours.shape)
    for start in range(0, len(features), ROWS_A_BLOCK):
        rows = slice(start, start + ROWS_A_BLOCK)
        for column in range(neighbours.shape[1]):
            apart = features[rows] - features[neighbours[rows, column]]
            distances[rows, column] = np.sqrt(np.einsum("nd,nd->n", apart, apart))
    return distances


def at_unit_length(features: np.ndarray) -> np.ndarray:
    """(n, d) each row divided by its length; a row of zeros stays one."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return np.divide(features, lengths, out=np.zeros_like(features), where=lengths > 0)


def check_features(features: np.ndarray, n: int, name: str = "features") -> np.ndarray:
    """The features as (n, d) floats, float32 left as it is; ValueError names samples that have none."""
    features = np.asarray(features)
    if features.dtype != np.float32:
        features = features.astype(np.float64)
    if features.ndim != 2 or len(features) != n:
        raise ValueError(f"{name} must be one row a sample, ({n}, d); found shape {features.shape}")
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {n} samples have {name} that are nan or infinite (positions {bad[:5].tolist()})"
        )
    return features


def check_clusters(clusters: np.ndarray, n: int) -> np.ndarray:
    """The clusters as (n,) int64 labels 0, 1, 2, ... without gaps, in the order of the labels given; or a
    ValueError."""
    clusters = np.asarray(clusters)
    if clusters.shape != (n,):
        raise ValueError(f"clusters must be one label a sample, ({n},); found shape {clusters.shape}")
    bad = np.flatnonzero(~(clusters >= 0) | (clusters != np.floor(clusters)))
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {n} samples have no cluster, an integer from 0 on (positions {bad[:5].tolist()})"
        )
    return np.unique(clusters, return_inverse=True)[1].astype(np.int64)


def check_neighbours(neighbours: np.ndarray, n: int, num_neighbours: int) -> np.ndarray:
    """The first `num_neighbours` columns as int64 positions, -1 for none, or a ValueError."""
    neighbours = np.asarray(neighbours)
    if neighbours.ndim != 2 or len(neighbours) != n:
        raise ValueError(f"neighbours must be one row a sample, ({n}, k); found shape {neighbours.shape}")
    if neighbours.shape[1] < min(num_neighbours, n - 1):
        raise ValueError(
            f"num_neighbours is {num_neighbours}, and the graph has only {neighbours.shape[1]} a sample"
        )
    neighbours = neighbours[:, :num_neighbours]
    if neighbours.size and not (neighbours.min() >= -1 and neighbours.max() < n):  # nan fails too
        bad = np.flatnonzero(~((neighbours >= -1) & (neighbours < n)).all(axis=1))
        raise ValueError(
            f"neighbours must be positions from 0 to {n - 1}, -1 for none; those of {len(bad)} samples are "
            f"not ({bad[:5].tolist()})"
        )
    return neighbours.astype(np.int64)
