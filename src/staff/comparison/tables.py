"""From the cells of a comparison to tables and plots: quality with intervals, what selection cost, quality
against cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from itertools import permutations
from pathlib import Path

import numpy as np

from staff.comparison.evaluate import read_examples
from staff.comparison.grid import FULL, UNTOUCHED
from staff.comparison.plots import draw_comparison
from staff.comparison.statistics import holm, interval, p_value, resample, resampled_means
from staff.files import failures_are_said, read_table, write_csv, write_text
from staff.report.comparison_page import LOWER, comparison_page
from staff.report.page import made_or_said

BASELINE = "random"
COMPARISON_PAGE = "comparison.html"
OF_SENTENCES = {"bleu": "BLEU", "chrf": "chrF"}  # whose value of a whole file is no mean over its rows
LEVEL = 0.95
OUTCOMES = ("win", "tie", "loss")
DIVERSITY = (
    "Means over seeds; higher is more diverse. The size of a coreset alone moves all three, so compare "
    "within a column. distinct-2: different pairs of words as a share of all in the responses; nearest: mean "
    "distance from a sample to the nearest other of the coreset; clusters: share of the pool's k-means "
    "clusters with a sample in it. Distances and clusters are those of TF-IDF vectors (cosine) of prompt and "
    "response, a space that no method selects by."
)

Cells = list[dict[str, str]]  # rows of results.csv
MethodAt = tuple[str, float | None]  # method, pruning rate; None: the full data, the untouched model


@dataclass(frozen=True)
class Judged:
    """A method at one pruning rate on one task: (S, N) values, a row a seed, a column a test row, and their
    resampled means."""

    values: np.ndarray
    resampled: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    def __str__(self) -> str:
        return f"{_number(self.mean)} {self.between}"

    @property
    def between(self) -> str:
        low, high = interval(self.resampled, LEVEL)
        return f"[{_number(low)}, {_number(high)}]"


@dataclass(frozen=True)
class Difference:
    """How much better one cell is than another, paired by seed and test row: above 0, the first is better.

    Attributes:
        p, corrected: of "no difference"; after Holm's correction over all such tests against the same second.
    """

    task: str
    metric: str
    pruning_rate: float
    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float
    corrected: float = math.nan

    @property
    def outcome(self) -> str:
        return "win" if self.low > 0 else "loss" if self.high < 0 else "tie"


def read_results(path: Path) -> Cells:
    """The rows of a results.csv.

    Raises:
        ValueError: there is none, or it is empty.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; `staff compare` makes it")
    rows = read_table(path)
    if not rows:
        raise ValueError(f"{path}: holds no finished cell yet")
    return rows


def judge_cells(folder: Path, rows: Cells, task: str, metric: str, seed: int = 0) -> dict[MethodAt, Judged]:
    """The cells of a task by method and pruning rate, those of them that have every seed.

    Args:
        folder: the comparison's, with the per-example files.
        rows: of results.csv.
        seed: of the bootstrap; all cells share one set of resamples, so that differences are paired.
    """
    own = [row for row in rows if row["task"] == task]
    seeds = sorted({row["seed"] for row in own if row["seed"]}, key=int)
    values: dict[MethodAt, dict[str, np.ndarray]] = {}
    for row in own:
        rate = float(row["pruning_rate"]) if row["pruning_rate"] else None
        examples = read_examples(folder / row["folder"] / "scores.jsonl")
        values.setdefault((row["method"], rate), {})[row["seed"]] = np.array(examples[metric], np.float64)
    num_seeds, judged, drawn = max(1, len(seeds)), {}, None
    for key, by_seed in values.items():
        if key[0] != UNTOUCHED and len(by_seed) < len(seeds):
            continue
        of_seeds = [by_seed[""]] * num_seeds if "" in by_seed else [by_seed[name] for name in seeds]
        stacked = np.stack(of_seeds)
        drawn = drawn or resample(num_seeds, stacked.shape[1], np.random.default_rng(seed))
        judged[key] = Judged(stacked, resampled_means(stacked, drawn))
    return judged


def compare_cells(judged: Mapping[MethodAt, Judged], task: str, metric: str) -> list[Difference]:
    """Every method against every other at the same pruning rate."""
    sign, differences = -1 if metric in LOWER else 1, []
    for ((first, rate), one), ((second, other_rate), other) in permutations(judged.items(), 2):
        if rate is not None and rate == other_rate:
            resampled = sign * (one.resampled - other.resampled)
            figures = sign * (one.mean - other.mean), *interval(resampled, LEVEL), p_value(resampled)
            differences.append(Difference(task, metric, rate, first, second, *figures))
    return differences


def corrected(differences: list[Difference]) -> list[Difference]:
    """The same with Holm's correction: over all tests of a metric against one second method, whatever the
    task and rate."""
    families: dict[tuple[str, str], list[int]] = {}
    for i, difference in enumerate(differences):
        families.setdefault((difference.metric, difference.second), []).append(i)
    values: dict[int, float] = {}
    for places in families.values():
        values |= zip(places, holm([differences[i].p for i in places]), strict=True)
    return [replace(difference, corrected=values[i]) for i, difference in enumerate(differences)]


def quality_table(
    judged: Mapping[MethodAt, Judged], differences: list[Difference], task: str, metric: str
) -> str:
    """Table 1 of a task: a line a method, a column a pruning rate, means with 95 % intervals.

    Bold: better than every other method at that rate, by paired intervals that leave out 0. ↑ ↓: better or
    worse than random so.
    """
    rates = sorted({rate for _, rate in judged if rate is not None})
    names = dict.fromkeys(name for name, rate in judged if rate is not None)
    outcomes: dict[MethodAt, dict[str, str]] = {}
    for d in differences:
        if (d.task, d.metric) == (task, metric):
            outcomes.setdefault((d.first, d.pruning_rate), {})[d.second] = d.outcome

    def cell(name: str, rate: float) -> str:
        if (name, rate) not in judged:
            return ""
        own, against = judged[name, rate], outcomes.get((name, rate), {})
        mean = _number(own.mean)
        best = bool(against) and set(against.values()) == {"win"}
        mark = {"win": " ↑", "loss": " ↓"}.get(against.get(BASELINE, ""), "")
        return f"{f'**{mean}**' if best else mean} {own.between}{mark}"

    lines = [[name, *(cell(name, rate) for rate in rates)] for name in names]
    lines += [[name, str(judged[name, None])] for name in (FULL, UNTOUCHED) if (name, None) in judged]
    return _markdown([metric, *(f"{rate:.0%} pruned" for rate in rates)], lines)


def tally(differences: list[Difference], metric: str) -> str:
    """Wins, ties and losses against random over all tasks and rates, and the cells that fall below it after
    Holm's correction."""
    against = [d for d in differences if d.second == BASELINE and d.metric == metric]
    if not against:
        return f"No wins and losses in {metric}: there is no finished {BASELINE} to compare with."
    lines = []
    for name in dict.fromkeys(d.first for d in against):
        own = [d for d in against if d.first == name]
        below = [d for d in own if d.difference < 0 and d.corrected < 1 - LEVEL]
        cells = ", ".join(f"{d.task} {d.pruning_rate:.0%}" for d in below)
        lines.append([name, *_counts([d.outcome for d in own]), cells or "none"])
    header = [f"{metric}, against {BASELINE}", "wins", "ties", "losses", "below it after Holm's correction"]
    return _markdown(header, lines)


def pair_table(differences: list[Difference], metric: str) -> str:
    """Every method against every other, the row's against the column's: wins-ties-losses over tasks and
    rates."""
    outcomes: dict[tuple[str, str], list[str]] = {}
    for d in differences:
        if d.metric == metric:
            outcomes.setdefault((d.first, d.second), []).append(d.outcome)
    names = list(dict.fromkeys(first for first, _ in outcomes))
    lines = [[a, *("-".join(_counts(outcomes.get((a, b), []))) for b in names)] for a in names]
    return _markdown([f"{metric}: wins-ties-losses against", *names], lines)


def diversity_table(rows: Cells, task: str) -> str:
    """How diverse a task's coresets are, means over seeds: distinct-2, nearest distance, clusters covered;
    all data below."""
    own = [row for row in rows if row["task"] == task and row["method"] != UNTOUCHED]
    rates = sorted({float(row["pruning_rate"]) for row in own if row["pruning_rate"]})
    formats = {"distinct2": ".3f", "nearest": ".3f", "clusters": ".0%"}

    def cell(name: str, rate: str) -> str:
        cells = [row for row in own if (row["method"], row["pruning_rate"]) == (name, rate)]
        texts = (f"{_mean(cells, column):{kind}}" for column, kind in formats.items())
        return " / ".join("?" if text.startswith("nan") else text for text in texts) if cells else ""

    methods = dict.fromkeys(row["method"] for row in own)
    lines = [[name, *(cell(name, str(rate)) for rate in rates)] for name in methods if name != FULL]
    lines += [[FULL, cell(FULL, "")]] if FULL in methods else []
    return _markdown(["distinct-2 / nearest / clusters", *(f"{rate:.0%} pruned" for rate in rates)], lines)


def cost_table(rows: Cells, task: str) -> str:
    """Table 2 of a task: what choosing cost, means over seeds and rates, beside one fine-tuning on all
    data."""
    by_method: dict[str, Cells] = {}
    for row in rows:
        if row["task"] == task:
            by_method.setdefault(row["method"], []).append(row)

    def costs(name: str, stage: str) -> list[float]:
        kinds = ("seconds", "tokens", "flops", "passes")
        return [_mean(by_method.get(name, []), f"{stage}_{kind}") for kind in kinds]

    full = costs(FULL, "finetune")
    taken = {name: costs(name, "select") for name in by_method if name not in (FULL, UNTOUCHED)}
    taken |= {} if math.isnan(full[0]) else {"fine-tuning on all": full}
    lines = []
    for name, (seconds, tokens, flops, passes) in taken.items():
        values = [f"{seconds:.1f}", f"{tokens / 1e6:.3f}", f"{flops / 1e12:.3g}", f"{passes:.2f}"]
        lines.append([name, *values, _share(flops, full[2]), _share(seconds, full[0])])
    header = ["selection", "seconds", "million tokens", "TFLOPs", "passes of the target (U)"]
    return _markdown([*header, "of one full fine-tuning: FLOPs", "seconds"], lines)


def report(folder: Path, metrics_of: Mapping[str, tuple[str, ...]], plots: bool = True) -> str:
    """Write results.md and differences.csv from results.csv and the per-example files, and plots where
    matplotlib is there.

    Args:
        folder: the comparison's.
        metrics_of: task -> the metrics its tables show.

    Returns:
        the Markdown.
    """
    rows = read_results(folder / "results.csv")
    tasks = [task for task in metrics_of if any(row["task"] == task for row in rows)]
    shown = [(task, metric) for task in tasks for metric in metrics_of[task]]
    judged = {(task, metric): judge_cells(folder, rows, task, metric) for task, metric in shown}
    differences = corrected([d for key, cells in judged.items() for d in compare_cells(cells, *key)])
    seeds = len({row["seed"] for row in rows if row["seed"]})
    over = "the test rows" if seeds < 2 else "both (two-level bootstrap)"
    text = [
        "# Quality",
        f"Means over {seeds} seed{'s' * (seeds != 1)} and all test rows, with {LEVEL:.0%} intervals over "
        f"{over}. Bold: better than every other method at that rate; ↑ ↓: better or worse than "
        f"{BASELINE}; all by paired intervals that leave out 0.",
    ]
    if seeds < 3:
        text[-1] += "\nOf so few seeds the spread between runs is hardly known."
    for (task, metric), cells in judged.items():
        text += [f"## {task}", quality_table(cells, differences, task, metric)]
        if metric in OF_SENTENCES:
            of_file = f"the corpus {OF_SENTENCES[metric]} is in results.csv."
            text.append(f"{metric} here is the mean over test rows, each scored alone; {of_file}")
    for metric in dict.fromkeys(metric for _, metric in judged):
        text.append(tally(differences, metric))
        if any(d.metric == metric for d in differences):
            text.append(pair_table(differences, metric))
    about = "Loading models aside; a method pays in full for what it needs, whoever else used it."
    text += ["# Cost of selection", about]
    for task in tasks:
        text += [f"## {task}", cost_table(rows, task)]
    text += ["# Diversity", DIVERSITY]
    for task in tasks:
        text += [f"## {task}", diversity_table(rows, task)]
    with failures_are_said(folder):
        for (task, metric), cells in judged.items() if plots else ():
            own = [d for d in differences if (d.task, d.metric, d.second) == (task, metric, BASELINE)]
            values = {key: cell.mean for key, cell in cells.items()}
            names = draw_comparison(folder, values, _passes_of(rows, task, cells), own, task, metric)
            text += [f"![{metric} of {task}]({name})" for name in names]
        markdown = "\n\n".join(text) + "\n"
        write_text(folder / "results.md", markdown)
        columns = [field.name for field in fields(Difference)]
        write_csv(folder / "differences.csv", columns, map(astuple, differences))
        means = [
            (*key, method, rate, cell.mean, *interval(cell.resampled, LEVEL))
            for key, cells in judged.items()
            for (method, rate), cell in cells.items()
        ]
        header = ["task", "metric", "method", "pruning_rate", "mean", "low", "high"]
        write_csv(folder / "means.csv", header, means)
        if plots:
            made_or_said(folder / COMPARISON_PAGE, lambda: write_page(folder))
    return markdown


def write_page(folder: Path) -> Path:
    """comparison.html from the tables of a comparison.

    Raises:
        ValueError: a table is not there.
    """
    rows = read_results(folder / "results.csv")
    for name in ("means.csv", "differences.csv"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: there is no such file; `staff compare --tables` makes it")
    means, differences = (read_table(folder / name) for name in ("means.csv", "differences.csv"))
    write_text(
        folder / COMPARISON_PAGE, comparison_page(folder.resolve().name, rows, means, differences, BASELINE)
    )
    return folder / COMPARISON_PAGE


def _passes_of(rows: Cells, task: str, wanted: Iterable[MethodAt]) -> dict[MethodAt, float]:
    """What choosing and training took together, in passes of the target, mean over seeds."""
    passes = {}
    for name, rate in wanted:
        key = (task, name, "" if rate is None else str(rate))
        own = [row for row in rows if (row["task"], row["method"], row["pruning_rate"]) == key]
        passes[name, rate] = _mean(own, "total_passes")
    return passes


def _markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *([*line, *[""] * (len(header) - len(line))] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _counts(outcomes: list[str]) -> list[str]:
    return [str(outcomes.count(outcome)) for outcome in OUTCOMES] if outcomes else []


def _mean(rows: Cells, column: str) -> float:
    numbers = [float(row[column]) for row in rows if row.get(column)]
    return float(np.mean(numbers)) if numbers else math.nan


def _share(part: float, whole: float) -> str:
    return "" if math.isnan(part) or math.isnan(whole) or whole == 0 else f"{part / whole:.0%}"


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.1f}"
