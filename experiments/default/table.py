"""The table of an experiment's results, and its picture: python table.py [RESULTS.csv [PICTURE.png]]"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from staff.comparison.statistics import interval, resample, resampled_means

HERE = Path(__file__).parent
CHANCE = ("random", "random again")


def read(path: Path) -> dict:
    """(way, task, rate) -> seed -> (N,) losses."""
    found: dict = defaultdict(dict)
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            cell = row["way"], row["task"], float(row["pruning_rate"])
            found[cell][int(row["seed"])] = np.array(row["losses"].split(), float)
    return found


def differences(found: dict, way: str, task: str, rate: float) -> np.ndarray | None:
    """(S, N) losses of a way less those of chance, of the seeds that both have."""
    seeds = [s for s in found.get((way, task, rate), ()) if all(s in found[c, task, rate] for c in CHANCE)]
    if not seeds:
        return None
    chance = [np.mean([found[c, task, rate][s] for c in CHANCE], axis=0) for s in seeds]
    return np.array([found[way, task, rate][s] for s in seeds]) - chance


def judged(found: dict, way: str, tasks: list[str], rates: list[float]) -> tuple | None:
    """The mean difference over tasks and rates, its interval, and how many cells it is of."""
    means, cells = [], 0
    for task in tasks:
        parts = {rate: d for rate in rates if (d := differences(found, way, task, rate)) is not None}
        if not parts:
            return None
        rng, at_rates = np.random.default_rng(1), []
        drawn = resample(max(map(len, parts.values())), next(iter(parts.values())).shape[1], rng)
        for values in parts.values():
            same = drawn if len(values) == drawn.seeds.shape[1] else resample(*values.shape, rng)
            at_rates.append((values.mean(), resampled_means(values, same)))
            cells += len(values)
        means.append((np.mean([m for m, _ in at_rates]), np.mean([r for _, r in at_rates], axis=0)))
    # tasks are judged on rows of their own: their resamples are independent
    mixed = [np.random.default_rng([2, i]).permutation(r) for i, (_, r) in enumerate(means)]
    return float(np.mean([m for m, _ in means])), *interval(np.mean(mixed, axis=0)), cells


def shown(told: tuple | None) -> str:
    if told is None:
        return ""
    mean, low, high, _ = told
    mark = "**" if low > 0 or high < 0 else ""
    return f"{mark}{mean:+.3f}{mark} ({low:+.3f} to {high:+.3f})"


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results.csv"
    found = read(path)
    ways = [way for way in dict.fromkeys(way for way, _, _ in found) if way not in CHANCE]
    tasks = list(dict.fromkeys(task for _, task, _ in found))
    rates = sorted({rate for _, _, rate in found})
    head = ["way", "cells", "all", *tasks, *(f"{rate:.0%} pruned" for rate in rates)]
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    lines = []
    for way in ways:
        whole = judged(found, way, tasks, rates)
        if whole is None:
            continue
        each = [judged(found, way, [task], rates) for task in tasks]
        at = [judged(found, way, tasks, [rate]) for rate in rates]
        lines.append((whole[2], way, whole, each, at))
    for _, way, whole, each, at in sorted(lines):
        print(f"| {way} | {whole[3]} | " + " | ".join(map(shown, [whole, *each, *at])) + " |")
    if len(sys.argv) > 2:
        draw(
            [(way, whole, each) for _, way, whole, each, _ in sorted(lines, reverse=True)], tasks, sys.argv[2]
        )


def draw(lines: list, tasks: list[str], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, 1 + len(tasks), sharey=True, figsize=(3.2 * (1 + len(tasks)), 0.34 * len(lines) + 1)
    )
    for column, (title, axis) in enumerate(zip(["all tasks", *tasks], axes, strict=True)):
        axis.axvline(0, color="0.6", linewidth=1)
        for place, (_, whole, each) in enumerate(lines):
            mean, low, high, _ = whole if column == 0 else each[column - 1]
            colour = "firebrick" if low > 0 else "seagreen" if high < 0 else "0.25"
            axis.plot([low, high], [place, place], color=colour)
            axis.plot(mean, place, "o", color=colour, markersize=4)
        axis.set_title(title.replace("_", " "), fontsize=10)
        axis.set_xlabel("test loss less chance's")
    axes[0].set_yticks(range(len(lines)), [way for way, _, _ in lines])
    figure.tight_layout()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
