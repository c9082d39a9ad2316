"""Tables -> rows: Parquet, Arrow and `datasets.Dataset`, read batch by batch."""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from staff.data.layouts import shown
from staff.data.text import stamp

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
        self.kind, self.files, self.names, self.data, self.saved = (
            kind,
            tuple(files),
            tuple(names),
            data,
            saved,
        )
        self.stamps = [stamp(path) for path in files]
        self.units: list[tuple[int, int, int]] = []  # file, its row group, rows
        schemas = []
        for number, name in enumerate(names):
            with _readable(name):
                schemas.append(self._open(number))
            schema = schemas[number]
            twice = next((n for n in schema.names if schema.names.count(n) > 1), None)
            if twice is not None:
                raise ValueError(f"{name} has two columns named {twice!r}; rename one")
            if not schema.equals(schemas[0]):
                first = {f.name: f.type for f in schemas[0]}
                other = [f"{f.name}: {f.type}" for f in schema if first.get(f.name) != f.type]
                other += [f"no {n}" for n in first if n not in schema.names]
                raise ValueError(
                    f"{name} has other columns than {names[0]} ({', '.join(other) or 'in another order'}); "
                    "make them alike, or select from each alone"
                )
        self.schema: pa.Schema = schemas[0]
        self.starts = np.cumsum([0, *(rows for _, _, rows in self.units)]).tolist()
        of_file = [file for file, _, _ in self.units]
        self.firsts = [self.starts[bisect_right(of_file, i - 1)] for i in range(len(names))]

    def _open(self, number: int) -> pa.Schema:
        if self.data is not None:
            n = len(self.data)
            self.units += [(0, i, min(ROWS_A_BATCH, n - i)) for i in range(0, n, ROWS_A_BATCH)]
            return self.data.with_format("arrow")[:1].schema if n else self.data.features.arrow_schema
        if self.kind == "Parquet":
            with pq.ParquetFile(self.files[number]) as file:
                sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
                self.units += [(number, i, rows) for i, rows in enumerate(sizes)]
                return file.schema_arrow
        with _arrow(self.files[number]) as (schema, batches):
            self.units.append((number, 0, sum(batch.num_rows for batch in batches)))
            return schema

    def scan(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Mapping]]:
        """0, since a table has no lines, and value of every row, of these columns alone."""
        for at, batch in self.batches(columns):
            for row in self._rows(at, batch):
                yield 0, row

    def fetch(self, numbers: np.ndarray, columns: Sequence[str] | None = None) -> Iterator[Mapping]:
        """Rows as dicts, in the order asked for; each ascending run of numbers takes one pass."""
        for run in np.split(numbers, np.flatnonzero(np.diff(numbers) < 0) + 1):
            for at, batch in self.batches(columns, run):
                yield from self._rows(at, batch)

    def _rows(self, at: int, batch: Any) -> Iterator[dict]:
        names = batch.schema.names
        with _readable(f"{self.names[bisect_right(self.firsts, at) - 1]}: row {at} and on"):
            values = [_to_list(column) for column in batch.columns]
        return (dict(zip(names, row, strict=True)) for row in zip(*values, strict=True))

    def batches(
        self, columns: Sequence[str] | None = None, wanted: np.ndarray | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Batches in order, with the row number of each one's first row.

        Args:
            columns: names to read; all of them if None.
            wanted: ascending row numbers; the batches then hold those rows alone.

        Raises:
            ValueError: a file is damaged or has changed.
        """
        for (file, index, rows), start in zip(self.units, self.starts, strict=False):
            if wanted is not None and not np.diff(np.searchsorted(wanted, [start, start + rows]))[0]:
                continue
            at, first = start, start - self.firsts[file]
            with _readable(f"{self.names[file]}, rows {first} to {first + rows - 1}"):
                for batch in self._load(file, index, columns):
                    batch.validate(full=True)  # Parquet texts are bytes that nobody has looked at yet
                    if wanted is None:
                        yield at, batch
                    else:
                        a, b = np.searchsorted(wanted, [at, at + batch.num_rows])
                        if b > a:
                            yield at, batch if b - a == batch.num_rows else _take(batch, wanted[a:b] - at)
                    at += batch.num_rows
            if at != start + rows:
                promise = f"it promises {rows} rows and has {at - start}"
                raise ValueError(f"{self.names[file]} is damaged: {promise}; write it again")

    def _load(self, number: int, index: int, columns: Sequence[str] | None) -> Iterator[Any]:
        if self.data is not None:
            yield self.data.with_format("arrow", columns=columns and list(columns))[
                index : index + ROWS_A_BATCH
            ]
            return
        path = self.files[number]
        if stamp(path) != self.stamps[number]:
            cure = "start again, on a copy that nothing writes to"
            raise ValueError(f"{self.names[number]} changed while it was in use; {cure}")
        if self.kind == "Parquet":
            with pq.ParquetFile(path) as file:
                yield from file.iter_batches(
                    ROWS_A_BATCH, row_groups=[index], columns=columns, use_threads=False
                )
            return
        with _arrow(path) as (_, batches):
            for batch in batches:
                batch = batch if columns is None else batch.select(list(columns))
                for start in range(0, batch.num_rows, ROWS_A_BATCH):
                    yield batch.slice(start, ROWS_A_BATCH)

    def write(self, path: Path, numbers: np.ndarray) -> None:
        """Write rows with the schema and values they came with: Arrow as Arrow, the others as Parquet."""
        new = {"Arrow": pa.ipc.new_file}.get(self.kind, pq.ParquetWriter)
        with new(path, self.schema) as writer:
            for run in np.split(numbers, np.flatnonzero(np.diff(numbers) < 0) + 1):
                for _, batch in self.batches(None, run):
                    for part in batch.to_batches() if isinstance(batch, pa.Table) else [batch]:
                        writer.write_batch(part)


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
        raise ValueError(
            f"{name}: the data is cut or damaged ({said}); write or fetch the file again"
        ) from None


def _take(batch: Any, rows: np.ndarray) -> Any:
    try:
        return batch.take(pa.array(rows))
    except pa.ArrowNotImplementedError:  # string views
        slices = [batch.slice(i, 1) for i in rows.tolist()]
        return pa.concat_tables(slices) if isinstance(batch, pa.Table) else pa.Table.from_batches(slices)


def _to_list(array: Any) -> list:
    """An array's values, several times as fast as its own `to_pylist` for texts and lists of turns."""
    if isinstance(array, pa.ChunkedArray):
        return [value for chunk in array.chunks for value in _to_list(chunk)]
    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return array.to_numpy(zero_copy_only=False).tolist()
    if pa.types.is_struct(kind) and kind.num_fields:
        names = [f.name for f in kind]
        values = zip(*map(_to_list, array.flatten()), strict=True)
        rows: list = [dict(zip(names, row, strict=True)) for row in values]
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = _to_list(array.flatten())
        ends = np.cumsum(pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)).tolist()
        rows = [inner[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    else:
        return _scalars(array)
    if array.null_count:
        rows = [row if valid else None for row, valid in zip(rows, array.is_valid().to_pylist(), strict=True)]
    return rows


def _scalars(array: Any) -> list:
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
