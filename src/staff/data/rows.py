"""Data as people have it -> rows: files, folders, hub data sets, rows in memory."""

from __future__ import annotations

import array
import copy
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from staff.data.layouts import (
    PROMPT_COLUMNS,
    REQUIRED,
    BadRow,
    Layout,
    find,
    from_columns,
    left_out,
    near,
    shown,
)
from staff.data.locate import Input, load, locate, split_of, suffix_of
from staff.data.text import LineRows, find_delimiter, kind_of, peek, read_csv, read_json_list
from staff.data.turns import Example, Turn, build
from staff.data.writers import csv_lines, dumps, json_lines, without_arrays, write_lines
from staff.files import write_whole

__all__ = ["Example", "Rows", "Turn", "read"]

MEMORY = "the data given"
USUAL = {
    ".jsonl": ("JSONL",),
    ".ndjson": ("JSONL",),
    ".json": ("JSON", "JSONL"),
    ".csv": ("CSV",),
    ".tsv": ("CSV",),
}


class MemoryRows:
    """Rows that are in memory: a user's own, or those of JSON lists and CSV.

    Attributes:
        kind: "rows in memory", "JSON" or "CSV", with "(gzip)" where they were packed.
        names: what messages call where they come from.
        firsts: row number of each name's first row.
        rows: (line, row) of each.
        keep: holds a temporary file that standard input was written to.
    """

    def __init__(self, kind: str = "rows in memory", keep: object = None):
        self.kind, self.keep = kind, keep
        self.delimiter, self.quoted = ",", True  # of CSV
        self.names: list[str] = []
        self.firsts: list[int] = []
        self.rows: list[tuple[int, Any]] = []

    def add(self, name: str, rows: Iterable[tuple[int, Any]]) -> None:
        self.names.append(name)
        self.firsts.append(len(self.rows))
        self.rows.extend(rows)

    def scan(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Any]]:
        return ((line, without_arrays(row)) for line, row in self.rows)

    def fetch(self, numbers: np.ndarray, columns: Sequence[str] | None = None) -> Iterator[Mapping]:
        return (without_arrays(self.rows[i][1]) for i in numbers.tolist())


class Rows:
    """The usable rows of the input. Opening it looked at every row once.

    Memory: 16 bytes a row of JSONL (where it lies, and its number), 8 bytes a row of Parquet or Arrow, and a
    block of the file, or the longest row if that is more. JSON lists, CSV and rows in memory stay there.

    Attributes:
        numbers: (n,) int64 row numbers in the input, from 0, counted over all files; skipped rows leave gaps.
        skipped: (row number, reason) of the rows left out.
        format: what was found, for people: "JSONL, prompt/response".
        paths: the files, in order; empty for data in memory.
        layout: which column holds what.
        notes: what a user should know about how the data was read, a sentence each.
        suffix: the extension of what `write_same` writes; empty where that is a folder of `save_to_disk`.
    """

    def __init__(
        self, source: Any, layout: Layout, train_on: str, numbers: np.ndarray, skipped: list[tuple[int, str]]
    ):
        self.source, self.layout, self.train_on, self.numbers, self.skipped = (
            source,
            layout,
            train_on,
            numbers,
            skipped,
        )
        self.format = f"{source.kind}, {layout.name}"
        self.paths: tuple[Path, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.suffix = ".parquet" if source.kind == "Dataset" else ".jsonl"

    def __len__(self) -> int:
        return len(self.numbers)

    def examples(self, start: int = 0, stop: int | None = None) -> Iterator[Example]:
        """The examples at positions start to stop, in order."""
        columns = None
        if is_table(self.source):
            columns = [c for c in self.layout.columns() if c in self.source.schema.names]
        for row in self.source.fetch(self.numbers[start:stop], columns):
            yield build(self.layout, row, self.train_on)

    def example(self, i: int) -> Example:
        """The example at one position; negative ones count from the end."""
        i = range(len(self))[i]
        return next(self.examples(i, i + 1))

    def raw(self, positions: Iterable[int]) -> Iterator[dict]:
        """The user's own rows at these positions, in the order asked for."""
        return map(dict, self.source.fetch(self._numbers(positions)))

    def without(self, reasons: Mapping[int, str]) -> Rows:
        """The rows without those at some positions, which count as skipped, each for its reason."""
        left = copy.copy(self)
        left.numbers = np.delete(self.numbers, list(reasons))
        skipped = ((int(self.numbers[i]), reason) for i, reason in reasons.items())
        left.skipped = sorted([*self.skipped, *skipped])
        return left

    def _numbers(self, positions: Iterable[int]) -> np.ndarray:
        return self.numbers[np.fromiter(positions, np.int64)]

    def write_jsonl(self, path: str | os.PathLike, positions: Iterable[int]) -> None:
        """Write rows as JSON Lines: the very bytes of each line where they come from JSON Lines.

        What JSON has no word for is written as the nearest: NaN as null, times as ISO 8601 (microseconds),
        bytes as base64, others as str() has them.

        Args:
            path: the file, replaced in one step once it is complete.
            positions: which, in this order.
        """
        if isinstance(self.source, LineRows):
            self._write(path, lambda aside: write_lines(aside, self.source.lines(self._numbers(positions))))
        else:
            self._write(path, lambda aside: write_lines(aside, map(dumps, self.raw(positions))))

    def write_skipped(self, path: str | os.PathLike) -> None:
        """Write the rows left out as JSON Lines: row number and reason."""
        lines = (dumps({"row": number, "reason": reason}) for number, reason in self.skipped)
        self._write(path, lambda aside: write_lines(aside, lines))

    def write_same(self, path: str | os.PathLike, positions: Iterable[int]) -> None:
        """Write rows in the format they came in: JSONL with its bytes, others with the same values.

        What was packed with gzip is packed again. A hub data set or a Dataset becomes Parquet, a folder of
        `save_to_disk` another one; rows in memory become JSON Lines.
        """
        source, path, gzipped = self.source, Path(path), self.suffix.endswith(".gz")
        if is_table(source):
            numbers = self._numbers(positions)
            write = (
                partial(_save, source.data, numbers)
                if source.saved
                else partial(source.write, numbers=numbers)
            )
            self._write(path, write)
            return
        if isinstance(source, LineRows):
            lines = source.lines(self._numbers(positions))
        elif source.kind.startswith("JSON"):
            lines = json_lines(self.raw(positions))
        elif source.kind.startswith("CSV"):
            header = list(next(self.raw([0])))
            lines = csv_lines(self.raw(positions), header, source.delimiter, source.quoted)
        else:
            lines = map(dumps, self.raw(positions))
        self._write(path, lambda aside: write_lines(aside, lines, gzipped))

    def _write(self, path: str | os.PathLike, write: Callable[[Path], object]) -> None:
        path = Path(path)
        if path.exists() and any(p.exists() and path.samefile(p) for p in self.paths):
            raise ValueError(f"{path} is the input itself; write to another file")
        write_whole(path, write)


def _save(data: Any, numbers: np.ndarray, folder: Path) -> None:
    data.select(numbers).save_to_disk(folder)


def is_table(source: object) -> bool:
    return hasattr(source, "schema")


# ---- reading ----


def read(
    data: Any,
    *,
    columns: str | None = None,
    train_on: str = "last",
    on_bad_row: str = "error",
    split: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    dataset_info: str | os.PathLike | None = None,
) -> Rows:
    """Open data and look at every row once.

    Args:
        data: a path, several, a folder (one written by `save_to_disk` too), "-" for standard input, the id of
            a hub data set; a list of dicts, a `datasets.Dataset`, a pandas DataFrame; what `locate` found.
        columns: names columns, as in "prompt=question,response=answer"; None: found by looking.
        train_on: "last" or "all": the loss is on the last assistant turn or on every one.
        on_bad_row: "error", or "skip" to leave out rows that can't be used and count them in `Rows.skipped`.
        split, config, revision: of a hub data set; `split` also of a folder that holds several.
        dataset_info: LLaMA-Factory's `dataset_info.json`, or its folder; `data` is then the name of an entry,
            or a file that one describes.

    Returns:
        The rows.

    Raises:
        ValueError: names file, row, what was found and the cure.
    """
    if train_on not in ("last", "all"):
        raise ValueError(f"train_on is {train_on!r}; it can be 'last' or 'all'")
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row is {on_bad_row!r}; it can be 'error' or 'skip'")
    layout = from_columns(columns) if columns is not None else None
    if not (
        isinstance(data, Input) or _is_path(data) or (_is_list(data) and data and all(map(_is_path, data)))
    ):
        source = _in_memory(data, split)
        return _checked(source, layout, train_on, on_bad_row == "skip")
    located = data if isinstance(data, Input) else locate(data, split, config, revision, dataset_info)
    if layout is not None and located.layout is not None:
        raise ValueError("--columns and --dataset-info both say which column holds what; give one of them")
    layout = located.layout or layout
    known = REQUIRED if layout is None else layout.columns()
    source, suffix, notes = _load(located) if located.hub or located.saved else _open(located, known)
    rows = _checked(source, layout, train_on, on_bad_row == "skip")
    rows.paths, rows.suffix, rows.notes = located.paths, suffix, tuple(notes)
    if located.samples is not None:
        rows.notes += (
            f"num_samples is {located.samples}: rows are drawn at random, each once, of {len(rows)}",
        )
        some = np.random.default_rng(0).permutation(len(rows))[: located.samples]
        rows.numbers = rows.numbers[np.sort(some)]
    return rows


def _is_path(data: Any) -> bool:
    return isinstance(data, str | os.PathLike)


def _is_list(data: Any) -> bool:
    return isinstance(data, list | tuple)


def _in_memory(data: Any, split: str | None) -> Any:
    """A list of dicts, a Dataset, a DatasetDict or a DataFrame, told apart without their libraries."""
    kind = type(data).__name__
    if kind == "DatasetDict":
        data = split_of(data, split, MEMORY)
    if kind == "IterableDataset":
        cure = "make it a Dataset, or write it to a file"
        raise ValueError(f"{MEMORY} is an IterableDataset, which can be read only once; {cure}")
    if hasattr(data, "with_format") and hasattr(data, "features"):
        from staff.data.tables import TableRows

        return TableRows("Dataset", (), (MEMORY,), data)
    if kind == "DataFrame" and hasattr(data, "to_dict"):
        twice = next((c for c in data.columns if list(data.columns).count(c) > 1), None)
        if twice is not None:
            raise ValueError(f"{MEMORY} has two columns named {twice!r}; rename one")
        data = data.to_dict("records")
    elif not _is_list(data):
        raise ValueError(
            f"data is {shown(data)}; it can be a path, several, a list of dicts, a datasets.Dataset or "
            "a pandas DataFrame"
        )
    elif not data:
        raise ValueError(f"{MEMORY} is an empty list; it should hold at least one row")
    source = MemoryRows()
    example = "a row looks like {'prompt': '...', 'response': '...'}"
    bad = (
        row if isinstance(row, Mapping) else BadRow(f"is {shown(row)}, not a dict; {example}") for row in data
    )
    source.add(MEMORY, ((0, row) for row in bad))
    return source


def _load(located: Input) -> tuple[Any, str, list[str]]:
    from staff.data.tables import TableRows

    name = f"hub data set {located.hub}" if located.hub else str(located.saved)
    source = TableRows("Dataset", (), (name,), load(located), saved=located.saved is not None)
    source.kind = name if located.hub else "Dataset"
    return source, "" if located.saved else ".parquet", []


def _open(located: Input, known: Sequence[str]) -> tuple[Any, str, list[str]]:
    """The rows of files, the extension that the same format is written with, and what to note."""
    files = [peek(path, name) for path, name in zip(located.paths, located.names, strict=True)]
    kinds = [kind_of(file, known) for file in files]
    kind = kinds[0]
    for file, other in zip(files, kinds, strict=True):
        if other != kind:
            what = f"{files[0].name} is {kind} and {file.name} is {other}"
            raise ValueError(f"{what}; files read together must be of one format")
    packed = next((file.name for file in files if file.gzipped), None)
    if kind in ("Parquet", "Arrow"):
        from staff.data.tables import TableRows

        if packed is not None:
            cure = f"unpack it with gunzip ({kind} compresses its own columns)"
            raise ValueError(f"{packed} is {kind} inside gzip; {cure}")
        return TableRows(kind, located.paths, located.names), f".{kind.lower()}", []
    notes = [
        f"{file.name} is {kind} by its content, whatever its name says"
        for file in files
        if kind not in USUAL.get(suffix_of(file.path), (kind,))
    ]
    end = ".gz" if packed is not None else ""
    if kind == "JSONL":
        return LineRows(files, located.keep), f".jsonl{end}", notes
    source = MemoryRows(f"{kind} (gzip)" if end else kind, located.keep)
    if kind == "JSON":
        for file in files:
            source.add(file.name, read_json_list(file))
        return source, f".json{end}", notes
    for file in files:
        source.delimiter = find_delimiter(file, known)
        source.quoted, rows = read_csv(file, source.delimiter)
        source.add(file.name, rows)
        if not source.quoted:
            notes.append(
                f"{file.name} is tab-separated: quotation marks in it are read as text, not round fields"
            )
    suffix = ".tsv" if source.delimiter == "\t" else ".csv"
    return source, f"{suffix}{end}", notes


def _checked(source: Any, layout: Layout | None, train_on: str, skip: bool) -> Rows:
    """The rows that can be used; the one look at every row, whatever the format."""
    numbers, skipped, count = array.array("q"), [], 0
    guessed_in, watched = "", frozenset[str]()
    seen: set[str] = set()
    columns: list[str] | None = None
    if is_table(source):  # what is read of it is settled before the first row
        if layout is None and (first := next(source.fetch(np.zeros(1, np.int64)), None)) is not None:
            guessed_in = _where(source, 0)
            try:
                layout = find(first)
            except BadRow as error:
                raise ValueError(f"{guessed_in} {error}") from None
            watched = PROMPT_COLUMNS.difference(layout.columns())
        if layout is not None and all(c in source.schema.names for c in layout.required()):
            columns = [c for c in source.schema.names if c in watched.union(layout.columns())]
        seen.update(source.schema.names)
    row: Any
    for number, (line, row) in enumerate(source.scan(columns)):
        count += 1
        try:
            if row.__class__ is BadRow:
                raise row
            if layout is None:
                layout, guessed_in = find(row), _where(source, number)
                watched = PROMPT_COLUMNS.difference(layout.columns())
            build(layout, row, train_on)
        except BadRow as error:
            reason = str(error)
            if guessed_in and row is not error and not all(c in row for c in layout.required()):  # type: ignore[union-attr]
                reason += (
                    f" (the format, {layout.name}, was found at {guessed_in}; rows of two formats don't mix)"  # type: ignore[union-attr]
                )
            if not skip:
                cure = "or leave such rows out with --on-bad-row skip"
                raise ValueError(f"{_where(source, number, line)} {reason}, {cure}") from None
            skipped.append((number, reason))
            continue
        numbers.append(number)
        if not watched.isdisjoint(row) and (reason := left_out(layout, row)):
            raise ValueError(f"{_where(source, number, line)} {reason}")
        if layout.named:
            seen.update(c for c in layout.named if c in row)
    if count == 0:
        raise ValueError(f"{', '.join(source.names)} has no rows; it should hold at least one")
    if not numbers:
        first, reason = skipped[0]
        names = ", ".join(source.names)
        raise ValueError(
            f"{names}: none of the {count} rows can be used; the first one, row {first}, {reason}"
        )
    assert layout is not None
    for column in layout.named:
        if column not in seen:
            hint = near(column, source.schema.names if is_table(source) else row)
            cure = f"{hint}; correct the name"
            raise ValueError(
                f"{source.names[0]}: no row has the column {column!r} that --columns names{cure}"
            )
    return Rows(source, layout, train_on, np.array(numbers, np.int64), skipped)


def _where(source: Any, number: int, line: int = 0) -> str:
    """Names a row for a message: 'train.jsonl: row 3 (line 5)'."""
    file = bisect_right(source.firsts, number) - 1
    place = f"{source.names[file]}: row {number - source.firsts[file]}"
    return f"{place} (line {line})" if line else place
