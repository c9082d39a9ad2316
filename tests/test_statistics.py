"""Intervals and corrections against numbers worked by hand, and against what they promise."""

import numpy as np
import pytest

from staff.comparison.statistics import Resamples, holm, interval, p_value, resample, resampled_means


def test_a_resampled_mean_weighs_seeds_and_rows_as_often_as_they_were_drawn():
    values = np.array([[1.0, 2, 3], [4, 5, 6]])
    # the first seed twice; row 0 twice and row 2 once: (1 + 1 + 3) / 3. Then both seeds, each row once: 3.5
    drawn = Resamples(np.array([[1, 0], [0.5, 0.5]]), np.array([[2, 0, 1], [1, 1, 1]]) / 3)
    assert resampled_means(values, drawn).tolist() == pytest.approx([5 / 3, 3.5])


def test_the_bootstrap_has_the_spread_of_rows_and_of_seeds():
    rng = np.random.default_rng(0)
    drawn = resample(5, 200, rng)
    assert drawn.seeds.sum(1) == pytest.approx(1)
    assert drawn.rows.sum(1) == pytest.approx(1)
    by_row = np.tile(
        rng.normal(size=200), (5, 1)
    )  # the same for every seed: five seeds are no five times the rows
    assert resampled_means(by_row, drawn).std() == pytest.approx(by_row[0].std() / np.sqrt(200), rel=0.05)
    by_seed = np.tile(rng.normal(size=5)[:, None], (1, 200))
    assert resampled_means(by_seed, drawn).std() == pytest.approx(by_seed[:, 0].std() / np.sqrt(5), rel=0.05)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    drawn = resample(10, 100, rng, 500)
    inside = 0
    for _ in range(200):
        values = rng.normal(size=(10, 1)) * 0.3 + rng.normal(size=(1, 100)) + rng.normal(size=(10, 100))
        low, high = interval(resampled_means(values, drawn))
        inside += low <= 0 <= high
    assert 0.9 <= inside / 200 <= 1


def test_equal_cells_differ_by_nothing_and_far_ones_by_the_smallest_p():
    drawn = resample(3, 50, np.random.default_rng(2), 999)
    values = np.random.default_rng(3).normal(size=(3, 50))
    difference = resampled_means(values, drawn) - resampled_means(values, drawn)
    assert interval(difference) == (0, 0)
    assert p_value(difference) == 1
    assert p_value(np.full(999, -1.0)) == 2 / 1000
    assert p_value(np.array([-1.0, 1, 1, 1])) == pytest.approx(2 * 2 / 5)


def test_holms_correction_as_in_his_scheme():
    # sorted 0.01 0.02 0.03 0.04, times 4 3 2 1: 0.04 0.06 0.06 0.04, never falling: 0.04 0.06 0.06 0.06
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []
