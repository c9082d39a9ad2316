"""A comparison as PNGs: differences to random, and scores against pruning rate and cost. matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from staff.comparison.grid import FULL, UNTOUCHED
from staff.files import write_whole
from staff.report.comparison_page import AXES, LOWER, metric_title

if TYPE_CHECKING:
    from staff.comparison.tables import Difference, MethodAt

SIGNED = {"better": "#1f83c6", "can't be told": "#8b939d", "worse": "#d55e00"}
MARKERS = "os^Dvp"


def draw_comparison(
    folder: Path,
    means: Mapping[MethodAt, float],
    passes: Mapping[MethodAt, float],
    against: Sequence[Difference],
    task: str,
    metric: str,
) -> list[str]:
    """Draw one task and metric; nothing where matplotlib is not installed.

    Args:
        means, passes: by method and pruning rate: of the metric, and of choosing and training in passes.
        against: the paired differences to the baseline.

    Returns:
        the names of the files: no picture that would say nothing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    pictures: dict[str, Any] = {}
    if against:
        pictures["differences"] = partial(_differences, against=against)
    rates = {rate for _, rate in means if rate is not None}
    if len(rates) > 1:
        x: Any = {key: key[1] for key in means}
        pictures["by-rate"] = partial(_scores, x=x, title=AXES["pruning_rate"], means=means, against=against)
    if any(value == value for key, value in passes.items() if key[1] is not None):
        title = AXES["passes"].replace(", in", ",\nin")
        pictures["by-cost"] = partial(_scores, x=passes, title=title, means=means, against=against)
    names = []
    for kind, draw in pictures.items():
        lines = len(against) if kind == "differences" else 12
        figure = Figure(figsize=(7.2, max(3.0, 1.3 + 0.22 * lines)), layout="constrained")
        axes = figure.subplots()
        draw(axes, metric=metric)
        axes.set_title(task, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        names.append(f"{task}-{metric}-{kind}.png")
        write_whole(folder / names[-1], partial(figure.savefig, dpi=150, format="png"))
    return names


def _differences(axes: Any, against: Sequence[Difference], metric: str) -> None:
    """A point and its interval for each method and rate, and a line at no difference."""
    methods = list(dict.fromkeys(d.first for d in against))
    rates = sorted({d.pruning_rate for d in against})
    axes.axvline(0, color="0.4", linewidth=1)
    for d in against:
        place = methods.index(d.first) + (rates.index(d.pruning_rate) - (len(rates) - 1) / 2) * 0.7 / len(
            rates
        )
        color = SIGNED["better" if d.low > 0 else "worse" if d.high < 0 else "can't be told"]
        axes.plot([d.low, d.high], [place, place], color=color, linewidth=2, solid_capstyle="butt")
        axes.plot(d.difference, place, MARKERS[rates.index(d.pruning_rate) % len(MARKERS)], color=color)
    for rate, marker in zip(rates, MARKERS * len(rates), strict=False):
        axes.plot([], [], marker, color="0.3", label=f"{rate:.0%} pruned")
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    title = f"{metric_title(metric)}: difference to {against[0].second}"
    axes.set_xlabel(f"{title}, right is better\nbars: its paired interval of 95 %")
    axes.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _scores(
    axes: Any,
    x: Mapping[MethodAt, float],
    title: str,
    means: Mapping[MethodAt, float],
    against: Sequence[Difference],
    metric: str,
) -> None:
    """A line a method, named at its end; bars say how sure its difference to random is."""
    from staff.report.figures import SERIES

    bounds = {(d.first, d.pruning_rate): (d.difference, d.low, d.high) for d in against}
    methods = list(dict.fromkeys(name for name, rate in means if rate is not None))
    ends: list[tuple[float, float, str, str]] = []
    for place, name in enumerate(methods):
        rates = sorted(rate for other, rate in means if other == name and rate is not None)
        points = [(x[name, rate], means[name, rate]) for rate in rates if x[name, rate] == x[name, rate]]
        color, style = SERIES[place % len(SERIES)], ("-", "--", ":")[place // len(SERIES) % 3]
        axes.plot(*zip(*points, strict=True), "o", linestyle=style, color=color) if points else None
        for rate in rates:
            if (name, rate) in bounds:
                value, low, high = bounds[name, rate]
                half = [high - value, value - low] if metric in LOWER else [value - low, high - value]
                axes.errorbar(x[name, rate], means[name, rate], np.c_[half], color=color, alpha=0.4)
        ends += [(*max(points), name, color)] if points else []
    for name, style in ((FULL, "--"), (UNTOUCHED, ":")):
        if (name, None) in means:
            axes.axhline(means[name, None], color="0.5", linestyle=style, linewidth=1)
            at, where = (0.01, means[name, None]), ("axes fraction", "data")
            axes.annotate(name, at, xycoords=where, va="bottom", fontsize="small", color="0.4")
    gap, last = np.ptp(axes.get_ylim()) * 0.045, -np.inf
    for right, height, name, color in sorted(ends, key=lambda end: end[1]):
        last = max(height, last + gap)  # names moved apart where they would lie on one another
        beside = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(name, (right, last), **beside, color=color, weight="bold")
    axes.margins(x=0.14)
    axes.set(xlabel=title, ylabel=metric_title(metric))
    if title == AXES["pruning_rate"]:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if bounds:
        about = f"bars: 95 % interval of the difference to {against[0].second}"
        axes.set_title(about, loc="right", fontsize="small", color="0.4")
