"""Rows set aside before any method looks at the pool: which, why, and where that is written down."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
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
        same_as: position -> position of the earlier row that it repeats.
    """

    rows: Rows
    reasons: dict[int, str] = dataclasses.field(default_factory=dict)
    same_as: dict[int, int] = dataclasses.field(default_factory=dict)

    @property
    def kept(self) -> np.ndarray:
        """Positions of the rows that are left."""
        return np.delete(np.arange(len(self.rows)), list(self.reasons))

    def left(self) -> Rows:
        """The rows that methods choose from."""
        return dataclasses.replace(self.rows, numbers=self.rows.numbers[self.kept])

    def facts(self) -> dict[str, Any]:
        """What the manifest says: how many, by reason."""
        return {"dropped": dict(Counter(self.reasons.values()))} if self.reasons else {}

    def widened(self, selection: Selection) -> Selection:
        """A selection among the rows that are left, its positions those of the whole pool."""
        kept, region_of = self.kept, None
        if selection.region_of is not None:
            region_of = np.full(len(self.rows), -1, np.int64)
            region_of[kept] = selection.region_of
        places = {"indices": kept[selection.indices], "verified": kept[selection.verified]}
        return dataclasses.replace(selection, **places, region_of=region_of)

    def columns(self, columns: dict[str, Any], with_duplicates: bool) -> dict[str, Any]:
        """Columns over the rows that are left as columns over all: those set aside have no values, and are
        not selected."""
        wide: dict[str, Any] = {}
        for name, values in columns.items():
            array = np.asarray(values)
            wide[name] = np.ma.masked_all(len(self.rows), array.dtype)
            wide[name][self.kept] = np.ma.masked_where(
                array != array, array
            )  # nan is a value that there is not
        for name in {"verified", "selected"} & wide.keys():
            wide[name] = wide[name].filled(False)
        if with_duplicates:
            of = np.ma.masked_all(len(self.rows), np.int64)
            of[list(self.same_as)] = self.rows.numbers[list(self.same_as.values())]
            chosen = wide.pop("selected")
            wide |= {"duplicate_of": of, "selected": chosen}
        return wide

    def write(self, path: Path) -> None:
        """The rows set aside as JSON Lines: row, reason, and the row that it repeats."""
        numbers = self.rows.numbers.tolist()
        lines = (
            {"row": numbers[place], "reason": reason}
            | ({"of": numbers[self.same_as[place]]} if place in self.same_as else {})
            for place, reason in sorted(self.reasons.items())
        )
        files.write_whole(path, lambda aside: write_lines(aside, map(dumps, lines)))


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
