"""Every entry of METHODS: the contract they all keep, and one case each that can be followed by hand."""

import importlib
import json
import subprocess
import sys
import types
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from staff.methods import COSTS, METHODS, cost, entry, methods_table
from staff.methods.features import neighbour_distances
from staff.methods.groups import select_by_group, share_by_size, share_by_wish, wanted_shares
from staff.methods.overlap import nestedness, overlap, overlaps
from staff.methods.spread import ordered
from staff.methods.verification import default_regions, default_verified
from staff.types import Need

features_module = importlib.import_module("staff.methods.features")
GOLDEN = Path(__file__).parent / "golden"
EVERY = sorted(METHODS)
NEEDY = [name for name in EVERY if METHODS[name].needs]


def rng(seed=0):
    return np.random.default_rng(seed)


def nearest(features, k):
    """All n - 1 or k nearest others, the obvious way."""
    distances = np.linalg.norm(features[:, None] - features[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    return np.argsort(distances, axis=1, kind="stable")[:, : min(k, len(features) - 1)]


def numbers(name, n, seed=0, equal=False):
    """The arrays that a method needs, of the right shapes, and `verify`."""
    draw = rng(seed)
    features = np.ones((n, 6), np.float32) if equal else draw.normal(size=(n, 6)).astype(np.float32)
    made = {
        "scores": np.full(n, 2.0) if equal else draw.lognormal(size=n),
        "loss": np.full(n, 2.0) if equal else draw.lognormal(size=n),
        "unconditional_loss": np.full(n, 2.0) if equal else draw.lognormal(size=n),
        "features": features,
        "neighbours": nearest(features, 10),
        "similarities": features,
        "quality": np.full(n, 2.0) if equal else draw.lognormal(size=n) - 0.5,
        "clusters": np.zeros(n, np.int64) if equal else draw.integers(0, 7, n),
    }
    target = draw.lognormal(size=n)
    arguments = {need: made[need] for need in METHODS[name].needs}
    asks = {
        "rewards": lambda seed, positions: np.sin(positions * len(seed)) - 0.2,
        "whispers": lambda conversations, layer: np.abs(np.sin(conversations + 2.0)) * (conversations >= 0),
    }
    arguments |= {argument: asks[argument] for argument in METHODS[name].asks}
    if METHODS[name].verify:
        arguments["verify"] = lambda positions: target[positions]
    return arguments


def run(name, n, budget, seed=0, equal=False, **options):
    arguments = numbers(name, n, equal=equal)
    return METHODS[name].select(n, budget=budget, rng=rng(seed), **arguments, **options)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("equal", [False, True], ids=["different", "all equal"])
@pytest.mark.parametrize(
    ("n", "budget"), [(1, 0), (1, 1), (2, 1), (10, 5), (200, 0), (200, 1), (200, 40), (200, 199), (200, 200)]
)
def test_every_method_keeps_exactly_m_sorted_positions_once(name, n, budget, equal):
    selection = run(name, n, budget, equal=equal)
    assert selection.indices.dtype == np.int64
    assert len(selection.indices) == budget
    assert (np.diff(selection.indices) > 0).all()
    assert budget == 0 or (selection.indices[0] >= 0 and selection.indices[-1] < n)


@pytest.mark.parametrize("name", EVERY)
def test_the_same_seed_keeps_the_same_samples(name):
    assert run(name, 200, 60, seed=4).indices.tolist() == run(name, 200, 60, seed=4).indices.tolist()


@pytest.mark.parametrize("name", EVERY)
def test_a_pool_without_samples_gives_a_coreset_without_samples(name):
    assert len(run(name, 0, 0).indices) == 0


@pytest.mark.parametrize("name", NEEDY)
def test_nan_is_refused_by_position_in_every_needed_array(name):
    for need in METHODS[name].needs:
        arguments = numbers(name, 50)
        broken = arguments[need].astype(np.float64)
        broken[[3, 7]] = np.nan
        with pytest.raises(ValueError, match=r"2 .*3, 7"):
            METHODS[name].select(50, budget=10, rng=rng(), **{**arguments, need: broken})


@pytest.mark.parametrize("name", NEEDY)
def test_an_array_of_the_wrong_length_or_none_is_refused(name):
    for need in METHODS[name].needs:
        arguments = numbers(name, 50)
        with pytest.raises(ValueError, match=need):
            METHODS[name].select(50, budget=10, rng=rng(), **{**arguments, need: arguments[need][:49]})
        arguments.pop(need)
        if need in METHODS[name].optional:
            assert len(METHODS[name].select(50, budget=10, rng=rng(), **arguments).indices) == 10
            continue
        with pytest.raises(ValueError, match=f"needs {need}"):
            METHODS[name].select(50, budget=10, rng=rng(), **arguments)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("budget", [-1, 51])
def test_a_budget_that_is_no_part_of_the_pool_is_refused(name, budget):
    with pytest.raises(ValueError, match="the budget must be between 0 and the pool's 50 samples"):
        run(name, 50, budget)


@pytest.mark.parametrize("name", EVERY)
def test_an_unknown_option_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match="has no option 'colour'"):
        run(name, 50, 10, colour=1)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 60), p=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 5), equal=st.booleans())
def test_every_method_keeps_m_whatever_the_pruning_rate(n, p, seed, equal):
    budget = round((1 - p) * n)
    for name in EVERY:
        indices = run(name, n, budget, seed=seed, equal=equal).indices
        assert len(set(indices.tolist())) == len(indices) == budget


def test_methods_import_neither_torch_nor_scikit_learn():
    modules = ["staff.methods", "staff.methods.groups", "staff.methods.overlap", "staff.graph"]
    check = f"import sys, {', '.join(modules)}; print([m for m in ('torch', 'sklearn', 'scipy', 'transformers') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", check], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


# random, top and their kin


def test_random_draws_and_every_sample_is_as_likely():
    counts = np.zeros(10)
    for seed in range(400):
        counts[METHODS["random"].select(10, budget=3, rng=rng(seed)).indices] += 1
    assert counts.min() > 80  # 120 expected
    assert counts.max() < 160


TEN = np.array([3.0, 9, 1, 7, 7, 5, 0, 8, 7, 2])  # in order: 6 2 9 0 5 (3 4 8) 7 1


@pytest.mark.parametrize("name", ["grand", "el2n", "loss", "entropy", "hes", "upd", "length", "less"])
def test_the_highest_of_ten_by_hand(name):
    assert METHODS[name].select(10, scores=TEN, budget=4, rng=rng()).indices.tolist() == [
        1,
        3,
        4,
        7,
    ]  # of three sevens the earlier two


@pytest.mark.parametrize(
    ("part", "expected"), [("top", [1, 3, 7]), ("bottom", [2, 6, 9]), ("middle", [0, 3, 5])]
)  # three of ten left out below, four above
def test_each_part_of_ten_by_hand(part, expected):
    assert (
        METHODS["loss"].select(len(TEN), scores=TEN, budget=3, rng=rng(), part=part).indices.tolist()
        == expected
    )


def test_perplexity_keeps_the_middle_unless_told():
    assert METHODS["perplexity"].select(len(TEN), scores=TEN, budget=3, rng=rng()).indices.tolist() == [
        0,
        3,
        5,
    ]
    assert METHODS["perplexity"].select(
        len(TEN), scores=TEN, budget=3, rng=rng(), part="bottom"
    ).indices.tolist() == [2, 6, 9]


def test_an_unknown_part_names_those_there_are():
    with pytest.raises(ValueError, match="top, middle, bottom; found 'left'"):
        METHODS["loss"].select(len(TEN), scores=TEN, budget=3, rng=rng(), part="left")


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.data())
def test_parts_are_those_of_a_stable_sort(scores, data):
    scores = np.array(scores, float)
    n, budget = len(scores), data.draw(st.integers(0, len(scores)))
    ascending, descending = np.argsort(scores, kind="stable"), np.argsort(-scores, kind="stable")
    below = (n - budget) // 2
    expected = {
        "top": descending[:budget],
        "bottom": ascending[:budget],
        "middle": ascending[below : below + budget],
    }
    for part, positions in expected.items():
        assert METHODS["loss"].select(
            len(scores), scores=scores, budget=budget, rng=rng(), part=part
        ).indices.tolist() == sorted(positions.tolist())


def test_instruction_following_difficulty_by_hand():
    # losses with and without the prompt; IFD = exp(difference): 1: e^-1, 2: e^-2, 3: e^1 (dropped), 4: 1
    # (dropped), 5: e^-0.5
    scores, unconditional = np.array([3.0, 1, 4, 2, 1.5]), np.array([4.0, 3, 3, 2, 2])
    for budget, expected, back in (
        (1, [4], 0),
        (2, [0, 4], 0),
        (3, [0, 1, 4], 0),
        (4, [0, 1, 3, 4], 1),
        (5, [0, 1, 2, 3, 4], 2),
    ):
        selection = METHODS["ifd"].select(
            len(scores), scores=scores, budget=budget, rng=rng(), unconditional_loss=unconditional
        )
        assert selection.indices.tolist() == expected
        assert selection.filled_from_cut == back


def test_instruction_following_difficulty_does_not_overflow():
    selection = METHODS["ifd"].select(
        len(np.array([2000.0, 1000.0])),
        scores=np.array([2000.0, 1000.0]),
        budget=1,
        rng=rng(),
        unconditional_loss=np.array([2001.0, 3000.0]),
    )
    assert selection.indices.tolist() == [0]


# coverage-centric selection


def test_ccs_takes_as_many_from_each_stratum_as_the_released_code():
    case = json.loads((GOLDEN / "ccs-n1500.json").read_text())
    selection = METHODS["ccs"].select(
        len(np.float32(case["scores"])),
        scores=np.float32(case["scores"]),
        budget=case["m"],
        rng=rng(),
        num_strata=case["num_strata"],
        hard_cutoff=case["hard_cutoff"],
    )
    assert len(selection.indices) == case["total_taken"]
    taken = np.bincount(selection.region_of[selection.indices], minlength=case["num_strata"])
    assert taken.tolist() == [region.selected for region in selection.regions]
    # strata of equal size go in the order of torch.argsort there, which no one promises: which of them get
    # one more may differ
    theirs = np.array(case["taken_per_stratum"])
    assert sorted(taken.tolist()) == sorted(theirs.tolist())
    assert np.abs(taken - theirs).max() <= 1


def test_ccs_by_hand():
    # five strata of width 2 over [0, 10.001]: sizes 4, 1, 1, 0, 3 (a tenth of ten is cut: position 9)
    scores = np.array([0.0, 0.5, 1.0, 1.5, 3.0, 5.0, 9.0, 9.5, 10.0, 99.0])
    selection = METHODS["ccs"].select(len(scores), scores=scores, budget=6, rng=rng(), num_strata=5)
    # smallest first, 6 over 4: the one of each middle stratum, then 4 over 2: two of the three above, then
    # two of the four below
    assert [region.size for region in selection.regions] == [4, 1, 1, 0, 3]
    assert [region.selected for region in selection.regions] == [2, 1, 1, 0, 2]
    assert {4, 5} <= set(selection.indices.tolist())
    assert 9 not in selection.indices
    assert selection.region_of.tolist() == [0, 0, 0, 0, 1, 2, 4, 4, 4, -1]


def test_ccs_puts_a_score_on_an_edge_into_the_upper_stratum():
    scores = np.array([0.0, 1.0, 2.0, 3.0, 4.0 / 1.0001])  # edges 0, 1, 2, 3, 4
    selection = METHODS["ccs"].select(
        len(scores), scores=scores, budget=5, rng=rng(), num_strata=4, hard_cutoff=0.0
    )
    assert selection.region_of.tolist() == [0, 1, 2, 3, 3]


def test_ccs_takes_cut_samples_back_easiest_first_when_the_rest_is_used_up():
    selection = METHODS["ccs"].select(
        len(np.arange(20.0)), scores=np.arange(20.0), budget=19, rng=rng(), hard_cutoff=0.1
    )
    assert selection.indices.tolist() == list(range(19))
    assert selection.filled_from_cut == 1


@pytest.mark.parametrize("scores", [np.full(6, -1.0), np.zeros(6), -np.arange(6.0), np.full(6, 1e30)])
def test_ccs_takes_scores_of_any_sign(scores):
    selection = METHODS["ccs"].select(len(scores), scores=scores, budget=3, rng=rng())
    assert len(selection.indices) == 3


# message passing


def test_d2_chooses_what_the_released_code_chooses():
    case = json.loads((GOLDEN / "d2-n400-weighted.json").read_text())
    features, scores = np.array(case["features"]), np.array(case["scores"])
    neighbours = nearest(features, case["num_neighbours"])
    density = scores + (np.exp(-neighbour_distances(features, neighbours)) * scores[neighbours]).sum(axis=1)
    np.testing.assert_allclose(density, case["density"], rtol=1e-6)
    selection = METHODS["d2"].select(
        len(scores),
        scores=scores,
        budget=case["m"],
        rng=rng(),
        features=features,
        neighbours=neighbours,
        num_neighbours=case["num_neighbours"],
        gamma=case["gamma"],
        reverse_message=case["reverse_message"],
        hard_cutoff=0.0,
        unit_distance=None,
    )
    assert selection.indices.tolist() == case["chosen"]


def plain_d2(scores, features, neighbours, budget, gamma, weighted):
    distances = np.linalg.norm(features[:, None] - features[neighbours], axis=2)
    density = scores + (np.exp(-distances) * scores[neighbours]).sum(axis=1)
    chosen = []
    for _ in range(budget):
        i = int(np.argmax(np.where(np.isin(np.arange(len(scores)), chosen), -np.inf, density)))
        density[neighbours[i]] -= (np.exp(-gamma * distances[i]) if weighted else 1.0) * density[i]
        chosen.append(i)
    return sorted(chosen)


@pytest.mark.parametrize("reverse_message", ["weighted", "absolute"])
def test_d2_walks_as_an_argmax_over_all_would(reverse_message):
    for seed in range(5):
        features, scores = rng(seed).normal(size=(60, 3)), rng(seed + 9).lognormal(size=60)
        neighbours = nearest(features, 5)
        selection = METHODS["d2"].select(
            len(scores),
            scores=scores,
            budget=40,
            rng=rng(),
            features=features,
            neighbours=neighbours,
            gamma=0.5,
            reverse_message=reverse_message,
            hard_cutoff=0.0,
            unit_distance=None,
        )
        assert selection.indices.tolist() == plain_d2(
            scores, features, neighbours, 40, 0.5, reverse_message == "weighted"
        )


def test_d2_by_hand():
    # a pair at one place, scores 4 and 3, and a loner with 2: densities 7, 7 and 2 (the loner's neighbour is
    # 100 away)
    features = np.array([[0.0], [0.0], [100.0]])
    arguments = {
        "features": features,
        "neighbours": np.array([[1], [0], [0]]),
        "num_neighbours": 1,
        "hard_cutoff": 0.0,
        "unit_distance": None,
    }
    # 0 goes first (of equals the earlier), which lowers 1 to 7 - 7 = 0; then 2, then 1
    for budget, expected in ((1, [0]), (2, [0, 2]), (3, [0, 1, 2])):
        assert (
            METHODS["d2"]
            .select(
                len(np.array([4.0, 3, 2])),
                scores=np.array([4.0, 3, 2]),
                budget=budget,
                rng=rng(),
                **arguments,
            )
            .indices.tolist()
            == expected
        )


def test_d2_does_not_change_with_the_unit_of_the_features():
    arguments = numbers("d2", 80)
    scores = arguments.pop("scores")
    small = METHODS["d2"].select(len(scores), scores=scores, budget=20, rng=rng(), **arguments)
    large = METHODS["d2"].select(
        len(scores),
        scores=scores,
        budget=20,
        rng=rng(),
        **{**arguments, "features": arguments["features"] * 1024},
    )
    assert small.indices.tolist() == large.indices.tolist()
    by_score = np.argsort(-scores, kind="stable")[
        8:28
    ]  # what is left of the method where exp(-distance) is 0
    assert set(small.indices.tolist()) != set(by_score.tolist())


def test_d2_sends_no_message_to_or_from_the_cut_samples():
    arguments = numbers("d2", 50)
    scores = arguments.pop("scores")
    hardest = np.argsort(scores)[-5:]
    far = scores.copy()
    far[hardest] *= 1e6
    first = METHODS["d2"].select(len(scores), scores=scores, budget=20, rng=rng(), **arguments).indices
    assert (
        first.tolist()
        == METHODS["d2"].select(len(far), scores=far, budget=20, rng=rng(), **arguments).indices.tolist()
    )
    assert not set(first.tolist()) & set(hardest.tolist())


def test_d2_needs_a_graph_of_enough_neighbours():
    arguments = numbers("d2", 50)
    scores = arguments.pop("scores")
    with pytest.raises(ValueError, match="num_neighbours is 11, and the graph has only 10 a sample"):
        METHODS["d2"].select(len(scores), scores=scores, budget=20, rng=rng(), num_neighbours=11, **arguments)


# feature space


def test_moderate_by_hand():
    # one cluster around 0 (its median) with distances 0 1 2 3 4, one around 100 with 0 1 1 6 6 (median 100)
    features = np.array([[0.0], [1], [-2], [3], [-4], [100], [99], [101], [94], [106]])
    clusters = np.array([7] * 5 + [2] * 5)
    # in order of distance: 0 5 | 1 6 7 2 3 4 | 8 9; two left out on either side
    selection = METHODS["moderate"].select(10, budget=6, rng=rng(), features=features, clusters=clusters)
    assert selection.indices.tolist() == [1, 2, 3, 4, 6, 7]


def test_s2l_by_hand():
    # clusters of 1, 2 and 7; m = 6: floor(6 / 3) = 2 -> the one; floor(5 / 2) = 2 -> both; 3 of the seven
    clusters = np.array([0, 0, 0, 0, 0, 0, 0, 5, 5, 9])
    selection = METHODS["s2l"].select(10, budget=6, rng=rng(), clusters=clusters)
    assert {7, 8, 9} <= set(selection.indices.tolist())
    assert len(selection.indices) == 6


def test_coverage_by_hand():
    # clusters of 6, 3 and 1; m = 5: 3, 1.5 and 0.5, the sixth sample to the earlier of equal remainders
    clusters = np.array([4, 4, 4, 4, 4, 4, 0, 0, 0, 9])
    taken = np.zeros(10)
    for seed in range(300):
        chosen = METHODS["coverage"].select(10, budget=5, rng=rng(seed), clusters=clusters).indices
        assert np.bincount(clusters[chosen], minlength=10)[[4, 0, 9]].tolist() == [3, 2, 0]
        taken[chosen] += 1
    assert taken[:6].min() > 115  # 150 expected, and 200 of the three
    assert taken[6:9].min() > 165
    sizes = np.array([600, 300, 100])
    chosen = (
        METHODS["coverage"].select(1000, budget=50, rng=rng(), clusters=np.repeat([0, 1, 2], sizes)).indices
    )
    assert np.histogram(chosen, [0, 600, 900, 1000])[0].tolist() == [30, 15, 5]


def test_round_robin_by_hand():
    similarities = np.array([[0.9, 0.9], [0.8, 0.1], [0.7, 0.8], [0.7, 0.8], [0.0, 0.3]])
    # 0 by the first row; the second wants it too and gets 2, the earlier of equals; 1; 3; and then 4
    taken = [[], [0], [0, 2], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    for budget, expected in enumerate(taken):
        select = METHODS["rds"].select
        assert select(5, budget=budget, rng=rng(), similarities=similarities).indices.tolist() == expected
    with pytest.raises(ValueError, match="no validation row"):
        METHODS["rds"].select(5, budget=1, rng=rng(), similarities=np.empty((5, 0)))


@pytest.mark.parametrize("ties", [False, True])
def test_round_robin_takes_turns_as_a_walk_over_all_that_is_left_would(ties):
    for seed in range(5):
        similarities = rng(seed).normal(size=(60, 7))
        similarities = similarities.round(0) if ties else similarities
        left, chosen = similarities.copy(), []
        while len(chosen) < 40:
            chosen.append(int(np.argmax(left[:, len(chosen) % 7])))
            left[chosen[-1]] = -np.inf
        found = METHODS["rds"].select(60, budget=40, rng=rng(), similarities=similarities)
        assert found.indices.tolist() == sorted(chosen)


def angles(degrees, lengths=1.0):
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], 1) * np.reshape(lengths, (-1, 1))


def test_ltd_by_hand():
    # directions, whatever their lengths: cluster 4 of six, mean near 19; cluster 2 of three, near 202; one
    # alone. m = 5: 3, 1.5 and 0.5, the sample left over to the earlier of equal remainders (2 before 9)
    degrees = [0, 10, 20, 25, 42, 21, 190, 200, 215, 300]
    features = angles(degrees, [1, 9, 2, 1, 5, 1, 1, 4, 1, 2])
    clusters = np.array([4] * 6 + [2] * 3 + [9])
    for budget, expected in (
        (1, [2]),  # of cluster 4 the one nearest to the mean
        (3, [2, 4, 7]),  # 0.9, 1.8 and 0.3 samples: of cluster 4 the 42 besides, which is farther than the 0
        (5, [0, 2, 4, 7, 8]),
    ):
        chosen = METHODS["ltd"].select(10, budget=budget, rng=rng(), features=features, clusters=clusters)
        assert chosen.indices.tolist() == expected, budget


def test_ltd_takes_the_users_groups_in_place_of_its_clusters():
    features = angles([0, 10, 20, 30, 41, 100, 110, 150])
    groups = np.array(["a"] * 5 + ["b"] * 3)
    for arguments in ({"clusters": np.arange(8)}, {}):
        chosen = select_by_group(
            METHODS["ltd"], groups, 8, budget=5, rng=rng(), features=features, **arguments
        )
        # 3.1 and 1.9: of a the 20 and both ends, of b the 110 and then the 150
        assert chosen.indices.tolist() == [0, 2, 4, 6, 7]


def test_ltd_keeps_one_template_of_a_task_and_the_others_last():
    features, one = angles([0, 10, 90, 180, 190, 30]), np.zeros(6, np.int64)
    templates = np.array(["b", "a", "b", "a", "b", "c"])
    keep = partial(METHODS["ltd"].select, 6, rng=rng(), features=features, clusters=one)
    # of template b 0, 2 and 4, at 0, 90 and 190 degrees: 2 is nearest to their mean, 4 farthest from it
    assert [keep(budget=m, templates=templates).indices.tolist() for m in (1, 2, 3)] == [
        [2],
        [2, 4],
        [0, 2, 4],
    ]
    # then from all of them the farthest: 5, 30 degrees from 0
    more = keep(budget=4, templates=templates)
    assert (more.indices.tolist(), more.filled_from_cut) == ([0, 2, 4, 5], 1)
    groups = ["x", "x", "x", "y", "y", "y"]  # of y no template has two rows: the first to come
    told = {"features": features, "clusters": one, "templates": templates}
    inside = select_by_group(METHODS["ltd"], groups, 6, budget=2, rng=rng(), **told)
    assert inside.indices.tolist() in ([0, 3], [2, 3])  # 0 and 2 are as near to their mean


# good rows, spread, that the model answers badly


def test_mods_by_hand():
    # on a line: 7 is not good; the seed, a fifth of ten, is drawn (0) and the farthest from it (9)
    features = np.array([0, 1, 2, 3, 4.2, 5, 6, 7, 8, 9])[:, None]
    quality = np.array([3.0, 1, 1, 1, 1, 1, 1, 0, 1, 1])
    asked = []

    def rewards(seed, positions):
        asked.append((seed.tolist(), positions.tolist()))
        return np.array([-1.0, 1, -1, 1, 1, -1, 1])  # 1, 3 and 6 are necessary

    class First:
        def integers(self, n):
            return 0

    told = {"features": features, "quality": quality, "rewards": rewards, "seed_share": 0.2}
    found = {m: METHODS["mods"].select(10, budget=m, rng=First(), **told) for m in range(11)}
    assert [found[m].indices.tolist() for m in (0, 1, 2)] == [[], [0], [0, 9]]
    # of 1, 3, 6 those farthest from 0 and 9: 3 and 6 alike, so the earlier; then 6, 3 away; then 1
    assert [found[m].indices.tolist() for m in (3, 4, 5)] == [[0, 3, 9], [0, 3, 6, 9], [0, 1, 3, 6, 9]]
    # nobody is necessary any more: 4, 1.2 from 3, then the others; all ten need no choice
    assert [(found[m].indices.tolist(), found[m].filled, found[m].filled_from_cut) for m in (6, 9, 10)] == [
        ([0, 1, 3, 4, 6, 9], 1, 0),
        ([0, 1, 2, 3, 4, 5, 6, 8, 9], 4, 0),
        (list(range(10)), 0, 0),
    ]
    assert asked == [([0, 9], [1, 2, 3, 4, 5, 6, 8])] * 7  # whatever m, from 3 to 9
    less = METHODS["mods"].select(10, budget=3, rng=First(), **told, alpha=0.5, beta=-1.5)
    assert (less.indices.tolist(), less.filled) == ([0, 4, 9], 1)  # nothing is necessary


def test_mods_says_when_alpha_tells_nothing_apart_and_refuses_nan(caplog):
    told = {"features": np.arange(4.0)[:, None], "rewards": lambda seed, positions: positions * np.nan}
    with pytest.raises(ValueError, match="3 of 3 rewards are nan"):
        METHODS["mods"].select(4, budget=3, rng=rng(), quality=np.arange(1.0, 5), **told)
    assert "every sample has a quality above alpha=0; they go from 1 to 4" in caplog.text
    none = METHODS["mods"].select(4, budget=2, rng=rng(), quality=-np.arange(4.0), **told)
    assert (none.indices.tolist(), none.filled_from_cut) == ([0, 1], 2)
    with pytest.raises(ValueError, match=r"seed_share must be a share of the pool, in \(0, 1\]; found 0"):
        METHODS["mods"].select(4, budget=2, rng=rng(), quality=np.arange(4.0), **told, seed_share=0)


# demonstrations that help


def test_whisper_by_hand():
    # halves 0 1 and 2 3 4; two demonstrations a prompt, one question each
    class Ordered:
        def permutation(self, n):
            return np.arange(n)

    answers = {  # conversation: how good, attention to each demonstration
        (2, 0, 1): (50.0, 1.0, 3.0),
        (0, 2, 3): (100.0, 2.0, 2.0),
        (1, 4, -1): (40.0, 7.0, 0.0),
    }
    asked = []

    def whispers(conversations, layer):
        asked.append((list(map(tuple, conversations.tolist())), layer))
        return np.array([answers[one] for one in asked[-1][0]])

    keep = partial(
        METHODS["whisper"].select, 5, rng=Ordered(), whispers=whispers, demonstrations=2, questions=1
    )
    # scores: 0: 50 * 1/4 * 2 = 25; 1: 75; 2 and 3: 100 * 1/2 * 2 = 100; 4, alone before its question: 40
    assert [keep(budget=m).indices.tolist() for m in range(1, 5)] == [[2], [2, 3], [1, 2, 3], [1, 2, 3, 4]]
    assert asked[0] == (list(answers), None)
    before = len(asked)
    assert [keep(budget=m).indices.tolist() for m in (0, 5)] == [[], [0, 1, 2, 3, 4]]
    assert len(asked) == before  # nothing is asked for nothing


def test_whisper_shows_every_sample_once_to_questions_of_the_other_half():
    seen = []

    def whispers(conversations, layer):
        seen.append(conversations)
        return np.ones(conversations.shape)

    for n in (2, 11, 61):
        METHODS["whisper"].select(n, budget=1, rng=rng(1), whispers=whispers)
        shown = seen[-1][:, 1:]
        prompts = {tuple(row) for row in shown.tolist()}
        assert sorted(i for prompt in prompts for i in prompt if i >= 0) == list(range(n))
        for prompt in prompts:
            questions = seen[-1][(shown == prompt).all(axis=1), 0]
            assert len(set(questions.tolist())) == len(questions) == (3 if n > 6 else 1)
            assert not set(questions.tolist()) & set(prompt)


def test_whisper_refuses_nan_and_no_demonstrations():
    for broken in (0, 1):

        def whispers(conversations, layer, broken=broken):
            numbers = np.ones(conversations.shape)
            numbers[1, broken] = np.nan
            return numbers

        with pytest.raises(ValueError, match="1 of 12 answers or attentions are nan"):
            METHODS["whisper"].select(20, budget=3, rng=rng(), whispers=whispers)
    for wrong in ({"demonstrations": 0}, {"questions": 1.5}, {"layer": 0.5}):
        with pytest.raises(ValueError, match="demonstrations, questions and layer are whole numbers"):
            METHODS["whisper"].select(20, budget=3, rng=rng(), whispers=whispers, **wrong)


def test_what_is_asked_inside_a_group_is_asked_of_the_pools_positions():
    groups, seen = np.array(["a", "b"] * 10), []

    def whispers(conversations, layer):
        seen.append((conversations, layer))
        return np.ones(conversations.shape)

    select_by_group(METHODS["whisper"], groups, 20, budget=6, rng=rng(), whispers=whispers, layer=1)
    for parity, (conversations, layer) in enumerate(seen):
        there = conversations[conversations >= 0]
        assert (there % 2 == parity).all()
        assert set(there.tolist()) == set(range(parity, 20, 2))
        assert layer == 1


def plain_kcenter(features, budget, first):
    chosen = [first]
    nearest_pick = np.linalg.norm(features - features[first], axis=1)
    while len(chosen) < budget:
        nearest_pick[chosen] = -1
        chosen.append(int(np.argmax(nearest_pick)))
        nearest_pick = np.minimum(nearest_pick, np.linalg.norm(features - features[chosen[-1]], axis=1))
    return sorted(chosen)


@pytest.mark.parametrize("few", [1, 5, 64, 2048])
def test_kcenter_picks_as_the_plain_walk_does(few, monkeypatch):
    monkeypatch.setattr(features_module, "FARTHEST_FEW", few)
    for seed in range(4):
        features = rng(seed).normal(size=(150, 4)) * rng(seed).lognormal(size=(150, 1))
        first = int(rng(seed).integers(150))  # the first thing that the method draws
        selection = METHODS["kcenter"].select(150, budget=60, rng=rng(seed), features=features)
        assert selection.indices.tolist() == plain_kcenter(features, 60, first)


def test_kcenter_by_hand():
    # five points on a line; whatever is drawn first, three picks end with one of {0, 1}, one of {9, 10} and
    # the 5
    features = np.array([[0.0], [1], [5], [9], [10]])
    for seed in range(8):
        chosen = METHODS["kcenter"].select(5, budget=3, rng=rng(seed), features=features).indices.tolist()
        assert 2 in chosen or {0, 4} <= set(chosen)
        assert set(chosen) & {0, 1}
        assert set(chosen) & {3, 4}


def test_kcenter_takes_duplicates_last():
    features = np.repeat(np.arange(5.0), 4)[:, None]
    chosen = METHODS["kcenter"].select(20, budget=5, rng=rng(), features=features).indices
    assert sorted(chosen // 4) == [0, 1, 2, 3, 4]


def test_kcenter_says_what_it_is_about_to_do_and_how_to_do_less(monkeypatch, caplog):
    monkeypatch.setattr(features_module, "SLOW_PAIRS", 100)
    features = rng().normal(size=(50, 2))
    METHODS["kcenter"].select(50, budget=10, rng=rng(), features=features)
    assert "50 samples against 10 picks" in caplog.text
    assert "num_candidates=20" in caplog.text
    caplog.clear()
    selection = METHODS["kcenter"].select(50, budget=5, rng=rng(), features=features, num_candidates=19)
    assert caplog.text == ""
    assert len(selection.indices) == 5
    with pytest.raises(ValueError, match="num_candidates must be at least the budget, 10; found 5"):
        METHODS["kcenter"].select(50, budget=10, rng=rng(), features=features, num_candidates=5)


def plain_facility_location(features, neighbours, budget):
    """(chosen, similarity) by trying everything at every pick."""
    n = len(features)
    distances = np.linalg.norm(features[:, None] - features[None], axis=2)
    is_near = np.zeros((n, n), bool)
    np.put_along_axis(is_near, neighbours, True, axis=1)
    unit = np.median(np.take_along_axis(distances, neighbours, axis=1))
    similarity = np.where(is_near | is_near.T, np.exp(-distances / unit), 0)
    np.fill_diagonal(similarity, 1)
    best, chosen = np.zeros(n), []
    for _ in range(budget):
        gains = np.maximum(similarity - best[:, None], 0).sum(axis=0)
        gains[chosen] = -1
        chosen.append(int(np.argmax(gains)))
        best = np.maximum(best, similarity[:, chosen[-1]])
    return sorted(chosen), similarity


@pytest.mark.parametrize("k", [3, 10, 59])
def test_facility_location_picks_as_the_plain_greedy_does(k):
    for seed in range(4):
        features = rng(seed).normal(size=(60, 3))
        neighbours = nearest(features, k)
        for budget in (8, 20):
            chosen = (
                METHODS["facility_location"]
                .select(60, budget=budget, rng=rng(), features=features, neighbours=neighbours)
                .indices
            )
            plain, similarity = plain_facility_location(features, neighbours, budget)
            assert similarity[:, chosen].max(axis=1).sum() == pytest.approx(
                similarity[:, plain].max(axis=1).sum(), rel=1e-9
            )
            # two samples with each other alone for neighbours gain the same: rounding picks one
            assert len(set(chosen.tolist()) ^ set(plain)) <= 2


def test_facility_location_by_hand():
    # two heaps on a line, of three and of two; the middle of the larger one is near to most, then one of the
    # smaller
    features = np.array([[0.0], [1], [2], [50], [51]])
    selection = METHODS["facility_location"].select(
        5, budget=2, rng=rng(), features=features, neighbours=nearest(features, 2)
    )
    assert 1 in selection.indices
    assert set(selection.indices.tolist()) & {3, 4}


def test_facility_location_says_when_its_graph_is_too_thin(caplog):
    features = rng().normal(size=(60, 3))
    METHODS["facility_location"].select(
        60, budget=2, rng=rng(), features=features, neighbours=nearest(features, 3)
    )
    assert "2 picks with 3 neighbours each reach at most 8 of 60 samples" in caplog.text


# groups


def test_shares_go_by_size_and_the_largest_remainders():
    # 7 over 5, 3 and 2: 3.5, 2.1 and 1.4
    assert share_by_size([5, 3, 2], 7).tolist() == [4, 2, 1]
    assert share_by_size([1, 1, 1], 2).tolist() == [1, 1, 0]
    assert share_by_size([4, 0], 4).tolist() == [4, 0]
    assert share_by_size([], 0).tolist() == []


@pytest.mark.parametrize("name", ["random", "coverage", "s2l", "ccs", "staff"])
def test_weights_are_the_inverse_of_how_often_a_sample_is_drawn(name):
    n, m, times = 40, 18, 3_000
    scores = np.arange(n) ** 1.5
    given = {"coverage": "clusters", "s2l": "clusters", "ccs": "scores", "staff": "scores"}
    arrays = {"clusters": np.arange(n) % 7 % 4, "scores": scores}
    arguments = {given[name]: arrays[given[name]]} if name in given else {}
    options = {}
    if name == "staff":  # V_i of 0.3 leave some of the budget to be filled
        options = {"num_regions": 4, "pick": "random", "allocation": "paper", "verification_budget": 2}
        options["verify"] = lambda positions: 0.3 * scores[positions]
    options |= {"num_strata": 5} if name == "ccs" else {}
    draws, taken = rng(), np.zeros(n)
    for _ in range(times):
        selection = METHODS[name].function(n, budget=m, rng=draws, **arguments, **options)
        taken[selection.indices] += 1
    assert selection.weights is not None
    if name == "random":
        assert np.allclose(selection.weights, n / m)
    if name == "staff":
        assert selection.filled
    drawn = taken > 0
    chance = 1 / selection.weights[drawn]
    error = np.sqrt(np.maximum(chance * (1 - chance), 1e-9) / times)
    assert (np.abs(taken[drawn] / times - chance) < 5 * error).all()
    assert np.isclose(chance.sum(), m)


def test_shares_are_as_asked_for_and_what_a_group_cannot_fill_flows_on():
    half, third, fifth = Fraction(1, 2), Fraction(3, 10), Fraction(1, 5)
    assert share_by_wish([50, 50, 50], [half, third, fifth], 50).tolist() == [25, 15, 10]
    assert share_by_wish([50, 50, 50], [half, third, fifth], 7).tolist() == [4, 2, 1]  # of 3.5, 2.1, 1.4
    # the first has 10 of its 25: the others share 40 as 3 to 2
    assert share_by_wish([10, 50, 50], [half, third, fifth], 50).tolist() == [10, 24, 16]
    # and again: the second has 20 of its 24
    assert share_by_wish([10, 20, 50], [half, third, fifth], 50).tolist() == [10, 20, 20]
    # all that have a share are full: by size
    assert share_by_wish([10, 30, 60], [Fraction(1), 0, 0], 40).tolist() == [10, 10, 20]
    assert share_by_wish([10, 30, 60], [Fraction(1), 0, 0], 100).tolist() == [10, 30, 60]
    assert share_by_wish([0, 3], [half, half], 0).tolist() == [0, 0]
    draws = rng()
    for _ in range(50):
        sizes = draws.integers(0, 9, 5)
        wanted = [Fraction(int(k), 10) for k in draws.integers(0, 4, 5)]
        m = int(draws.integers(0, sizes.sum() + 1))
        shares = share_by_wish(sizes, wanted, m)
        assert shares.sum() == m
        assert ((shares >= 0) & (shares <= sizes)).all()
    named = {"qa": half, "chat": third}
    assert wanted_shares(named, True, {"qa": 5, "code": 30, "chat": 1, "law": 10}) == {
        **named,
        "code": Fraction(3, 20),
        "law": Fraction(1, 20),
    }
    assert wanted_shares({"qa": Fraction(1)}, False, {"qa": 5, "law": 1}) == {"qa": 1, "law": 0}


@given(st.lists(st.integers(0, 50), max_size=12), st.data())
def test_shares_sum_to_the_budget_and_fit_their_groups(sizes, data):
    budget = data.draw(st.integers(0, sum(sizes)))
    shares = share_by_size(sizes, budget)
    assert shares.sum() == budget
    assert (shares <= np.array(sizes, int)).all()
    assert np.abs(shares - np.array(sizes) * budget / max(sum(sizes), 1)).max(initial=0) < 1


@pytest.mark.parametrize("name", EVERY)
def test_every_method_selects_inside_groups(name):
    arguments = numbers(name, 120)
    groups = np.array(["news", "chat", "chat", "maths"] * 30)
    selection = select_by_group(METHODS[name], groups, 120, budget=50, rng=rng(), **arguments)
    assert len(np.unique(selection.indices)) == len(selection.indices) == 50
    labels, counts = np.unique(groups[selection.indices], return_counts=True)
    assert dict(zip(labels.tolist(), counts.tolist(), strict=True)) == {"chat": 25, "maths": 13, "news": 12}
    again = select_by_group(METHODS[name], groups, 120, budget=50, rng=rng(), **arguments)
    assert again.indices.tolist() == selection.indices.tolist()
    if selection.regions:
        taken = np.bincount(selection.region_of[selection.indices] + 1, minlength=len(selection.regions) + 1)[
            1:
        ]
        assert taken.tolist() == [region.selected for region in selection.regions]


def test_a_group_verifies_its_own_samples_by_their_place_in_the_pool():
    scores = rng().lognormal(size=300)
    groups = np.arange(300) % 3
    asked = []

    def verify(positions):
        asked.append(positions)
        return scores[positions]

    selection = select_by_group(
        METHODS["staff"],
        groups,
        len(scores),
        scores=scores,
        budget=60,
        rng=rng(),
        verify=verify,
        num_regions=5,
    )
    assert [set((positions % 3).tolist()) for positions in asked] == [{0}, {1}, {2}]
    assert sorted(np.concatenate(asked).tolist()) == selection.verified.tolist()


def test_what_adaptive_verification_may_ask_is_shared_over_the_groups():
    n = 900
    scores = rng().lognormal(size=n)
    target = scores * rng(1).lognormal(sigma=0.5, size=n)
    most = default_regions(n) * default_verified(n, default_regions(n))
    for sizes in ([n], [n // 2] * 2, [20] * 45, [1] * 300 + [600], [3] * 300):
        selection = select_by_group(
            METHODS["staff"],
            np.repeat(np.arange(len(sizes)), sizes),
            n,
            scores=scores,
            budget=180,
            rng=rng(),
            verify=target.__getitem__,
            verification="adaptive",
            verification_error=1e-9,
        )
        assert len(selection.verified) == most
        assert len(selection.indices) == 180
        assert all(region.verified for region in selection.regions if region.size and len(sizes) < 300)


def test_neighbours_in_another_group_are_none():
    features = np.arange(8.0)[:, None]
    scores = np.ones(8)
    groups = [0, 1] * 4
    arguments = {
        "features": features,
        "neighbours": nearest(features, 2),
        "num_neighbours": 2,
        "hard_cutoff": 0.0,
    }
    apart = select_by_group(
        METHODS["d2"], groups, len(scores), scores=scores, budget=4, rng=rng(), **arguments
    )
    # 0 has 1 and 2 for neighbours, of which 2 is in its group; 2 has 1 and 3, none of them; and so on
    own = METHODS["d2"].select(
        len(scores[::2]),
        scores=scores[::2],
        budget=2,
        rng=rng(),
        features=features[::2],
        neighbours=np.array([[-1, 1], [-1, -1], [-1, -1], [-1, -1]]),
        num_neighbours=2,
        hard_cutoff=0.0,
    )
    assert apart.indices[apart.indices % 2 == 0].tolist() == (own.indices * 2).tolist()


def test_an_error_inside_a_group_names_the_group():
    scores = np.array([1.0, np.nan, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"group 'b' \(2 samples.*1 of 2 scores are nan"):
        select_by_group(
            METHODS["loss"], ["b", "b", "a", "a"], len(scores), scores=scores, budget=2, rng=rng()
        )
    with pytest.raises(ValueError, match="one label a sample"):
        select_by_group(METHODS["loss"], ["b"], len(scores), scores=scores, budget=2, rng=rng())


# likeness


def test_two_coresets_side_by_side_by_hand():
    # A of 4, B of 2, one shared, of 10: chance would share 0.8
    row = overlap("a", np.array([1, 2, 3, 4]), "b", np.array([4, 5]), 10)
    assert (row.shared, row.overlap, row.jaccard) == (1, 0.5, 0.2)
    assert row.chance_overlap == pytest.approx(0.4)
    assert row.chance_jaccard == pytest.approx(0.8 / 5.2)


def test_random_coresets_are_as_alike_as_chance_says():
    rows = overlaps(
        {str(seed): METHODS["random"].select(4000, budget=800, rng=rng(seed)).indices for seed in range(6)},
        4000,
    )
    assert len(rows) == 15
    assert np.mean([row.overlap for row in rows]) == pytest.approx(rows[0].chance_overlap, abs=0.02)
    assert np.mean([row.jaccard for row in rows]) == pytest.approx(rows[0].chance_jaccard, abs=0.02)


def test_the_highest_scores_are_nested_across_pruning_rates_and_random_draws_are_not():
    scores = rng().normal(size=500)
    sizes = {"0.5": 250, "0.9": 50, "0.8": 100}
    rows = nestedness(
        {
            p: METHODS["loss"].select(len(scores), scores=scores, budget=m, rng=rng()).indices
            for p, m in sizes.items()
        },
        500,
    )
    assert [(row.first, row.second, row.overlap) for row in rows] == [
        ("0.9", "0.8", 1.0),
        ("0.8", "0.5", 1.0),
    ]
    rows = nestedness(
        {p: METHODS["random"].select(len(scores), budget=m, rng=rng(m)).indices for p, m in sizes.items()},
        500,
    )
    assert all(row.overlap < 0.8 for row in rows)


def test_chance_knows_what_is_always_in():
    pair = overlap("a", np.arange(6), "b", np.arange(3), 20, held=2)
    # two are shared whatever is drawn; of 18 others four and one
    assert pair.chance_overlap == pytest.approx((2 + 4 / 18) / 3)
    assert overlap("a", np.arange(2), "b", np.arange(2), 2, held=2).chance_overlap == 1


def test_empty_coresets_have_no_overlap_to_speak_of():
    row = overlap("a", np.empty(0, int), "b", np.array([1]), 10)
    assert np.isnan(row.overlap)
    assert row.jaccard == 0


# the table


def test_the_table_has_a_row_for_every_method_with_its_cost():
    rows = {row.name: row for row in methods_table()}
    assert list(rows) == list(METHODS)
    costs = {name: row.cost for name, row in rows.items()}
    assert costs["random"] == costs["length"] == "0"
    assert costs["direct"] == "1"
    assert costs["el2n"] == costs["d2"] == "2·E + 1"  # one pass gives scores and features
    assert costs["staff"] == "(2·T·f + 1)·r + v"
    assert costs["ifd"] == "r + u·r"
    assert costs["s2l"] == "(2·T·f + c)·r"
    assert all(row.about for row in rows.values())
    assert rows["staff"].needs == "draft/effort, target/effort (drawn samples)"


def test_every_need_is_of_a_model_whose_cost_is_known():
    for name, method in METHODS.items():
        assert set(method.models()) <= {model.removesuffix("@checkpoints") for model in COSTS}, name


@pytest.mark.parametrize(
    "text", ["draft", "draft/efort", "draft@steps/loss", "draft/loss.cluster", "/effort", ""]
)
def test_a_need_that_names_no_numbers_fails_when_the_table_is_made(text):
    with pytest.raises(ValueError, match="names no numbers"):
        entry(METHODS["ccs"].function, needs={"scores": text})


@pytest.mark.parametrize("text", ["draft/effort", "draft@checkpoints/loss.clusters", "pool/tokens"])
def test_a_need_reads_as_it_is_written(text):
    assert str(Need.parse(text)) == text


def test_an_ablation_is_a_changed_need_and_its_cost_follows():
    assert cost(entry(METHODS["ccs"].function, needs={"scores": "draft/effort"})) == "(2·T·f + 1)·r"
    variant = entry(METHODS["staff"].function, needs={"scores": "tiny/effort"}, verify="target/effort")
    assert cost(variant) == "cost(tiny) + v"


# spread


def test_every_start_keeps_every_sample_equally_often_and_neighbours_in_the_order_are_alike():
    n, budget = 23, 5
    scores, clusters = rng(1).lognormal(size=n), rng(2).integers(0, 4, n)
    order = ordered(scores, clusters)
    counts = np.zeros(n)
    for start in range(n):
        fixed = types.SimpleNamespace(integers=lambda high, start=start: start)
        counts[
            METHODS["spread"].select(n, budget=budget, rng=fixed, scores=scores, clusters=clusters).indices
        ] += 1
    assert counts.tolist() == [budget] * n
    assert (np.diff(clusters[order]) != 0).sum() == 3  # each cluster in one piece
    means = [scores[clusters == label].mean() for label in dict.fromkeys(clusters[order])]
    assert means == sorted(means)
    by_cluster = [scores[order][clusters[order] == label] for label in dict.fromkeys(clusters[order])]
    ups = [
        np.sort(own).tolist() if i % 2 == 0 else np.sort(own)[::-1].tolist()
        for i, own in enumerate(by_cluster)
    ]
    assert [own.tolist() for own in by_cluster] == ups


def test_of_equal_rows_spread_keeps_one():
    scores = np.repeat(rng(1).lognormal(size=20), 4)  # each row four times
    for seed in range(20):
        kept = (
            METHODS["spread"]
            .select(80, budget=16, rng=rng(seed), scores=scores, clusters=np.zeros(80))
            .indices
        )
        assert len(np.unique(scores[kept])) == 16


def test_rows_that_look_wrong_are_not_drawn_where_the_draft_can_tell():
    n = 40
    loss, alone = np.full(n, 1.0), np.full(n, 2.0)
    loss[[3, 8, 21]], alone[8] = (2.1, 1.0, 2.4), 0.9
    given = {
        "scores": np.arange(n) / 7,
        "clusters": np.arange(n) % 3,
        "loss": loss,
        "unconditional_loss": alone,
    }
    kept, weights = set(), None
    for seed in range(40):
        selection = METHODS["spread"].select(n, budget=10, rng=rng(seed), **given)
        kept |= set(selection.indices.tolist())
        weights = selection.weights
    assert kept == set(range(n)) - {3, 8, 21}
    assert np.flatnonzero(np.isnan(weights)).tolist() == [3, 8, 21]
    assert set(weights[~np.isnan(weights)]) == {3.7}
    back = METHODS["spread"].select(n, budget=38, rng=rng(), **given)
    assert back.filled_from_cut == 1
    assert set(range(n)) - set(back.indices.tolist()) == {
        8,
        21,
    }  # 3 is the least suspicious: 1.05, 1.11 and 1.2
    assert np.flatnonzero(np.isnan(back.weights)).tolist() == [8, 21]
    everyone = METHODS["spread"].select(n, budget=10, rng=rng(1), **given, suspect_ratio=9)
    assert set(everyone.weights) == {4.0}
    blind = {**given, "loss": np.where(loss > 1, loss, 1.7)}  # prompts take too little off
    assert set(METHODS["spread"].select(n, budget=10, rng=rng(1), **blind).weights) == {4.0}
