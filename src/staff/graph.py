"""Neighbours and clusters of features as plain arrays, so that methods need numpy alone.

scikit-learn; optional extra `graph`.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable

import numpy as np

log = logging.getLogger(__name__)

APPROXIMATE_ABOVE = 20_000  # rows from which neighbours are looked for in nearby clusters alone
NUM_NEIGHBOURS = 10
NUM_CLUSTERS = 100  # S2L's number
CANDIDATES = 40_000  # samples, and as many clusters as hold them, among which an approximate search looks
PROJECTED = 64  # principal components in which it looks
SHORTLIST = 3  # times the neighbours asked for: those looked at again in all dimensions
ROWS_A_CLUSTER = 256  # drawn for k-means above 20,000 rows, as faiss does
ROWS_AT_ONCE = 512
NUM_CHECKED = 200  # rows on which an approximate search is held against the exact one


def derive(made: str, array: np.ndarray, seed: int) -> np.ndarray:
    """What is made of a quantity: neighbours of (n, d) features, clusters of (n, k) losses.

    Args:
        made: one of `types.MADE`.
        array: (n, d) the quantity.
        seed: of the clustering.
    """
    return MAKES[made](array, seed=seed)


def neighbours(
    features: np.ndarray, *, seed: int, num_neighbours: int = NUM_NEIGHBOURS, exact: bool | None = None
) -> np.ndarray:
    """The nearest other samples of each sample, by Euclidean distance.

    Up to 20,000 rows every pair is looked at. Above, the rows are put into sqrt(n) k-means clusters; a sample's own and the
    next nearest ones, as many as hold 40,000 samples, are searched in the first 64 principal components, and the best
    30 (for 10 neighbours) once more in all dimensions. How many of the true neighbours that finds is measured on 200 rows
    and logged, as a warning where it is under 9 in 10. Distances are worked out a cluster at a time as one matrix
    product, which on a CPU is faster, and finds more, than a library's index that is asked for one row after another.

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
                "looking at all %.1e pairs of %d samples for their neighbours; exact=False looks in nearby clusters alone",
                n * n,
                n,
            )
        return _nearest(features, everyone, everyone, num_neighbours)

    num_lists = max(1, round(n**0.5))
    projected = _project(features, seed)
    labels, centres = _cluster(projected, num_lists, seed, rows_a_cluster=64)
    sizes = np.bincount(labels, minlength=num_lists)
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])
    from_near_to_far = np.argsort(_squared_distances(centres, centres), axis=1, kind="stable")
    found = np.empty((n, num_neighbours), np.int64)
    for own, lists in zip(members, from_near_to_far, strict=True):
        if len(own):
            enough = 1 + np.searchsorted(np.cumsum(sizes[lists]), CANDIDATES)
            candidates = np.union1d(own, np.concatenate([members[i] for i in lists[:enough]]))
            shortlist = _nearest(projected, own, candidates, SHORTLIST * num_neighbours)
            found[own] = _look_again(features, own, shortlist, num_neighbours)

    checked = np.sort(np.random.default_rng(seed).choice(n, min(NUM_CHECKED, n), replace=False))
    truth = _nearest(features, checked, everyone, num_neighbours)
    recall = float(
        np.mean(
            [len(np.intersect1d(a, b)) / num_neighbours for a, b in zip(found[checked], truth, strict=True)]
        )
    )
    report = log.info if recall >= 0.9 else log.warning
    report(
        "approximate neighbours of %d samples: %.0f %% of the true ones found on %d samples",
        n,
        100 * recall,
        len(checked),
    )
    return found


def clusters(features: np.ndarray, *, seed: int, num_clusters: int | None = None) -> np.ndarray:
    """k-means clusters of the rows.

    Args:
        features: (n, d) float: features, or losses over checkpoints.
        seed: of the first centres and, above 20,000 rows, of those drawn to move the centres: 256 a cluster, after which
            every row goes to the nearest centre, as in faiss, which S2L's released code uses.
        num_clusters: at most n; None: 100, or n / 20 where that is fewer.

    Returns:
        (n,) int64 labels in [0, num_clusters); some may be empty where rows are equal.
    """
    features = _check(features)
    n = len(features)
    if n == 0:
        return np.empty(0, np.int64)
    num_clusters = num_clusters or max(1, min(NUM_CLUSTERS, n // 20))
    return _cluster(
        features, min(num_clusters, n), seed, rows_a_cluster=ROWS_A_CLUSTER if n > APPROXIMATE_ABOVE else n
    )[0]


def _cluster(features, num_clusters, seed, rows_a_cluster):
    """(labels, centres) by k-means on `rows_a_cluster` drawn rows a cluster, or all; the same for the same seed."""
    need_sklearn()
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    drawn = features
    if rows_a_cluster * num_clusters < len(features):
        drawn = features[
            np.sort(
                np.random.default_rng(seed).choice(
                    len(features), rows_a_cluster * num_clusters, replace=False
                )
            )
        ]
    # k-means++ would take longer than all the rest on large pools, and faiss does without it too
    init = "k-means++" if drawn is features else "random"
    model = KMeans(num_clusters, init=init, max_iter=25, n_init=1, random_state=seed)
    # one OpenMP thread: with several, k-means adds up its threads' sums in the order in which they end
    with threadpool_limits(1, user_api="openmp"), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # fewer distinct rows than clusters: empty clusters will do
        model.fit(drawn)
        labels = model.labels_ if drawn is features else model.predict(features)
    return labels.astype(np.int64), model.cluster_centers_


def _project(features, seed):
    """(n, 64) principal components of the rows, those of 20,000 drawn rows; the rows themselves where they have no more."""
    if features.shape[1] <= PROJECTED:
        return features
    need_sklearn()
    from sklearn.decomposition import PCA

    drawn = np.sort(
        np.random.default_rng(seed).choice(
            len(features), min(len(features), APPROXIMATE_ABOVE), replace=False
        )
    )
    model = PCA(min(PROJECTED, len(drawn)), svd_solver="randomized", random_state=seed)
    return model.fit(features[drawn]).transform(features)


def _nearest(features, queries, candidates, num_neighbours):
    """(q, k) positions among `candidates` (ascending) nearest to each of `queries`, itself left out; -1 where there are too few."""
    found = np.full((len(queries), num_neighbours), -1, np.int64)
    count = min(num_neighbours, len(candidates) - 1)
    if count < 1:
        return found
    theirs = features[candidates]
    squares = np.einsum("nd,nd->n", theirs, theirs)
    for start in range(0, len(queries), ROWS_AT_ONCE):
        rows = queries[start : start + ROWS_AT_ONCE]
        distances = (-2 * features[rows]) @ theirs.T
        distances += squares  # short of |x|^2, the same for all of a row's candidates
        distances[np.arange(len(rows)), np.searchsorted(candidates, rows)] = np.inf
        found[start : start + ROWS_AT_ONCE, :count] = candidates[_lowest(distances, count)]
    return found


def _look_again(features, queries, shortlist, num_neighbours):
    """(q, k) the nearest of each query's shortlist, (q, s) positions or -1, in all dimensions."""
    found = np.empty((len(queries), num_neighbours), np.int64)
    for start in range(0, len(queries), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        apart = features[shortlist[rows]] - features[queries[rows], None]
        distances = np.einsum("qsd,qsd->qs", apart, apart)
        distances[shortlist[rows] < 0] = np.inf
        found[rows] = np.take_along_axis(
            shortlist[rows], np.argsort(distances, axis=1, kind="stable")[:, :num_neighbours], axis=1
        )
    return found


def _lowest(distances, count, width=64):
    """(q, count) columns of each row's lowest values, lowest first."""
    num_blocks = distances.shape[1] // width
    if num_blocks > 4 * count:
        # the lowest values lie in the blocks of lowest minima (and in what is over), and a minimum takes a tenth of a partition's time
        whole = distances[:, : num_blocks * width].reshape(len(distances), num_blocks, width).min(axis=2)
        blocks = np.sort(np.argpartition(whole, count - 1, axis=1)[:, :count], axis=1)
        columns = (blocks[:, :, None] * width + np.arange(width)).reshape(len(distances), -1)
        over = np.broadcast_to(
            np.arange(num_blocks * width, distances.shape[1]),
            (len(distances), distances.shape[1] - num_blocks * width),
        )
        columns = np.concatenate([columns, over], axis=1)
        values = np.take_along_axis(distances, columns, axis=1)
        return np.take_along_axis(columns, _lowest_by_sorting(values, count), axis=1)
    return _lowest_by_sorting(distances, count)


def _lowest_by_sorting(values, count):
    lowest = np.sort(np.argpartition(values, count - 1, axis=1)[:, :count], axis=1)
    return np.take_along_axis(
        lowest, np.argsort(np.take_along_axis(values, lowest, axis=1), axis=1, kind="stable"), axis=1
    )


def _squared_distances(a, b):
    return np.einsum("nd,nd->n", a, a)[:, None] - 2 * (a @ b.T) + np.einsum("nd,nd->n", b, b)


def need_sklearn():
    if importlib.util.find_spec("sklearn") is None:
        raise ImportError(
            "clusters, and neighbours among more than 20,000 samples, need scikit-learn: pip install 'staff-coreset[graph]'"
        )


def _check(features):
    features = np.asarray(features)
    if features.dtype != np.float32:
        features = features.astype(np.float64)
    if features.ndim != 2:
        raise ValueError(f"features must be one row a sample, (n, d); found shape {features.shape}")
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(features)} samples have features that are nan or infinite (positions {bad[:5].tolist()})"
        )
    return features


MAKES: dict[str, Callable[..., np.ndarray]] = {"neighbours": neighbours, "clusters": clusters}
