"""Neighbours and clusters of features, as plain arrays, so that methods need numpy alone. scikit-learn; optional extra `graph`."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

log = logging.getLogger(__name__)

APPROXIMATE_ABOVE = 20_000  # rows from which neighbours are looked for in nearby clusters alone
NUM_NEIGHBOURS = 10
NUM_CLUSTERS = 100  # S2L's number
NUM_PROBES = 16  # clusters in which neighbours are looked for
ROWS_AT_ONCE = 2048
NUM_CHECKED = 200  # rows on which an approximate search is held against the exact one


def derive(quantity: str, array: np.ndarray, seed: int) -> np.ndarray:
    """What a need with a dot in it asks for: "features.neighbours" of features, "loss.clusters" of (n, k) losses.

    Args:
        quantity: the part of a need after the slash, "base.made".
        array: (n, d) the base quantity.
        seed: of the clustering.

    Raises:
        ValueError: nothing of that name can be made.
    """
    made = quantity.rpartition(".")[2]
    if made not in MAKES:
        raise ValueError(f"{quantity!r}: only {', '.join(MAKES)} can be made of another quantity; found {made!r}")
    return MAKES[made](array, seed=seed)


def neighbours(features: np.ndarray, *, seed: int, num_neighbours: int = NUM_NEIGHBOURS, exact: bool | None = None) -> np.ndarray:
    """The nearest other samples of each sample, by Euclidean distance.

    Up to 20,000 rows every pair is looked at. Above, a sample's neighbours are looked for in the 16 nearest of sqrt(n)
    k-means clusters (an inverted file); how many of the true neighbours that finds is measured on 200 rows and logged,
    as a warning where it is under 9 in 10. Distances are worked out a cluster at a time as one matrix product, which on CPUs
    serves tens of thousands of queries faster than a library's index that takes them one by one.

    Args:
        features: (n, d) float.
        seed: of the clustering, and of the rows checked; has no effect on an exact search.
        num_neighbours: k; at most n - 1 are there.
        exact: True looks at every pair whatever n; None leaves it to n.

    Returns:
        (n, min(k, n - 1)) int64 positions, nearest first; -1 where an approximate search found too few. Which of
        equally distant samples is the last one in is settled by the numbers, not by chance.

    Raises:
        ValueError: features that are not (n, d) finite numbers.
    """
    features = _check(features)
    n = len(features)
    num_neighbours = min(num_neighbours, max(n - 1, 0))
    if num_neighbours == 0:
        return np.empty((n, 0), np.int64)
    features = features - features.mean(axis=0)  # keeps |x|^2 + |y|^2 - 2 x.y from cancelling
    everyone = np.arange(n)
    if exact or (exact is None and n <= APPROXIMATE_ABOVE):
        if n > APPROXIMATE_ABOVE:
            log.warning(
                "looking at all %.1e pairs of %d samples for their neighbours; exact=False looks in nearby clusters alone", n * n, n
            )
        return _nearest(features, everyone, everyone, num_neighbours)

    num_lists = max(1, round(n**0.5))
    labels, centres = _cluster(features, num_lists, seed, quick=True)
    found = np.empty((n, num_neighbours), np.int64)
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels, minlength=num_lists))[:-1])
    nearby = np.argsort(_squared_distances(centres, centres), axis=1, kind="stable")[:, :NUM_PROBES]
    for own, lists in zip(members, nearby, strict=True):
        if len(own):
            found[own] = _nearest(features, own, np.sort(np.concatenate([members[i] for i in lists])), num_neighbours)

    checked = np.sort(np.random.default_rng(seed).choice(n, min(NUM_CHECKED, n), replace=False))
    truth = _nearest(features, checked, everyone, num_neighbours)
    recall = float(np.mean([len(np.intersect1d(a, b)) / num_neighbours for a, b in zip(found[checked], truth, strict=True)]))
    report = log.info if recall >= 0.9 else log.warning
    report("approximate neighbours of %d samples: %.0f %% of the true ones found on %d samples", n, 100 * recall, len(checked))
    return found


def clusters(features: np.ndarray, *, seed: int, num_clusters: int | None = None) -> np.ndarray:
    """k-means clusters of the rows.

    Args:
        features: (n, d) float: features, or losses over checkpoints.
        seed: of the first centres and, above 20,000 rows, of the mini-batches.
        num_clusters: at most n; None: 100, or n / 20 where that is fewer.

    Returns:
        (n,) int64 labels in [0, num_clusters); some may be empty where rows are equal.
    """
    features = _check(features)
    n = len(features)
    if n == 0:
        return np.empty(0, np.int64)
    num_clusters = num_clusters or max(1, min(NUM_CLUSTERS, n // 20))
    return _cluster(features, min(num_clusters, n), seed, quick=n > APPROXIMATE_ABOVE)[0]


def _cluster(features, num_clusters, seed, quick):
    """(labels, centres) by k-means, on mini-batches where `quick`; the same for the same seed."""
    import warnings

    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    if quick:
        model = MiniBatchKMeans(num_clusters, batch_size=4096, max_iter=5, n_init=1, random_state=seed)
    else:
        model = KMeans(num_clusters, max_iter=100, n_init=1, random_state=seed)
    # one OpenMP thread: with several, k-means adds up its threads' sums in the order in which they end
    with threadpool_limits(1, user_api="openmp"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters: empty clusters will do
        labels = model.fit(features).labels_
    return labels.astype(np.int64), model.cluster_centers_


def _nearest(features, queries, candidates, num_neighbours):
    """(q, k) positions among `candidates` (ascending) nearest to each of `queries`, itself left out; -1 where there are too few."""
    found = np.full((len(queries), num_neighbours), -1, np.int64)
    count = min(num_neighbours, len(candidates) - 1)
    if count < 1:
        return found
    for start in range(0, len(queries), ROWS_AT_ONCE):
        rows = queries[start : start + ROWS_AT_ONCE]
        distances = _squared_distances(features[rows], features[candidates])
        distances[np.arange(len(rows)), np.searchsorted(candidates, rows)] = np.inf
        nearest = np.sort(np.argpartition(distances, count - 1, axis=1)[:, :count], axis=1)
        order = np.argsort(np.take_along_axis(distances, nearest, axis=1), axis=1, kind="stable")
        found[start : start + ROWS_AT_ONCE, :count] = candidates[np.take_along_axis(nearest, order, axis=1)]
    return found


def _squared_distances(a, b):
    distances = -2 * (a @ b.T)
    distances += np.einsum("nd,nd->n", a, a)[:, None]
    distances += np.einsum("nd,nd->n", b, b)
    return distances


def _check(features):
    features = np.asarray(features)
    if features.dtype != np.float32:
        features = features.astype(np.float64)
    if features.ndim != 2:
        raise ValueError(f"features must be one row a sample, (n, d); found shape {features.shape}")
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise ValueError(f"{len(bad)} of {len(features)} samples have features that are nan or infinite (positions {bad[:5].tolist()})")
    return features


MAKES: dict[str, Callable[..., np.ndarray]] = {"neighbours": neighbours, "clusters": clusters}
