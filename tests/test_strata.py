"""Regions and budgets, worked by hand on ten samples, then whatever hypothesis can think of."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from staff.methods.staff import staff
from staff.methods.strata import allocate, check_scores, set_hardest_aside, split, take_back

# ten samples, 4 regions of width 1 between 0 and 4: {0, 1}, {2, 3, 4, 5}, {6}, {7, 8, 9}
TEN = np.array([0.0, 1.0, 1.5, 1.6, 1.7, 2.0, 2.5, 3.1, 3.6, 4.0])
SIZES = [2, 4, 1, 3]  # walked smallest first: region 2, 0, 3, 1
RATIOS = [2.0, 1.0, 1.0, 4.0]

finite = st.floats(0, 1e6, width=32)


def test_ten_samples_fall_into_four_regions_of_equal_width():
    edges, region_of = split(TEN, 4)
    assert edges.tolist() == [0, 1, 2, 3, 4]
    assert region_of.tolist() == [0, 0, 1, 1, 1, 1, 2, 3, 3, 3]


def test_a_score_on_an_edge_belongs_to_the_lower_region():
    edges, region_of = split(np.array([0.0, 1.0, 1.0000001, 2.0, 3.0, 4.0]), 4)
    assert region_of.tolist() == [0, 0, 1, 1, 2, 3]
    assert edges[-1] == 4.0


def test_the_last_edge_is_the_highest_score_itself():
    scores = np.float32([0.1, 0.2, 0.7]).astype(np.float64)  # 0.1 + 49 * 0.6 / 49 is not 0.7 in float64
    for num_regions in range(1, 60):
        edges, region_of = split(scores, num_regions)
        assert edges[-1] == scores[-1]
        assert region_of[-1] == num_regions - 1


def test_equal_scores_all_fall_into_the_first_region():
    edges, region_of = split(np.full(5, 3.0), 4)
    assert region_of.tolist() == [0] * 5
    assert edges.tolist() == [3.0] * 5


def test_no_scores_make_empty_regions():
    edges, region_of = split(np.empty(0), 4)
    assert len(edges) == 5
    assert len(region_of) == 0


def test_released_rule_shares_by_the_ratios_still_to_come():
    # m = 6. region 2 (size 1): 6 * 1 / 8 = 0.75 -> 0, 6 left
    # region 0 (size 2): 6 * 2 / 7 = 1.71 -> 1, 5 left; region 3 (size 3): 5 * 4 / 5 = 4 -> 3 (all), 2 left;
    # region 1: 2 * 1 / 1 = 2
    assert allocate(RATIOS, SIZES, 6, "released").tolist() == [1, 2, 0, 3]


def test_papers_rule_shares_by_the_regions_left_and_never_overspends():
    # m = 6. region 2: 6 * 1 / 4 = 1.5 -> 1, 5 left; region 0: 5 * 2 / 3 = 3.3 -> 2 (all), 3 left
    # region 3: 3 * 4 / 2 = 6 -> 3 (all, and all that is left); region 1: nothing left
    assert allocate(RATIOS, SIZES, 6, "paper").tolist() == [2, 0, 1, 3]


def test_papers_rule_is_not_scale_free_and_leaves_budget_over():
    # V = 0.5 everywhere, m = 6: 6 * 0.5 / 4 = 0.75 -> 0; 6 * 0.5 / 3 = 1; 5 * 0.5 / 2 = 1.25 -> 1; 4 * 0.5 /
    # 1 = 2: four of six
    assert allocate([0.5] * 4, SIZES, 6, "paper").tolist() == [1, 2, 0, 1]
    # the released rule does not care: 6 / 4 -> 1, 5 / 3 -> 1, 4 / 2 -> 2, 2
    assert allocate([0.5] * 4, SIZES, 6, "released").tolist() == [1, 2, 1, 2]


def test_a_region_without_a_ratio_gets_an_even_share():
    # region 2: floor(6 / 4) = 1 whatever V is elsewhere; region 0: floor(5 / 3) = 1; region 3: 4 * 4 / 5 =
    # 3.2 -> 3; region 1: 1 * 1 / 1
    for rule in ("released", "paper"):
        assert allocate([np.nan, 1.0, np.nan, 4.0], SIZES, 6, rule).tolist() == [1, 1, 1, 3]


def test_ratios_that_are_all_zero_count_as_equal():
    assert (
        allocate([0.0] * 4, SIZES, 6, "released").tolist()
        == allocate([1.0] * 4, SIZES, 6, "released").tolist()
    )
    assert allocate([0.0] * 4, SIZES, 6, "paper").tolist() == allocate([1.0] * 4, SIZES, 6, "paper").tolist()


def test_one_ratio_of_zero_gives_its_region_nothing():
    # region 2 has V = 0: nothing; region 0: 6 * 2 / 7 -> 1; region 3: 5 * 4 / 5 = 4 -> 3; region 1: 2
    assert allocate([2.0, 1.0, 0.0, 4.0], SIZES, 6, "released").tolist() == [1, 2, 0, 3]


def test_equal_sizes_go_lower_scores_first():
    # 3 over two regions of 2: the first takes floor(3 / 2) = 1, the second the 2 left
    assert allocate([1.0, 1.0], [2, 2], 3).tolist() == [1, 2]


def test_empty_regions_are_passed_over():
    # counted as one of three regions left, the empty one would have cost the others a share
    assert allocate([np.nan] * 3, [0, 4, 4], 4).tolist() == [0, 2, 2]


@pytest.mark.parametrize("budget", [0, 10])
def test_no_budget_takes_nothing_and_a_full_one_takes_everything(budget):
    assert allocate(RATIOS, SIZES, budget).sum() == budget


@pytest.mark.parametrize("bad", [-1.0, np.inf])
def test_a_ratio_that_cannot_be_is_refused_by_region(bad):
    with pytest.raises(ValueError, match="region 2 has the verification ratio"):
        allocate([1.0, 1.0, bad, 1.0], SIZES, 3)


def test_an_unknown_rule_names_those_there_are():
    with pytest.raises(ValueError, match="released, paper; found 'even'"):
        allocate(RATIOS, SIZES, 3, "even")


def test_the_hardest_tenth_of_ten_is_one_sample():
    kept, cut = set_hardest_aside(TEN, 0.1)
    assert kept.tolist() == list(range(9))
    assert cut.tolist() == [9]


def test_of_equal_scores_the_later_position_is_cut_and_the_easiest_cut_comes_back_first():
    scores = np.array([5.0, 9.0, 7.0, 7.0, 1.0])
    kept, cut = set_hardest_aside(scores, 0.4)
    assert cut.tolist() == [1, 3]
    assert kept.tolist() == [0, 2, 4]
    assert take_back(scores, cut, 1).tolist() == [3]


def test_a_cutoff_is_a_fraction_and_binary_fractions_do_not_cost_a_sample():
    assert len(set_hardest_aside(np.arange(100.0), 0.29)[1]) == 29  # 0.29 * 100 is 28.999999999999996
    assert len(set_hardest_aside(np.arange(10.0), 1 - 1e-12)[1]) == 9  # one sample is left to speak of
    for bad in (-0.1, 1.0):
        with pytest.raises(ValueError, match="hard_cutoff"):
            set_hardest_aside(TEN, bad)


def test_scores_that_are_no_numbers_are_refused_by_position():
    with pytest.raises(ValueError, match=r"2 of 4 scores are nan or infinite \(positions 1, 3\)"):
        check_scores(np.array([0, np.nan, 1, np.inf]), 4)
    with pytest.raises(ValueError, match="one number a sample"):
        check_scores(np.zeros((3, 2)), 3)


@given(st.lists(finite, max_size=60), st.floats(0, 0.99))
def test_the_cut_parts_the_pool_with_the_hardest_above(scores, hard_cutoff):
    scores = np.array(scores, np.float64)
    kept, cut = set_hardest_aside(scores, hard_cutoff)
    assert sorted([*kept, *cut]) == list(range(len(scores)))
    assert len(kept) > 0 or len(scores) == 0
    if len(cut):
        assert scores[kept].max() <= scores[cut].min()


@given(st.lists(finite, min_size=1, max_size=60), st.integers(1, 70))
def test_every_score_lies_between_its_regions_edges(scores, num_regions):
    scores = np.array(scores, np.float64)
    edges, region_of = split(scores, num_regions)
    assert len(edges) == num_regions + 1
    assert (
        region_of.tolist() == np.searchsorted(edges[1:], scores, side="left").tolist()
    )  # the first whose upper edge it does not pass
    assert (edges[region_of] <= scores).all()


@given(
    st.lists(st.tuples(st.floats(0, 1e6) | st.just(np.nan), st.integers(0, 30)), min_size=1, max_size=20),
    st.data(),
)
def test_no_region_gets_more_than_it_has_nor_all_of_them_more_than_there_is(regions, data):
    ratios, sizes = (np.array(column) for column in zip(*regions, strict=True))
    budget = data.draw(st.integers(0, int(sizes.sum())))
    for rule in ("released", "paper"):
        budgets = allocate(ratios, sizes, budget, rule)
        assert (budgets >= 0).all()
        assert (budgets <= sizes).all()
        assert budgets.sum() <= budget


@given(
    scores=st.lists(finite, min_size=1, max_size=80),
    p=st.floats(0, 1, exclude_max=True),
    num_regions=st.integers(1, 60),
    verification_budget=st.integers(1, 12),
    hard_cutoff=st.floats(0, 0.9),
    allocation=st.sampled_from(["released", "paper"]),
    pick=st.sampled_from(["top", "random"]),
    seed=st.integers(0, 3),
)
def test_staff_keeps_exactly_m_samples_whatever_it_is_given(
    scores, p, num_regions, verification_budget, hard_cutoff, allocation, pick, seed
):
    scores = np.array(scores)
    budget = round((1 - p) * len(scores))
    selection = staff(
        len(scores),
        scores=scores,
        budget=budget,
        rng=np.random.default_rng(seed),
        verify=lambda positions: scores[positions] * 2,
        num_regions=num_regions,
        verification_budget=verification_budget,
        hard_cutoff=hard_cutoff,
        allocation=allocation,
        pick=pick,
    )
    assert len(np.unique(selection.indices)) == len(selection.indices) == budget
    assert (np.diff(selection.indices) > 0).all()
    assert sum(region.selected for region in selection.regions) + selection.filled_from_cut == budget
    assert (
        sum(region.budget for region in selection.regions) + selection.filled + selection.filled_from_cut
        == budget
    )
