"""STAFF's selection: a case by hand, the authors' own answers, and who asks the target what."""

import json
from pathlib import Path

import numpy as np
import pytest

from staff.methods import METHODS, verification
from staff.methods.staff import staff

GOLDEN = sorted(Path(__file__).parent.glob("golden/*keep*.json"))


def rng(seed=0):
    return np.random.default_rng(seed)


class Target:
    """A target that writes down what it was asked."""

    def __init__(self, scores):
        self.scores, self.asked = np.asarray(scores), []

    def __call__(self, positions):
        self.asked.append(positions)
        return self.scores[positions]


def pool(n=600, seed=3):
    draft = rng(seed).lognormal(size=n)
    return draft, Target(draft * rng(seed + 1).uniform(0.5, 2, n))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_staff_chooses_what_the_released_script_chooses(path, monkeypatch):
    case = json.loads(path.read_text())
    drawn = {position: positions for positions in case["verified_smallest_first"] for position in positions}
    monkeypatch.setattr(
        verification,
        "_draw",
        lambda positions, *_: np.array(next(drawn[p] for p in positions.tolist() if p in drawn)),
    )
    target = Target(np.float32(case["target_scores"]))
    budget = int(case["n"] * case["keep_rate"])
    selection = staff(
        len(np.float32(case["draft_scores"])),
        scores=np.float32(case["draft_scores"]),
        budget=budget,
        rng=rng(),
        verify=target,
        num_regions=case["num_regions"],
        verification_budget=case["verification_budget"],
        allocation="released",
        pick="top",
        hard_cutoff=case["hard_cutoff"],
    )
    assert (
        sorted(region.size for region in selection.regions if region.size)
        == case["region_sizes_smallest_first"]
    )
    assert set(case["chosen"]) <= set(selection.indices.tolist())
    assert selection.filled == len(case["back_filled"]) == budget - len(case["chosen"])
    assert selection.filled_from_cut == 0
    asked = [
        positions
        for positions in case["verified_smallest_first"]
        if len(positions) == case["verification_budget"]
    ]
    assert set(selection.verified.tolist()) <= {p for positions in asked for p in positions}


def test_there_are_three_released_cases():
    assert len(GOLDEN) == 3


def test_ten_samples_by_hand():
    # no cut; two regions over [0, 8]: {0..5} with scores 0..4, {6..9} with scores 5..8
    draft = np.array([0.0, 1, 1, 2, 3, 4, 5, 6, 7, 8])
    # b_v = 4: region 0 (six samples) is verified; region 1 has only four, so it is not and gets an even share
    # smallest first: region 1: floor(6 / 2) = 3, region 0: min(6, 3 * V / V) = 3; highest first: {9, 8, 7}
    # and {5, 4, 3}
    target = Target(draft * 3)
    selection = staff(
        len(draft),
        scores=draft,
        budget=6,
        rng=rng(),
        verify=target,
        num_regions=2,
        verification_budget=4,
        hard_cutoff=0.0,
    )
    assert selection.indices.tolist() == [3, 4, 5, 7, 8, 9]
    first, second = selection.regions
    assert (first.lower, first.upper, first.size, first.verified, first.budget, first.selected) == (
        0,
        4,
        6,
        4,
        3,
        3,
    )
    assert first.ratio == pytest.approx(3.0)
    assert (second.lower, second.upper, second.size, second.verified, second.budget, second.selected) == (
        4,
        8,
        4,
        0,
        3,
        3,
    )
    assert np.isnan(second.ratio)
    assert selection.region_of.tolist() == [0] * 6 + [1] * 4
    assert set(selection.verified.tolist()) <= set(range(6))
    assert (selection.filled, selection.filled_from_cut) == (0, 0)


def test_what_the_target_finds_harder_gets_the_larger_share():
    # two regions of five, all verified but one each; V = 1 below, 4 above; the lower one goes first: floor(5
    # * 1 / 5) = 1, then 4
    draft = np.array([1.0, 1, 1, 1, 1, 2, 2, 2, 2, 2])
    target = Target([1.0] * 5 + [8.0] * 5)
    selection = staff(
        len(draft),
        scores=draft,
        budget=5,
        rng=rng(),
        verify=target,
        num_regions=2,
        verification_budget=4,
        hard_cutoff=0.0,
    )
    assert [(r.ratio, r.budget) for r in selection.regions] == [(1.0, 1), (4.0, 4)]
    assert selection.indices.tolist() == [0, 5, 6, 7, 8]  # of equal scores the earlier position


def test_the_target_is_asked_once_for_the_drawn_positions_and_nothing_else():
    draft, target = pool()
    paper = {"num_regions": 50, "verification_budget": 10}
    selection = staff(len(draft), scores=draft, budget=100, rng=rng(), verify=target, **paper)
    assert len(target.asked) == 1
    assert target.asked[0].tolist() == selection.verified.tolist() == sorted(set(selection.verified.tolist()))
    larger = [region for region in selection.regions if region.size > 10]
    assert len(selection.verified) == 10 * len(larger) == sum(region.verified for region in selection.regions)
    assert all(
        np.isnan(region.ratio) and region.verified == 0 for region in selection.regions if region.size <= 10
    )


def test_what_is_verified_depends_neither_on_the_budget_nor_on_the_pick_nor_on_the_rule():
    draft, target = pool()
    for budget in (0, 60, 300, 600):
        for options in ({}, {"pick": "random"}, {"allocation": "paper"}):
            staff(len(draft), scores=draft, budget=budget, rng=rng(7), verify=target, **options)
    assert len({positions.tobytes() for positions in target.asked}) == 1


def test_another_seed_verifies_others():
    draft, target = pool()
    staff(len(draft), scores=draft, budget=100, rng=rng(0), verify=target)
    staff(len(draft), scores=draft, budget=100, rng=rng(1), verify=target)
    assert target.asked[0].tolist() != target.asked[1].tolist()


def test_a_pool_of_small_regions_never_calls_the_target():
    target = Target(np.ones(10))
    selection = staff(len(np.arange(10.0)), scores=np.arange(10.0), budget=5, rng=rng(), verify=target)
    assert target.asked == []
    assert len(selection.verified) == 0


def test_without_a_target_every_region_counts_the_same():
    draft, _ = pool()
    selection = staff(len(draft), scores=draft, budget=100, rng=rng())
    assert {region.ratio for region in selection.regions} == {1.0}
    assert len(selection.verified) == 0
    assert (
        METHODS["direct"].select(len(draft), scores=draft, budget=100, rng=rng()).indices.tolist()
        == selection.indices.tolist()
    )


def test_pick_random_takes_as_many_from_each_region_but_others():
    draft, target = pool()
    top = staff(len(draft), scores=draft, budget=200, rng=rng(), verify=target)
    drawn = staff(len(draft), scores=draft, budget=200, rng=rng(), verify=target, pick="random")
    assert [r.budget for r in top.regions] == [r.budget for r in drawn.regions]
    assert top.indices.tolist() != drawn.indices.tolist()


def test_pick_top_takes_the_highest_of_each_region():
    draft, target = pool()
    selection = staff(len(draft), scores=draft, budget=200, rng=rng(), verify=target)
    assert selection.filled == 0
    for i, region in enumerate(selection.regions):
        members = np.flatnonzero(selection.region_of == i)
        chosen = np.isin(members, selection.indices)
        assert chosen.sum() == region.selected == region.budget
        if 0 < region.selected < region.size:
            assert draft[members[chosen]].min() >= draft[members[~chosen]].max()


def test_the_hardest_are_left_out_until_the_rest_is_used_up():
    draft = np.arange(100.0)
    selection = staff(len(draft), scores=draft, budget=90, rng=rng())
    assert selection.indices.tolist() == list(range(90))
    assert selection.filled_from_cut == 0
    selection = staff(len(draft), scores=draft, budget=93, rng=rng())
    assert selection.indices.tolist() == list(range(93))  # easiest of the cut ones first
    assert selection.filled_from_cut == 3
    assert set(selection.region_of[90:]) == {-1}


def test_what_the_papers_rule_leaves_over_is_filled_and_counted():
    draft = np.linspace(0, 1, 100)
    selection = staff(
        len(draft),
        scores=draft,
        budget=50,
        rng=rng(),
        verify=Target(draft * 0.5),
        num_regions=2,
        allocation="paper",
        hard_cutoff=0.0,
    )
    # 50 * 0.5 / 2 -> 12, 38 * 0.5 / 1 -> 19: 31 granted
    assert [region.budget for region in selection.regions] == [12, 19]
    assert (selection.filled, selection.filled_from_cut) == (19, 0)
    assert sum(region.selected for region in selection.regions) == len(selection.indices) == 50


def test_a_draft_of_zeros_counts_as_one_where_the_target_agrees_and_is_refused_where_not():
    draft = np.zeros(30)
    selection = staff(len(draft), scores=draft, budget=10, rng=rng(), verify=Target(np.zeros(30)))
    assert selection.regions[0].ratio == 1.0
    with pytest.raises(ValueError, match="region 0 has draft scores of 0 where the target's are not"):
        staff(len(draft), scores=draft, budget=10, rng=rng(), verify=Target(np.ones(30)))


def test_a_target_that_finds_everything_easy_shares_evenly():
    draft, _ = pool()
    zeros = staff(
        len(draft), scores=draft, budget=100, rng=rng(), verify=Target(np.zeros(600)), verification_budget=1
    )
    ones = staff(len(draft), scores=draft, budget=100, rng=rng(), verify=Target(draft), verification_budget=1)
    assert zeros.indices.tolist() == ones.indices.tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_a_target_score_that_is_no_norm_is_refused_by_position(bad):
    scores = np.ones(30)
    scores[[4, 5]] = bad
    with pytest.raises(ValueError, match=r"no usable score to 2 of 29 samples \(positions \[4, 5\]\)"):
        staff(
            len(np.ones(30)),
            scores=np.ones(30),
            budget=10,
            rng=rng(2),
            verify=Target(scores),
            verification_budget=29,
            hard_cutoff=0.0,
        )


def test_a_target_that_answers_too_little_is_refused():
    with pytest.raises(ValueError, match=r"10 positions.*shape \(\)"):
        staff(len(np.ones(30)), scores=np.ones(30), budget=10, rng=rng(), verify=lambda positions: 1.0)


def test_minmax_sees_the_whole_pool_and_says_so():
    draft, target = pool()
    selection = staff(len(draft), scores=draft, budget=100, rng=rng(), verify=target, normalise="minmax")
    assert selection.verified.tolist() == list(range(600))
    assert target.asked[0].tolist() == list(range(600))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 11}, "the budget must be between 0 and the pool's 10 samples; found 11"),
        ({"budget": -1}, "the budget must be between 0"),
        ({"pick": "best"}, "pick must be one of top, random; found 'best'"),
        ({"normalise": "z"}, "normalise must be one of"),
        ({"verification_budget": 0}, "verification_budget must be 1 or more; found 0"),
        ({"num_regions": 0}, "num_regions must be 1 or more; found 0"),
        ({"hard_cutoff": 1.0}, "hard_cutoff"),
        ({"allocation": "even"}, "allocation must be one of"),
    ],
)
def test_an_option_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        staff(10, scores=np.arange(10.0), **({"budget": 5, "rng": rng()} | options))


def test_a_negative_score_is_no_norm():
    with pytest.raises(ValueError, match="must not be negative"):
        staff(len(np.array([1.0, -1.0])), scores=np.array([1.0, -1.0]), budget=1, rng=rng())


def test_an_unknown_option_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="no option 'num_region'"):
        METHODS["staff"].select(2, scores=np.ones(2), budget=1, rng=rng(), num_region=5)
