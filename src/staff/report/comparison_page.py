"""The page of a comparison: is a method better than random, at which pruning rate, and at what cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from staff.report.facts import figure, short
from staff.report.page import compact, escaped, figure_of, gzipped, section_of, table_of, whole_page

Lines = Sequence[Mapping[str, str]]  # of a table on disk

BEYOND_DOUBT = 0.05  # p after Holm's correction
LOWER = ("loss",)  # metrics of which less is better
METRIC_TITLES = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU-4",
    "chrf": "chrF",
}
AXES = {
    "pruning_rate": "share of the pool that was pruned",
    "passes": "cost of choosing and training, in passes of the target over the pool",
}
NUMBERS = ("pruning_rate", "mean", "low", "high", "difference", "corrected", "passes")


def comparison_page(name: str, cells: Lines, means: Lines, differences: Lines, baseline: str) -> str:
    """The page, as HTML.

    Args:
        name: of the comparison.
        cells: of results.csv.
        means: of means.csv: task, metric, method, pruning_rate, mean, low, high.
        differences: of differences.csv.
        baseline: the method that others are held against.
    """
    from staff.report import figures  # Altair comes in here

    against = [line for line in differences if line["second"] == baseline]
    metrics = {metric: metric_title(metric) for metric in dict.fromkeys(line["metric"] for line in means)}
    specs: dict[str, Any] = {"differences": figures.paired_differences("table").to_dict(validate=False)}
    for (metric, title), (by, axis) in product(metrics.items(), AXES.items()):
        chart = figures.qualities("table", "beside", title, by, axis)
        specs[f"{by}-{metric}"] = chart.to_dict(validate=False)
    data = {
        "differences": [
            _drawn({**line, "method": line["first"], "outcome": _outcome(line)}) for line in against
        ],
        "means": [_drawn({**line, "passes": _passes(cells, line)}) for line in means],
        **{"specs": specs, "metrics": metrics, "baseline": baseline},
    }
    seeds = len({line["seed"] for line in cells if line["seed"]})
    sections = [_verdict(against, baseline, seeds), '<form id="filters"></form>', *_charts(bool(against))]
    foot = "One file, which fetches nothing. Beside it: results.csv, means.csv, differences.csv, results.md."
    body = f"{_head(name, cells, seeds)}<main>{''.join(sections)}{_raw(cells, against)}</main>"
    body += f"<footer><p>{foot}</p></footer>"
    return whole_page(f"{name}: a comparison", body, {"numbers": gzipped(compact(data))}, "comparison.js")


def metric_title(name: str) -> str:
    """A metric as people call it, and its direction where less is better."""
    return METRIC_TITLES.get(name, name) + " (lower is better)" * (name in LOWER)


def _drawn(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line as a chart takes it: numbers as numbers."""
    numbers = {key: short(float(line[key])) for key in NUMBERS if line.get(key) not in ("", None)}
    rate = numbers.get("pruning_rate")
    return {**line, **numbers, "rate": "" if rate is None else f"{rate:.0%}"}


def _outcome(line: Mapping[str, str]) -> str:
    return "better" if float(line["low"]) > 0 else "worse" if float(line["high"]) < 0 else "can't be told"


def _passes(cells: Lines, line: Mapping[str, str]) -> float | None:
    """Of choosing and training together, mean over seeds."""

    def key(row: Mapping[str, str]) -> tuple[str, str, float | None]:
        return row["task"], row["method"], float(row["pruning_rate"]) if row["pruning_rate"] else None

    own = [float(cell["total_passes"]) for cell in cells if cell["total_passes"] and key(cell) == key(line)]
    return sum(own) / len(own) if own else None


def _head(name: str, cells: Lines, seeds: int) -> str:
    tasks = ", ".join(dict.fromkeys(cell["task"] for cell in cells))
    rates = sorted({float(cell["pruning_rate"]) for cell in cells if cell["pruning_rate"]})
    pruned = f"pruned {', '.join(f'{rate:.0%}' for rate in rates)}"
    about = f"{tasks} · {pruned} · {seeds} seed{'s' * (seeds != 1)} · {len(cells)} models judged"
    return (
        f'<header><p class="kicker">STAFF · comparison {escaped(name)}</p>'
        f"<h1>Which choice of data trains the better model?</h1><p>{escaped(about)}</p></header>"
    )


def _verdict(against: Lines, baseline: str, seeds: int) -> str:
    """How many differences there are beyond doubt, and which."""
    if not against:
        return section_of(f"There is no finished {baseline} to compare with yet.", kind="verdict")
    sure = [line for line in against if float(line["corrected"]) < BEYOND_DOUBT]
    better = [line for line in sure if float(line["difference"]) > 0]
    worse = [line for line in sure if float(line["difference"]) < 0]
    head = f"No method is better or worse than {baseline} beyond doubt."
    if sure:
        head = f"Beyond doubt, {len(better)} of {len(against)} differences to {baseline} are for the better, "
        head += f"{len(worse)} for the worse."
    about = (
        f"Every method chose a coreset, the target was fine-tuned on it, and its answers to test rows were "
        f"scored. {baseline} draws rows and costs nothing, so a method must beat it. Beyond doubt: p below "
        f"{BEYOND_DOUBT:g} after Holm's correction over all tests of a metric."
    )
    parts = [f"<p>{escaped(about)}</p>"]
    for title, lines in {"Better": better, "Worse": worse}.items():
        places: dict[str, list[str]] = {}
        for line in lines:
            where = (
                f"{line['task']}, {float(line['pruning_rate']):.0%} pruned, {metric_title(line['metric'])}"
            )
            places.setdefault(line["first"], []).append(where)
        items = (
            f"<li><strong>{escaped(k)}</strong>: {escaped('; '.join(v))}</li>" for k, v in places.items()
        )
        parts += [f"<h3>{title}</h3><ul>{''.join(items)}</ul>"] if places else []
    if seeds < 3:
        what = "the spread between runs is hardly known"
        what += ": the intervals are of the test rows" * (seeds < 2)
        parts.append(f'<ul class="warnings"><li>Of {seeds} seed{"s" * (seeds != 1)} {what}.</li></ul>')
    return section_of(head, *parts, kind="verdict")


def _charts(has_baseline: bool) -> list[str]:
    table = '<div class="table"></div>'  # of what is chosen: a script fills it
    paired = (
        "The mean difference, paired over seeds and test rows, with its interval of 95 %. An interval over "
        "the line at 0 tells nothing."
    )
    rate = (
        "Dashed: the target trained on all rows, and untouched. Whether two methods differ is for the "
        "picture above to say: what all share, the spread of the test rows, is taken out there."
    )
    cost = (
        "Left is cheaper: what choosing and training took together, models that were tuned for it included."
    )
    best = figure_of("differences", "Difference to random", paired, table)
    prices = figure_of("pruning_rate", "Score against pruning rate", rate, table)
    prices += figure_of("passes", "Score against cost", cost, table)
    sections = [section_of("Is it better than random?", best)] * has_baseline
    return [*sections, section_of("How good, and at what price?", prices)]


def _raw(cells: Lines, against: Lines) -> str:
    def value(name: str, text: str) -> str:
        return text if name in ("task", "method", "seed") else figure(float(text)) if text else "–"

    header = [name for name in cells[0] if name != "folder" and any(cell[name] for cell in cells)]
    lines = [[value(name, cell[name]) for name in header] for cell in cells]
    keys = ("difference", "low", "high", "p", "corrected")
    numbers = [[figure(float(line[key])) for key in keys] for line in against]
    tests = [
        [
            line["first"],
            line["task"],
            metric_title(line["metric"]),
            f"{float(line['pruning_rate']):.0%}",
            *own,
        ]
        for line, own in zip(against, numbers, strict=True)
    ]
    titles = ("method", "task", "metric", "pruned", "difference", "from", "to", "p", "p (Holm)")
    tables = {
        f"{len(tests)} differences to random": table_of(titles, tests, "Differences to random"),
        f"{len(cells)} cells, a model each": table_of(header, lines, "Cells, as in results.csv"),
    }
    folded = (f"<details><summary>{name}</summary>{table}</details>" for name, table in tables.items())
    return section_of("Raw figures", *folded)
