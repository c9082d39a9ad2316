"""A run in a notebook: the charts of its page, and a summary with a picture."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from staff.report import facts as told
from staff.report.facts import Facts, Record
from staff.report.page import escaped

if TYPE_CHECKING:
    import altair as alt


def regions(facts: Facts) -> alt.TopLevelMixin:
    """See `Run.plot_regions`."""
    import altair as alt

    from staff.report import figures

    records = told.strata(facts)
    if not records:
        raise ValueError(f"{facts.manifest['method']} has no regions")
    title, verified = facts.region_title, bool(facts.verified.any())
    parts = []
    for group in dict.fromkeys(record["group"] for record in records):
        own = [record for record in records if record["group"] == group]
        parts.append(figures.region_sizes(own, title, verified))
        if group:
            parts[-1] = parts[-1].properties(title=group)
        if verified:
            parts += [figures.region_budgets(own, title), figures.region_ratios(own, title)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a click in one chart chooses in all
        return alt.vconcat(*parts)


def fidelity_of(facts: Facts) -> alt.TopLevelMixin:
    """See `Run.plot_fidelity`."""
    from staff.report import figures

    records = told.points(facts)
    if not records:
        raise ValueError(f"{facts.name}: nothing was verified on the target")
    return figures.two_scores(records, *told.names_of_scores(facts, records))


def shares(facts: Facts, column: str) -> alt.TopLevelMixin:
    """See `Run.plot_shares`."""
    from staff.report import figures

    values = _column(facts, column)
    if told.is_number(values):
        return figures.shares_along(told.bins_of(values, facts.kept), facts.word(column))
    return figures.shares_by(told.labels_of(values, facts.kept), facts.word(column))


def samples(facts: Facts, x: str, y: str) -> alt.TopLevelMixin:
    """See `Run.plot_samples`."""
    from staff.report import figures

    values = {name: _column(facts, name) for name in (x, y)}
    places = np.flatnonzero(np.all([np.isfinite(part.astype(float)) for part in values.values()], axis=0))
    places = places[np.argsort(facts.kept[places], kind="stable")]  # those kept are drawn last
    rows, fates = facts.columns["row"], np.where(facts.kept, "kept", "dropped")
    records: list[Record] = [
        {"row": int(rows[i]), "fate": str(fates[i]), x: told.short(values[x][i]), y: told.short(values[y][i])}
        for i in places
    ]
    logs = bool((values[x][places] > 0).all()), bool((values[y][places] > 0).all())
    return figures.every_sample(records, x, y, (facts.word(x), facts.word(y)), logs)


def _column(facts: Facts, name: str) -> np.ndarray:
    if name not in facts.columns:
        raise ValueError(f"there is no column {name!r}; scores.parquet has {', '.join(facts.columns)}")
    return facts.columns[name]


def card(facts: Facts, text: str) -> str:
    """A run as HTML: a few lines, and its regions as bars, the kept part of each dark."""
    lines = "<br>".join(escaped(line) for line in text.splitlines())
    records = told.strata(facts)
    highest, width = max((record["size"] for record in records), default=1), 480 / max(len(records), 1)
    bars = [
        f'<rect x="{i * width:.1f}" y="{60 - 60 * record[part] / highest:.1f}" width="{width * 0.9:.1f}" '
        f'height="{60 * record[part] / highest:.1f}" fill="{color}"><title>{escaped(record["name"])}: '
        f"{record['kept']} of {record['size']} kept</title></rect>"
        for i, record in enumerate(records)
        for part, color in (("size", "#c3c8ce"), ("kept", "#1f83c6"))
    ]
    about = 'role="img" aria-label="samples of each region, those kept dark"'
    picture = f'<br><svg width="480" height="60" {about}>{"".join(bars)}</svg>'
    picture += f"<br><small>samples by {escaped(facts.region_title)}; blue: kept</small>"
    return f'<div style="font-family: system-ui, sans-serif">{lines}{picture if records else ""}</div>'
