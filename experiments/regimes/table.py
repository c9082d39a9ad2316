"""Differences to random of every finished cell, corrected over all of them: results.csv beside this file.

    python experiments/regimes/table.py

Above 0 is better than random. Of one seed the intervals are of the test rows alone.
"""

from pathlib import Path

from staff.comparison.tables import BASELINE, compare_cells, corrected, judge_cells, read_results
from staff.files import write_csv

COLUMNS = (
    "regime",
    "pruned",
    "method",
    "metric",
    "seeds",
    "difference",
    "low",
    "high",
    "p",
    "holm",
    "passes",
)


def main() -> None:
    found, costs, seeds = [], {}, {}
    for regime in ("clean", "noisy", "copies", "mixed"):
        folder = Path("runs/regimes") / regime
        if not (folder / "results.csv").exists():
            continue
        rows = read_results(folder / "results.csv")
        # seeds that every arm has
        own = [row for row in rows if row["seed"]]
        arms = {(row["method"], row["pruning_rate"]) for row in own}
        by_seed = {
            s: {(r["method"], r["pruning_rate"]) for r in own if r["seed"] == s}
            for s in {r["seed"] for r in own}
        }
        whole = {seed for seed, there in by_seed.items() if there == arms}
        rows = [row for row in rows if not row["seed"] or row["seed"] in whole]
        for row in rows:
            costs[regime, row["method"], row["pruning_rate"]] = row["select_passes"]
        seeds[regime] = len(whole)
        for metric in ("loss", "rougeL"):
            judged = judge_cells(folder, rows, regime, metric)
            found += [d for d in compare_cells(judged, regime, metric) if d.second == BASELINE]
    table = []
    for d in corrected(found):
        numbers = (f"{value:.4f}" for value in (d.difference, d.low, d.high, d.p, d.corrected))
        passes = float(costs[d.task, d.first, str(d.pruning_rate)] or 0)
        table.append((d.task, d.pruning_rate, d.first, d.metric, seeds[d.task], *numbers, f"{passes:.2f}"))
    write_csv(Path(__file__).with_name("results.csv"), COLUMNS, table)
    for line in table:
        print(*line, sep="\t")


if __name__ == "__main__":
    main()
