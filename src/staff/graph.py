"""Neighbours and clusters of features as plain arrays, so that methods need numpy alone. scikit-learn."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import numpy as np

from staff.methods.features import at_unit_length

logger = logging.getLogger(__name__)

APPROXIMATE_ABOVE = 20_000  # rows from which neighbours are looked for in nearby clusters alone
NUM_NEIGHBOURS = 10
NUM_CLUSTERS = 100  # S2L's number
CANDIDATES = 40_000  # samples, and as many clusters as hold them, among which an approximate search looks
PROJECTED = 64  # principal components in which it looks
SHORTLIST = 3  # times the neighbours asked for: those looked at again in all dimensions
ROWS_A_CLUSTER = 256  # drawn for k-means above 20,000 rows, as faiss does
QUERIES_AT_ONCE = 512
NUM_CHECKED = 200  # rows on which an approximate search is held against the exact one


def derive(made: str, array: np.ndarray, seed: int) -> np.ndarray:
    """What is made of a quantity: neighbours or clusters of (n, d) features, clusters of (n, k) losses.

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

    Up to 20,000 rows every pair is looked at. Above, the rows are put into sqrt(n) k-means clusters; a
    sample's own and the next nearest ones, as many as hold 40,000 samples, are searched in the first 64
    principal components, and the best 30 (for 10 neighbours) once more in all dimensions. How many of the
    true neighbours that finds is measured on 200 rows and logged, as a warning where it is under 9 in 10.
    Distances are worked out a cluster at a time as one matrix product, which on a CPU is faster, and finds
    more, than a library's index that is asked for one row after another.

    Args:
        features: (n, d) float.
        seed: of the clustering, and of the rows checked; has no effect on an exact search.
        num_neighbours: k; at most n - 1 are there.
        exact: True looks at every pair whatever n; None leaves it to n.

    Returns:
        (n, min(k, n - 1)) int64 positions, nearest first; -1 where an approximate search came upon too few.
        Which of equally distant samples is the last one in is settled by the numbers, not by chance.

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
            way = "exact=False looks in nearby clusters alone"
            logger.warning("looking at all %.1e pairs of %d samples for their neighbours; %s", n * n, n, way)
        return _nearest(features, everyone, everyone, num_neighbours)

    num_lists = max(1, round(n**0.5))
    projected = _project(features, seed)
    labels, centres = _cluster(projected, num_lists, seed, rows_a_cluster=64)
    sizes = np.bincount(labels, minlength=num_lists)
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])
    from_near_to_far = np.argsort(_squared_distances(centres, centres), axis=1, kind="stable")
    nearest = np.empty((n, num_neighbours), np.int64)
    for own, lists in zip(members, from_near_to_far, strict=True):
        if len(own):
            enough = 1 + np.searchsorted(np.cumsum(sizes[lists]), CANDIDATES)
            candidates = np.union1d(own, np.concatenate([members[i] for i in lists[:enough]]))
            shortlist = _nearest(projected, own, candidates, SHORTLIST * num_neighbours)
            nearest[own] = _look_again(features, own, shortlist, num_neighbours)

    checked = _draw(n, NUM_CHECKED, seed)
    truth = _nearest(features, checked, everyone, num_neighbours)
    hits = sum(len(np.intersect1d(a, b)) for a, b in zip(nearest[checked], truth, strict=True))
    recall = hits / truth.size
    said = f"approximate neighbours of {n} samples: {recall:.0%} of the true ones"
    level = logging.INFO if recall >= 0.9 else logging.WARNING
    logger.log(level, "%s among those of %d samples", said, len(checked))
    return nearest


def clusters(features: np.ndarray, *, seed: int, num_clusters: int | None = None) -> np.ndarray:
    """k-means clusters of the rows.

    Args:
        features: (n, d) float: features, or losses over checkpoints.
        seed: of the first centres and, above 20,000 rows, of those drawn to move the centres: 256 a cluster,
            after which every row goes to the nearest centre, as in faiss, which S2L's released code uses.
        num_clusters: at most n; None: 100, or n / 20 where that is fewer.

    Returns:
        (n,) int64 labels in [0, num_clusters); some may be empty where rows are equal.
    """
    features = _check(features)
    n = len(features)
    if n == 0:
        return np.empty(0, np.int64)
    num_clusters = min(num_clusters or max(1, min(NUM_CLUSTERS, n // 20)), n)
    rows_a_cluster = ROWS_A_CLUSTER if n > APPROXIMATE_ABOVE else n
    return _cluster(features, num_clusters, seed, rows_a_cluster)[0]


def unit_clusters(features: np.ndarray, *, seed: int) -> np.ndarray:
    """(n,) k-means clusters of the rows at unit length: by direction alone, as a cosine sees them."""
    return clusters(at_unit_length(_check(features)), seed=seed)


def _cluster(
    features: np.ndarray, num_clusters: int, seed: int, rows_a_cluster: int
) -> tuple[np.ndarray, np.ndarray]:
    """(labels, centres) by k-means on `rows_a_cluster` drawn rows a cluster; the same for the same seed."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    drawn = features
    if rows_a_cluster * num_clusters < len(features):
        drawn = features[_draw(len(features), rows_a_cluster * num_clusters, seed)]
    # k-means++ would take longer than all the rest on large pools, and faiss does without it too
    init = "k-means++" if drawn is features else "random"
    model = KMeans(num_clusters, init=init, max_iter=25, n_init=1, random_state=seed)
    # one OpenMP thread: with several, k-means adds up its threads' sums in the order in which they end
    with threadpool_limits(1, user_api="openmp"), warnings.catch_warnings():
        # fewer distinct rows than clusters: empty clusters will do
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(drawn)
        labels = model.labels_ if drawn is features else model.predict(features)
    return labels.astype(np.int64), model.cluster_centers_


def _project(features: np.ndarray, seed: int) -> np.ndarray:
    """(n, 64) principal components of the rows, those of 20,000 drawn ones; narrow rows as they are."""
    if features.shape[1] <= PROJECTED:
        return features
    from sklearn.decomposition import PCA

    drawn = _draw(len(features), APPROXIMATE_ABOVE, seed)
    model = PCA(min(PROJECTED, len(drawn)), svd_solver="randomized", random_state=seed)
    return model.fit(features[drawn]).transform(features)


def _draw(n: int, most: int, seed: int) -> np.ndarray:
    """Positions drawn of n without repetition, ascending; all where there are no more."""
    return np.sort(np.random.default_rng(seed).choice(n, min(n, most), replace=False))


def _nearest(
    features: np.ndarray, queries: np.ndarray, candidates: np.ndarray, num_neighbours: int
) -> np.ndarray:
    """(q, k) positions among `candidates` (ascending) nearest to each query but itself; -1 for too few."""
    nearest = np.full((len(queries), num_neighbours), -1, np.int64)
    count = min(num_neighbours, len(candidates) - 1)
    if count < 1:
        return nearest
    theirs = features[candidates]
    squares = np.einsum("nd,nd->n", theirs, theirs)
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        rows = queries[start : start + QUERIES_AT_ONCE]
        distances = (-2 * features[rows]) @ theirs.T
        distances += squares  # short of |x|^2, the same for all of a row's candidates
        distances[np.arange(len(rows)), np.searchsorted(candidates, rows)] = np.inf
        nearest[start : start + QUERIES_AT_ONCE, :count] = candidates[_lowest(distances, count)]
    return nearest


def _look_again(
    features: np.ndarray, queries: np.ndarray, shortlist: np.ndarray, num_neighbours: int
) -> np.ndarray:
    """(q, k) the nearest of each query's shortlist, (q, s) positions or -1, in all dimensions."""
    nearest = np.empty((len(queries), num_neighbours), np.int64)
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        rows = slice(start, start + QUERIES_AT_ONCE)
        apart = features[shortlist[rows]] - features[queries[rows], None]
        distances = np.einsum("qsd,qsd->qs", apart, apart)
        distances[shortlist[rows] < 0] = np.inf
        order = np.argsort(distances, axis=1, kind="stable")[:, :num_neighbours]
        nearest[rows] = np.take_along_axis(shortlist[rows], order, axis=1)
    return nearest


def _lowest(distances: np.ndarray, count: int, width: int = 64) -> np.ndarray:
    """(q, count) columns of each row's lowest values, lowest first."""
    num_rows, num_columns = distances.shape
    num_blocks = num_columns // width
    if num_blocks <= 4 * count:
        return _lowest_by_sorting(distances, count)
    # the lowest values lie in the blocks of lowest minima, or in the rest: a minimum takes a tenth of a
    # partition's time
    minima = distances[:, : num_blocks * width].reshape(num_rows, num_blocks, width).min(axis=2)
    blocks = np.sort(np.argpartition(minima, count - 1, axis=1)[:, :count], axis=1)
    columns = (blocks[:, :, None] * width + np.arange(width)).reshape(num_rows, -1)
    rest = np.tile(np.arange(num_blocks * width, num_columns), (num_rows, 1))
    columns = np.concatenate([columns, rest], axis=1)
    places = _lowest_by_sorting(np.take_along_axis(distances, columns, axis=1), count)
    return np.take_along_axis(columns, places, axis=1)


def _lowest_by_sorting(values: np.ndarray, count: int) -> np.ndarray:
    lowest = np.sort(np.argpartition(values, count - 1, axis=1)[:, :count], axis=1)
    order = np.argsort(np.take_along_axis(values, lowest, axis=1), axis=1, kind="stable")
    return np.take_along_axis(lowest, order, axis=1)


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("nd,nd->n", a, a)[:, None] - 2 * (a @ b.T) + np.einsum("nd,nd->n", b, b)


def _check(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features)
    if features.dtype != np.float32:
        features = features.astype(np.float64)
    if features.ndim != 2:
        raise ValueError(f"features must be one row a sample, (n, d); found shape {features.shape}")
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        what = "samples have features that are nan or infinite"
        raise ValueError(f"{len(bad)} of {len(features)} {what} (positions {bad[:5].tolist()})")
    return features


MAKES: dict[str, Callable[..., np.ndarray]] = {
    "neighbours": neighbours,
    "clusters": clusters,
    "unit_clusters": unit_clusters,
}
