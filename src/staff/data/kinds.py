"""What a file is: JSON Lines, JSON, CSV, Parquet or Arrow, by its content; its bytes, gzipped or not."""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from staff.data.layouts import shown
from staff.data.locate import suffix_of

BLOCK = 1 << 20  # bytes read at a time
LONGEST_ROW = 1 << 28  # bytes; past it a file is taken for something else
UNPACKED_AT_LEAST = 1 << 23  # bytes that a gzipped file may unpack to, whatever its own size
GZIP = b"\x1f\x8b"
GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)
DELIMITERS = (",", "\t", ";", "|")
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
    **{bytes([0x80, v]): ("a Python pickle", "write the rows as JSON Lines") for v in (2, 3, 4, 5)},
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
        head: its first bytes, unpacked.
        gzipped: it is unpacked while it is read.
        stamp: size and time of change at the first look; a file that changes under us is an error.
        max_unpacked: times its own size that a gzipped file may unpack to.
    """

    path: Path
    name: str
    head: bytes
    gzipped: bool
    stamp: tuple[int, int]
    max_unpacked: int

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The file's (unpacked) bytes. Errors of the system and of gzip come out as ValueError."""
        check_unchanged(self.path, self.name, self.stamp)
        with _readable(self.name), open(self.path, "rb", buffering=BLOCK) as packed:
            yield gzip.GzipFile(fileobj=packed) if self.gzipped else packed  # type: ignore[misc]

    @property
    def limit(self) -> int:
        """Bytes that it may hold, unpacked."""
        return max(self.max_unpacked * self.stamp[0], UNPACKED_AT_LEAST) if self.gzipped else 1 << 62

    def check(self, size: int) -> None:
        """Raise ValueError where a gzipped file unpacks to what no text does; it could take all memory."""
        if size > self.limit:
            much = f"{self.max_unpacked} times its size, {self.limit >> 20} MiB"
            cure = "if it is meant so, raise --max-unpacked, or unpack it with gunzip"
            raise ValueError(f"{self.name} unpacks to more than {much}; {cure}")

    def read(self) -> bytes:
        with self.open() as stream:
            data = stream.read(self.limit + 1) if self.gzipped else stream.read()
        self.check(len(data))
        return data.removeprefix(codecs.BOM_UTF8)


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except GZIP_ERRORS as error:
        cure = "fetch or pack the file again (gzip -t checks it)"
        raise ValueError(f"{name}: the gzip data is cut or damaged ({error}); {cure}") from None
    except OSError as error:
        raise ValueError(f"{name} can't be read: {error.strerror or error}") from None


def stamp(path: Path) -> tuple[int, int]:
    """Size and time of change."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def check_unchanged(path: Path, name: str, seen: tuple[int, int]) -> None:
    """Raise ValueError where a file is not what it was at the first look."""
    if stamp(path) != seen:
        cure = "start again, on a copy that nothing writes to"
        raise ValueError(f"{name} changed while it was in use; {cure}")


def peek(path: Path, name: str, max_unpacked: int, size: int = 1 << 16) -> TextFile:
    """The beginning of a file, unpacked.

    Raises:
        ValueError: it can't be opened, is empty, or is of a kind that can't be read.
    """
    with _readable(name):
        with open(path, "rb") as packed:
            gzipped = packed.read(2) == GZIP
        file = TextFile(path, name, b"", gzipped, stamp(path), max_unpacked)
    with file.open() as stream:
        head = stream.read(size)
    if not head:
        raise ValueError(f"{name} is empty; it should hold at least one row")
    for magic, (what, cure) in REFUSED.items():
        if head.startswith(magic):
            raise ValueError(f"{name} is {what}; {cure}")
    if head.startswith(GZIP):
        raise ValueError(f"{name} is gzipped twice; unpack it once with gunzip")
    return replace(file, head=head)


def kind_of(file: TextFile, known: Sequence[str]) -> str:
    """What a file is: "JSONL", "JSON", "CSV", "Parquet" or "Arrow": by content, broken JSON by name.

    Args:
        file: as `peek` gives it.
        known: column names by which a file without an extension is taken for CSV.

    Raises:
        ValueError: its content says nothing and its extension neither; or it is JSON, but no list of rows.
    """
    head, name, suffix = file.head, file.name, suffix_of(file.path)
    is_csv, is_jsonl = suffix in (".csv", ".tsv"), suffix in (".jsonl", ".ndjson")
    if head.startswith(b"PAR1"):
        return "Parquet"
    is_stream = head.startswith(b"\xff\xff\xff\xff") and suffix in (".arrow", ".feather", ".ipc", "")
    if head.startswith(b"ARROW1") or is_stream:
        return "Arrow"
    if suffix in (".parquet", ".arrow", ".feather"):
        kind, magic = ("Parquet", ", not with b'PAR1'") if suffix == ".parquet" else ("Arrow", "")
        cure = "name it after what it is, or fetch it again"
        raise ValueError(f"{name} is no {kind} file: it begins with {shown(head[:8])}{magic}; {cure}")
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if not text:
        raise ValueError(f"{name} holds nothing but white space; it should hold at least one row")
    first, _, rest = text.partition(b"\n")
    whole = _is_json(first)
    if text.startswith(b"{") and (whole or not is_csv):
        if whole or is_jsonl or not (first.strip() == b"{" or suffix == ".json"):
            return "JSONL"
        what = f"a JSON object over several lines, not a list of rows ({_keys_of(text)})"
        cure = "give a list, [{...}, {...}], or one object a line (jq -c . FILE > rows.jsonl)"
        raise ValueError(f"{name} holds {what}; {cure}")
    if text.startswith(b"[") and (not is_csv or text[1:].lstrip().startswith(b"{")):
        return "JSONL" if whole and rest.strip() else "JSON"
    if is_jsonl or suffix == ".json" or (whole and not is_csv):
        return "JSONL"
    if is_csv or any(c in known for c in _header(text, find_delimiter(file, known))):
        return "CSV"
    raise ValueError(
        f"{name}: can't tell what this is; it begins with {shown(head[:24])}. It can be JSON Lines, JSON, "
        "CSV, TSV, Parquet or Arrow: name it .jsonl, .json, .csv, .tsv, .parquet or .arrow. Plain text is "
        'given as JSON Lines, one {"text": "..."} a line'
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
        return "its keys: " + ", ".join(shown(k, 30) for k in list(json.loads(text))[:8])
    except (ValueError, RecursionError):
        return f"it begins with {shown(text[:30].decode(errors='replace'))}"


def records_of(text: str, delimiter: str, quoted: bool = True) -> Any:
    csv.field_size_limit(LONGEST_ROW)  # the library's own is 128 kB, and one for the whole process
    lines = io.StringIO(text, newline="\n")
    options: dict[str, Any] = {} if quoted else {"quoting": csv.QUOTE_NONE}
    return csv.reader(lines, delimiter=delimiter, strict=True, **options)


def _header(head: bytes, delimiter: str) -> list[str]:
    text = head.removeprefix(codecs.BOM_UTF8).decode(errors="replace").lstrip("\r\n")
    with contextlib.suppress(csv.Error):
        return next(records_of(text, delimiter), [])
    return []


def find_delimiter(file: TextFile, known: Sequence[str]) -> str:
    """The delimiter whose header has most known names, then most columns; a tie goes to the extension's."""
    usual = "\t" if suffix_of(file.path) == ".tsv" else ","
    headers = {d: _header(file.head, d) for d in sorted(DELIMITERS, key=lambda d: d != usual)}
    return max(headers, key=lambda d: (sum(h in known for h in headers[d]), len(headers[d])))
