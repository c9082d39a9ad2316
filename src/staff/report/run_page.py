"""The page of a run: what was kept of a pool, why, and whether to trust it."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from staff.methods import METHODS
from staff.methods.fidelity import ADVICE, Fidelity, within
from staff.planning import finetuning_passes, sum_in_words
from staff.report import facts as told
from staff.report.facts import Facts, Record, figure
from staff.report.page import (
    bars_of,
    compact,
    escaped,
    figure_of,
    gzipped,
    section_of,
    table_of,
    whole_page,
)
from staff.report.table import TIMES, Labels, Texts, labels_of_rows, numbers_of, packed_texts, rows_shown

MOST_BYTES = 2_900_000  # of the page
MOST_GROUPS = 6  # whose regions are drawn
EPOCHS = 3  # that fine-tuning is reckoned with
SKEWED, SHIFTED = 1.5, 0.1  # ratio of median lengths, difference of shares, from which it is said
LEAST_KEPT = 20  # samples below which a skew may be chance


@dataclass(frozen=True)
class Charts:
    """The charts of a page: specifications, each once, and what is drawn with which."""

    specs: dict[str, Any] = field(default_factory=dict)
    charts: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, spec: tuple[Any, ...], records: Sequence[Record], picks: str = "") -> str:
        """A chart's name.

        Args:
            spec: a function of `figures` and what it is given beside the data.
            picks: what a click in it chooses: "region", "source", "repeats", "row" or a column of numbers.
        """
        self.specs.setdefault(repr(spec), _spec(*spec))
        self.charts[name] = {"spec": repr(spec), "records": list(records), "picks": picks}
        return name


@cache
def _spec(kind: str, *arguments: Any) -> dict[str, Any]:
    from staff.report import figures  # Altair comes in here

    return getattr(figures, kind)("table", *arguments).to_dict(validate=False)


def run_page(
    cells: Sequence[Facts],
    names: Mapping[str, str],
    texts: Texts | None,
    overlap: Sequence[Mapping[str, str]] = (),
) -> str:
    """The page, as HTML.

    Args:
        cells: a coreset each, of one pool.
        names: what was read: "data", "target", "draft", "folder"; those that are known.
        texts: None where no row can be read.
        overlap: lines of overlap.csv.
    """
    labels, shown, charts = labels_of_rows(cells[0], texts), rows_shown(cells), Charts()
    articles = "".join(_article(place, cell, labels, charts) for place, cell in enumerate(cells))
    numbers = numbers_of(cells, shown, labels)
    data = {"numbers": gzipped(compact({**numbers, "specs": charts.specs, "charts": charts.charts}))}
    title = f"What was kept of {names.get('data', 'the pool')}"

    def page(samples: str) -> str:
        body = f"{_head(cells, names, overlap)}<main>{articles}{samples}</main>{_foot(cells[0], names)}"
        return whole_page(title, body, data, "run.js")

    lines, with_text = b"", 0
    if texts is not None:
        rows, place_of = cells[0].columns["row"][shown].tolist(), numbers["rows"]["row"]
        places = {row: place for place, row in enumerate(place_of)}
        lines, with_text = packed_texts(texts, rows, places, MOST_BYTES - len(page("").encode()))
    data["texts"] = base64.b64encode(lines).decode()
    return page(_samples(cells[0], len(shown), with_text, texts))


# ---- head and foot ----


def _head(cells: Sequence[Facts], names: Mapping[str, str], overlap: Sequence[Mapping[str, str]]) -> str:
    n, kind = cells[0].manifest["n"], cells[0].manifest["format"]
    pool = f"{names.get('data', 'the pool')}: {n:,} samples ({kind})"
    models = [f"{name} {names[name]}" for name in ("target", "draft") if names.get(name)]
    head = '<header><p class="kicker">STAFF · coreset selection</p><h1>What was kept, and why</h1>'
    head += f"<p>{escaped(' · '.join([pool, *models]))}</p>"
    if len(cells) > 1:
        titles = [_title(cell) for cell in cells]
        options = "".join(f'<option value="{i}">{escaped(title)}</option>' for i, title in enumerate(titles))
        head += f'<p><label>Coreset shown below <select id="cell">{options}</select></label></p>'
        lines = [
            (
                title,
                f"{cell.manifest['m']:,}",
                f"{cell.verified.sum():,}",
                told_of.verdict if told_of else "–",
            )
            for title, cell in zip(titles, cells, strict=True)
            for told_of in [_fidelity(cell)]
        ]
        head += table_of(("coreset", "kept", "verified", "draft"), lines, "The coresets of this run")
    if overlap:
        pairs = [
            (f"{line['first']} and {line['second']}", *(_percent(float(line[key])) for key in shares))
            for line in overlap
            for shares in [("overlap", "chance_overlap")]
        ]
        alike = table_of(("coresets", "share of the smaller", "by chance"), pairs, "What two of them share")
        head += f"<details><summary>How alike they are</summary>{alike}</details>"
    return head + "</header>"


def _title(cell: Facts) -> str:
    rate = cell.manifest.get("pruning_rate")
    size = f"{cell.manifest['m']:,} kept" if rate is None else f"{rate:.0%} pruned"
    return f"{cell.manifest['method']}, {size}"


def _foot(cell: Facts, names: Mapping[str, str]) -> str:
    made = [f"staff {cell.manifest.get('staff') or ''}".strip(), f"seed {cell.manifest.get('seed', '–')}"]
    made.append(f"ended {cell.manifest.get('ended', '–')}")
    again = f"<code>staff report {escaped(names.get('folder', ''))}</code> makes this page again."
    return f"<footer><p>{escaped(', '.join(made))}. {again} One file, which fetches nothing.</p></footer>"


# ---- a coreset ----


def _article(place: int, cell: Facts, labels: Labels, charts: Charts) -> str:
    sections = (
        _verdict(cell),
        _warnings(cell, labels),
        _regions(place, cell, charts),
        _trust(place, cell, charts),
        _shares(place, cell, labels, charts),
        _every_sample(place, cell, charts),
        _stages(cell),
    )
    return f'<article data-cell="{place}"{" hidden" * (place > 0)}>{"".join(sections)}</article>'


def _verdict(cell: Facts) -> str:
    m, n, method, cost = (*(cell.manifest[name] for name in ("m", "n", "method")), cell.cost)
    fidelity = _fidelity(cell)
    spent = _duration(cost["seconds"]) if cost["seconds"] else "nothing"
    if "passes" in cost:
        price = (f"{cost['passes']:.2f} passes", f"of the target over the pool; {spent} of computing")
    else:
        price = (spent, "no pass of the target" if cost["seconds"] else "no model was asked")
    if fidelity:
        about = f"{fidelity.shown()}: {fidelity.reason}" if fidelity.spearman else fidelity.reason
        trust = (fidelity.verdict, about)
    else:
        trust = ("not checked" if _has_draft(cell) else "none", _unchecked(cell))
    tiles = [("Kept", f"{m:,} of {n:,}", _kept_words(cell)), ("Cost", *price)]
    tiles.append(("Is the draft to be trusted?", *trust))
    drawn = "".join(
        f'<div class="tile {escaped(value.split()[0])}"><h3>{name}</h3><p class="value">{escaped(value)}</p>'
        f"<p>{_with_code(about)}</p></div>"
        for name, value, about in tiles
    )
    about = f": {METHODS[method].about}" if method in METHODS else ""
    if told.by_scores_alone(cell.manifest):
        about = f": {told.BY_SCORES}"
    by = f"Chosen by <em>{escaped(method)}</em>{escaped(about)}."
    tiles_and_bars = f'<div class="tiles">{drawn}</div>{_cost_bars(cell)}'
    return (
        f'<section class="verdict"><h2>{escaped(_headline(cell))}</h2><p>{by}</p>{tiles_and_bars}</section>'
    )


def _headline(cell: Facts) -> str:
    """What was kept, and whether to trust it."""
    trust = {
        "good": "The draft ranks samples as the target does: trust the choice as the target's own.",
        "usable": "The draft ranks samples much as the target does: usable.",
        "poor": "Don't trust this choice: the draft does not know what the target finds hard.",
        "unknown": "Whether the draft can be trusted is not known: too little was verified.",
    }
    fidelity, end = _fidelity(cell), ""
    if fidelity:
        end = trust[fidelity.verdict]
    elif cell.regions and (_has_draft(cell) or cell.score == "score"):
        end = "The target verified none of it."
    elif cell.regions and "passes" in cell.cost:
        end = "The target scored the pool itself: there is no draft to doubt."
    return f"{cell.manifest['m']:,} of {cell.manifest['n']:,} samples kept. {end}".strip()


def _kept_words(cell: Facts) -> str:
    manifest = cell.manifest
    words = _percent(manifest["m"] / max(manifest["n"], 1)) + " of the samples"
    if "response_tokens" in cell.columns:
        words += f", {_percent(_token_share(cell))} of the tokens"
    if "kept_tokens" in manifest:
        allowed = manifest["settings"]["budget_tokens"]
        words += f"; {manifest['kept_tokens']:,} tokens of the {allowed:,} allowed"
    if "always" in manifest:
        words += f"; {manifest['always']:,} of them were always in (--keep)"
    return words


def _token_share(cell: Facts) -> float:
    if "response_tokens" not in cell.columns:
        return cell.manifest["m"] / max(cell.manifest["n"], 1)
    tokens = np.nan_to_num(cell.columns["prompt_tokens"] + cell.columns["response_tokens"])
    return float(tokens[cell.kept].sum() / max(tokens.sum(), 1))


def _fidelity(cell: Facts) -> Fidelity | None:
    known = cell.manifest.get("fidelity") or {}
    values: Any = {name: tuple(v) if isinstance(v, list) else v for name, v in known.items()}
    return Fidelity(**values) if values else None


def _has_draft(cell: Facts) -> bool:
    return any(stage.get("model", "").endswith("draft") for stage in cell.cost["stages"].values())


def _unchecked(cell: Facts) -> str:
    if cell.manifest["method"] == "random":
        return "drawn at random: no model was asked, so there is nothing to trust or to doubt"
    if not _has_draft(cell):
        return "no draft took part" + ": the target scored the pool itself" * ("passes" in cell.cost)
    return "nothing was verified on the target; `staff drafts` tells whether a draft ranks as the target does"


def _cost_bars(cell: Facts) -> str:
    if "passes" not in cell.cost:
        return ""
    whole = finetuning_passes(EPOCHS)
    part = whole * _token_share(cell)
    lines = [("this selection", cell.cost["passes"], f"{cell.cost['passes']:.2f} passes")]
    lines.append(("scoring the pool on the target", 1.0, "1.00"))
    lines.append((f"fine-tuning on the coreset, {EPOCHS} epochs", part, f"{part:.2f}"))
    lines.append((f"fine-tuning on the whole pool, {EPOCHS} epochs", whole, f"{whole:.2f}"))
    about = "In passes of the target over the pool; one is about one forward pass of every sample"
    verdict = f"<p>{_with_code(_first_upper(cell.cost['verdict']))}.</p>" if "verdict" in cell.cost else ""
    return bars_of(lines, about) + verdict


def _warnings(cell: Facts, labels: Labels) -> str:
    said = warnings_of(cell, labels)
    fine = '<p class="fine">None: nothing was cut, no region was too small to tell, no skew in length.</p>'
    lines = "".join(f"<li>{_with_code(_first_upper(line).rstrip('.'))}.</li>" for line in said)
    listed = f'<ul class="warnings">{lines}</ul>' if said else fine
    return section_of("Warnings", listed)


def warnings_of(cell: Facts, labels: Labels) -> list[str]:
    """What to be wary of, a sentence each."""
    said, fidelity, m = [], _fidelity(cell), max(cell.manifest["m"], 1)
    if fidelity and fidelity.verdict in ADVICE:
        cure = _first_upper(ADVICE[fidelity.verdict])
        said.append(f"The draft is {fidelity.verdict}: {fidelity.reason}. {cure}")
    regions = [region for region in cell.regions if region.size]
    unseen = [region for region in regions if not region.verified]
    if cell.verified.any() and unseen:
        rows, chosen = (sum(getattr(region, name) for region in unseen) for name in ("size", "selected"))
        holding = f"{rows:,} samples of the pool and {chosen:,} of the coreset ({chosen / m:.0%})"
        cure = "Fewer --num-regions hold more samples each"
        said.append(
            f"{len(unseen)} of {len(regions)} regions are too small to verify; with {holding}. {cure}"
        )
    method = METHODS.get(cell.manifest["method"])
    if regions and method and method.verify and not cell.verified.any():
        said.append("Nothing was verified on the target: all regions count alike")
    said += cell.remarks
    for name in ("response_tokens", "prompt_tokens") if m >= LEAST_KEPT else ():
        if name in cell.columns:
            pool, coreset = told.medians(cell.columns[name], cell.kept)
            ratio = coreset / pool if pool else math.nan
            if ratio > SKEWED or ratio < 1 / SKEWED:
                lengths = f"{coreset:,.0f} tokens in the coreset, and {pool:,.0f} in the pool"
                said.append(f"Skewed in length: the median {name.removesuffix('_tokens')} has {lengths}")
    if labels.source is not None and m >= LEAST_KEPT and not any(_asked(cell)):
        for record in told.labels_of(labels.source, cell.kept):
            shares = record["of_pool"], record["of_coreset"]
            if abs(shares[0] - shares[1]) > SHIFTED and record["label"] is not None:
                where = f"{shares[0]:.0%} of the pool and {shares[1]:.0%} of the coreset"
                said.append(f"Skewed in {labels.name}: {record['name']} is {where}")
    return said


def _asked(cell: Facts) -> dict[str, float]:
    """The share of each group that was asked for, where it was."""
    groups = cell.manifest.get("groups", ())
    return {group["group"]: group["asked"] for group in groups if "asked" in group}


def _regions(place: int, cell: Facts, charts: Charts) -> str:
    records, title = told.strata(cell), cell.region_title
    if not records:
        return ""
    verified, parts = bool(cell.verified.any()), [f"<p>{_regions_words(cell)}</p>"]
    groups = list(dict.fromkeys(record["group"] for record in records))

    def add(kind: str, records: list[Record], heading: str, about: str, table: str, *more: Any) -> None:
        heading = f"{records[0]['group']}: {heading}" if records[0]["group"] else _first_upper(heading)
        name = charts.add(f"{kind}-{place}-{len(parts)}", (kind, title, *more), records, "region")
        parts.append(figure_of(name, heading, about, table))

    for group in groups[:MOST_GROUPS]:
        own = [record for record in records if record["group"] == group]
        about = "Choose a bar to see its rows in the table at the end."
        add("region_sizes", own, "samples by region", about, _region_table(own, verified), verified)
        if any(record["even"] is not None for record in own):
            about = "A bar above its line: verification gave the region more than it would have had."
            add(
                "region_budgets",
                own,
                "budgets before and after verification",
                about,
                _region_table(own, True),
            )
        if any(record["ratio"] is not None for record in own):
            about = (
                "Higher: the target finds these samples harder than the draft says. Lines: 95 % intervals."
            )
            add("region_ratios", own, "V, what the target says of each region", about, _ratio_table(own))
    if len(groups) > MOST_GROUPS:
        parts.append(f"<p>{len(groups) - MOST_GROUPS} more groups have regions: regions.csv lists them.</p>")
    return section_of("What was kept of each region", *parts)


SCORES = {
    "effort": "The <dfn>effort</dfn> of a sample is how hard a model must pull to learn it: the length of "
    "the gradient of its loss. ",
    "loss": "The <dfn>loss</dfn> of a sample is how little the model expected its response. ",
}


def _regions_words(cell: Facts) -> str:
    words = SCORES.get(cell.score or "", "")
    words += (
        f"A <dfn>region</dfn> holds samples {'of like score' if cell.are_intervals else 'that are alike'}. "
    )
    if any(record["region"] < 0 for record in told.strata(cell)):
        words += "The hardest were set aside first: many of them are mistakes. "
    if cell.verified.any():
        words += (
            f"The target scored {cell.verified.sum():,} samples drawn from the regions. <dfn>V</dfn> is the "
        )
        words += (
            "sum of its scores over the sum of the draft's; the higher a region's V, the larger its share "
        )
        words += "of the <dfn>budget</dfn>, the samples that may be kept."
    return words


def _region_table(records: Sequence[Record], verified: bool) -> str:
    header = ["region", "samples", "kept", "share kept", "budget", *["before verification"] * verified]
    lines = [
        (
            r["name"],
            f"{r['size']:,}",
            f"{r['kept']:,}",
            f"{r['share']:.0%}",
            *(_count(r[key]) for key in budgets),
        )
        for r in records
        for budgets in [("budget", "even") if verified else ("budget",)]
    ]
    return table_of(header, lines, "Samples by region")


def _ratio_table(records: Sequence[Record]) -> str:
    keys = ("ratio", "low", "high")
    lines = [(r["name"], _count(r["verified"]), *(figure(r[key]) for key in keys)) for r in records]
    return table_of(("region", "verified", "V", "from", "to"), lines, "V of each region")


MEASURES = {  # of a Fidelity: what it is called, and what it says
    "spearman": (
        "rank correlation (Spearman)",
        "1: both order the samples alike; 0: the draft knows nothing",
    ),
    "without_length": ("the same, length taken out", "what the draft knows beside the response's length"),
    "kendall": ("rank correlation (Kendall)", "pairs in the same order, less those in the other"),
    "adjusted_rand": ("regions, adjusted Rand index", "1: the target cuts the same regions; 0: as by chance"),
    "length": ("response's length alone (Spearman)", "costs nothing: the draft should do better"),
    "loss": ("the draft's loss alone (Spearman)", "costs less: the effort should do better"),
}


def _trust(place: int, cell: Facts, charts: Charts) -> str:
    records, fidelity = told.points(cell), _fidelity(cell)
    if not records or fidelity is None:
        return ""
    values = [getattr(fidelity, name) for name in MEASURES]
    measures = zip(MEASURES.values(), values, strict=True)
    lines = [(name, within(value), about) for (name, about), value in measures if value]
    header = ("measure", "value (95 % interval)", "what it says")
    measured = table_of(header, lines, "How alike draft and target rank") if lines else ""
    draft, target, is_log = told.names_of_scores(cell, records)
    name = charts.add(f"two_scores-{place}", ("two_scores", draft, target, is_log), records, "row")
    about = (
        f"{fidelity.samples} verified samples, which stand for {fidelity.pool_share:.0%} of the pool. The "
    )
    about += "nearer they lie to one rising line, the better the draft knows what the target finds hard."
    points = [(r["row"], figure(r["draft"]), figure(r["target"]), r["fate"]) for r in records]
    table = table_of(("row", draft, target, "fate"), points, "Verified samples")
    verdict = escaped(fidelity.verdict)
    said = f'<p><strong class="{verdict}">{_first_upper(verdict)}</strong>: {escaped(fidelity.reason)}.</p>'
    drawn = figure_of(name, "Draft against target", about, table)
    return section_of("Does the draft know what the target finds hard?", said, measured, drawn)


def _shares(place: int, cell: Facts, labels: Labels, charts: Charts) -> str:
    parts = []

    def add(key: str, kind: str, title: str, records: list[Record], about: str, *more: Any) -> None:
        name = charts.add(f"{key}-{place}", (kind, title, *more), records, key)
        header = (title, "samples", "of the pool", "kept", "of the coreset")
        lines = [
            (r["name"], f"{r['size']:,}", _percent(r["of_pool"]), f"{r['kept']:,}", _percent(r["of_coreset"]))
            for r in records
        ]
        parts.append(figure_of(name, _first_upper(title), about, table_of(header, lines, title)))

    for column in told.axes(cell):
        pool, coreset = told.medians(cell.columns[column], cell.kept)
        about = f"Median {figure(pool)} in the pool, {figure(coreset)} in the coreset."
        records = told.bins_of(cell.columns[column], cell.kept)
        add(column, "shares_along", cell.word(column), records, about)
    if labels.source is not None:
        asked = _asked(cell)
        about = f"The column {labels.name} of the data." + " Diamonds: the shares asked for." * bool(asked)
        records = told.labels_of(labels.source, cell.kept, asked or None)
        add("source", "shares_by", "source", records, escaped(about), bool(asked))
    if labels.repeats is not None:
        by_name = {record["name"]: record for record in told.labels_of(labels.repeats, cell.kept)}
        records = [by_name[name] for name in TIMES.values() if name in by_name]
        if len(records) > 1:
            about = "Rows of equal turns; where near duplicates were looked for, of nearly equal ones."
            add("repeats", "shares_by", "how often a text stands in the pool", records, about)
    if not parts:
        return ""
    lead = "Bars: the share of the pool. Blue lines: the share of the coreset; above its bar, more were kept."
    grid = f'<div class="grid">{"".join(parts)}</div>'
    return section_of("The coreset beside the pool", f"<p>{lead}</p>", grid)


def _every_sample(place: int, cell: Facts, charts: Charts) -> str:
    axes = told.axes(cell)
    across = cell.score if cell.score in axes else next(iter(axes), None)
    up = next((name for name in axes if name != across), None)
    if across is None or up is None:
        return ""
    logs = tuple(bool(np.nanmin(cell.columns[name]) > 0) for name in (across, up))
    titles = cell.word(across), cell.word(up)
    # its records are the table's
    name = charts.add(f"every_sample-{place}", ("every_sample", across, up, titles, logs), [], "row")
    about = "A point a sample. Choose one to read it."
    table = "<p>The table of samples at the end has these figures, a row each.</p>"
    heading = f"{_first_upper(titles[1])} against {titles[0]}"
    return section_of("Every sample", figure_of(name, heading, about, table))


def _stages(cell: Facts) -> str:
    lines = []
    for name, row in cell.cost["stages"].items():
        seconds = row.get("seconds", 0.0)
        more = [f"{row['tokens']:,.0f} tokens"] if row.get("tokens") else []
        more += [f"{row['passes']:.2f} passes"] if row.get("passes") else []
        lines.append((name, seconds, ", ".join([f"{seconds:,.1f} s", *more])))
    if not lines:
        return ""
    terms = ""
    if "sum" in cell.cost:
        words = "T: the draft's epochs, on a share f of the pool; r: its cost beside the target's; v: "
        words += "the share of the pool that was verified."
        terms = f"<p>{escaped(_first_upper(sum_in_words(cell.cost['sum'])))}. {words}</p>"
    caption = f"Stages, {_duration(cell.cost['seconds'])} in all"
    return section_of("What took how long", bars_of(lines, caption), terms)


def _samples(cell: Facts, shown: int, with_text: int, texts: Texts | None) -> str:
    n = len(cell.kept)
    rows = (
        f"all {n:,} rows"
        if shown == n
        else f"{shown:,} of {n:,} rows: those verified, then some of every region"
    )
    full = "each with its text" if with_text == shown else f"{with_text:,} of them with their text"
    gone = " The data is not where it was, or has changed, and no text can be shown."
    why = gone if texts is None else f" {texts.missing}." * bool(texts.missing)
    about = f"The table holds {rows}, {full}.{why} Choose a row to read it in full."
    places = '<form id="filters" role="search"></form><p id="count" role="status" aria-live="polite"></p>'
    places += '<div id="rows" class="scroll"></div><nav id="pages" aria-label="Pages of the table"></nav>'
    return section_of("The samples", f"<p>{escaped(about)}</p>", places, id="samples")


# ---- words ----


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 or share == 0 else f"{share:.1%}"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _with_code(text: str) -> str:
    """Escaped text, what stands between backticks as code, and flags."""
    return re.sub(r"(?<!\w)(--[a-z][a-z-]+)|`([^`]+)`", r"<code>\1\2</code>", escaped(text))


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]
