"""Tables -> rows: Parquet, Arrow and `datasets.Dataset`, read batch by batch and checked a column at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from staff.data.layouts import ROLES, Layout, shown

ROWS_A_BATCH = 4096
ARROW_ERRORS = (
    pa.ArrowException,
    OSError,
    UnicodeDecodeError,
    OverflowError,
    MemoryError,
    IndexError,
    KeyError,
    TypeError,
)


@dataclass(frozen=True)
class Unit:
    """A piece that can be reached without reading what is before it: a Parquet row group, an Arrow batch, some rows of a Dataset.

    Attributes:
        file: number of the file.
        index: which of the file's pieces.
        first, rows: row number of its first row, counted over all files, and how many it has.
    """

    file: int
    index: int
    first: int
    rows: int


@dataclass
class TableRows:
    """Rows of tables. Holds a few numbers a row group; reading needs one column chunk of a row group, and a batch.

    Attributes:
        kind: "Parquet", "Arrow" or "Dataset".
        files: in order; empty for a Dataset in memory.
        names: what messages call them.
        schema: of all of them.
        units: in order.
        data: the Dataset, if it is one.
        stamps: size and time of change of each file at the first look.
        stream: the Arrow file is of the kind without an index.
        saved: the folder of `save_to_disk` that the files are in.
    """

    kind: str
    files: tuple[Path, ...]
    names: tuple[str, ...]
    schema: pa.Schema
    units: tuple[Unit, ...]
    data: Any = None
    stamps: tuple[tuple[int, int], ...] = field(default=())
    stream: bool = False
    saved: Path | None = None

    def __len__(self) -> int:
        return sum(u.rows for u in self.units)

    def where(self, number: int) -> str:
        """Names a row, counted over all files, for a message: 'train.parquet: row 3'."""
        unit = next(u for u in reversed(self.units) if u.first <= number)
        return f"{self.names[unit.file]}: row {number - self.first_row(unit.file)}"

    def first_row(self, file: int) -> int:
        """Number of the first row of a file, counted over all files."""
        return next((u.first for u in self.units if u.file == file), 0)

    def batches(
        self, columns: Sequence[str] | None = None, wanted: np.ndarray | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Batches in order, with the row number of each one's first row.

        Args:
            columns: names to read; all of them if None.
            wanted: ascending row numbers; the batches then hold those rows alone, and the row number is of the batch they were cut from.

        Raises:
            ValueError: a file is damaged or has changed.
        """
        for unit in self.units:
            if (
                wanted is not None
                and np.diff(np.searchsorted(wanted, [unit.first, unit.first + unit.rows])) == 0
            ):
                continue
            at = unit.first
            for batch in self._load(unit, columns):
                rows = batch.num_rows
                if wanted is None:
                    yield at, batch
                else:
                    a, b = np.searchsorted(wanted, [at, at + rows])
                    if b - a == rows:
                        yield at, batch
                    elif b > a:
                        yield at, _take(batch, wanted[a:b] - at)
                at += rows
            if at != unit.first + unit.rows:
                raise ValueError(
                    f"{self.names[unit.file]} is damaged: it promises {unit.rows} rows and has {at - unit.first}; write it again"
                )

    def _load(self, unit: Unit, columns: Sequence[str] | None) -> Iterator[Any]:
        if self.kind == "Dataset":
            table = self.data.with_format("arrow")[unit.first : unit.first + unit.rows]
            yield table if columns is None else table.select(list(columns))
            return
        name, path = self.names[unit.file], self.files[unit.file]
        first = unit.first - self.first_row(unit.file)
        with _readable(f"{name}, rows {first} to {first + unit.rows - 1}"):
            if (
                self.stamps
                and (status := os.stat(path))
                and (status.st_size, status.st_mtime_ns) != self.stamps[unit.file]
            ):
                raise ValueError(
                    f"{name} changed while it was in use; start again, on a copy that nothing writes to"
                )
            if self.kind == "Parquet":
                with pq.ParquetFile(path) as file:
                    for batch in file.iter_batches(
                        ROWS_A_BATCH, row_groups=[unit.index], columns=columns, use_threads=False
                    ):
                        batch.validate(full=True)  # Parquet texts are bytes that nobody has looked at yet
                        yield batch
            else:
                with pa.memory_map(str(path)) as file:
                    for batch in _arrow_batches(file, unit.index):
                        batch.validate(full=True)
                        batch = batch if columns is None else batch.select(list(columns))
                        for start in range(0, batch.num_rows, ROWS_A_BATCH):
                            yield batch.slice(start, ROWS_A_BATCH)

    def fetch(self, numbers: np.ndarray, columns: Sequence[str] | None = None) -> Iterator[Mapping]:
        """Rows as dicts, in the order asked for; ascending numbers take one pass, others one pass for each ascending run."""
        numbers = np.asarray(numbers, np.int64)
        for run in np.split(numbers, np.flatnonzero(np.diff(numbers) < 0) + 1):
            for at, batch in self.batches(columns, run):
                with _readable(self.where(at)):
                    values = _microseconds(batch).to_pydict()  # by column: three times as fast as to_pylist
                names = list(values)
                for row in zip(*values.values(), strict=True):
                    yield dict(zip(names, row, strict=True))


def _take(batch: Any, rows: np.ndarray) -> Any:
    try:
        return batch.take(pa.array(rows))
    except pa.ArrowNotImplementedError:  # string views
        slices = [batch.slice(i, 1) for i in rows.tolist()]
        return pa.concat_tables(slices) if isinstance(batch, pa.Table) else pa.Table.from_batches(slices)


def _microseconds(batch: Any) -> Any:
    """Python's times end there; with pandas installed pyarrow would give other objects than without."""
    for i, column in enumerate(batch.schema):
        if getattr(column.type, "unit", None) == "ns":
            kind = {
                pa.lib.Type_TIMESTAMP: pa.timestamp("us", getattr(column.type, "tz", None)),
                pa.lib.Type_DURATION: pa.duration("us"),
            }
            batch = batch.set_column(
                i, column.name, batch.column(i).cast(kind.get(column.type.id, pa.time64("us")), safe=False)
            )
    return batch


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except ARROW_ERRORS as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"{name}: the data is cut or damaged ({shown(said, 160)}); write or fetch the file again"
        ) from None


def _arrow_batches(file: Any, index: int) -> Iterator[pa.RecordBatch]:
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    if is_file:
        yield pa.ipc.open_file(file).get_batch(index)
    else:
        yield from pa.ipc.open_stream(file)


def open_tables(
    kind: str, files: Sequence[Path], names: Sequence[str], saved: Path | None = None
) -> TableRows:
    """Parquet or Arrow files as rows.

    Raises:
        ValueError: a file is damaged, has two columns of one name, or other columns than the first.
    """
    schema: pa.Schema | None = None
    units, first, stamps, stream = [], 0, [], False
    for number, (path, name) in enumerate(zip(files, names, strict=True)):
        with _readable(name):
            status = os.stat(path)
            stamps.append((status.st_size, status.st_mtime_ns))
            if kind == "Parquet":
                with pq.ParquetFile(path) as parquet:
                    found = parquet.schema_arrow
                    sizes = [
                        parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)
                    ]
            else:
                with pa.memory_map(str(path)) as file:
                    is_file = file.read(6) == b"ARROW1"
                    file.seek(0)
                    reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
                    found = reader.schema
                    stream = not is_file
                    if is_file:
                        sizes = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
                    else:  # a stream has no index: one piece, of which only the memory map's pages are read
                        sizes = [sum(b.num_rows for b in reader)]
        check_schema(found, name)
        if schema is None:
            schema = found
        elif not schema.equals(found):
            other = [
                f"{f.name}: {f.type}"
                for f in found
                if f.name not in schema.names or schema.field(f.name).type != f.type
            ]
            missing = [n for n in schema.names if n not in found.names]
            raise ValueError(
                f"{name} has other columns than {names[0]} ({', '.join(other + ['no ' + m for m in missing]) or 'in another order'}); "
                "make them alike, or select from each alone"
            )
        for index, rows in enumerate(sizes):
            units.append(Unit(number, index, first, rows))
            first += rows
    assert schema is not None
    return TableRows(
        kind, tuple(files), tuple(names), schema, tuple(units), None, tuple(stamps), stream, saved
    )


def open_dataset(data: Any, name: str) -> TableRows:
    """A `datasets.Dataset` as rows."""
    schema = data.with_format("arrow")[:1].schema if len(data) else data.features.arrow_schema
    check_schema(schema, name)
    units = tuple(Unit(0, i, i, min(ROWS_A_BATCH, len(data) - i)) for i in range(0, len(data), ROWS_A_BATCH))
    return TableRows("Dataset", (), (name,), schema, units, data=data)


def check_schema(schema: pa.Schema, name: str) -> None:
    """Raise ValueError for two columns of one name."""
    twice = next((n for n in schema.names if schema.names.count(n) > 1), None)
    if twice is not None:
        raise ValueError(f"{name} has two columns named {twice!r}; rename one")


def check_types(schema: pa.Schema, layout: Layout, name: str) -> None:
    """Raise ValueError where a column that must be text, or a list of turns, is of another type."""
    for column in layout.required():
        if column not in schema.names:
            continue
        found = schema.field(column).type
        found = found.value_type if pa.types.is_dictionary(found) else found
        if column == layout.messages:
            if not _is_list(found):
                raise ValueError(
                    f"{name}: column {column!r} is of type {found}, not a list of turns; store it as a list of role and content"
                )
        elif not (_is_text(found) or (_is_list(found) and column in (layout.prompt, layout.response))):
            raise ValueError(
                f"{name}: column {column!r} is of type {found}, not text; cast it to string, or name another with --columns"
            )


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def plain(batch: Any, layout: Layout) -> np.ndarray:
    """Rows that are certainly fine, found a column at a time; the others must be looked at one by one.

    Returns:
        (rows,) bool.
    """
    names = batch.schema.names
    none = np.zeros(batch.num_rows, bool)
    if not all(c in names for c in layout.required()) or any(
        c in names for c in (layout.history, layout.tools) if c is not None
    ):
        return none
    for column in (layout.query, layout.system):
        if column in names and not _is_text(batch.schema.field(column).type):
            return none
    fine = ~none
    for column in layout.required():
        values = batch.column(column)
        values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        fine &= _plain_chat(values, layout) if column == layout.messages else _plain_text(values)
    return fine


def _plain_text(values: pa.Array) -> np.ndarray:
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return np.zeros(len(values), bool)
    fine = pc.and_(pc.greater(pc.binary_length(values), 0), pc.invert(pc.utf8_is_space(values)))
    return pc.fill_null(fine, False).to_numpy(zero_copy_only=False)


def _plain_chat(values: pa.Array, layout: Layout) -> np.ndarray:
    """Rows whose turns are user and assistant in known roles, with text in all of them, the last one the assistant's."""
    none = np.zeros(len(values), bool)
    if not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)) or not pa.types.is_struct(
        values.type.value_type
    ):
        return none
    fields = [f.name for f in values.type.value_type]
    tags = (layout.role_tag, layout.content_tag)
    pairs = [("role", "content"), ("from", "value")] if tags == (None, None) else [tags]
    tag = next(
        (p for p in pairs if set(fields) == set(p)), None
    )  # weights, tool calls and the like: one by one
    if tag is None:
        return none
    turns = values.flatten()
    lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False)
    role_names = layout.roles if layout.roles is not None else ROLES
    ends = np.cumsum(lengths)
    starts = ends - lengths
    role = turns.field(tag[0])
    if not _is_text(role.type) or len(turns) == 0:
        return none
    good = _plain_text(turns.field(tag[1]))
    good &= pc.fill_null(pc.is_in(role, pa.array(list(role_names), role.type)), False).to_numpy(
        zero_copy_only=False
    )
    good &= pc.is_valid(turns).to_numpy(zero_copy_only=False)
    assistant = pa.array([k for k, v in role_names.items() if v == "assistant"], role.type)
    is_assistant = pc.fill_null(pc.is_in(role, assistant), False).to_numpy(zero_copy_only=False)
    bad_before = np.concatenate([[0], np.cumsum(~good)])
    fine = (lengths > 0) & (bad_before[ends] == bad_before[starts])
    fine[fine] = is_assistant[ends[fine] - 1]
    return fine
