"""Differences to random of every finished cell, corrected over all of them: results.csv beside this file.

    python experiments/regimes/table.py

Above 0 is better than random. Of one seed the intervals are of the test rows alone. "auto" is at each seed of
auto.csv the cell of the way that it chose there.
"""

import csv
from pathlib import Path

from staff.comparison.tables import BASELINE, compare_cells, corrected, judge_cells, read_results
from staff.files import write_csv

AUTO = "auto"
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
    """(regime, rate, method, metric) is a test; a cell counts at the seeds that every arm has."""
    found, costs, seeds = [], {}, {}
    chosen, spent = choices()
    for regime in ("clean", "noisy", "copies", "mixed"):
        folder = Path("runs/regimes") / regime
        if not (folder / "results.csv").exists():
            continue
        rows = [row for row in read_results(folder / "results.csv") if row["seed"]]
        arms = {(row["method"], row["pruning_rate"]) for row in rows}
        of_seed = {row["seed"]: set() for row in rows}
        for row in rows:
            of_seed[row["seed"]].add((row["method"], row["pruning_rate"]))
        rows = [row for row in rows if of_seed[row["seed"]] == arms]
        for row in rows:
            costs[regime, float(row["pruning_rate"]), row["method"]] = float(row["select_passes"] or 0)
        tries = [(rows, "")]
        for rate in {rate for _, rate in arms}:
            way = {seed: way for (name, at, seed), way in chosen.items() if (name, at) == (regime, rate)}
            own = [row for row in rows if row["pruning_rate"] == rate and row["seed"] in way]
            made = [{**row, "method": AUTO} for row in own if row["method"] == way[row["seed"]]]
            if made:
                tries.append(([*own, *made], AUTO))
                costs[regime, float(rate), AUTO] = spent[regime, rate]
        for some, only in tries:
            for metric in ("loss", "rougeL"):
                judged = judge_cells(folder, some, regime, metric)
                these = [d for d in compare_cells(judged, regime, metric) if d.second == BASELINE]
                found += [d for d in these if not only or d.first == only]
            for row in some:
                seeds.setdefault((regime, float(row["pruning_rate"]), only), set()).add(row["seed"])
    table = []
    for d in corrected(found):
        numbers = (f"{value + 0.0:.4f}" for value in (d.difference, d.low, d.high, d.p, d.corrected))
        num_seeds = len(seeds[d.task, d.pruning_rate, AUTO if d.first == AUTO else ""])
        passes = costs[d.task, d.pruning_rate, d.first]
        table.append((d.task, d.pruning_rate, d.first, d.metric, num_seeds, *numbers, f"{passes:.2f}"))
    write_csv(Path(__file__).with_name("results.csv"), COLUMNS, table)
    for line in table:
        print(*line, sep="\t")


def choices() -> tuple[dict[tuple[str, str, str], str], dict[tuple[str, str], float]]:
    """What auto chose, by regime, pruning rate and seed; and what that took, by regime and rate, in U."""
    chosen, passes = {}, {}
    with Path(__file__).with_name("auto.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            name = row["regime"].partition("-")[0]
            rate = {"clean-98": "0.98", "noisy": "0.8"}.get(row["regime"], "0.9")
            chosen[name, rate, row["seed"]] = row["chosen"]
            passes.setdefault((name, rate), []).append(float(row["counted"]))
    return chosen, {key: sum(values) / len(values) for key, values in passes.items()}


if __name__ == "__main__":
    main()
