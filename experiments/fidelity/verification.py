"""What fidelity and verification are worth, told from whole pools: python
experiments/fidelity/verification.py

Reads runs/fidelity/TASK-MODEL.npz (`efforts.py`) and writes VERIFICATION.md and verification.csv beside this
file. numpy alone, so a draw of verified samples costs nothing and is repeated many times.

1. Intervals: how often those of V_i and of the rank correlations hold the pool's own figure.
2. Thresholds: drafts made worse step by step (the logarithms of their efforts mixed with shuffled ones),
against the error of
   the budgets, sum |m_i - m_i*| / m, and the share of the target's own coreset that is found again.
3. Adaptive verification against b_v samples of every region: error at equal and at half the calls, calls for
equal error.
"""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.stats import kendalltau, spearmanr

from staff.methods import METHODS, verification
from staff.methods.fidelity import fidelity
from staff.methods.strata import allocate, members_of, set_hardest_aside, split

HERE, EFFORTS = Path(__file__).parent, Path("runs/fidelity")
TASKS, DRAFTS, SCOPES = (
    ("medquad", "dialogue", "translation", "wiki"),
    ("nano", "small"),
    ("last-value", "last-block"),
)
RATES, DRAWS = (0.5, 0.8, 0.9), 40
NOISE = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


class Case:
    """A pool as a draft and the target see it, and its regions."""

    def __init__(
        self,
        task: str,
        draft: str,
        scope: str,
        n: int = 2000,
        noise: float = 0.0,
        num_regions: int | None = None,
    ):
        one, other = (np.load(EFFORTS / f"{task}-{name}.npz") for name in (draft, "base"))
        scores, self.target = (np.asarray(part[scope][:n], np.float64) for part in (one, other))
        if noise:
            shuffled = np.log(np.random.default_rng(1).permutation(scores))
            scores = np.exp((1 - noise) * np.log(scores) + noise * shuffled)
        self.scores, self.length, self.loss, self.n = (
            scores,
            other["response"][:n],
            one["loss"][:n],
            len(scores),
        )
        self.num_regions = num_regions or verification.default_regions(self.n)
        self.count = 10 if num_regions else verification.default_verified(self.n, self.num_regions)
        kept, _ = set_hardest_aside(scores, 0.1)
        self.members = [
            kept[part] for part in members_of(split(scores[kept], self.num_regions)[1], self.num_regions)
        ]
        self.sizes = np.array([*map(len, self.members)])
        self.ratios = np.array(
            [self.target[m].sum() / scores[m].sum() if len(m) else np.nan for m in self.members]
        )

    def budget_error(self, ratios: np.ndarray) -> np.ndarray:
        """By rate."""
        errors = []
        for rate in RATES:
            budget = round((1 - rate) * self.n)
            own, best = (allocate(part, self.sizes, budget) for part in (ratios, self.ratios))
            errors.append(np.abs(own - best).sum() / budget)
        return np.array(errors)

    def fixed(self, seed: int) -> verification.Ratios:
        rng = np.random.default_rng(seed)
        return verification.fixed(self.scores, self.members, self.count, self.target.__getitem__, rng)

    def adaptive(self, seed: int, error: float, most: int) -> verification.Ratios:
        rng = np.random.default_rng(seed)
        return verification.adaptive(self.scores, self.members, error, most, self.target.__getitem__, rng)


def coverage(case: Case) -> dict[str, float]:
    """Shares of intervals that hold the truth, over draws."""
    drawn_from = np.flatnonzero(case.sizes > case.count)
    inside = np.concatenate([case.members[i] for i in drawn_from])
    truth = {
        "spearman": spearmanr(case.scores[inside], case.target[inside])[0],
        "kendall": kendalltau(case.scores[inside], case.target[inside])[0],
    }
    hits: dict[str, list[bool]] = {"V_i": [], "V_i adaptive": [], "spearman": [], "kendall": []}
    region_of = np.full(case.n, -1)
    for region, positions in enumerate(case.members):
        region_of[positions] = region
    for seed in range(DRAWS):
        for name, ratios in (
            ("V_i", case.fixed(seed)),
            ("V_i adaptive", case.adaptive(seed, 0.03, case.num_regions * case.count)),
        ):
            known = ~np.isnan(ratios.low) & ~np.isnan(case.ratios)
            hits[name] += ((ratios.low <= case.ratios + 1e-12) & (case.ratios <= ratios.high + 1e-12))[
                known
            ].tolist()
        at = case.fixed(seed).verified
        told = fidelity(
            region_of[at],
            case.sizes,
            case.n,
            case.scores[at],
            case.target[at],
            case.length[at],
            case.loss[at],
        )
        for name, value in truth.items():
            _, low, high = getattr(told, name)
            hits[name].append(low <= value <= high)
    return {name: float(np.mean(values)) for name, values in hits.items()}


def worth(case: Case) -> dict[str, float]:
    """Fidelity of the whole pool, error of the budgets at p = 80 %, with and without verification, and what
    is found again."""
    whole = np.zeros(case.n, np.int64)
    told = fidelity(whole, np.array([case.n]), case.n, case.scores, case.target, case.length, case.loss)
    budget = round(0.2 * case.n)
    direct = METHODS["direct"].select(case.n, budget=budget, rng=np.random.default_rng(0), scores=case.target)
    errors, shared = [], []
    for seed in range(5):
        rng, ask = np.random.default_rng(seed), case.target.__getitem__
        chosen = METHODS["staff"].select(case.n, budget=budget, rng=rng, scores=case.scores, verify=ask)
        errors.append(case.budget_error(np.array([region.ratio for region in chosen.regions]))[1])
        shared.append(len(np.intersect1d(chosen.indices, direct.indices)) / budget)
    assert told.spearman is not None
    assert told.without_length is not None
    return {
        "spearman": told.spearman[0],
        "without_length": told.without_length[0],
        "error": float(np.mean(errors)),
        "error_unverified": float(case.budget_error(np.ones(case.num_regions))[1]),
        "found_again": float(np.mean(shared)),
    }


def saved(case: Case) -> dict[str, float]:
    """Errors of the budgets, means over rates and draws, and the share of the calls that equal error
    takes."""

    def mean(ratios_of: Callable[[int], verification.Ratios]) -> tuple[float, float]:
        every = [ratios_of(seed) for seed in range(DRAWS)]
        errors = np.mean([case.budget_error(ratios.values) for ratios in every])
        return float(errors), float(np.mean([len(ratios.verified) for ratios in every]))

    error, calls = mean(case.fixed)
    told = {"calls": calls, "fixed": error}
    for share in (1.0, 0.5, 0.25):
        told[f"adaptive {share:g}"] = mean(
            lambda seed, most=int(share * calls): case.adaptive(seed, 0.0, most)
        )[0]
    told["stops at"] = mean(lambda seed: case.adaptive(seed, 0.03, int(calls)))[1] / calls
    told["stops with"] = mean(lambda seed: case.adaptive(seed, 0.03, int(calls)))[0]
    shares = np.arange(0.1, 1.01, 0.1)
    told["calls for equal error"] = next(
        (
            s
            for s in shares
            if mean(lambda seed, most=int(s * calls): case.adaptive(seed, 0.0, most))[0] <= error
        ),
        np.nan,
    )
    return told


def main() -> None:
    lines, rows = [], []
    lines += [
        "# Verification and fidelity",
        "",
        "Made by `verification.py`; target `base`, 2,000 rows of each task, K and b_v as the pool bears "
        "them (20 and 10).",
        "",
    ]
    lines += ["## How often intervals of 95 % hold the pool's own figure", "", f"{DRAWS} draws each.", ""]
    lines += [
        "| task | draft | scope | V_i, b_v each | V_i, adaptive | Spearman | Kendall |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    cases = [(t, d, s) for t in TASKS for d in DRAFTS for s in SCOPES if (EFFORTS / f"{t}-{d}.npz").exists()]
    for name in cases:
        found = coverage(Case(*name))
        rows.append({"part": "coverage", "case": "/".join(name), **found})
        lines.append(f"| {' | '.join(name)} | {' | '.join(f'{value:.3f}' for value in found.values())} |")
    lines += ["", "## Fidelity against what it is for", ""]
    lines += [
        "p = 80 %; drafts made worse by mixing in noise. `found again`: of the target's own coreset, 0.2 "
        "by chance.",
        "",
    ]
    lines += [
        "| task | draft | scope | noise | Spearman | length out | error of budgets | unverified (V = 1) "
        "| found again |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in cases:
        for noise in NOISE:
            found = worth(Case(*name, noise=noise))
            rows.append({"part": "worth", "case": "/".join(name), "noise": noise, **found})
            lines.append(
                f"| {' | '.join(name)} | {noise} | {' | '.join(f'{value:.3f}' for value in found.values())} |"
            )
    lines += ["", "## Adaptive verification", ""]
    lines += [
        "Error of the budgets, mean over p = 50, 80, 90 %. `stops`: with `verification_error` 0.03, share "
        "of the calls and error.",
        "",
    ]
    lines += [
        "| task | draft | scope | n | K | calls at b_v each | error | adaptive, as many | half | a quarter "
        "| stops at | with | share of calls for equal error |",
        "| --- " * 13 + "|",
    ]
    for name in cases:
        for n, regions in ((2000, None), (2000, 50), (500, None)):
            case = Case(*name, n=n, num_regions=regions)
            found = saved(case)
            rows.append({"part": "saved", "case": "/".join(name), "n": n, "K": case.num_regions, **found})
            values = [f"{found['calls']:.0f}"] + [
                f"{value:.3f}" for key, value in found.items() if key != "calls"
            ]
            lines.append(f"| {' | '.join(name)} | {n} | {case.num_regions} | {' | '.join(values)} |")
            print(lines[-1], flush=True)
    (HERE / "VERIFICATION.md").write_text("\n".join(lines) + "\n")
    with open(HERE / "verification.csv", "w", newline="") as file:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
