"""What a page shows of one coreset, told from the files of its run: strata, verified samples, shares. numpy
alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from staff.config import DEFAULT_METHOD
from staff.data.layouts import visible
from staff.types import Region

Record = dict[str, Any]  # a row of what a chart draws

NUM_BINS = 18
MOST_LABELS = 12  # values of a column that are shown by name
# what a number is called on an axis and in the table
COLUMN_TITLES = {
    "effort": "effort on the draft",
    "target_effort": "effort on the target",
    "loss": "loss",
    "prompt_tokens": "tokens of the prompt",
    "response_tokens": "tokens of the response",
    "score": "your own score",
    "el2n": "EL2N, the error's norm",
    "entropy": "entropy",
    "hes": "HES, the sum of the highest entropies",
    "upd": "UPD, surprise where it was sure",
    "similarity": "likeness to the validation rows",
    "tokens": "tokens of the response",
}

BY_SCORES = "evenly over your own scores: without a draft nothing tells what rows are about, or look wrong"


def by_scores_alone(manifest: Mapping[str, Any]) -> bool:
    """Did the default have scores of the user's own to go by, and nothing else?"""
    is_own = "scores" in manifest["inputs"] and not manifest["settings"].get("draft")
    return is_own and manifest["method"] == DEFAULT_METHOD


@dataclass(frozen=True)
class Facts:
    """One coreset of a run.

    Attributes:
        name: of its folder.
        manifest, cost: as manifest.json and cost.json have them.
        regions: as regions.csv has them.
        columns: of scores.parquet, by name; nan where a number is missing.
        remarks: what is to be said of how the data was read.
        dropped: row number -> why it was set aside before the choice.
    """

    name: str
    manifest: Mapping[str, Any]
    cost: Mapping[str, Any]
    regions: Sequence[Region]
    columns: Mapping[str, np.ndarray]
    remarks: Sequence[str] = ()
    dropped: Mapping[int, str] = field(default_factory=dict)

    @property
    def score(self) -> str | None:
        """The column that the method chose by; None where it chose by no number of each row."""
        told = self.manifest.get("score")
        return told if told in self.columns else None

    def word(self, column: str) -> str:
        """What a column is called."""
        if column == "effort" and self.manifest["method"] in ("direct", "grand"):
            return "effort on the target"
        return COLUMN_TITLES.get(column, column)

    @property
    def are_intervals(self) -> bool:
        """Whether regions are intervals of the score; else they are clusters of like samples."""
        return self.score is not None and all(math.isfinite(region.upper) for region in self.regions)

    @property
    def region_title(self) -> str:
        """What the regions are intervals of."""
        return self.word(self.score) if self.score and self.are_intervals else "cluster"

    @property
    def kept(self) -> np.ndarray:
        return self.columns["selected"].astype(bool)

    @property
    def verified(self) -> np.ndarray:
        return (
            self.columns["verified"].astype(bool) if "verified" in self.columns else np.zeros_like(self.kept)
        )


def read_columns(table: Any) -> dict[str, np.ndarray]:
    """A pyarrow.Table as arrays: missing numbers are nan, missing regions -1, texts are objects."""
    columns = {}
    for name in table.column_names:
        column = table.column(name)
        if name in ("region", "duplicate_of"):
            column = column.fill_null(-1)
        columns[name] = np.asarray(column.to_numpy(zero_copy_only=False))
    return columns


def is_number(array: np.ndarray) -> bool:
    return array.dtype.kind in "fiu" and bool(np.isfinite(array).any())


def strata(facts: Facts) -> list[Record]:
    """The regions that hold samples as charts and tables show them, each group's followed by what of it was
    set aside as hardest."""
    told: list[Record] = []
    of_rows, score = facts.columns.get("region"), facts.columns.get(facts.score or "")
    labels = facts.columns.get("group")
    are_intervals = facts.are_intervals
    is_left = ~np.isin(facts.columns["row"], list(facts.dropped))
    members: dict[str, list[int]] = {}
    for number, region in enumerate(facts.regions):
        if region.size:
            first = int(np.argmax(of_rows == number)) if of_rows is not None else 0
            members.setdefault("" if labels is None else str(labels[first]), []).append(number)
    for group, numbers in members.items():
        edges = (
            _edges([(facts.regions[i].lower, facts.regions[i].upper) for i in numbers])
            if are_intervals
            else []
        )
        for place, number in enumerate(numbers):
            region = facts.regions[number]
            name = " to ".join(edges[place]) if edges else f"no. {number + 1}"
            numbered = {"region": number, "group": visible(group), "name": name, "size": region.size}
            numbered |= {"from": edges[place][0] if edges else str(number + 1)}
            numbered |= {"kept": region.selected, "share": region.selected / region.size}
            numbered |= {"budget": region.budget, "even": region.even_budget, "verified": region.verified}
            ratios = (region.ratio, region.ratio_low, region.ratio_high)
            numbered |= zip(
                ("ratio", "low", "high"), map(known, ratios) if region.verified else [None] * 3, strict=True
            )
            told.append(numbered)
        if of_rows is None:
            continue
        aside = is_left & (of_rows < 0) & (True if labels is None else labels == group)
        if are_intervals and score is not None:
            aside &= score >= max(facts.regions[number].upper for number in numbers)
        if aside.any():
            name = f"hardest, up to {figure(float(score[aside].max()))}" if score is not None else "set aside"
            size, kept = int(aside.sum()), int((aside & facts.kept).sum())
            record = {"region": -1, "group": visible(group), "name": name, "from": "hardest", "size": size}
            record |= {"kept": kept, "share": kept / size, "verified": 0}
            told.append(record | dict.fromkeys(("budget", "even", "ratio", "low", "high")))
    return told


def _edges(intervals: Sequence[tuple[float, float]]) -> list[tuple[str, str]]:
    """Edges of intervals in as many digits as tell them apart."""
    width = min((upper - lower for lower, upper in intervals), default=0.0)
    largest = max((abs(edge) for interval in intervals for edge in interval), default=0.0)
    digits = math.ceil(1 - math.log10(width)) if width > 0 else 2
    if digits > 5 or largest >= 1e6:  # very small or very large ones
        digits = math.ceil(math.log10(largest / width)) + 1 if width > 0 else 2
        return [(f"{low:.{digits}g}", f"{high:.{digits}g}") for low, high in intervals]
    return [(f"{low:,.{max(digits, 0)}f}", f"{high:,.{max(digits, 0)}f}") for low, high in intervals]


def points(facts: Facts) -> list[Record]:
    """The verified samples: the draft's score beside the target's."""
    if "target_effort" not in facts.columns or facts.score is None:
        return []
    draft, target = facts.columns[facts.score], facts.columns["target_effort"]
    places = np.flatnonzero(np.isfinite(target) & np.isfinite(draft))
    rows, kept = facts.columns["row"][places].tolist(), facts.kept[places]
    fates = np.where(kept, "kept", "dropped").tolist()
    numbers = zip(rows, draft[places].tolist(), target[places].tolist(), fates, strict=True)
    return [{"row": row, "draft": short(d), "target": short(t), "fate": fate} for row, d, t, fate in numbers]


def names_of_scores(facts: Facts, records: Sequence[Record]) -> tuple[str, str, bool]:
    """What the axes of `points` are called, and whether they are logarithmic."""
    is_log = all(record["draft"] > 0 and record["target"] > 0 for record in records)
    return facts.word(facts.score or ""), COLUMN_TITLES["target_effort"], is_log


def axes(facts: Facts) -> list[str]:
    """The columns of numbers that it is shown along which rows are kept and dropped."""
    names = dict.fromkeys(("response_tokens", "prompt_tokens", "loss", facts.score or "loss"))
    return [name for name in names if name in facts.columns and is_number(facts.columns[name])]


def bins_of(values: np.ndarray, kept: np.ndarray) -> list[Record]:
    """Shares of pool and coreset in bins of a number: of equal width, or of equal ratio where it has a long
    tail.

    Args:
        values: (n,) numbers, nan where there is none.
        kept: (n,) bool.
    """
    is_known = np.isfinite(values)
    values, kept = values[is_known].astype(float), kept[is_known]
    low, high = float(values.min()), float(values.max())
    whole = bool((values % 1 == 0).all())
    if low == high:
        edges = np.array([low, low + 1])
    elif low > 0 and high / max(np.median(values), 1e-12) > 4:
        edges = np.geomspace(low, high, NUM_BINS + 1)
    else:
        edges = np.linspace(low, high, NUM_BINS + 1)
    if whole:
        edges = np.unique(np.r_[np.floor(edges[:-1]), np.floor(edges[-1]) + 1])
    edges[-1] = max(edges[-1], np.nextafter(high, np.inf))
    place = np.searchsorted(edges, values, "right") - 1
    sizes, chosen = (np.bincount(part, minlength=len(edges) - 1) for part in (place, place[kept]))
    told = []
    for i, (size, taken) in enumerate(zip(sizes.tolist(), chosen.tolist(), strict=True)):
        # a bin of whole numbers ends with the last that is in it
        last = edges[i + 1] - (1 if whole and low < high else 0)
        name = figure(edges[i]) + (f" to {figure(last)}" if last != edges[i] else "")
        numbers = {"low": float(edges[i]), "high": float(edges[i + 1]), "size": size, "kept": taken}
        told.append({"bin": i, "name": name, "from": figure(edges[i]), **numbers})
    return _with_shares(told)


def labels_of(labels: np.ndarray, kept: np.ndarray, asked: Mapping[str, float] | None = None) -> list[Record]:
    """Shares of pool and coreset by the values of a column, the most frequent first.

    Args:
        labels: (n,) the value of each row.
        asked: share of the coreset that was asked for.
    """
    names, place = np.unique(np.array(labels, dtype=object).astype(str), return_inverse=True)
    sizes, chosen = (np.bincount(part, minlength=len(names)) for part in (place, place[kept]))
    order = np.argsort(-sizes, kind="stable").tolist()
    told = [
        {"name": visible(names[i]), "label": names[i], "size": int(sizes[i]), "kept": int(chosen[i])}
        for i in order
    ]
    for record in told if asked else ():
        record["asked"] = (asked or {}).get(record["label"], 0.0)
    if len(told) > MOST_LABELS + 1:
        rest = told[MOST_LABELS:]
        sums = {key: sum(r[key] for r in rest) for key in ("size", "kept", *(["asked"] if asked else []))}
        told = [*told[:MOST_LABELS], {"name": f"{len(rest)} others", "label": None, **sums}]
    return _with_shares(told)


def _with_shares(records: list[Record]) -> list[Record]:
    n, m = (max(1, sum(record[key] for record in records)) for key in ("size", "kept"))
    return [record | {"of_pool": record["size"] / n, "of_coreset": record["kept"] / m} for record in records]


def medians(values: np.ndarray, kept: np.ndarray) -> tuple[float, float]:
    """Of the pool and of the coreset; nan where there is none."""
    is_known = np.isfinite(values)
    both = values[is_known], values[is_known & kept]
    first, second = (float(np.median(part)) if len(part) else math.nan for part in both)
    return first, second


def known(value: float) -> float | None:
    return short(value) if math.isfinite(value) else None


def short(value: float) -> float:
    """A number of five digits: what a chart can show."""
    return float(f"{value:.5g}")


def figure(value: float | None) -> str:
    """A number for people: three digits, thousands set apart."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
