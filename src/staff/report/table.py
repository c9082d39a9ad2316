"""What the table of samples on a page holds: numbers of every row, texts of as many as there is room for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any
from zlib import Z_SYNC_FLUSH, compressobj

import numpy as np

from staff.data.duplicates import digest_of
from staff.data.rows import Rows
from staff.data.turns import build
from staff.report import facts as told
from staff.report.facts import Facts, short
from staff.report.page import compact

MOST_ROWS = 30_000  # of the table and of the chart of all samples; bars and figures are of all rows always
MOST_LETTERS = 20_000  # of a turn
MOST_VALUES = 200  # of a column that says where rows come from
SOURCES = ("source", "dataset", "origin", "domain", "category", "task", "topic", "subset", "lang", "language")
TIMES = {1: "stands once", 2: "stands twice", 3: "3 to 5 times", 6: "6 times or more"}


@dataclass(frozen=True)
class Texts:
    """The rows of a pool that can still be read.

    Attributes:
        rows: the pool, or what was kept of it.
        numbers: (n,) the row number, in the pool, of each.
        missing: why the others can't be read; empty where all can.
    """

    rows: Rows
    numbers: np.ndarray
    missing: str = ""


@dataclass(frozen=True)
class Labels:
    """What a page knows of each row beside its numbers.

    Attributes:
        name: of the column that says where rows come from; empty where there is none.
        source: (n,) its values.
        repeats: (n,) how often the row's text stands in the pool, in words; None where it is not known.
    """

    name: str = ""
    source: np.ndarray | None = None
    repeats: np.ndarray | None = None


def labels_of_rows(cell: Facts, texts: Texts | None) -> Labels:
    """The user's groups, or else a column of the data by which rows are told apart; and repeated texts."""
    numbers, n = cell.columns["row"].tolist(), len(cell.kept)
    same = {}  # row -> an earlier one that it repeats
    if "duplicate_of" in cell.columns:
        first_of = zip(numbers, cell.columns["duplicate_of"].astype(int).tolist(), strict=True)
        same = {row: first for row, first in first_of if first >= 0}
    name, values = "", cell.columns.get("group")
    if values is not None:
        name = cell.manifest.get("settings", {}).get("group_by") or "group"
    is_whole = texts is not None and not texts.missing and texts.numbers.tolist() == numbers
    if texts is not None and is_whole:
        seen: dict[bytes, int] = {}
        columns: dict[str, list[str]] | None = None
        used = {*texts.rows.layout.columns(), texts.rows.layout.id}
        for number, row in zip(numbers, texts.rows.raw(range(n)), strict=True):
            first = seen.setdefault(digest_of(build(texts.rows.layout, row, texts.rows.train_on)), number)
            if first != number:
                same.setdefault(number, first)
            if columns is None:
                columns = {c: [] for c, value in row.items() if c not in used and isinstance(value, str)}
            for column, column_values in columns.items():
                column_values.append(str(row.get(column, "")))
        distinct = {c: len(set(column_values)) for c, column_values in (columns or {}).items()}
        fitting = [c for c, count in distinct.items() if 1 < count <= min(MOST_VALUES, n / 2)]
        if values is None and fitting:
            name = next((c for c in SOURCES if c in fitting), fitting[0])
            values = np.array((columns or {})[name], object)
    repeats = None
    if same or is_whole:
        times = Counter(same.get(row, row) for row in numbers)
        counts = [times[same.get(row, row)] for row in numbers]
        repeats = np.array([*TIMES.values()], object)[np.searchsorted([*TIMES], counts, "right") - 1]
    source = None if values is None else np.array([str(value) for value in values], object)
    return Labels(name, source, repeats)


def rows_shown(cells: Sequence[Facts]) -> np.ndarray:
    """Positions of the rows on the page, in the order in which they get their text: those verified, then of
    every region and fate in turn."""
    first, n = cells[0], len(cells[0].kept)
    shuffled = np.random.default_rng(0).permutation(n)  # the same page again for the same run
    part = 2 * first.columns.get("region", np.zeros(n)).astype(np.int64) + first.kept
    order = shuffled[np.argsort(part[shuffled], kind="stable")]
    starts = np.r_[0, np.flatnonzero(np.diff(part[order])) + 1]
    turn = np.empty(n, np.int64)
    turn[order] = np.arange(n) - np.repeat(starts, np.diff(np.r_[starts, n]))
    is_verified = np.any([cell.verified for cell in cells], axis=0)
    return np.lexsort((shuffled, turn, ~is_verified))[:MOST_ROWS]


def numbers_of(cells: Sequence[Facts], shown: np.ndarray, labels: Labels) -> dict[str, Any]:
    """The numbers of the rows shown, a list a column, in the pool's order: those that all coresets share, and
    each one's own."""
    order, first = np.sort(shown), cells[0]
    rows: dict[str, Any] = {"row": first.columns["row"][order].tolist()}
    ids = first.columns["id"][order].tolist() if "id" in first.columns else []
    if any(label is not None for label in ids):
        rows["id"] = ids
    if labels.source is not None:
        names, place = np.unique(labels.source[order].astype(str), return_inverse=True)
        rows |= {"sources": names.tolist(), "source": place.tolist(), "source_name": labels.name}
    if labels.repeats is not None:
        rows |= {"repeats": labels.repeats[order].tolist()}
    return {"rows": rows, "cells": [_numbers_of_cell(cell, order) for cell in cells]}


def _numbers_of_cell(cell: Facts, order: np.ndarray) -> dict[str, Any]:
    names = [name for name in (*told.axes(cell), "target_effort") if name in cell.columns]
    fate = np.where(cell.kept, "1", "0")
    fate[np.isin(cell.columns["row"], list(cell.dropped))] = "x"
    reasons = {place: cell.dropped.get(int(row)) for place, row in enumerate(cell.columns["row"][order])}
    numbers: dict[str, Any] = {
        "columns": {name: _listed(cell.columns[name][order]) for name in names},
        "titles": {name: cell.word(name) for name in names},
        "score": cell.score,
        "fate": "".join(fate[order].tolist()),
        "verified": np.flatnonzero(cell.verified[order]).tolist(),
        "reasons": {place: reason for place, reason in reasons.items() if reason},
    }
    if cell.regions:
        numbers["region"] = cell.columns["region"][order].astype(int).tolist()
        strata = [r for r in told.strata(cell) if r["region"] >= 0]
        numbers["regions"] = [[r["region"], r["group"], r["name"]] for r in strata]
    return numbers


def _listed(values: np.ndarray) -> list[float | None]:
    """Numbers as JSON has them, none for nan."""
    numbers = values.astype(float).tolist()
    return [None if v != v else int(v) if v.is_integer() else short(v) for v in numbers]


def packed_texts(texts: Texts, rows: Sequence[int], place_of: dict[int, int], room: int) -> tuple[bytes, int]:
    """A line a row, as many as fit: its place in the table, and its turns.

    Args:
        rows: row numbers in the order in which they get in.
        place_of: row number -> its place in the table.
        room: bytes that base64 of it may have.

    Returns:
        gzip of the lines, and how many there are.
    """
    where = {number: position for position, number in enumerate(texts.numbers.tolist())}
    wanted = [(where[row], place_of[row]) for row in rows if row in where]
    packer, parts, size, count = compressobj(6, wbits=31), list[bytes](), 0, 0
    lines = _lines(texts.rows, wanted)
    while some := list(islice(lines, 32)):
        before = packer.copy()
        part = packer.compress("".join(some).encode(errors="replace"))
        part += packer.flush(Z_SYNC_FLUSH)  # what was written can be counted
        if (size + len(part) + 64) * 4 / 3 > room:
            packer = before
            break
        parts.append(part)
        size, count = size + len(part), count + len(some)
    return b"".join([*parts, packer.flush()]), count


def _lines(rows: Rows, wanted: Sequence[tuple[int, int]]) -> Iterator[str]:
    """Lines in the order asked for, read in a few passes in the order of the file.

    Args:
        wanted: position among the rows, and place in the table, of each.
    """
    start, size = 0, 512
    while block := wanted[start : start + size]:
        ordered, turns = sorted(block), {}
        for (_, place), row in zip(ordered, rows.raw([position for position, _ in ordered]), strict=True):
            example = build(rows.layout, row, rows.train_on)
            turns[place] = [[turn.role, _cut(turn.text), int(turn.train)] for turn in example.turns]
        yield from (compact([place, turns[place]]) + "\n" for _, place in block)
        start, size = start + size, size * 2


def _cut(text: str) -> str:
    more = len(text) - MOST_LETTERS
    return text if more <= 0 else f"{text[:MOST_LETTERS]}\n[{more:,} more letters are not on this page]"
