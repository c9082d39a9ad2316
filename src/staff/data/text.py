"""Text files -> rows: JSON Lines, JSON and CSV, gzipped or not, read in blocks. Every failure names file, row, line and cure."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from staff.data.layouts import shown
from staff.data.scanners import (
    BLOCK,
    DELIMITERS,
    Found,
    csv_header,
    csv_reader,
    decode_json,
    scan_csv,
    scan_json,
    scan_jsonl,
    suffix_of,
)

GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)

REFUSED = {
    b"PK\x03\x04": ("a zip archive or an Excel workbook", "unpack it, or save the sheet as CSV (UTF-8)"),
    b"\xd0\xcf\x11\xe0": ("an old Excel workbook", "save the sheet as CSV (UTF-8)"),
    b"BZh": ("compressed with bzip2", "unpack it with bunzip2"),
    b"\xfd7zXZ": ("compressed with xz", "unpack it with unxz"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "unpack it with unzstd"),
    b"7z\xbc\xaf": ("a 7-zip archive", "unpack it"),
    b"SQLite format 3": ("an SQLite data base", "export the table as CSV"),
    b"%PDF": ("a PDF document", "give the data as JSON Lines"),
    b"\xff\xfe": ("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"),
    b"\xfe\xff": ("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"),
    b"\x80\x02": ("a Python pickle", "write the rows as JSON Lines"),
    b"\x80\x03": ("a Python pickle", "write the rows as JSON Lines"),
    b"\x80\x04": ("a Python pickle", "write the rows as JSON Lines"),
    b"\x80\x05": ("a Python pickle", "write the rows as JSON Lines"),
    b"\x93NUMPY": ("a numpy array", "write the rows as JSON Lines"),
    b"version https://git-lfs": ("a Git LFS pointer, not the data", "fetch it with git lfs pull"),
    b"<!DOCTYPE": ("an HTML page", "download the data file itself"),
    b"<html": ("an HTML page", "download the data file itself"),
}


@dataclass(frozen=True)
class TextFile:
    """A file of rows as text.

    Attributes:
        path: where it lies.
        name: what messages call it.
        kind: "JSONL", "JSON" or "CSV".
        gzipped: it is unpacked while it is read.
        delimiter: of a CSV file.
        stamp: size and time of change at the first look; a file that changes under us is an error.
    """

    path: Path
    name: str
    kind: str
    gzipped: bool
    delimiter: str = ","
    stamp: tuple[int, int] = (0, 0)

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The file's (unpacked) bytes. Errors of the system and of gzip come out as ValueError."""
        try:
            if stamp(self.path) != self.stamp:
                raise ValueError(
                    f"{self.name} changed while it was in use; start again, on a copy that nothing writes to"
                )
            with (
                gzip.open(self.path, "rb")
                if self.gzipped
                else open(self.path, "rb", buffering=BLOCK) as stream
            ):
                yield stream  # type: ignore[misc]
        except GZIP_ERRORS as error:
            raise ValueError(
                f"{self.name}: the gzip data is cut or damaged ({error}); fetch or pack the file again (gzip -t checks it)"
            ) from None
        except OSError as error:
            raise ValueError(f"{self.name} can't be read: {error.strerror or error}") from None


def stamp(path: Path) -> tuple[int, int]:
    """Size and time of change."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


# ---- what is it? ----


def peek(path: Path, name: str, size: int = 1 << 16) -> tuple[bytes, bool]:
    """The first bytes of a file, unpacked, and whether it is gzipped.

    Raises:
        ValueError: it can't be opened, is empty, or is of a kind that can't be read.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(size)
        gzipped = head.startswith(b"\x1f\x8b")
        if gzipped:
            with gzip.open(path, "rb") as unpacked:
                head = unpacked.read(size)
    except GZIP_ERRORS as error:
        raise ValueError(
            f"{name}: the gzip data is cut or damaged ({error}); fetch or pack the file again (gzip -t checks it)"
        ) from None
    except OSError as error:
        raise ValueError(f"{name} can't be read: {error.strerror or error}") from None
    if not head:
        raise ValueError(f"{name} is empty; it should hold at least one row")
    for magic, (what, cure) in REFUSED.items():
        if head.startswith(magic):
            raise ValueError(f"{name} is {what}; {cure}")
    if head.startswith(b"\x1f\x8b"):
        raise ValueError(f"{name} is gzipped twice; unpack it once with gunzip")
    return head, gzipped


def kind_of(head: bytes, path: Path, name: str) -> str:
    """What a file is: "JSONL", "JSON", "CSV", "Parquet" or "Arrow". Content decides; the extension only between CSV and broken JSON.

    Raises:
        ValueError: its content says nothing and its extension neither; or it is JSON, but no list of rows.
    """
    suffix = suffix_of(path)
    if head.startswith(b"PAR1"):
        return "Parquet"
    if head.startswith(b"ARROW1") or (
        head.startswith(b"\xff\xff\xff\xff") and suffix in (".arrow", ".feather", ".ipc", "")
    ):
        return "Arrow"
    if suffix == ".parquet":
        raise ValueError(
            f"{name} is no Parquet file: it begins with {shown(head[:8])}, not with b'PAR1'; name it after what it is, or fetch it again"
        )
    if suffix in (".arrow", ".feather"):
        raise ValueError(
            f"{name} is no Arrow file: it begins with {shown(head[:8])}; name it after what it is, or fetch it again"
        )
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if not text:
        raise ValueError(f"{name} holds nothing but white space; it should hold at least one row")
    first, _, rest = text.partition(b"\n")
    whole = _is_json(first)
    if text.startswith(b"{"):
        if whole or suffix in (".jsonl", ".ndjson"):
            return "JSONL"
        if suffix not in (".csv", ".tsv"):
            if first.strip() == b"{" or suffix == ".json":
                raise ValueError(
                    f"{name} holds a JSON object over several lines, not a list of rows ({_keys_of(text)}); "
                    "give a list, [{...}, {...}], or one object a line (jq -c . FILE > rows.jsonl)"
                )
            return "JSONL"
    if text.startswith(b"[") and (suffix not in (".csv", ".tsv") or text[1:].lstrip().startswith(b"{")):
        return "JSONL" if whole and rest.strip() else "JSON"
    if suffix in (".jsonl", ".ndjson", ".json") or (
        whole and first.strip()[:1] in b'"0123456789tfn-' and suffix not in (".csv", ".tsv")
    ):
        return "JSONL"
    if suffix in (".csv", ".tsv") or any(d.encode() in first for d in DELIMITERS):
        return "CSV"
    raise ValueError(
        f"{name}: can't tell what this is; it begins with {shown(head[:24])}. It can be JSON Lines, JSON, CSV, TSV, Parquet or Arrow: "
        "name it .jsonl, .json, .csv, .tsv, .parquet or .arrow"
    )


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except RecursionError:
        return True
    except ValueError:
        return False
    return True


def _keys_of(text: bytes) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return f"it begins with {shown(text[:30].decode(errors='replace'))}"
    return "its keys: " + ", ".join(shown(k, 30) for k in list(value)[:8])


# ---- a set of text files ----


@dataclass
class TextRows:
    """Rows of text files. Holds 16 bytes a usable row: where its bytes begin and end.

    Attributes:
        kind: "JSONL", "JSON" or "CSV".
        files: in order.
        spans: (n, 2) int64 first and last byte of each usable row, set by the scan.
        first: (files + 1,) position of each file's first usable row, and n.
        headers: column names of each file, for CSV.
        keep: holds a temporary file that standard input was written to.
    """

    kind: str
    files: tuple[TextFile, ...]
    spans: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int64))
    first: list[int] = field(default_factory=list)
    headers: list[list[str]] = field(default_factory=list)
    keep: object = None

    def scan(self, file: TextFile) -> Iterator[Found]:
        """Every row of one of the files, bad ones too."""
        with file.open() as stream:
            if file.kind == "JSONL":
                yield from scan_jsonl(stream, file.name)
            elif file.kind == "JSON":
                yield from scan_json(stream, file.name)
            else:
                self.headers.append(csv_header(stream, file.name, file.delimiter)[0])
                stream.seek(0)
                yield from scan_csv(stream, file.name, file.delimiter)

    def very_bytes(self, positions: Sequence[int] | np.ndarray | range) -> Iterator[tuple[int, bytes]]:
        """File number and the very bytes of rows, in the order asked for."""
        stack = contextlib.ExitStack()
        with stack:
            current, stream, at = -1, None, 0
            for position in positions:
                number = (
                    int(np.searchsorted(self.first, position, side="right")) - 1 if len(self.files) > 1 else 0
                )
                if number != current:
                    stack.close()
                    stream, current, at = stack.enter_context(self.files[number].open()), number, 0
                assert stream is not None
                start, end = self.spans[position].tolist()
                if start != at:
                    stream.seek(start)
                yield number, stream.read(end - start)
                at = end

    def fetch(self, positions: Sequence[int] | np.ndarray | range) -> Iterator[Mapping]:
        """Rows as dicts, in the order asked for."""
        for number, data in self.very_bytes(positions):
            if self.kind == "CSV":
                text = data.decode().removeprefix("\ufeff")
                record = next(
                    r for r in csv_reader(io.StringIO(text, newline="\n"), self.files[number].delimiter) if r
                )
                yield dict(zip(self.headers[number], record, strict=True))
            else:
                yield decode_json(data.decode().strip())[0]

    def header_bytes(self, number: int) -> bytes:
        """The very bytes of a CSV file's header line."""
        file = self.files[number]
        with file.open() as stream:
            end = csv_header(stream, file.name, file.delimiter)[1]
            stream.seek(0)
            return stream.read(end)
