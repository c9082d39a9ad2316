"""How far the samples of a coreset lie apart, in a space of words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from staff import graph
from staff.data.metrics import UnicodeTokenizer
from staff.methods.features import at_unit_length

MAX_WORDS = 2**16  # the most frequent ones, that texts are told apart by
NUM_ASKED = 2000  # samples of a coreset, drawn, whose nearest neighbour is looked for
SIMILARITIES_AT_ONCE = 10_000_000  # of sparse vectors: 12 bytes each where all are above 0


def text_space(texts: Iterable[str], *, seed: int = 0) -> dict[str, np.ndarray]:
    """Where the texts of a pool lie: a space of words that no method selects by, to judge coresets in.

    TF-IDF vectors of length 1 over words of any script, the 65,536 most frequent ones. The clusters are
    k-means of their first 64 singular directions, again of length 1. On one thread, so that the same texts
    give the same bytes.

    Args:
        texts: of n samples, read one after another.
        seed: of directions and clusters.

    Returns:
        data, indices, indptr, shape: the (n, words) vectors as scipy's CSR has them; labels (n,) int64: of
        min(100, n / 10) clusters.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from threadpoolctl import threadpool_limits

    tokenize = UnicodeTokenizer().tokenize
    # a text without words is a word of its own
    vectorizer = TfidfVectorizer(
        analyzer=lambda text: tokenize(text) or [text], max_features=MAX_WORDS, dtype=np.float32
    )
    vectors = vectorizer.fit_transform(texts)
    vectors.sort_indices()
    n = vectors.shape[0]
    with threadpool_limits(1):
        if vectors.shape[1] <= graph.PROJECTED:
            directions = vectors.toarray()
        else:
            directions = TruncatedSVD(min(graph.PROJECTED, n), random_state=seed).fit_transform(vectors)
        directions = at_unit_length(directions)
        labels = graph.clusters(directions, seed=seed, num_clusters=max(1, min(graph.NUM_CLUSTERS, n // 10)))
    parts = {name: getattr(vectors, name) for name in ("data", "indices", "indptr")}
    return {**parts, "shape": np.array(vectors.shape), "labels": labels}


def apart(space: Mapping[str, np.ndarray], positions: np.ndarray, *, seed: int = 0) -> dict[str, float]:
    """How far a coreset's samples lie apart, and how much of the pool's ground they cover.

    Args:
        space: of `text_space`.
        positions: (m,) pool positions.
        seed: of the 2,000 samples asked, of a larger coreset; their neighbours are looked for among all.

    Returns:
        nearest: mean cosine distance, in [0, 1], from a sample to the nearest other of the coreset; nan below
            two.
        clusters: share of the pool's clusters with a sample in the coreset.
    """
    from scipy.sparse import csr_array

    labels = space["labels"]
    covered = len(np.unique(labels[positions])) / max(1, len(np.unique(labels)))
    m = len(positions)
    if m < 2:
        return {"nearest": float("nan"), "clusters": covered}
    whole = csr_array((space["data"], space["indices"], space["indptr"]), shape=tuple(space["shape"]))
    vectors = whole[positions]
    asked = np.sort(np.random.default_rng(seed).choice(m, min(m, NUM_ASKED), replace=False))
    others, highest, step = vectors.T.tocsr(), [], max(1, SIMILARITIES_AT_ONCE // m)
    for start in range(0, len(asked), step):
        rows = asked[start : start + step]
        similar = (vectors[rows] @ others).tocoo()
        similar.data[similar.col == rows[similar.row]] = 0
        highest.append(similar.max(axis=1).toarray().ravel())
    distances = 1 - np.concatenate(highest, dtype=np.float64)
    return {"nearest": float(distances.clip(0, 1).mean()), "clusters": covered}
