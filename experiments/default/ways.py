"""The ways to choose that the experiment compares: the table's own, and changes to it, on given numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from staff.methods import METHODS
from staff.methods.strata import check_scores, highest, members_of, share_by_size


@dataclass(frozen=True)
class Seen:
    """What may be looked at of a pool: (n,) each, but features (n, d), neighbours (n, k), and verify, which
    asks the target for efforts by position."""

    effort: np.ndarray
    ratio: np.ndarray
    tokens: np.ndarray
    features: np.ndarray
    clusters: np.ndarray
    neighbours: np.ndarray
    verify: Callable[[np.ndarray], np.ndarray]

    @property
    def n(self) -> int:
        return len(self.effort)


Chosen = tuple[np.ndarray, np.ndarray | None]  # positions, and 1 / the probability of each of the pool


def by_table(name: str, **options: object) -> Callable:
    """An entry of the table as it is."""

    def choose(seen: Seen, budget: int, rng: np.random.Generator) -> Chosen:
        arrays = {"scores": seen.effort, "features": seen.features, "neighbours": seen.neighbours}
        arrays["clusters"] = seen.clusters
        method = METHODS[name]
        given = {argument: arrays[argument] for argument in method.needs}
        verify = {"verify": seen.verify} if method.verify else {}
        return method.select(seen.n, budget=budget, rng=rng, **given, **verify, **options).indices, None

    return choose


def probabilities(sizes: np.ndarray, budget: int) -> np.ndarray:
    """In proportion to sizes, none above 1, and m in all."""
    pi, left = np.zeros(len(sizes)), np.asarray(sizes, float).copy()
    full = np.zeros(len(sizes), bool)
    while True:
        pi = np.where(full, 1.0, left * (budget - full.sum()) / left[~full].sum())
        over = (pi > 1) & ~full
        if not over.any():
            return pi
        full |= over


def systematic(pi: np.ndarray, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Every 1 / pi-th sample in an order, from a drawn start: each is kept with its own probability."""
    ends = np.cumsum(pi[order])
    ends *= round(ends[-1]) / ends[-1]
    ticks = np.floor(ends - rng.random())
    return np.sort(order[np.diff(ticks, prepend=-1.0) > 0])


def crossed(clusters: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Cluster after cluster, easiest cluster first, inside each by score, up and down in turns."""
    means = np.bincount(clusters, scores) / np.maximum(np.bincount(clusters), 1)
    rank_of = np.argsort(np.argsort(means, kind="stable"))[clusters]
    return np.lexsort((np.where(rank_of % 2, -scores, scores), rank_of))


def drawn(size: Callable[[Seen], np.ndarray], order: Callable[[Seen], np.ndarray], weighted: bool = False):
    """Probabilities in proportion to a size, sampled systematically in an order."""

    def choose(seen: Seen, budget: int, rng: np.random.Generator) -> Chosen:
        pi = probabilities(size(seen), budget)
        weights = np.divide(1.0, pi, out=np.ones(seen.n), where=pi > 0)
        return systematic(pi, order(seen), rng), weights if weighted else None

    return choose


def alike(seen: Seen) -> np.ndarray:
    return np.ones(seen.n)


def trusted(seen: Seen) -> np.ndarray:
    return (seen.ratio < 1).astype(float)


def by_effort_in_clusters(seen: Seen) -> np.ndarray:
    return crossed(seen.clusters, seen.effort)


def without_length(seen: Seen) -> np.ndarray:
    """In order of effort's rank with that of response tokens taken out."""
    y, x = rankdata(seen.effort), rankdata(seen.tokens)
    slope = np.cov(x, y)[0, 1] / max(x.var(ddof=1), 1e-12)
    return np.argsort(y - slope * x, kind="stable")


def changed(
    *,
    cut: float = 0.1,
    budgets: str = "released",
    pick: str = "top",
    trust: bool = False,
    weighted: bool = False,
):
    """STAFF with one thing or another changed; what budgets leave over is drawn at random."""

    def choose(seen: Seen, budget: int, rng: np.random.Generator) -> Chosen:
        scores = check_scores(seen.effort, seen.n)
        open_to = np.flatnonzero(seen.ratio < 1) if trust else np.arange(seen.n)
        rule = budgets if budgets in ("released", "paper") else "released"
        asked = METHODS["staff"].select(
            len(open_to),
            budget=budget,
            rng=np.random.default_rng(rng.integers(2**32)),
            scores=scores[open_to],
            verify=lambda places: seen.verify(open_to[places]),
            hard_cutoff=cut,
            allocation=rule,
        )
        region_of = asked.region_of
        inside = np.flatnonzero(region_of >= 0)
        members = [inside[places] for places in members_of(region_of[inside], len(asked.regions))]
        sizes = np.array([len(own) for own in members])
        if rule == budgets:
            shares = np.array([region.budget for region in asked.regions])
        else:
            ratios = np.array([region.ratio for region in asked.regions])
            ratios = np.where(np.isnan(ratios), np.nanmean(ratios), ratios)
            spreads = [seen.verify(open_to[own[np.isin(own, asked.verified)]]) for own in members]
            known = np.array([own.std(ddof=1) if len(own) > 1 else np.nan for own in spreads])
            known = np.where(np.isnan(known), np.nanmean(known), known)
            size = sizes * (ratios if budgets == "size" else known)
            shares = np.minimum(sizes, share_by_size(np.round(size * 1e6 / size.sum()), budget))
        chosen = np.zeros(len(open_to), bool)
        for own, share in zip(members, shares, strict=True):
            if pick == "top":
                chosen[own[highest(scores[open_to][own], share)]] = True
            elif pick == "random":
                chosen[rng.choice(own, share, replace=False)] = True
            elif share:
                in_order = own[np.argsort(seen.clusters[open_to][own], kind="stable")]
                chosen[systematic(np.full(len(open_to), share / len(own)), in_order, rng)] = True
        spare = inside[~chosen[inside]]
        missing = budget - int(chosen.sum())
        chosen[rng.choice(spare, missing, replace=False)] = True
        weights = None
        if weighted:
            weights = np.ones(seen.n)
            chance = np.maximum(shares, 1e-9) / np.maximum(sizes, 1)
            fill = missing / max(len(spare), 1)
            for own, one in zip(members, chance, strict=True):
                weights[open_to[own]] = 1 / (one + (1 - one) * fill) if one > 1e-6 or fill else 1.0
        return open_to[np.flatnonzero(chosen)], weights

    return choose


def half_at_random(seen: Seen, budget: int, rng: np.random.Generator) -> Chosen:
    first, _ = by_table("staff")(seen, budget // 2, rng)
    rest = np.setdiff1d(np.arange(seen.n), first)
    return np.union1d(first, rng.choice(rest, budget - len(first), replace=False)), None


WAYS: dict[str, Callable[[Seen, int, np.random.Generator], Chosen]] = {
    "random": by_table("random"),
    "random again": by_table("random"),
    "staff": by_table("staff"),
    "coverage": by_table("coverage"),
    "spread": drawn(alike, by_effort_in_clusters),
    "spread, no suspects": drawn(trusted, by_effort_in_clusters),
    "root effort, weighted": drawn(lambda seen: seen.effort**0.5, by_effort_in_clusters, True),
    "size budgets, no cut": changed(cut=0, budgets="size", pick="random"),
    "facility_location": by_table("facility_location"),
    "cut 0": by_table("staff", hard_cutoff=0.0),
    "cut suspects": changed(cut=0, trust=True),
    "paper budgets": by_table("staff", allocation="paper"),
    "size budgets": changed(budgets="size"),
    "neyman budgets": changed(budgets="neyman"),
    "half at random": half_at_random,
    "pick random": by_table("staff", pick="random"),
    "pick spread": changed(pick="spread"),
    "effort": drawn(alike, lambda seen: np.argsort(seen.effort, kind="stable")),
    "effort, length out": drawn(alike, without_length),
    "effort, unweighted": drawn(lambda seen: seen.effort, by_effort_in_clusters),
    "effort, weighted": drawn(lambda seen: seen.effort, by_effort_in_clusters, True),
    "root effort, unweighted": drawn(lambda seen: seen.effort**0.5, by_effort_in_clusters),
    "tokens, unweighted": drawn(lambda seen: seen.tokens**0.5, by_effort_in_clusters),
    "neyman, weighted": changed(cut=0, budgets="neyman", pick="random", weighted=True),
}
