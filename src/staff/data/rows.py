"""Data as people have it -> rows: files, folders, hub data sets, rows in memory."""

from __future__ import annotations

import array
import contextlib
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from staff.data.kinds import find_delimiter, kind_of, peek
from staff.data.layouts import (
    PROMPT_COLUMNS,
    REQUIRED,
    BadRow,
    Layout,
    find_layout,
    from_columns,
    left_out,
    near,
    shown,
)
from staff.data.locate import Input, load, locate, split_of, suffix_of
from staff.data.text import LineRows, read_csv, read_json_list
from staff.data.turns import Example, Turn, build
from staff.data.writers import csv_lines, dumps, json_lines, without_arrays, write_lines
from staff.files import write_whole

__all__ = ["Example", "Rows", "Turn", "read"]

MEMORY = "the data given"
KINDS_OF = {".json": ("JSON", "JSONL"), ".csv": ("CSV",), ".tsv": ("CSV",)}
KINDS_OF |= dict.fromkeys((".jsonl", ".ndjson"), ("JSONL",))


class MemoryRows:
    """Rows that are in memory: a user's own, or those of JSON lists and CSV.

    Attributes:
        kind: "rows in memory", "JSON" or "CSV", with "(gzip)" where they were packed.
        suffix: the extension of what `write` writes.
        keep: holds a temporary file that standard input was written to.
        as_lines: rows -> the lines of a file in their own format.
        names: what messages call where they come from.
        firsts: row number of each name's first row.
        rows: (line, row) of each.
    """

    columns = ()

    def __init__(self, kind: str = "rows in memory", suffix: str = ".jsonl", keep: object = None):
        self.kind, self.suffix, self.keep = kind, suffix, keep
        self.as_lines: Callable[[Iterable[Mapping]], Iterable[bytes]] = partial(map, dumps)
        self.names: list[str] = []
        self.firsts: list[int] = []
        self.rows: list[tuple[int, Any]] = []

    def add(self, name: str, rows: Iterable[tuple[int, Any]]) -> None:
        self.names.append(name)
        self.firsts.append(len(self.rows))
        self.rows.extend(rows)

    def scan(self, *_: object) -> Iterator[tuple[int, Any]]:
        return iter(self.rows)

    def fetch(self, numbers: np.ndarray, *_: object) -> Iterator[Mapping]:
        return (self.rows[i][1] for i in numbers.tolist())

    def write(self, path: Path, numbers: np.ndarray) -> None:
        write_lines(path, self.as_lines(self.fetch(numbers)), self.suffix.endswith(".gz"))


@dataclass(eq=False, repr=False)
class Rows:
    """The usable rows of the input. Opening it looked at every row once.

    Memory: 16 bytes a row of JSONL (where it lies, and its number), 8 bytes a row of Parquet or Arrow, and a
    block of the file, or the longest row if that is more. JSON lists, CSV and rows in memory stay there.

    Attributes:
        source: where they come from: `LineRows`, `TableRows` or `MemoryRows`.
        layout: which column holds what.
        train_on: "last" or "all": which assistant turns the loss is on.
        numbers: (n,) int64 row numbers in the input, from 0, counted over all files; skipped rows leave gaps.
        skipped: (row number, reason) of the rows left out.
        paths: the files, in order; empty for data in memory.
        notes: what a user should know about how the data was read, a sentence each.
    """

    source: Any
    layout: Layout
    train_on: str
    numbers: np.ndarray
    skipped: list[tuple[int, str]]
    paths: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def format(self) -> str:
        """What was found, for people: "JSONL, prompt/response"."""
        return f"{self.source.kind}, {self.layout.name}"

    @property
    def suffix(self) -> str:
        """The extension of what `write_same` writes; empty where that is a folder of `save_to_disk`."""
        return self.source.suffix

    def __len__(self) -> int:
        return len(self.numbers)

    def examples(self, start: int = 0, stop: int | None = None) -> Iterator[Example]:
        """The examples at positions start to stop, in order."""
        for row in self.source.fetch(self.numbers[start:stop], self.layout.columns()):
            yield build(self.layout, row, self.train_on)

    def example(self, i: int) -> Example:
        """The example at one position; negative ones count from the end."""
        i = range(len(self))[i]
        return next(self.examples(i, i + 1))

    def raw(self, positions: Iterable[int]) -> Iterator[dict]:
        """The user's own rows at these positions, in the order asked for."""
        return map(dict, self.source.fetch(self._numbers(positions)))

    def column(self, name: str, flag: str = "--group-by ") -> list[str]:
        """A column's values, as text.

        Args:
            flag: what names it.

        Raises:
            ValueError: a row has none of that name; says the nearest.
        """
        values = []
        for number, row in zip(self.numbers, self.raw(range(len(self))), strict=True):
            if name not in row:
                raise ValueError(f"{flag}{name}: row {number} has no such column{near(name, row)}")
            values.append(str(row[name]))
        return values

    def where(self, position: int) -> str:
        """What messages call the row at a position: 'train.jsonl: row 3'."""
        return _where(self.source, int(self.numbers[position]))

    def without(self, reasons: Mapping[int, str]) -> Rows:
        """The rows without those at some positions, which count as skipped, each for its reason."""
        skipped = ((int(self.numbers[i]), reason) for i, reason in reasons.items())
        left = np.delete(self.numbers, list(reasons))
        return replace(self, numbers=left, skipped=sorted([*self.skipped, *skipped]))

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
        exact = isinstance(self.source, LineRows)
        lines = self.source.lines(self._numbers(positions)) if exact else map(dumps, self.raw(positions))
        self._write(path, lambda aside: write_lines(aside, lines))

    def write_skipped(self, path: str | os.PathLike) -> None:
        """Write the rows left out as JSON Lines: row number and reason."""
        lines = (dumps({"row": number, "reason": reason}) for number, reason in self.skipped)
        self._write(path, lambda aside: write_lines(aside, lines))

    def write_same(self, path: str | os.PathLike, positions: Iterable[int]) -> None:
        """Write rows in the format they came in: JSONL with its bytes, others with the same values.

        What was packed with gzip is packed again. A hub data set or a Dataset becomes Parquet, a folder of
        `save_to_disk` another one; rows in memory become JSON Lines.
        """
        self._write(path, partial(self.source.write, numbers=self._numbers(positions)))

    def _write(self, path: str | os.PathLike, write: Callable[[Path], object]) -> None:
        path = Path(path)
        if path.exists() and any(p.exists() and path.samefile(p) for p in self.paths):
            raise ValueError(f"{path} is the input itself; write to another file")
        write_whole(path, write)


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
    max_unpacked: int = 100,
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
        max_unpacked: times its own size that a gzipped file may unpack to, beyond 8 MiB.

    Returns:
        The rows.

    Raises:
        ValueError: names file, row, what was found and the cure.
    """
    if train_on not in ("last", "all"):
        raise ValueError(f"train_on is {train_on!r}; it can be 'last' or 'all'")
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row is {on_bad_row!r}; it can be 'error' or 'skip'")
    layout, skip = from_columns(columns) if columns is not None else None, on_bad_row == "skip"
    paths = data if isinstance(data, list | tuple) and data else [data]
    if not isinstance(data, Input):
        if not all(isinstance(path, str | os.PathLike) for path in paths):
            return _checked(_in_memory(data, split), layout, train_on, skip)
        data = locate(data, split, config, revision, dataset_info)
    if layout is not None and data.layout is not None:
        raise ValueError("--columns and --dataset-info both say which column holds what; give one of them")
    layout, notes = data.layout or layout, list[str]()
    if data.hub or data.saved:
        from staff.data.tables import TableRows

        name = f"hub data set {data.hub}" if data.hub else "Dataset"
        source: Any = TableRows(name, (), (str(data.saved or name),), load(data), data.saved is not None)
    else:
        source, notes = _open(data, REQUIRED if layout is None else layout.columns(), max_unpacked)
    rows = replace(_checked(source, layout, train_on, skip), paths=data.paths)
    if data.samples is not None:
        notes.append(f"num_samples is {data.samples}: rows are drawn at random, each once, of {len(rows)}")
        some = np.random.default_rng(0).permutation(len(rows))[: data.samples]
        rows.numbers = rows.numbers[np.sort(some)]
    rows.notes = tuple(notes)
    return rows


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
    elif not isinstance(data, list | tuple):
        kinds = "a path, several, a list of dicts, a datasets.Dataset or a pandas DataFrame"
        raise ValueError(f"data is {shown(data)}; it can be {kinds}")
    elif not data:
        raise ValueError(f"{MEMORY} is an empty list; it should hold at least one row")
    source = MemoryRows()
    cure = "not a dict; a row looks like {'prompt': '...', 'response': '...'}"
    rows = (without_arrays(r) if isinstance(r, Mapping) else BadRow(f"is {shown(r)}, {cure}") for r in data)
    source.add(MEMORY, ((0, row) for row in rows))
    return source


def _open(located: Input, known: Sequence[str], max_unpacked: int) -> tuple[Any, list[str]]:
    """The rows of files, and what to note about them."""
    named = zip(located.paths, located.names, strict=True)
    files = [peek(path, name, max_unpacked) for path, name in named]
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
        return TableRows(kind, located.paths, located.names), []
    notes = [
        f"{file.name} is {kind} by its content, whatever its name says"
        for file in files
        if kind not in KINDS_OF.get(suffix_of(file.path), (kind,))
    ]
    if kind == "JSONL":
        return LineRows(files, located.keep), notes
    source = MemoryRows(f"{kind} (gzip)" if packed else kind, ".json", located.keep)
    source.as_lines = json_lines
    for file in files:
        if kind == "JSON":
            source.add(file.name, read_json_list(file))
            continue
        delimiter = find_delimiter(file, known)
        header, quoted, rows = read_csv(file, delimiter)
        if not source.names:
            source.suffix = ".tsv" if delimiter == "\t" else ".csv"
            source.as_lines = partial(csv_lines, header=header, delimiter=delimiter, quoted=quoted)
        source.add(file.name, rows)
        if not quoted:
            how = "quotation marks in it are read as text, not round fields"
            notes.append(f"{file.name} is tab-separated: {how}")
    source.suffix += ".gz" if packed else ""
    return source, notes


def _checked(source: Any, layout: Layout | None, train_on: str, skip: bool) -> Rows:
    """The rows that can be used; the one look at every row, whatever the format."""
    numbers, skipped = array.array("q"), []
    unseen = set(layout.named).difference(source.columns) if layout is not None else set()
    guessed_in, watched = "", frozenset[str]()  # where the layout was found, and what it would leave out
    if layout is None and source.columns:  # what is read of a table is settled before the first row
        with contextlib.suppress(BadRow, StopIteration):
            layout, guessed_in = find_layout(next(source.fetch(np.zeros(1, np.int64)))), _where(source, 0)
            watched = PROMPT_COLUMNS.difference(layout.columns())
    row: Any
    for number, (line, row) in enumerate(source.scan(layout, watched)):
        if row is None:  # a table's own look found nothing wrong
            numbers.append(number)
            continue
        try:
            if row.__class__ is BadRow:
                raise row
            if layout is None:
                layout, guessed_in = find_layout(row), _where(source, number)
                watched = PROMPT_COLUMNS.difference(layout.columns())
            build(layout, row, train_on)
        except BadRow as error:
            reason = str(error)
            if guessed_in and row is not error and not all(c in row for c in layout.required()):  # type: ignore[union-attr]
                found = f"the format, {layout.name}, was found at {guessed_in}"  # type: ignore[union-attr]
                reason += f" ({found}; rows of two formats don't mix)"
            if not skip:
                cure = "or leave such rows out with --on-bad-row skip"
                raise ValueError(f"{_where(source, number, line)} {reason}, {cure}") from None
            skipped.append((number, reason))
            continue
        numbers.append(number)
        if not watched.isdisjoint(row) and (reason := left_out(layout, row)):
            raise ValueError(f"{_where(source, number, line)} {reason}")
        if unseen:
            unseen.difference_update(row)
    names = ", ".join(source.names)
    if not numbers and not skipped:
        raise ValueError(f"{names} has no rows; it should hold at least one")
    if not numbers:
        what = f"none of the {len(skipped)} rows can be used; the first one, row {skipped[0][0]}"
        raise ValueError(f"{names}: {what}, {skipped[0][1]}")
    assert layout is not None
    for column in layout.named:
        if column in unseen:
            what = f"no row has the column {column!r} that --columns names"
            cure = f"{near(column, source.columns or row)}; correct the name"
            raise ValueError(f"{source.names[0]}: {what}{cure}")
    return Rows(source, layout, train_on, np.array(numbers, np.int64), skipped)


def _where(source: Any, number: int, line: int = 0) -> str:
    """Names a row for a message: 'train.jsonl: row 3 (line 5)'."""
    file = bisect_right(source.firsts, number) - 1
    place = f"{source.names[file]}: row {number - source.firsts[file]}"
    return f"{place} (line {line})" if line else place
