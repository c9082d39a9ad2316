"""From the cells of a comparison to tables and plots: quality with intervals, what selection cost, quality
against cost."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np

from staff.comparison.evaluate import read_examples
from staff.comparison.grid import FULL, UNTOUCHED
from staff.comparison.statistics import Resamples, holm, interval, p_value, resample, resampled_means
from staff.files import failures_are_said, write_csv, write_text, write_whole

BASELINE = "random"
LOWER = ("loss",)  # metrics of which less is better
OF_SENTENCES = {
    "bleu": "BLEU",
    "chrf": "chrF",
}  # metrics whose value of a whole file is no mean over its rows
LEVEL = 0.95
DIVERSITY = (
    "Means over seeds; higher is more diverse. The size of a coreset alone moves all three, so compare "
    "within a column. "
    "distinct-2: different pairs of words as a share of all in the responses; nearest: mean distance from a "
    "sample to the nearest other "
    "of the coreset; clusters: share of the pool's k-means clusters with a sample in it. Distances and "
    "clusters are those of TF-IDF "
    "vectors (cosine) of prompt and response, a space that no method selects by."
)

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


def read_results(path: Path) -> list[dict[str, str]]:
    """The rows of a results.csv.

    Raises:
        ValueError: there is none, or it is empty.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; `staff compare` makes it")
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path}: holds no finished cell yet")
    return rows


def judge_cells(
    folder: Path, rows: list[dict[str, str]], task: str, metric: str, seed: int = 0
) -> dict[MethodAt, Judged]:
    """The cells of a task by method and pruning rate, those of them that have every seed.

    Args:
        folder: the comparison's, with the per-example files.
        rows: of results.csv.
        seed: of the bootstrap; all cells share one set of resamples, so that differences are paired.
    """
    own = [row for row in rows if row["task"] == task]
    seeds = sorted({row["seed"] for row in own if row["seed"]}, key=int)
    found: dict[MethodAt, dict[str, np.ndarray]] = {}
    for row in own:
        rate = float(row["pruning_rate"]) if row["pruning_rate"] else None
        values = np.array(read_examples(folder / row["folder"] / "scores.jsonl")[metric], np.float64)
        found.setdefault((row["method"], rate), {})[row["seed"]] = values
    whole = {
        key: by_seed for key, by_seed in found.items() if key[0] == UNTOUCHED or len(by_seed) == len(seeds)
    }
    if not whole:
        return {}
    num_rows = len(next(iter(next(iter(whole.values())).values())))
    drawn = resample(max(1, len(seeds)), num_rows, np.random.default_rng(seed))
    return {key: _judged(by_seed, seeds, drawn) for key, by_seed in whole.items()}


def _judged(by_seed: Mapping[str, np.ndarray], seeds: list[str], drawn: Resamples) -> Judged:
    values = (
        np.stack([by_seed[seed] for seed in seeds])
        if "" not in by_seed
        else np.tile(by_seed[""], (drawn.seeds.shape[1], 1))
    )
    return Judged(values, resampled_means(values, drawn))


def compare_cells(judged: Mapping[MethodAt, Judged], task: str, metric: str) -> list[Difference]:
    """Every method against every other at the same pruning rate."""
    sign = -1 if metric in LOWER else 1
    found = []
    for (first, rate), one in judged.items():
        for (second, other_rate), other in judged.items():
            if rate is None or rate != other_rate or first == second:
                continue
            resampled = sign * (one.resampled - other.resampled)
            difference = sign * (one.mean - other.mean)
            found.append(
                Difference(
                    task,
                    metric,
                    rate,
                    first,
                    second,
                    difference,
                    *interval(resampled, LEVEL),
                    p_value(resampled),
                )
            )
    return found


def corrected(differences: list[Difference]) -> list[Difference]:
    """The same with Holm's correction: over all tests of a metric against one second method, whatever the
    task and rate."""
    families: dict[tuple[str, str], list[int]] = {}
    for i, found in enumerate(differences):
        families.setdefault((found.metric, found.second), []).append(i)
    values = [math.nan] * len(differences)
    for places in families.values():
        for i, value in zip(places, holm([differences[i].p for i in places]), strict=True):
            values[i] = value
    return [
        replace(difference, corrected=value) for difference, value in zip(differences, values, strict=True)
    ]


def quality_table(
    judged: Mapping[MethodAt, Judged], differences: list[Difference], task: str, metric: str
) -> str:
    """Table 1 of a task: a line a method, a column a pruning rate, means with 95 % intervals.

    Bold: better than every other method at that rate, by paired intervals that leave out 0. ↑ ↓: better or
        worse than
    random so.
    """
    rates = sorted({rate for _, rate in judged if rate is not None})
    names = list(dict.fromkeys(name for name, rate in judged if rate is not None))
    own = {
        (d.first, d.second, d.pruning_rate): d for d in differences if (d.task, d.metric) == (task, metric)
    }
    lines = [
        f"| {metric} | " + " | ".join(f"{rate:.0%} pruned" for rate in rates) + " |",
        "| --- " * (len(rates) + 1) + "|",
    ]
    for name in names:
        line = [name]
        for rate in rates:
            found = judged.get((name, rate))
            if found is None:
                line.append("")
                continue
            against = [own[name, other, rate] for other in names if (name, other, rate) in own]
            mark = (
                {"win": " ↑", "loss": " ↓"}.get(own[name, BASELINE, rate].outcome, "")
                if (name, BASELINE, rate) in own
                else ""
            )
            mean = _number(found.mean)
            best = bool(against) and all(difference.outcome == "win" for difference in against)
            low, high = interval(found.resampled, LEVEL)
            line.append(f"{f'**{mean}**' if best else mean} [{_number(low)}, {_number(high)}]{mark}")
        lines.append("| " + " | ".join(line) + " |")
    for name in (FULL, UNTOUCHED):
        found = judged.get((name, None))
        if found:
            low, high = interval(found.resampled, LEVEL)
            lines.append(
                f"| {name} | {_number(found.mean)} [{_number(low)}, {_number(high)}]" + " |" * len(rates)
            )
    return "\n".join(lines)


def tally(differences: list[Difference], metric: str) -> str:
    """Wins, ties and losses against random over all tasks and rates, and the cells that fall below it after
    Holm's correction."""
    against = [d for d in differences if d.second == BASELINE and d.metric == metric]
    if not against:
        return f"No wins and losses in {metric}: there is no finished {BASELINE} to compare with."
    lines = [
        f"| {metric}, against {BASELINE} | wins | ties | losses | below it after Holm's correction |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(d.first for d in against):
        own = [d for d in against if d.first == name]
        counts = [str(sum(d.outcome == outcome for d in own)) for outcome in ("win", "tie", "loss")]
        below = [
            f"{d.task} {d.pruning_rate:.0%}" for d in own if d.difference < 0 and d.corrected < 1 - LEVEL
        ]
        lines.append(f"| {name} | {' | '.join(counts)} | {', '.join(below) or 'none'} |")
    return "\n".join(lines)


def pair_table(differences: list[Difference], metric: str) -> str:
    """Every method against every other, the row's against the column's: wins-ties-losses over tasks and
    rates."""
    own = [d for d in differences if d.metric == metric]
    names = list(dict.fromkeys(d.first for d in own))
    outcomes: dict[tuple[str, str], list[str]] = {}
    for d in own:
        outcomes.setdefault((d.first, d.second), []).append(d.outcome)
    lines = [
        f"| {metric}: wins-ties-losses against | " + " | ".join(names) + " |",
        "| --- " * (len(names) + 1) + "|",
    ]
    for name in names:
        pairs = [outcomes.get((name, other)) for other in names]
        cells = [
            "-".join(str(pair.count(outcome)) for outcome in ("win", "tie", "loss")) if pair else ""
            for pair in pairs
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def diversity_table(rows: list[dict[str, str]], task: str) -> str:
    """How diverse a task's coresets are, means over seeds: distinct-2, nearest distance, clusters covered;
    all data below."""
    own = [row for row in rows if row["task"] == task and row["method"] != UNTOUCHED]
    rates = sorted({float(row["pruning_rate"]) for row in own if row["pruning_rate"]})

    def cell(name: str, rate: str) -> str:
        cells = [row for row in own if (row["method"], row["pruning_rate"]) == (name, rate)]
        distinct2, nearest, clusters = (
            _mean([row.get(column, "") for row in cells]) for column in ("distinct2", "nearest", "clusters")
        )
        found = zip(
            (f"{distinct2:.3f}", f"{nearest:.3f}", f"{clusters:.0%}"),
            (distinct2, nearest, clusters),
            strict=True,
        )
        return " / ".join("?" if math.isnan(value) else text for text, value in found) if cells else ""

    header = [f"{rate:.0%} pruned" for rate in rates]
    lines = [f"| distinct-2 / nearest / clusters | {' | '.join(header)} |", "| --- " * (len(rates) + 1) + "|"]
    for name in dict.fromkeys(row["method"] for row in own if row["method"] != FULL):
        lines.append(f"| {name} | {' | '.join(cell(name, str(rate)) for rate in rates)} |")
    if any(row["method"] == FULL for row in own):
        lines.append(f"| {FULL} | {cell(FULL, '')} |" + " |" * (len(rates) - 1))
    return "\n".join(lines)


def cost_table(rows: list[dict[str, str]], task: str) -> str:
    """Table 2 of a task: what choosing cost, means over seeds and rates, beside one fine-tuning on all
    data."""
    own = [row for row in rows if row["task"] == task]
    full_seconds = _mean([row["finetune_seconds"] for row in own if row["method"] == FULL])
    full_flops = _mean([row["finetune_flops"] for row in own if row["method"] == FULL])
    header = "| selection | seconds | million tokens | TFLOPs | passes of the target (U) "
    header += "| of one full fine-tuning: FLOPs | seconds |"
    lines = [header, "| --- | --- | --- | --- | --- | --- | --- |"]
    for name in dict.fromkeys(row["method"] for row in own if row["method"] not in (FULL, UNTOUCHED)):
        cells = [row for row in own if row["method"] == name]
        seconds, tokens, flops, passes = (
            _mean([row[f"select_{kind}"] for row in cells])
            for kind in ("seconds", "tokens", "flops", "passes")
        )
        values = [f"{seconds:.1f}", f"{tokens / 1e6:.3f}", f"{flops / 1e12:.3g}", f"{passes:.2f}"]
        values += [_share(flops, full_flops), _share(seconds, full_seconds)]
        lines.append(f"| {name} | {' | '.join(values)} |")
    if full_seconds == full_seconds:
        passes = _mean([row["finetune_passes"] for row in own if row["method"] == FULL])
        tokens = _mean([row["finetune_tokens"] for row in own if row["method"] == FULL])
        lines.append(
            f"| fine-tuning on all | {full_seconds:.1f} | {tokens / 1e6:.3f} | {full_flops / 1e12:.3g} | "
            f"{passes:.2f} | 100% | 100% |"
        )
    return "\n".join(lines)


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
    judged = {
        (task, metric): judge_cells(folder, rows, task, metric)
        for task in tasks
        for metric in metrics_of[task]
    }
    differences = corrected(
        [d for (task, metric), cells in judged.items() for d in compare_cells(cells, task, metric)]
    )
    seeds = len({row["seed"] for row in rows if row["seed"]})
    about = (
        f"Means over {seeds} seeds and all test rows, with {LEVEL:.0%} intervals over both (two-level "
        f"bootstrap). Bold: better than "
        f"every other method at that rate; ↑ ↓: better or worse than {BASELINE}; all by paired intervals "
        f"that leave out 0."
    )
    text = ["# Quality", "", about]
    if seeds < 3:
        text.append(
            f"Of {seeds} seed{'s' * (seeds > 1)} the spread between runs is hardly known: the intervals are "
            f"of the test rows."
        )
    for (task, metric), cells in judged.items():
        text += ["", f"## {task}", "", quality_table(cells, differences, task, metric)]
        if metric in OF_SENTENCES:
            text += [
                "",
                f"{metric} here is the mean over test rows, each scored alone; the corpus "
                f"{OF_SENTENCES[metric]} is in results.csv.",
            ]
    for metric in dict.fromkeys(metric for _, metric in judged):
        text += ["", tally(differences, metric)]
        if any(d.metric == metric for d in differences):
            text += ["", pair_table(differences, metric)]
    text += [
        "",
        "# Cost of selection",
        "",
        "Loading models aside; a method pays in full for what it needs, whoever else used it.",
    ]
    for task in tasks:
        text += ["", f"## {task}", "", cost_table(rows, task)]
    text += ["", "# Diversity", "", DIVERSITY]
    for task in tasks:
        text += ["", f"## {task}", "", diversity_table(rows, task)]
    if plots:
        for (task, metric), cells in judged.items():
            with failures_are_said(folder):
                names = _plot(folder, rows, cells, task, metric)
            for name in names:
                text += ["", f"![{metric} of {task}]({name})"]
    markdown = "\n".join(text) + "\n"
    with failures_are_said(folder):
        write_text(folder / "results.md", markdown)
        names = [field.name for field in fields(Difference)]
        write_csv(folder / "differences.csv", names, map(astuple, differences))
    return markdown


def _plot(
    folder: Path, rows: list[dict[str, str]], judged: Mapping[MethodAt, Judged], task: str, metric: str
) -> list[str]:
    """Metric against pruning rate and against total cost, as PNG; nothing where matplotlib is not
    installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    methods = list(dict.fromkeys(name for name, rate in judged if rate is not None))
    beside = {name: judged[name, None] for name in (FULL, UNTOUCHED) if (name, None) in judged}
    passes: dict[MethodAt, float] = {}
    for name, rate in judged:
        own = [
            r
            for r in rows
            if r["task"] == task
            and r["method"] == name
            and r["pruning_rate"] == ("" if rate is None else str(rate))
        ]
        passes[name, rate] = _mean([row["total_passes"] for row in own])
    names = []
    for kind, label in (
        ("rate", "pruning rate"),
        ("cost", "selection and fine-tuning, passes of the target over the pool"),
    ):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        for place, name in enumerate(methods):
            rates = sorted(rate for other, rate in judged if other == name and rate is not None)
            x = np.array([rate if kind == "rate" else passes[name, rate] for rate in rates])
            order = np.argsort(x, kind="stable")
            means = np.array([judged[name, rate].mean for rate in rates])[order]
            low, high = np.array([interval(judged[name, rate].resampled, LEVEL) for rate in rates])[order].T
            axes.plot(x[order], means, "o-", color=f"C{place % 10}", label=name)
            axes.vlines(
                x[order], low, high, color=f"C{place % 10}", alpha=0.5
            )  # of one rate alone there is no band
            axes.fill_between(x[order], low, high, color=f"C{place % 10}", alpha=0.15, linewidth=0)
        for name, style in ((FULL, "--"), (UNTOUCHED, ":")):
            if name in beside:
                axes.axhline(beside[name].mean, color="0.4", linestyle=style, label=name)
        if kind == "cost" and (FULL, None) in passes and not math.isnan(passes[FULL, None]):
            axes.plot([passes[FULL, None]], [beside[FULL].mean], "s", color="0.4")
        axes.set(xlabel=label, ylabel=metric, title=task)
        axes.legend(fontsize="small")
        names.append(f"{task}-{metric}-by-{kind}.png")
        write_whole(folder / names[-1], partial(figure.savefig, dpi=150, format="png"))
    return names


def _mean(values: list[str]) -> float:
    numbers = [float(value) for value in values if value not in ("", None)]
    return float(np.mean(numbers)) if numbers else math.nan


def _share(part: float, whole: float) -> str:
    return "" if math.isnan(part) or math.isnan(whole) or whole == 0 else f"{part / whole:.0%}"


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.1f}"
