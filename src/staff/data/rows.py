"""Data as people have it -> rows: files, folders, hub data sets and rows in memory. Every reading error names file, row and cure."""

from __future__ import annotations

import array
import contextlib
import gzip
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from staff.data.layouts import LAYOUTS, BadRow, Layout, find, from_columns, near, shown
from staff.data.locate import Input, load_hub, locate
from staff.data.scanners import find_delimiter, suffix_of
from staff.data.text import TextFile, TextRows, kind_of, peek, stamp
from staff.data.turns import Example, Turn, build
from staff.data.writers import aside, dumps, write_table

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
    """Rows that are in memory already: dicts."""

    kind = "rows in memory"

    def __init__(self, rows: Sequence[Mapping]):
        self.rows = rows

    def fetch(self, numbers: Iterable[int]) -> Iterator[Mapping]:
        return (self.rows[int(i)] for i in numbers)


class Rows:
    """The usable rows of the input. Opening it looked at every row once; nothing of them is kept.

    Memory: 24 bytes a row of JSONL, JSON or CSV (where it lies, and its number), 8 bytes a row of Parquet or Arrow, and one block: 1 MiB
    of text, or the longest row if that is more; of Parquet 4096 rows and the column chunks of one row group. Rows in memory stay there.

    Attributes:
        numbers: (n,) int64 row numbers in the input, 0-based, counted over all files; skipped rows leave gaps.
        skipped: (row number, reason) of the rows left out.
        format: what was found, for people: "JSONL, prompt/response".
        paths: the files, in order; empty for data in memory.
        layout: which column holds what.
        notes: what a user should know about how the data was read, a sentence each.
    """

    def __init__(
        self,
        source: Any,
        layout: Layout,
        train_on: str,
        numbers: np.ndarray,
        skipped: list[tuple[int, str]],
        paths: tuple[Path, ...],
        notes: Sequence[str] = (),
    ):
        self.source, self.layout, self.train_on = source, layout, train_on
        self.numbers, self.skipped, self.paths, self.notes = numbers, skipped, paths, tuple(notes)
        gzipped = any(f.gzipped for f in source.files) if isinstance(source, TextRows) else False
        kind = source.names[0] if source.kind == "Dataset" and source.names[0] != MEMORY else source.kind
        self.format = f"{kind}{' (gzip)' if gzipped else ''}, {layout.name}"

    def __len__(self) -> int:
        return len(self.numbers)

    def examples(self, start: int = 0, stop: int | None = None) -> Iterator[Example]:
        """The examples at positions start to stop, in order."""
        stop = len(self) if stop is None else min(stop, len(self))
        columns = None
        if _is_table(self.source):
            columns = [c for c in self.layout.columns() if c in self.source.schema.names]
        for row in self._fetch(range(start, stop), columns):
            yield build(self.layout, row, self.train_on)

    def example(self, i: int) -> Example:
        """The example at one position; negative ones count from the end."""
        i = range(len(self))[i]
        return next(self.examples(i, i + 1))

    def raw(self, positions: Iterable[int]) -> Iterator[dict]:
        """The user's own rows at these positions, in the order asked for."""
        for row in self._fetch(positions):
            yield dict(row)

    def _fetch(self, positions: Iterable[int], columns: list[str] | None = None) -> Iterator[Mapping]:
        if isinstance(self.source, TextRows):
            return self.source.fetch(
                positions if isinstance(positions, range) else np.asarray(list(positions), np.int64)
            )
        if isinstance(positions, range) and positions.step == 1:
            numbers = self.numbers[positions.start : positions.stop]
        else:
            numbers = self.numbers[np.asarray(list(positions), np.int64)]
        return self.source.fetch(numbers, columns) if columns is not None else self.source.fetch(numbers)

    def write_jsonl(self, path: str | os.PathLike, positions: Iterable[int]) -> None:
        """Write rows as JSON Lines: the very bytes of each line where they come from JSON Lines, else one json.dumps a row.

        What JSON has no word for is written as the nearest: NaN as null, times as ISO 8601 to the microsecond, bytes as base64, others as
        str() has them.

        Args:
            path: the file, replaced in one step once it is complete.
            positions: which, in this order.
        """
        with aside(path, self.paths) as file:
            if isinstance(self.source, TextRows) and self.source.kind == "JSONL":
                for _, line in self.source.very_bytes(np.asarray(list(positions), np.int64)):
                    file.write(line if line.endswith(b"\n") else line + b"\n")
            else:
                for row in self.raw(positions):
                    file.write(dumps(row) + b"\n")

    def write_skipped(self, path: str | os.PathLike) -> None:
        """Write the rows left out as JSON Lines: row number and reason."""
        with aside(path, self.paths) as file:
            for number, reason in self.skipped:
                file.write(dumps({"row": number, "reason": reason}) + b"\n")

    @property
    def suffix(self) -> str:
        """The extension of what `write_same` writes; empty where it is a folder, as `save_to_disk` makes them."""
        source = self.source
        if isinstance(source, TextRows):
            file = source.files[0]
            suffix = {"JSONL": ".jsonl", "JSON": ".json"}.get(
                source.kind, ".tsv" if file.delimiter == "\t" else ".csv"
            )
            return suffix + (".gz" if any(f.gzipped for f in source.files) else "")
        if not _is_table(source):
            return ".jsonl"
        return "" if source.saved is not None else ".arrow" if source.kind == "Arrow" else ".parquet"

    def write_same(self, path: str | os.PathLike, positions: Iterable[int]) -> None:
        """Write rows in the format they came in: the same bytes for JSONL, JSON and CSV, the same schema and values for Parquet and Arrow.

        Gzipped text is gzipped again, CSV keeps its header. A hub data set or a Dataset becomes Parquet; rows in memory become JSON Lines.
        """
        positions = np.asarray(list(positions), np.int64)
        source = self.source
        if not isinstance(source, TextRows):
            if _is_table(source):
                write_table(Path(path), source, self.numbers[positions], self.paths)
            else:
                self.write_jsonl(path, positions)
            return
        with aside(path, self.paths) as raw, contextlib.ExitStack() as stack:
            file: Any = raw
            if any(f.gzipped for f in source.files):
                file = stack.enter_context(gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0))
            before, between, after = b"", b"", b""
            if source.kind == "JSON":
                before, between, after = b"[\n", b",\n", b"\n]\n"
            elif source.kind == "CSV":
                before = source.header_bytes(0)
            file.write(before)
            for i, (_, data) in enumerate(source.very_bytes(positions)):
                file.write(between if i else b"")
                file.write(data if source.kind == "JSON" or data.endswith(b"\n") else data + b"\n")
            file.write(after)


def _is_table(source: object) -> bool:
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
        data: a path, several, a folder (one written by `save_to_disk` too), "-" for standard input, the id of a hub data set; or a list of
            dicts, a `datasets.Dataset`, a pandas DataFrame; or what `sources.locate` found.
        columns: names columns, as in "prompt=question,response=answer"; None: found by looking.
        train_on: "last" or "all": the loss is on the last assistant turn or on every one.
        on_bad_row: "error", or "skip" to leave out rows that can't be used and count them in `Rows.skipped`.
        split, config, revision: of a hub data set; `split` also of a folder that holds several.
        dataset_info: LLaMA-Factory's `dataset_info.json`, or its folder; `data` is then the name of an entry, or a file that one describes.

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
    skip = on_bad_row == "skip"
    if isinstance(data, list | tuple) and not data:
        raise ValueError(f"{MEMORY} is an empty list; it should hold at least one row")
    if isinstance(data, list | tuple) and not all(isinstance(d, str | os.PathLike) for d in data):
        return _read_memory(data, layout, train_on, skip)
    if not isinstance(data, str | os.PathLike | list | tuple | Input):
        return _read_object(data, layout, train_on, skip, split)
    found = data if isinstance(data, Input) else locate(data, split, config, revision, dataset_info)
    if layout is not None and found.layout is not None:
        raise ValueError("--columns and --dataset-info both say which column holds what; give one of them")
    layout = found.layout if layout is None else layout
    if found.hub is None:
        return _read_files(found, layout, train_on, skip)
    from staff.data.tables import open_dataset

    name = f"hub data set {found.hub}"
    loaded = _split_of(load_hub(found), found.split, name)
    return _read_table(open_dataset(loaded, name), layout, train_on, skip, (), found.notes)


def _read_files(found: Input, layout: Layout | None, train_on: str, skip: bool) -> Rows:
    paths, names, notes = found.paths, found.names, list(found.notes)
    heads = [peek(p, n) for p, n in zip(paths, names, strict=True)]
    kinds = [kind_of(head, p, n) for (head, _), p, n in zip(heads, paths, names, strict=True)]
    other = next((i for i, k in enumerate(kinds) if k != kinds[0]), None)
    if other is not None:
        raise ValueError(
            f"{names[0]} is {kinds[0]} and {names[other]} is {kinds[other]}; files read together must be of one format"
        )
    kind = kinds[0]
    if kind in ("Parquet", "Arrow"):
        from staff.data.tables import open_tables

        gzipped = next((n for n, (_, g) in zip(names, heads, strict=True) if g), None)
        if gzipped is not None:
            raise ValueError(
                f"{gzipped} is {kind} inside gzip; unpack it with gunzip ({kind} compresses its own columns)"
            )
        return _read_table(open_tables(kind, paths, names, found.saved), layout, train_on, skip, paths, notes)
    known = (
        [c for each in LAYOUTS.values() for c in each.required()]
        if layout is None
        else list(layout.columns())
    )
    files = tuple(
        TextFile(p, n, kind, g, find_delimiter(head, p, known) if kind == "CSV" else ",", stamp(p))
        for p, n, (head, g) in zip(paths, names, heads, strict=True)
    )
    for path, name in zip(paths, names, strict=True):
        if suffix_of(path) in USUAL and kind not in USUAL[suffix_of(path)]:
            notes.append(f"{name} is {kind} by its content, whatever its name says")
    return _read_text(TextRows(kind, files, keep=found.keep), layout, train_on, skip, notes)


def _read_text(source: TextRows, layout: Layout | None, train_on: str, skip: bool, notes: list[str]) -> Rows:
    spans, numbers = array.array("q"), array.array("q")
    skipped: list[tuple[int, str]] = []
    seen: set[str] = set()
    number, found_in = 0, ""
    for file in source.files:
        source.first.append(len(numbers))
        first = number
        for found in source.scan(file):
            try:
                if isinstance(found.value, BadRow):
                    raise found.value
                row = found.value
                if layout is None:
                    layout, found_in = find(row, row), f"row {number - first} of {file.name}"
                build(layout, row, train_on)
            except BadRow as error:
                reason = str(error)
                lacks = (
                    not isinstance(found.value, BadRow)
                    and layout is not None
                    and not all(c in found.value for c in layout.required())
                )
                if found_in and lacks and layout is not None:
                    reason += f" (the format, {layout.name}, was found in {found_in}; rows of two formats don't mix)"
                if not skip:
                    raise ValueError(
                        f"{file.name}: row {number - first} (line {found.line}) {reason}{_skip_cure()}"
                    ) from None
                skipped.append((number, reason))
            else:
                spans.append(found.start)
                spans.append(found.end)
                numbers.append(number)
                if layout.named:
                    seen.update(c for c in layout.named if c in row)
            number += 1
    source.first.append(len(numbers))
    paths = tuple(f.path for f in source.files)
    _check_some(number, skipped, ", ".join(f.name for f in source.files))
    assert layout is not None
    _check_named(layout, seen, source.files[0].name)
    source.spans = np.frombuffer(spans, np.int64).reshape(-1, 2)
    return Rows(source, layout, train_on, np.frombuffer(numbers, np.int64), skipped, paths, notes)


def _skip_cure() -> str:
    return ", or leave such rows out with --on-bad-row skip"


def _check_some(rows: int, skipped: list[tuple[int, str]], name: str) -> None:
    if rows == 0:
        raise ValueError(f"{name} has no rows; it should hold at least one")
    if len(skipped) == rows:
        raise ValueError(
            f"{name}: none of the {rows} rows can be used; the first one, row {skipped[0][0]}, {skipped[0][1]}"
        )


def _check_named(layout: Layout, seen: set[str], name: str, columns: Sequence[str] = ()) -> None:
    for column in layout.named:
        if column not in seen:
            raise ValueError(
                f"{name}: no row has the column {column!r} that --columns names{near(column, columns)}; correct the name"
            )


def _read_table(
    source: Any,
    layout: Layout | None,
    train_on: str,
    skip: bool,
    paths: tuple[Path, ...],
    notes: Sequence[str],
) -> Rows:
    from staff.data.tables import check_types, plain

    name = source.names[0]
    columns = source.schema.names
    try:
        layout = find(columns) if layout is None else layout
        missing = next((c for c in layout.required() if c not in columns), None)
        if missing is not None:
            raise BadRow(
                f"has no column {missing!r}{near(missing, columns)}; found {', '.join(map(repr, columns))}"
            )
    except BadRow as error:
        raise ValueError(f"{name} {error}") from None
    check_types(source.schema, layout, name)
    _check_named(layout, set(columns), name, columns)
    used = [c for c in layout.columns() if c in columns]
    absent = [f for f in ("query", "system", "history", "tools", "id") if getattr(layout, f) not in columns]
    layout = replace(layout, **dict.fromkeys(absent))  # type: ignore[arg-type]  # what the table has not is not asked of every row
    numbers, skipped = [], []
    for at, batch in source.batches(used):
        fine = plain(batch, layout)
        for i in np.flatnonzero(~fine).tolist():
            try:
                row = {c: v[0] for c, v in batch.slice(i, 1).to_pydict().items()}
                build(layout, row, train_on)
            except (BadRow, UnicodeDecodeError) as error:
                if not skip:
                    raise ValueError(f"{source.where(at + i)} {error}{_skip_cure()}") from None
                skipped.append((at + i, str(error)))
            else:
                fine[i] = True
        numbers.append(np.flatnonzero(fine) + at)
    _check_some(len(source), skipped, ", ".join(source.names))
    number = int(np.concatenate(numbers)[0])
    try:
        dumps(
            next(source.fetch(np.array([number])))
        )  # a column that Python can't take must show now, not when the coreset is written
    except Exception as error:  # time zones, extension types: pyarrow raises whatever its conversions raise
        said = " ".join(str(error).split())
        raise ValueError(
            f"{source.where(number)} can't be written as JSON ({shown(said, 160)}); cast or drop that column"
        ) from None
    return Rows(source, layout, train_on, np.concatenate(numbers).astype(np.int64), skipped, paths, notes)


def _read_memory(rows: Sequence, layout: Layout | None, train_on: str, skip: bool) -> Rows:
    numbers, skipped = [], []
    seen: set[str] = set()
    for number, row in enumerate(rows):
        try:
            if not isinstance(row, Mapping):
                raise BadRow(
                    f"is {shown(row)}, not a dict; a row looks like {{'prompt': '...', 'response': '...'}}"
                )
            layout = find(row, row) if layout is None else layout
            build(layout, row, train_on)
        except BadRow as error:
            if not skip:
                raise ValueError(f"{MEMORY}: row {number} {error}{_skip_cure()}") from None
            skipped.append((number, str(error)))
        else:
            numbers.append(number)
            seen.update(c for c in layout.named if c in row)
    _check_some(len(rows), skipped, MEMORY)
    assert layout is not None
    _check_named(layout, seen, MEMORY)
    return Rows(MemoryRows(rows), layout, train_on, np.array(numbers, np.int64), skipped, ())


def _read_object(data: Any, layout: Layout | None, train_on: str, skip: bool, split: str | None) -> Rows:
    """A Dataset, a DatasetDict or a DataFrame, told apart without importing their libraries."""
    kind = type(data).__name__
    if kind == "DataFrame" and hasattr(data, "to_dict"):
        twice = next((c for c in data.columns if list(data.columns).count(c) > 1), None)
        if twice is not None:
            raise ValueError(f"{MEMORY} has two columns named {twice!r}; rename one")
        return _read_memory(data.to_dict("records"), layout, train_on, skip)
    if kind == "DatasetDict":
        data = _split_of(data, split, MEMORY)
    if kind == "IterableDataset":
        raise ValueError(
            f"{MEMORY} is an IterableDataset, which can be read only once; make it a Dataset, or write it to a file"
        )
    if not (hasattr(data, "with_format") and hasattr(data, "features")):
        raise ValueError(
            f"data is {shown(data)}; it can be a path, several, a list of dicts, a datasets.Dataset or a pandas DataFrame"
        )
    from staff.data.tables import open_dataset

    return _read_table(open_dataset(data, MEMORY), layout, train_on, skip, (), [])


def _split_of(data: Any, split: str | None, name: str) -> Any:
    """The split asked for, else `train`, else the only one; a single Dataset is itself."""
    if not hasattr(data, "keys"):
        return data
    names = list(data)
    if split is None and len(names) == 1:
        return data[names[0]]
    chosen = split or "train"
    if chosen not in names:
        raise ValueError(
            f"{name} has no split {chosen!r}{near(chosen, names)}; name one with --split: {', '.join(names)}"
        )
    return data[chosen]
