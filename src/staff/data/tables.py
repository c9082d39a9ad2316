"""Tables -> rows: Parquet, Arrow and `datasets.Dataset`, read by batches and checked a column at a time."""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from staff.data.kinds import check_unchanged, stamp
from staff.data.layouts import Layout, shown

ROWS_A_BATCH = 4096
ARROW_ERRORS = (
    *(pa.ArrowException, OSError, UnicodeDecodeError, OverflowError),
    *(MemoryError, IndexError, KeyError, TypeError),
)


class TableRows:
    """Rows of tables, in constant memory: the column chunks of one row group of Parquet, and a batch.

    Args:
        kind: "Parquet", "Arrow" or "Dataset".
        files: in order; empty for a Dataset.
        names: what messages call them.
        data: the Dataset, if it is one.
        saved: it was read from a folder that `save_to_disk` wrote.

    Raises:
        ValueError: a file is damaged, has two columns of one name, or other columns than the first.
    """

    def __init__(
        self, kind: str, files: Sequence[Path], names: Sequence[str], data: Any = None, saved: bool = False
    ):
        self.kind, self.files, self.names = kind, tuple(files), tuple(names)
        self.data, self.saved = data, saved
        self.suffix = "" if saved else ".arrow" if kind == "Arrow" else ".parquet"
        self.stamps = [stamp(path) for path in files]
        self.parts: list[tuple[int, int]] = []  # file, and which of its parts
        self.starts, self.firsts = [0], []  # row numbers of each part's and of each file's first row
        schemas = []
        for number, name in enumerate(names):
            with _readable(name):
                schema, sizes = self._open(number)
            twice = next((n for n in schema.names if schema.names.count(n) > 1), None)
            if twice is not None:
                raise ValueError(f"{name} has two columns named {twice!r}; rename one")
            schemas.append(schema)
            if not schema.equals(schemas[0]):
                first = {f.name: f.type for f in schemas[0]}
                other = [f"{f.name}: {f.type}" for f in schema if first.get(f.name) != f.type]
                other += [f"no {n}" for n in first if n not in schema.names]
                said = f"than {names[0]} ({', '.join(other) or 'in another order'})"
                cure = "make them alike, or select from each alone"
                raise ValueError(f"{name} has other columns {said}; {cure}")
            self.firsts.append(self.starts[-1])
            self.parts += [(number, part) for part in range(len(sizes))]
            self.starts += (self.starts[-1] + np.cumsum(sizes, dtype=np.int64)).tolist()
        self.schema: pa.Schema = schemas[0]
        self.columns = self.schema.names

    def _open(self, number: int) -> tuple[pa.Schema, list[int]]:
        """Schema, and rows of each part that can be reached without reading what is before it."""
        if self.data is not None:
            n = len(self.data)
            schema = self.data.with_format("arrow")[:1].schema if n else self.data.features.arrow_schema
            return schema, [min(ROWS_A_BATCH, n - i) for i in range(0, n, ROWS_A_BATCH)]
        if self.kind == "Parquet":
            with pq.ParquetFile(self.files[number]) as file:
                groups = map(file.metadata.row_group, range(file.num_row_groups))
                return file.schema_arrow, [group.num_rows for group in groups]
        with _arrow(self.files[number]) as (schema, batches):
            return schema, [sum(batch.num_rows for batch in batches)]

    def _load(self, number: int, part: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        if self.data is not None:
            some = slice(part * ROWS_A_BATCH, (part + 1) * ROWS_A_BATCH)
            yield from self.data.with_format("arrow", columns=columns)[some].to_batches()
            return
        path = self.files[number]
        check_unchanged(path, self.names[number], self.stamps[number])
        if self.kind == "Parquet":
            with pq.ParquetFile(path) as file:
                yield from file.iter_batches(ROWS_A_BATCH, [part], columns, use_threads=False)
            return
        with _arrow(path) as (_, batches):
            for batch in batches:
                for start in range(0, batch.num_rows, ROWS_A_BATCH):
                    yield batch.select(columns).slice(start, ROWS_A_BATCH)

    def batches(
        self, columns: Collection[str] | None = None, wanted: np.ndarray | None = None
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Batches in order, with the row number of the first row of the one each is of.

        Args:
            columns: names to read, where there are such; all of them if None.
            wanted: ascending row numbers; the batches then hold those rows alone.

        Raises:
            ValueError: a file is damaged or has changed.
        """
        names = [name for name in self.columns if columns is None or name in columns]
        for (file, part), start, end in zip(self.parts, self.starts, self.starts[1:], strict=False):
            if wanted is not None and not np.diff(np.searchsorted(wanted, [start, end]))[0]:
                continue
            at, first = start, self.firsts[file]
            with _readable(f"{self.names[file]}, rows {start - first} to {end - first - 1}"):
                for batch in self._load(file, part, names):
                    batch.validate(full=True)  # Parquet texts are bytes that nobody has looked at yet
                    rows = np.arange(at, at + batch.num_rows)
                    if wanted is not None:
                        rows = wanted[slice(*np.searchsorted(wanted, [at, at + batch.num_rows]))]
                    for some in _take(batch, rows - at):
                        yield at, some
                    at += batch.num_rows
            if at != end:
                promise = f"it promises {end - start} rows and has {at - start}"
                raise ValueError(f"{self.names[file]} is damaged: {promise}; write it again")

    def scan(
        self, layout: Layout | None = None, more: Collection[str] = ()
    ) -> Iterator[tuple[int, Mapping | None]]:
        """0, since a table has no lines, and value of every row; None for one that certainly can be used.

        Args:
            layout: its columns alone are read; None: all.
            more: other columns that are wanted, where there are such.
        """
        whole = layout is None or not set(layout.required()).issubset(self.columns)
        for at, batch in self.batches(None if whole else {*layout.columns(), *more}):  # type: ignore[union-attr]
            fine = np.zeros(batch.num_rows, bool) if whole else usable(batch, layout)  # type: ignore[arg-type]
            others = _take(batch, np.flatnonzero(~fine))
            rows = chain.from_iterable(self._rows(at, some) for some in others)
            yield from ((0, None if good else next(rows)) for good in fine.tolist())

    def fetch(self, numbers: np.ndarray, columns: Collection[str] | None = None) -> Iterator[Mapping]:
        """Rows as dicts, in the order asked for; each ascending run of numbers takes one pass."""
        for at, batch in self._in_order(numbers, columns):
            yield from self._rows(at, batch)

    def write(self, path: Path, numbers: np.ndarray) -> None:
        """Write rows with the schema and values they came with: Arrow as Arrow, the others as Parquet."""
        if self.saved:
            self.data.select(numbers).save_to_disk(path)
            return
        with (pa.ipc.new_file if self.kind == "Arrow" else pq.ParquetWriter)(path, self.schema) as writer:
            for _, batch in self._in_order(numbers):
                writer.write_batch(batch)

    def _in_order(self, numbers: np.ndarray, columns: Collection[str] | None = None) -> Iterator[tuple]:
        for run in np.split(numbers, np.flatnonzero(np.diff(numbers) <= 0) + 1):
            yield from self.batches(columns, run)

    def _rows(self, at: int, batch: pa.RecordBatch) -> Iterator[dict]:
        names = batch.schema.names
        with _readable(f"{self.names[bisect_right(self.firsts, at) - 1]}: row {at} and on"):
            values = [_to_list(column) for column in batch.columns]
        return (dict(zip(names, row, strict=True)) for row in zip(*values, strict=True))


@contextlib.contextmanager
def _arrow(path: Path) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    with pa.memory_map(str(path)) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file:
            reader = pa.ipc.open_file(file)
            yield reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:  # a stream has no index
            stream = pa.ipc.open_stream(file)
            yield stream.schema, iter(stream)


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except ARROW_ERRORS as error:
        said = shown(" ".join(str(error).split()), 160)
        cure = "write or fetch the file again"
        raise ValueError(f"{name}: the data is cut or damaged ({said}); {cure}") from None


def _take(batch: pa.RecordBatch, rows: np.ndarray) -> list[pa.RecordBatch]:
    """Some rows of a batch, by ascending places."""
    if len(rows) in (0, batch.num_rows):
        return [batch] if len(rows) else []
    try:
        return [batch.take(pa.array(rows))]
    except pa.ArrowNotImplementedError:  # string views
        return [batch.slice(i, 1) for i in rows.tolist()]


# ---- columns of values ----


def usable(batch: pa.RecordBatch, layout: Layout) -> np.ndarray:
    """(rows,) bool: rows that certainly make an example; the others must be looked at one by one."""
    types = {field.name: field.type for field in batch.schema}
    texts = [types[column] for column in (layout.query, layout.system) if column in types]
    known = {*layout.required(), layout.query, layout.system, layout.id}
    if not known.issuperset(types) or not all(map(_is_text, texts)):
        return np.zeros(batch.num_rows, bool)
    if layout.messages is not None:
        return _usable_chats(batch.column(layout.messages), layout)
    return np.logical_and.reduce([_filled(batch.column(column)) for column in layout.required()])


def _usable_chats(chats: pa.Array, layout: Layout) -> np.ndarray:
    """Chats of turns in known roles that hold text and nothing else, the last one the assistant's."""
    nothing = np.zeros(len(chats), bool)
    if not (_is_list(chats.type) and pa.types.is_struct(chats.type.value_type)):
        return nothing
    turns, names = chats.flatten(), [field.name for field in chats.type.value_type]
    role_tag, content_tag = layout.tags(dict.fromkeys(names))
    if {role_tag, content_tag} != set(names) or len(turns) == 0:
        return nothing
    role, content = (pc.struct_field(turns, tag) for tag in (role_tag, content_tag))
    if not _is_text(role.type):
        return nothing
    assistant = _among(role, [name for name, ours in layout.roles.items() if ours == "assistant"])
    good = np.cumsum(np.append(False, _among(role, list(layout.roles)) & _filled(content)))
    lengths = pc.fill_null(pc.list_value_length(chats), 0).to_numpy(zero_copy_only=False)
    ends = np.cumsum(lengths)
    return (lengths > 0) & (good[ends] - good[ends - lengths] == lengths) & assistant[ends - 1]


def _among(texts: pa.Array, names: list[str]) -> np.ndarray:
    return pc.is_in(texts, pa.array(names, texts.type)).to_numpy(zero_copy_only=False)


def _filled(texts: pa.Array) -> np.ndarray:
    """Where there is more than white space."""
    if not _is_text(texts.type):
        return np.zeros(len(texts), bool)
    filled = pc.greater(pc.binary_length(pc.utf8_trim_whitespace(texts)), 0)
    return pc.fill_null(filled, False).to_numpy(zero_copy_only=False)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _to_list(array: pa.Array) -> list:
    """An array's values, several times as fast as its own `to_pylist` for texts and lists of turns."""
    kind = array.type
    if _is_text(kind):
        return array.to_numpy(zero_copy_only=False).tolist()
    if pa.types.is_struct(kind) and kind.num_fields:
        names = [field.name for field in kind]
        values = zip(*map(_to_list, array.flatten()), strict=True)
        rows: list = [dict(zip(names, row, strict=True)) for row in values]
    elif _is_list(kind):
        inner = _to_list(array.flatten())
        ends = np.cumsum(pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)).tolist()
        rows = [inner[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    else:
        return _scalars(array)
    if array.null_count:
        rows = [row if valid else None for row, valid in zip(rows, array.is_valid().to_pylist(), strict=True)]
    return rows


def _scalars(array: pa.Array) -> list:
    """Numbers, times and the like; a time that Python has no word for (year 10000, unknown zones) as text."""
    kind = array.type
    if getattr(kind, "unit", None) == "ns":  # Python's end at microseconds; pandas, if installed, has its own
        zone = getattr(kind, "tz", None)
        micro = {pa.lib.Type_TIMESTAMP: pa.timestamp("us", zone), pa.lib.Type_DURATION: pa.duration("us")}
        array = array.cast(micro.get(kind.id, pa.time64("us")), safe=False)
    try:
        return array.to_pylist()
    except (ValueError, OverflowError, KeyError):
        if pa.types.is_timestamp(array.type):
            array = array.view(pa.timestamp(array.type.unit))
        return array.cast(pa.string()).to_pylist()
