"""Neighbours and clusters: exact against the obvious way, approximate close to it, the same for the same
seed."""

import numpy as np
import pytest

from staff import graph


def blobs(n=1200, num_blobs=12, seed=0):
    draw = np.random.default_rng(seed)
    blob_of = draw.integers(num_blobs, size=n)
    return (8 * draw.normal(size=(num_blobs, 10))[blob_of] + draw.normal(size=(n, 10))).astype(
        np.float32
    ), blob_of


def plain_neighbours(features, k):
    distances = np.array([np.linalg.norm(features - row, axis=1) for row in features])
    np.fill_diagonal(distances, np.inf)
    return np.argsort(distances, axis=1, kind="stable")[:, :k]


def test_exact_neighbours_are_those_of_the_obvious_way():
    features, _ = blobs(300)
    assert (
        graph.neighbours(features, seed=0, num_neighbours=5).tolist()
        == plain_neighbours(features, 5).tolist()
    )


def test_the_lowest_of_many_columns_are_those_of_a_sort():
    distances = np.random.default_rng(0).normal(size=(20, 1003))
    for count in (1, 3):
        assert graph._lowest(distances, count).tolist() == np.argsort(distances, axis=1)[:, :count].tolist()
        assert graph._lowest(-np.ones((3, 1003)), count).shape == (3, count)


def test_neighbours_by_hand():
    features = np.array([[0.0], [1.0], [3.0], [7.0]])
    assert graph.neighbours(features, seed=0, num_neighbours=2).tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]


def test_far_from_the_origin_neighbours_stay_the_same():
    features, _ = blobs(300)
    shifted = (features + 1000).astype(np.float64)
    assert graph.neighbours(shifted, seed=0).tolist() == graph.neighbours(shifted - 1000, seed=0).tolist()


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_a_small_pool_has_fewer_neighbours(n):
    found = graph.neighbours(np.arange(float(n))[:, None], seed=0)
    assert found.shape == (n, max(0, min(10, n - 1)))
    assert all(i not in row for i, row in enumerate(found.tolist()))


def test_duplicates_are_neighbours_and_no_one_is_its_own():
    found = graph.neighbours(np.ones((30, 3)), seed=0)
    assert all(i not in row and len(set(row)) == 10 for i, row in enumerate(found.tolist()))


def test_approximate_neighbours_are_nearly_all_true_and_it_is_said_how_many(monkeypatch, caplog):
    monkeypatch.setattr(graph, "CANDIDATES", 300)
    features, _ = blobs()
    features = features @ np.random.default_rng(1).normal(size=(10, 80)).astype(
        np.float32
    )  # so that there is something to project
    caplog.set_level("INFO")
    found = graph.neighbours(features, seed=0, exact=False)
    truth = plain_neighbours(features, 10)
    assert np.mean([len(set(a) & set(b)) for a, b in zip(found.tolist(), truth.tolist(), strict=True)]) > 9.5
    assert "approximate neighbours of 1200 samples" in caplog.text
    assert found.tolist() == graph.neighbours(features, seed=0, exact=False).tolist()


def test_an_approximate_search_that_misses_much_warns(monkeypatch, caplog):
    monkeypatch.setattr(graph, "CANDIDATES", 300)
    noise = np.random.default_rng(0).normal(size=(3000, 200))
    graph.neighbours(noise, seed=0, exact=False)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_large_pool_is_searched_approximately_unless_told(monkeypatch, caplog):
    monkeypatch.setattr(graph, "APPROXIMATE_ABOVE", 100)
    features, _ = blobs(200)
    caplog.set_level("INFO")
    graph.neighbours(features, seed=0)
    assert "approximate neighbours of 200" in caplog.text
    assert graph.neighbours(features, seed=0, exact=True).tolist() == plain_neighbours(features, 10).tolist()
    assert "all 4.0e+04 pairs of 200 samples" in caplog.text


@pytest.mark.parametrize("quick", [False, True])
def test_clusters_find_blobs_and_are_the_same_for_the_same_seed(quick, monkeypatch):
    monkeypatch.setattr(graph, "APPROXIMATE_ABOVE", 100 if quick else 20_000)
    features, blob_of = blobs(num_blobs=4)
    labels = graph.clusters(features, seed=1, num_clusters=8)
    assert labels.dtype == np.int64
    assert labels.tolist() == graph.clusters(features, seed=1, num_clusters=8).tolist()
    mixed = [label for label in np.unique(labels) if len(np.unique(blob_of[labels == label])) > 1]
    assert len(mixed) <= 1


def test_there_are_a_hundred_clusters_or_fewer_in_a_small_pool():
    assert len(np.unique(graph.clusters(blobs(300)[0], seed=0))) == 15
    assert len(np.unique(graph.clusters(blobs(3000)[0], seed=0))) == 100
    assert graph.clusters(np.ones((1, 4)), seed=0).tolist() == [0]
    assert graph.clusters(np.empty((0, 4)), seed=0).tolist() == []


def test_equal_rows_cluster_without_complaint(recwarn):
    labels = graph.clusters(np.ones((200, 4)), seed=0)
    assert labels.shape == (200,)
    assert not recwarn.list


def test_features_without_numbers_are_refused_by_position():
    features = np.ones((5, 2))
    features[3, 1] = np.nan
    for make in (graph.neighbours, graph.clusters):
        with pytest.raises(ValueError, match=r"1 of 5 samples .*\[3\]"):
            make(features, seed=0)
        with pytest.raises(ValueError, match="one row a sample"):
            make(np.ones(5), seed=0)


def test_what_a_need_has_behind_its_dot_is_made():
    features, _ = blobs(100)
    assert graph.derive("neighbours", features, 0).tolist() == graph.neighbours(features, seed=0).tolist()
    assert graph.derive("clusters", features, 0).tolist() == graph.clusters(features, seed=0).tolist()


def test_clusters_at_unit_length_see_directions_alone():
    features, _ = blobs(100)
    features[3] = 0  # a row without a direction is a place of its own
    of_lengths = np.linspace(0.1, 50, 100)[:, None]
    labels = graph.derive("unit_clusters", features, 0)
    assert labels.tolist() == graph.derive("unit_clusters", features * of_lengths, 0).tolist()
