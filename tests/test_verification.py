"""Which samples the target scores: intervals by simulation, calls that are saved, and what stays the same."""

import numpy as np
import pytest

from staff.methods import verification
from staff.methods.staff import staff
from staff.methods.strata import allocate, members_of, split


def pool(n=1200, regions=16, noise=0.2, seed=0):
    rng = np.random.default_rng(seed)
    draft = rng.gamma(4.0, size=n)
    target = draft ** rng.uniform(0.6, 0.9) * rng.lognormal(sigma=noise, size=n)
    members = members_of(split(draft, regions)[1], regions)
    true = np.array([target[m].sum() / draft[m].sum() if len(m) else np.nan for m in members])
    return draft, target, members, true


def errors(ratios, true, members, budget=240):
    sizes = np.array([*map(len, members)])
    return np.abs(allocate(ratios, sizes, budget) - allocate(true, sizes, budget)).sum() / budget


def test_fixed_verification_takes_the_ratio_of_sums_by_hand():
    scores, target = np.array([1.0, 2, 3, 4, 10, 20]), np.array([2.0, 2, 2, 2, 5, 5])
    members = [np.arange(4), np.arange(4, 6)]
    told = verification.fixed(scores, members, 2, target.__getitem__, np.random.default_rng(0))
    drawn = told.verified
    assert len(drawn) == 2
    assert set(drawn) <= {0, 1, 2, 3}
    assert told.values[0] == target[drawn].sum() / scores[drawn].sum()
    assert np.isnan(told.values[1])
    assert told.low[0] < told.values[0] < told.high[0]
    assert np.isnan(told.high[1])


def test_intervals_of_the_ratios_hold_the_truth_as_often_as_they_say():
    hits = {"fixed": [], "adaptive": []}
    for seed in range(30):
        draft, target, members, true = pool(seed=seed)
        for name in hits:
            draws = np.random.default_rng(seed)
            if name == "fixed":
                told = verification.fixed(draft, members, 10, target.__getitem__, draws)
            else:
                told = verification.adaptive(draft, members, 0.03, 160, target.__getitem__, draws)
            is_known = ~np.isnan(told.low) & ~np.isnan(true)
            hits[name] += ((told.low <= true + 1e-12) & (true <= told.high + 1e-12))[is_known].tolist()
    assert 0.93 <= np.mean(hits["fixed"]) <= 0.97
    assert 0.90 <= np.mean(hits["adaptive"]) <= 0.98


def test_adaptive_verification_needs_half_the_calls_for_the_same_error():
    ten, half = [], []
    for seed in range(20):
        draft, target, members, true = pool(seed=seed)
        draws = np.random.default_rng(seed)
        told = verification.fixed(draft, members, 10, target.__getitem__, draws)
        ten.append(errors(told.values, true, members))
        less = verification.adaptive(draft, members, 0.0, len(told.verified) // 2, target.__getitem__, draws)
        assert len(less.verified) <= len(told.verified) // 2
        half.append(errors(less.values, true, members))
    assert np.mean(half) <= np.mean(ten)


def test_it_stops_where_the_error_is_small_and_a_longer_run_scores_what_a_shorter_one_does():
    draft, target, members, _ = pool()
    sets = []
    for error in (0.2, 0.05, 0.02, 0.0):
        told = verification.adaptive(draft, members, error, 400, target.__getitem__, np.random.default_rng(1))
        sets.append(set(told.verified.tolist()))
    counts = [len(verified) for verified in sets]
    assert counts[0] < counts[1] < counts[2] < counts[3] == 400
    assert sets[0] <= sets[1] <= sets[2] <= sets[3]


def test_a_killed_adaptive_run_replays_what_it_asked_and_ends_the_same():
    draft, target, members, _ = pool()
    paid: dict[int, float] = {}

    def verify(positions, most):
        for position in positions.tolist():
            if position not in paid:
                if len(paid) == most:
                    raise KeyboardInterrupt
                paid[position] = target[position]
        return np.array([paid[position] for position in positions.tolist()])

    def run(most):
        ask = lambda positions: verify(positions, most)  # noqa: E731
        return verification.adaptive(draft, members, 0.02, 200, ask, np.random.default_rng(5))

    whole = verification.adaptive(draft, members, 0.02, 200, target.__getitem__, np.random.default_rng(5))
    for most in (0, 40, 70):
        with pytest.raises(KeyboardInterrupt):
            run(most)
    resumed = run(10**6)
    assert resumed.values.tobytes() == whole.values.tobytes()
    assert set(paid) == set(whole.verified.tolist())


def test_one_set_of_target_calls_serves_every_rate_and_pick():
    draft, target, *_ = pool()
    asked = set()
    for budget in (12, 240, 600):
        for pick in ("top", "random"):
            rng = np.random.default_rng(3)
            options = {"verification": "adaptive", "pick": pick}
            chosen = staff(1200, budget=budget, rng=rng, scores=draft, verify=target.__getitem__, **options)
            asked.add(chosen.verified.tobytes())
            assert len(chosen.indices) == budget
            assert all(region.verified >= min(region.size, 2) for region in chosen.regions)
    assert len(asked) == 1


def test_extremes_of_adaptive_verification():
    draws = np.random.default_rng(0)
    members = [np.arange(3), np.empty(0, np.int64), np.arange(3, 4), np.arange(4, 40)]
    scores = np.linspace(1, 5, 40)
    alike = verification.adaptive(scores, members, 0.03, 400, scores.__getitem__, draws)
    assert alike.values[[0, 2, 3]] == pytest.approx(1)
    assert np.isnan(alike.values[1])
    nothing = verification.adaptive(scores, members, 0.03, 400, lambda p: np.zeros(len(p)), draws)
    assert np.nanmax(nothing.values) <= 1
    assert np.isfinite(nothing.values[[0, 2, 3]]).all()
    with pytest.raises(ValueError, match="region 0 has draft scores of 0"):
        verification.adaptive(np.zeros(40), members, 0.03, 400, lambda p: np.ones(len(p)), draws)
    with pytest.raises(ValueError, match="no usable score"):
        verification.adaptive(scores, members, 0.03, 400, lambda p: np.full(len(p), np.nan), draws)


@pytest.mark.parametrize("n", [1, 20, 100, 200, 500, 1000, 2000, 12_500, 10**6])
def test_regions_follow_the_pool(n):
    regions = verification.default_regions(n)
    drawn = verification.default_verified(n, regions)
    assert 2 <= regions <= 50
    assert 4 <= drawn <= 10
    if n >= 500:
        assert regions * drawn <= 0.105 * n
    if n >= 100:
        assert regions * drawn >= 24
    scores = np.random.default_rng(0).lognormal(sigma=0.4, size=n)  # as skew as efforts are
    uncut = np.sort(scores)[: n - n // 10]
    sizes = np.bincount(split(uncut, regions)[1], minlength=regions)
    if n >= 200:
        assert sizes[sizes > drawn].sum() >= 0.9 * len(uncut)


def test_adaptive_verification_never_scores_more_than_it_may():
    draft, target, *_ = pool()
    options = {"verification": "adaptive", "verification_budget": 1, "num_regions": 30, "budget": 100}
    rng = np.random.default_rng(0)
    chosen = staff(1200, rng=rng, scores=draft, verify=target.__getitem__, **options)
    assert len(chosen.verified) <= 30
    assert all(region.verified >= min(region.size, 1) for region in chosen.regions)
