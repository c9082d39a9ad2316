"""Rows set aside before any method looks at the pool: which, why, and where that is written down."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from staff import files
from staff.config import SelectConfig, near_similarity
from staff.data.duplicates import find_duplicates
from staff.data.rows import Rows
from staff.data.writers import dumps, write_lines
from staff.runs import account
from staff.runs.store import RunFolder
from staff.types import Selection, Stage


@dataclass(frozen=True, eq=False)
class Aside:
    """What of a pool is set aside.

    Attributes:
        rows: the whole pool.
        reasons: position in it -> why that row is left out.
        same_as: position -> position of the earlier row that it repeats; no model sees such a row.
        ratios: position of a suspect -> its loss as a multiple of its answer's alone.
    """

    rows: Rows
    reasons: dict[int, str] = dataclasses.field(default_factory=dict)
    same_as: dict[int, int] = dataclasses.field(default_factory=dict)
    ratios: dict[int, float] = dataclasses.field(default_factory=dict)

    @property
    def kept(self) -> np.ndarray:
        """Positions of the rows that repeat none."""
        return np.delete(np.arange(len(self.rows)), list(self.same_as))

    def left(self) -> Rows:
        """The rows that repeat none."""
        return dataclasses.replace(self.rows, numbers=self.rows.numbers[self.kept])

    def with_suspects(self, positions: np.ndarray, ratios: np.ndarray) -> Aside:
        """Set aside these of the rows that repeat none, too."""
        found = dict(zip(self.kept[positions].tolist(), ratios.tolist(), strict=True))
        return dataclasses.replace(self, reasons=self.reasons | dict.fromkeys(found, "suspect"), ratios=found)

    def places_of(self, numbers: np.ndarray) -> np.ndarray:
        """Positions, among the rows that repeat none, of the rows of these numbers; one that repeats another
        counts as that one.

        Raises:
            ValueError: a row can't be used.
        """
        missing = np.setdiff1d(numbers, self.rows.numbers)
        if len(missing):
            reason = dict(self.rows.skipped).get(int(missing[0]), "can't be used")
            raise ValueError(f"--keep: row {missing[0]} of the data {reason}")
        places = np.searchsorted(self.rows.numbers, numbers).tolist()
        firsts = [self.same_as.get(place, place) for place in places]
        return np.unique(np.searchsorted(self.kept, np.array(firsts, np.int64)))

    def facts(self) -> dict[str, Any]:
        """What the manifest says: how many, by reason."""
        return {"dropped": dict(Counter(self.reasons.values()))} if self.reasons else {}

    def widened(self, selection: Selection) -> Selection:
        """A selection among the rows that repeat none, its positions those of the whole pool."""
        return among_all(selection, self.kept, len(self.rows))

    def columns(self, columns: dict[str, Any], with_duplicates: bool) -> dict[str, Any]:
        """Columns over the rows that repeat none as columns over all: the others have no values, and are not
        selected."""
        wide: dict[str, Any] = {}
        for name, values in columns.items():
            array = np.asarray(values)
            wide[name] = np.ma.masked_all(len(self.rows), array.dtype)
            # nan is a value that there is not
            wide[name][self.kept] = np.ma.masked_where(array != array, array)
        for name in {"verified", "selected"} & wide.keys():
            wide[name] = wide[name].filled(False)
        if with_duplicates:
            of = np.ma.masked_all(len(self.rows), np.int64)
            of[list(self.same_as)] = self.rows.numbers[list(self.same_as.values())]
            chosen = wide.pop("selected")
            wide |= {"duplicate_of": of, "selected": chosen}
        return wide

    def write(self, path: Path) -> None:
        """The rows set aside as JSON Lines: row, reason, the row that it repeats or the ratio of losses."""
        numbers = self.rows.numbers.tolist()
        lines = (
            {"row": numbers[place], "reason": reason}
            | ({"of": numbers[self.same_as[place]]} if place in self.same_as else {})
            | ({"ratio": float(f"{self.ratios[place]:.4g}")} if place in self.ratios else {})
            for place, reason in sorted(self.reasons.items())
        )
        files.write_whole(path, lambda aside: write_lines(aside, map(dumps, lines)))


def among_all(
    selection: Selection, members: np.ndarray, n: int, held: Sequence[int] | np.ndarray = ()
) -> Selection:
    """A selection among some of n samples, its positions those of all, with the samples that are always in;
    the others have no weight."""
    region_of = None
    if selection.region_of is not None:
        region_of = np.full(n, -1, np.int64)
        region_of[members] = selection.region_of
    weights = np.full(n, np.nan)
    weights[members] = 1.0 if selection.weights is None else selection.weights
    held = np.asarray(held, np.int64)
    weights[held] = 1.0
    places = {
        "indices": np.union1d(members[selection.indices], held),
        "verified": members[selection.verified],
    }
    return dataclasses.replace(selection, **places, region_of=region_of, weights=weights)


def set_aside(config: SelectConfig, run: RunFolder, rows: Rows, data: str) -> Aside:
    """What `--dedup` leaves out of a pool, kept as a piece of the run.

    Args:
        data: the data's fingerprint.
    """
    if config.dedup is None:
        return Aside(rows)
    key = {"data": data, "dedup": config.dedup, "rows": files.fingerprint(rows.numbers.tolist())}
    key |= {name: getattr(config.reading, name) for name in ("columns", "train_on")}
    path = run.piece("dedup", key) / "same.npz"
    found = files.read_arrays(path)
    if found is None:
        stage, began = Stage("dedup"), time.monotonic()
        tell = run.counter(stage, len(rows))
        same = find_duplicates(rows.examples(), near_similarity(config.dedup), tell)
        found = {"places": np.array([*same], np.int64), "same_as": np.array([*same.values()], np.int64)}
        account.spend(run.work, stage, seconds=time.monotonic() - began)
        files.write_arrays(path, found)
    same = dict(zip(found["places"].tolist(), found["same_as"].tolist(), strict=True))
    reason = "duplicate" if config.dedup == "exact" else "near-duplicate"
    return Aside(rows, dict.fromkeys(same, reason), same)
