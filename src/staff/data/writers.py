"""Rows -> text: JSON Lines, JSON and CSV."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any


def dumps(row: Mapping) -> bytes:
    """A row as JSON; what JSON has no word for as the nearest, see `Rows.write_jsonl`."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError):
        return json.dumps(_plain(row), allow_nan=False).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k if isinstance(k, str) else str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, bytes | bytearray):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def without_arrays(value: Any) -> Any:
    """Lists for the arrays that a DataFrame has in its cells, all the way down."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {k: v if isinstance(v, str) else without_arrays(v) for k, v in value.items()}
    return [without_arrays(v) for v in value] if isinstance(value, list | tuple) else value


def write_lines(path: Path, lines: Iterable[bytes], gzipped: bool = False) -> None:
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if gzipped else raw as file:
        for line in lines:
            file.write(line if line.endswith(b"\n") else line + b"\n")


def json_lines(rows: Iterable[Mapping]) -> Iterator[bytes]:
    """A JSON list, a row a line."""
    before = b"[\n"
    for row in rows:
        yield before + dumps(row)
        before = b","
    yield b"]" if before == b"," else b"[]"


def csv_lines(rows: Iterable[Mapping], header: list[str], delimiter: str, quoted: bool) -> Iterator[bytes]:
    """The header and a record for each row, quoted where it must be, or never."""
    line = io.StringIO()
    options: dict[str, Any] = {} if quoted else {"quoting": csv.QUOTE_NONE, "quotechar": None}
    writer = csv.writer(line, delimiter=delimiter, lineterminator="\n", **options)
    for record in chain([header], ([row.get(name, "") for name in header] for row in rows)):
        writer.writerow(record)
        yield line.getvalue().encode()
        line.seek(0)
        line.truncate()
