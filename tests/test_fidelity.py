"""How faithful a draft is: against scipy's figures, by simulation, and in words."""

import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr
from sklearn.metrics import adjusted_rand_score, rand_score

from staff.methods.fidelity import Fidelity, fidelity, judge
from staff.methods.strata import split


def pool(n=400, noise=0.4, seed=0):
    rng = np.random.default_rng(seed)
    length = rng.integers(5, 60, n)
    hard = rng.normal(size=n) - 0.5 * np.log(length)
    draft, target = (np.exp(0.5 * (hard + noise * rng.normal(size=n))) for _ in range(2))
    return draft, target, length, rng.uniform(1, 4, n)


def partition(draft, regions=8):
    _, region_of = split(draft, regions)
    return region_of, np.bincount(region_of, minlength=regions)


def test_with_the_whole_pool_verified_it_is_what_scipy_says_and_nothing_is_uncertain():
    draft, target, length, loss = pool()
    region_of, sizes = partition(draft)
    told = fidelity(region_of, sizes, len(draft), draft, target, length, loss)
    widths = np.linspace(target.min(), target.max(), 9)
    of_target = np.clip(np.searchsorted(widths[1:], target, side="left"), 0, 7)
    rank = {
        a: spearmanr(x, y)[0]
        for a, x, y in [("dt", draft, target), ("dl", draft, length), ("tl", target, length)]
    }
    out = (rank["dt"] - rank["dl"] * rank["tl"]) / np.sqrt((1 - rank["dl"] ** 2) * (1 - rank["tl"] ** 2))
    expected = {
        "spearman": rank["dt"],
        "kendall": kendalltau(draft, target)[0],
        "without_length": out,
        "adjusted_rand": adjusted_rand_score(region_of, of_target),
        "length": rank["tl"],
        "loss": spearmanr(loss, target)[0],
    }
    for name, value in expected.items():
        assert getattr(told, name) == pytest.approx((value,) * 3, abs=1e-9), name
    assert told.rand == pytest.approx(rand_score(region_of, of_target))
    assert told.pool_share == 1


def test_samples_drawn_evenly_from_uneven_regions_are_weighted_back_to_the_pool_and_intervals_hold():
    draft, target, length, loss = pool(1500)
    hard = np.flatnonzero(draft > np.quantile(draft, 0.7))  # of which the draft knows nothing
    target[hard] = target[np.random.default_rng(1).permutation(hard)]
    region_of, sizes = partition(draft)
    drawn_from = np.flatnonzero(sizes > 8)
    inside = np.isin(region_of, drawn_from)
    truth = {
        "spearman": spearmanr(draft[inside], target[inside])[0],
        "kendall": kendalltau(draft[inside], target[inside])[0],
    }
    values, hits = {name: [] for name in truth}, dict.fromkeys(truth, 0)
    plain = []
    for seed in range(120):
        rng = np.random.default_rng(seed)
        taken = [rng.choice(np.flatnonzero(region_of == region), 8, replace=False) for region in drawn_from]
        at = np.concatenate(taken)
        told = fidelity(region_of[at], sizes, 1500, draft[at], target[at], length[at], loss[at])
        assert told.pool_share == pytest.approx(inside.mean())
        plain.append(spearmanr(draft[at], target[at])[0])
        for name, value in truth.items():
            middle, low, high = getattr(told, name)
            values[name].append(middle)
            hits[name] += low <= value <= high
    for name, value in truth.items():
        assert np.mean(values[name]) == pytest.approx(value, abs=0.02)
        assert 0.90 <= hits[name] / 120 <= 0.99
    assert abs(np.mean(plain) - truth["spearman"]) > 0.05  # what no weights would have said


def test_too_few_samples_and_constant_scores_say_so():
    draft, target, length, _ = pool(19)
    told = fidelity(np.zeros(19, int), np.array([100]), 200, draft, target, length)
    assert (told.verdict, told.spearman, told.pool_share) == ("unknown", None, 0.5)
    assert told.reason.startswith("too few to say: 19 samples")
    told = fidelity(np.zeros(40, int), np.array([100]), 100, np.ones(40), np.arange(40.0), np.arange(40))
    assert (told.verdict, told.spearman, told.kendall, told.without_length) == ("unknown", None, None, None)
    assert told.reason == "not defined: all scores of one side are equal"
    assert "nan" not in str(told.as_dict())


def test_equal_samples_give_equal_intervals_and_order_does_not_matter():
    draft, target, length, loss = pool(60)
    region_of, sizes = partition(draft, 3)
    first = fidelity(region_of, sizes * 4, 240, draft, target, length, loss)
    assert first == fidelity(region_of, sizes * 4, 240, draft, target, length, loss)
    assert isinstance(first, Fidelity)
    assert first.spearman[1] < first.spearman[0] < first.spearman[2]


@pytest.mark.parametrize(
    ("rank", "rest", "better", "verdict"),
    [
        ((0.9, 0.85, 0.93), (0.7, 0.6, 0.8), [], "good"),
        ((0.9, 0.75, 0.95), (0.7, 0.6, 0.8), [], "usable"),
        ((0.9, 0.85, 0.93), (0.5, 0.1, 0.8), [], "usable"),
        ((0.9, 0.85, 0.93), None, [], "good"),
        ((0.9, 0.85, 0.93), (0.1, 0.0, 0.19), [], "poor"),
        ((0.5, 0.4, 0.59), None, [], "poor"),
        ((0.9, 0.85, 0.93), None, ["the responses' length"], "poor"),
        ((0.6, 0.2, 0.8), (0.3, -0.1, 0.6), [], "unknown"),
        (None, None, [], "unknown"),
    ],
)
def test_the_verdict_hangs_on_the_ends_of_the_intervals(rank, rest, better, verdict):
    assert judge({"spearman": rank, "without_length": rest}, better)[0] == verdict


def test_a_draft_that_length_beats_is_not_to_be_trusted():
    rng = np.random.default_rng(0)
    length = rng.permutation(300)
    target = length + 5.0 * rng.normal(size=300)
    draft = length + 80.0 * rng.normal(size=300)
    told = fidelity(np.zeros(300, int), np.array([3000]), 3000, draft - draft.min(), target, length)
    assert told.verdict == "poor"
    assert "the responses' length alone ranks" in told.reason


def test_one_sample_a_region_leaves_an_interval_that_holds():
    draft, target, length, loss = pool(1500, noise=0.8)
    region_of, sizes = partition(draft, 40)
    drawn_from = np.flatnonzero(sizes > 1)
    inside = np.isin(region_of, drawn_from)
    truth, hits = spearmanr(draft[inside], target[inside])[0], 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        at = np.array([rng.choice(np.flatnonzero(region_of == region)) for region in drawn_from])
        told = fidelity(region_of[at], sizes, 1500, draft[at], target[at], length[at], loss[at])
        hits += told.spearman[1] <= truth <= told.spearman[2]
    assert hits / 60 >= 0.85


def test_inside_groups_what_a_draft_knows_of_the_groups_themselves_counts_for_nothing():
    rng = np.random.default_rng(0)
    hard = np.repeat([1.0, 100.0], 150)
    draft, target = hard + rng.uniform(0, 1, 300), hard + rng.uniform(0, 1, 300)
    halves = [split(draft[part], 5)[1] for part in (slice(150), slice(150, 300))]
    region_of = np.r_[halves[0], halves[1] + 5]
    sizes = np.bincount(region_of, minlength=10)
    together = fidelity(region_of, sizes, 300, draft, target)
    apart = fidelity(region_of, sizes, 300, draft, target, firsts=(0, 5))
    assert together.spearman[0] > 0.7
    assert apart.verdict == "poor"
    each = [spearmanr(draft[part], target[part])[0] for part in (slice(150), slice(150, 300))]
    assert apart.spearman[0] == pytest.approx(np.mean(each))
    assert abs(apart.adjusted_rand[0]) < 0.05
    same = fidelity(region_of, sizes, 300, draft, draft, firsts=(0, 5))
    assert same.adjusted_rand[0] == same.kendall[0] == pytest.approx(1)


def test_groups_whose_scores_touch_are_still_groups():
    from staff.methods import METHODS
    from staff.methods.groups import select_by_group
    from staff.pipeline import _fidelity

    rng, groups = np.random.default_rng(0), np.repeat(["a", "b"], 150)
    scores = np.r_[
        np.linspace(1, 2, 150), np.linspace(2, 3, 150)
    ]  # the end of one is the beginning of the other
    target, length = scores + rng.uniform(0, 0.1, 300), rng.integers(5, 50, 300)
    settings = {"num_regions": 5, "verification_budget": 10, "hard_cutoff": 0.0}
    rng, ask = np.random.default_rng(1), target.__getitem__
    chosen = select_by_group(
        METHODS["staff"], groups, 300, budget=30, rng=rng, scores=scores, verify=ask, **settings
    )
    assert chosen.regions[4].upper == chosen.regions[5].lower
    at = chosen.verified
    told = _fidelity(chosen, scores, target[at], length, None, groups)
    sizes = np.array([region.size for region in chosen.regions])
    regions = chosen.region_of[at]
    apart = fidelity(regions, sizes, 300, scores[at], target[at], length[at], firsts=(0, 5))
    assert told == apart.as_dict()


def test_a_draft_that_is_the_length_knows_nothing_else():
    length = np.random.default_rng(0).permutation(200)
    target = length + 8.0 * np.random.default_rng(1).normal(size=200)
    told = fidelity(np.zeros(200, int), np.array([2000]), 2000, 3.0 * length, target, length)
    assert told.spearman[1] > 0.9
    assert (told.without_length, told.verdict) == ((0, 0, 0), "poor")
