"""Text files -> rows: JSON Lines, JSON and CSV, gzipped or not, read in blocks. Every failure names file, row, line and cure."""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from staff.layouts import BadRow, shown

BLOCK = 1 << 20  # bytes read at a time
LONGEST_ROW = 1 << 28  # bytes; past it a file is taken for something else
ROWS_A_BATCH = 4096  # of tables
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


class Found(NamedTuple):
    """A row as it lies in its file: `value`, or why there is none.

    Attributes:
        value: column -> value; a BadRow where it can't be read.
        line: 1-based, where it starts; 0 for files without lines.
        start, end: its bytes in the (unpacked) file, end exclusive.
    """

    value: Mapping | BadRow
    line: int = 0
    start: int = 0
    end: int = 0


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
                raise ValueError(f"{self.name} changed while it was in use; start again, on a copy that nothing writes to")
            with gzip.open(self.path, "rb") if self.gzipped else open(self.path, "rb", buffering=BLOCK) as stream:
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
        raise ValueError(f"{name}: the gzip data is cut or damaged ({error}); fetch or pack the file again (gzip -t checks it)") from None
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
    if head.startswith(b"ARROW1") or (head.startswith(b"\xff\xff\xff\xff") and suffix in (".arrow", ".feather", ".ipc", "")):
        return "Arrow"
    if suffix == ".parquet":
        raise ValueError(
            f"{name} is no Parquet file: it begins with {shown(head[:8])}, not with b'PAR1'; name it after what it is, or fetch it again"
        )
    if suffix in (".arrow", ".feather"):
        raise ValueError(f"{name} is no Arrow file: it begins with {shown(head[:8])}; name it after what it is, or fetch it again")
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
    if suffix in (".jsonl", ".ndjson", ".json") or (whole and first.strip()[:1] in b'"0123456789tfn-' and suffix not in (".csv", ".tsv")):
        return "JSONL"
    if suffix in (".csv", ".tsv") or any(d.encode() in first for d in DELIMITERS):
        return "CSV"
    raise ValueError(
        f"{name}: can't tell what this is; it begins with {shown(head[:24])}. It can be JSON Lines, JSON, CSV, TSV, Parquet or Arrow: "
        "name it .jsonl, .json, .csv, .tsv, .parquet or .arrow"
    )


def suffix_of(path: Path) -> str:
    """The extension in small letters, without a .gz behind it."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


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


# ---- JSON ----


def _pairs(pairs: list[tuple[str, Any]]) -> dict:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [k for k, _ in pairs]
        twice = next(k for k in keys if keys.count(k) > 1)
        raise BadRow(f"has the key {twice!r} twice; keep one")
    return row


_decode = json.JSONDecoder(object_pairs_hook=_pairs).raw_decode  # a key given twice would silently lose a value


def _json_row(text: str, last: bool = False) -> Mapping | BadRow:
    """One line of JSON Lines."""
    text = text.strip()
    try:
        value, end = _decode(text)
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, end + len(text[end:]) - len(text[end:].lstrip()))
    except json.JSONDecodeError as error:
        return BadRow(_json_reason(error, last))
    except RecursionError:
        return BadRow("is nested too deeply; flatten it")
    except BadRow as error:
        return error
    except ValueError as error:  # an integer of more than 4300 digits
        return BadRow(f"is not valid JSON: {error}; put the value in quotation marks")
    return _object(value)


def _object(value: object) -> Mapping | BadRow:
    if isinstance(value, dict):
        return value
    kind = {list: "a list", str: "a text", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
    return BadRow(f'is {kind}, {shown(value)}, not an object; a row looks like {{"prompt": "...", "response": "..."}}')


def _json_reason(error: json.JSONDecodeError, last: bool = False) -> str:
    text, at = error.doc, error.pos
    found = f"column {at + 1}: {shown(text[at : at + 24])}" if at < len(text) else f"column {at + 1}, the end of the row"
    reason = f"is not valid JSON ({error.msg} at {found})"
    if text[:2] in ("{'", "['") or text[at : at + 1] == "'":
        return f"{reason}; JSON wants double quotation marks: write rows with json.dumps, not str"
    if error.msg == "Extra data" and text[at - 1 : at + 1] == "\r{":
        return f"{reason}; line ends are carriage returns alone: convert them with tr '\\r' '\\n'"
    if error.msg == "Extra data" and text[at : at + 1] == "{":
        return f"{reason}; put each object on a line of its own"
    if "control character" in error.msg:
        return f"{reason}; write it as an escape such as \\n or \\t, as json.dumps does"
    if text == "{":
        return f"{reason}; an object over several lines: write one object a line (jq -c . FILE > rows.jsonl)"
    if last and (at >= len(text) - 8 or error.msg.startswith("Unterminated")):
        return f"{reason}; the file seems cut off here: fetch or write it again"
    if not text.startswith(("{", "[")):
        return f"{reason}; it does not look like JSON at all: if it is CSV or TSV, name the file .csv or .tsv"
    return f"{reason}; correct the row"


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"is not UTF-8 (byte 0x{byte:02x} at byte {error.start}); convert it, as with iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"


def scan_jsonl(stream: IO[bytes], name: str) -> Iterator[Found]:
    """The rows of a JSON Lines file; blank lines are no rows."""
    position = line_number = 0
    while line := stream.readline(LONGEST_ROW):
        start, line_number = position, line_number + 1
        position += len(line)
        if line_number == 1 and line.startswith(codecs.BOM_UTF8):
            line, start = line[3:], 3
        ended = line.endswith(b"\n")
        if not ended and len(line) >= LONGEST_ROW:
            raise ValueError(f"{name}: line {line_number} is longer than {LONGEST_ROW >> 20} MiB; JSON Lines has one row a line")
        if line.isspace():
            continue
        value: Mapping | BadRow
        try:
            value = _json_row(line.decode(), last=not ended)
        except UnicodeDecodeError as error:
            value = BadRow(_not_utf8(error))
        yield Found(value, line_number, start, position)


def scan_json(stream: IO[bytes], name: str) -> Iterator[Found]:
    """The rows of a JSON list, decoded one at a time from a buffer that holds a block, or the longest row if that is more."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    text, at, position, line, row = "", 0, 0, 1, 0
    broken: UnicodeDecodeError | None = None
    ended = False

    def fail(what: str) -> ValueError:
        return ValueError(f"{name}: row {row} (line {line}) {what}")

    def more() -> bool:
        nonlocal text, at, ended, broken
        if broken is not None:
            raise fail(_not_utf8(broken))
        if ended:
            return False
        if len(text) - at >= LONGEST_ROW:
            raise fail(f"is longer than {LONGEST_ROW >> 20} MiB")
        block = stream.read(max(BLOCK, len(text) - at))  # at least twice as much as before, so that a long row costs no square
        ended = not block
        try:
            new = decoder.decode(block, final=ended)
        except UnicodeDecodeError as error:
            broken = error
            new = error.object[: error.start].decode()
        text, at = text[at:] + new, 0
        return True

    def advance(to: int) -> None:
        nonlocal at, position, line
        passed = text[at:to]
        position += len(passed) if passed.isascii() else len(passed.encode())
        line += passed.count("\n")
        at = to

    def space() -> str:
        """Skips white space; the character there, or "" at the end."""
        while True:
            to = at
            while to < len(text) and text[to] in " \t\r\n":
                to += 1
            advance(to)
            if at < len(text):
                return text[at]
            if not more():
                return ""

    more()
    if text.startswith("\ufeff"):
        advance(1)
    assert space() == "["
    advance(at + 1)
    if space() == "]":
        advance(at + 1)
    else:
        while True:
            if space() == "":
                raise fail("is missing: the list is not closed, the file seems cut off; fetch or write it again")
            while True:
                try:
                    value, to = _decode(text, at)
                    if to == len(text) and not ended and more():  # a number may go on
                        continue
                    found: Mapping | BadRow = _object(value)
                    break
                except json.JSONDecodeError as error:
                    if (error.msg.startswith(("Unterminated", "Invalid \\")) or error.pos >= len(text) - 16) and more():
                        continue
                    row_text = text[at : at + 10_000_000]
                    local = json.JSONDecodeError(error.msg, row_text, min(error.pos - at, len(row_text)))
                    raise fail(_json_reason(local, last=ended)) from None
                except RecursionError:
                    raise fail("is nested too deeply; flatten it") from None
                except BadRow as error:
                    # the decoder stopped in the middle: read the row again, without the check, to get past it
                    while True:
                        try:
                            to = json.JSONDecoder().raw_decode(text, at)[1]
                            break
                        except (json.JSONDecodeError, RecursionError):
                            if not more():
                                raise fail(str(error)) from None
                    found = error
                    break
                except ValueError as error:
                    raise fail(f"is not valid JSON: {error}; put the value in quotation marks") from None
            start, first_line = position, line
            advance(to)
            yield Found(found, first_line, start, position)
            row += 1
            mark = space()
            if mark not in (",", "]"):
                what = "the end of the file" if mark == "" else shown(text[at : at + 24])
                cure = "the file seems cut off: fetch or write it again" if mark == "" else "correct it there"
                raise ValueError(
                    f"{name}: after row {row - 1} (line {line}) there must be a comma or a closing bracket, found {what}; {cure}"
                )
            advance(at + 1)
            if mark == "]":
                break
            if space() == "]":
                raise ValueError(f"{name}: line {line}: a comma before the closing bracket is no JSON; take it away")
    if space() != "":
        raise ValueError(f"{name}: line {line}: {shown(text[at : at + 24])} after the closing bracket; one file holds one list")


# ---- CSV ----

DELIMITERS = (",", "\t", ";", "|")


class _Lines:
    """Lines for csv.reader, which takes no more of them than the record it reads; so `position` is where the next record begins."""

    def __init__(self, stream: IO[bytes], name: str):
        self.stream, self.name = stream, name
        self.position = self.line = 0
        self.bad: BadRow | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.stream.readline(LONGEST_ROW)
        if not line:
            raise StopIteration
        if len(line) >= LONGEST_ROW:
            raise ValueError(f"{self.name}: line {self.line + 1} is longer than {LONGEST_ROW >> 20} MiB; is it CSV?")
        self.position += len(line)
        self.line += 1
        if self.line == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            self.bad = BadRow(_not_utf8(error))
            return line.decode(errors="replace")


def _csv(lines: Iterable[str], delimiter: str) -> Any:
    csv.field_size_limit(LONGEST_ROW >> 2)  # the library's own is 128 kB, and one for the whole process
    return csv.reader(lines, delimiter=delimiter, strict=True)


def csv_header(stream: IO[bytes], name: str, delimiter: str) -> tuple[list[str], int]:
    """Column names and the byte where the first record begins.

    Raises:
        ValueError: no header, or a name that is empty or there twice.
    """
    lines = _Lines(stream, name)
    try:
        header = next((r for r in _csv(lines, delimiter) if r), None)
    except csv.Error as error:
        raise ValueError(f"{name}: line 1: the header can't be read ({error}); {_csv_cure(error)}") from None
    if lines.bad is not None:
        raise ValueError(f"{name}: line 1: the header {lines.bad}")
    if header is None:
        raise ValueError(f"{name} has no header line; the first line names the columns")
    twice = next((h for h in header if header.count(h) > 1), None)
    if twice is not None:
        raise ValueError(f"{name}: line 1: the header has the column {twice!r} twice; rename one")
    return header, lines.position


def _csv_cure(error: csv.Error) -> str:
    if "new-line" in str(error):
        return "line ends are carriage returns alone: convert them with tr '\\r' '\\n'"
    if "field larger" in str(error) or "unexpected end" in str(error):
        return "a quotation mark is never closed: close it, or double it where it is part of the text"
    return "quotation marks inside a quoted field are doubled, and such a field ends at the delimiter"


def find_delimiter(head: bytes, path: Path, known: Sequence[str]) -> str:
    """The delimiter whose header line has most of the known names, then most columns; a tie goes to the extension's own."""
    text = head.removeprefix(codecs.BOM_UTF8).decode(errors="replace").lstrip("\r\n")
    usual = "\t" if suffix_of(path) == ".tsv" else ","
    best, best_rank = usual, (-1, 0)
    for delimiter in sorted(DELIMITERS, key=lambda d: d != usual):
        try:
            header = next(_csv(io.StringIO(text, newline="\n"), delimiter), [])
        except csv.Error:
            continue
        rank = (sum(h in known for h in header), len(header))
        if rank > best_rank:
            best, best_rank = delimiter, rank
    return best


def scan_csv(stream: IO[bytes], name: str, delimiter: str) -> Iterator[Found]:
    """The records of a CSV file under its header; blank lines are no rows."""
    header, _ = csv_header(stream, name, delimiter)
    stream.seek(0)
    lines = _Lines(stream, name)
    reader = _csv(lines, delimiter)
    row = -1
    while True:
        start, first_line = lines.position, lines.line + 1
        lines.bad = None
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error) or "field larger" in str(error):  # it swallowed the rest of the file: not one row's fault
                raise ValueError(f"{name}: row {row} (line {first_line}) {_csv_cure(error)}") from None
            row += 1
            yield Found(BadRow(f"is not valid CSV ({error}); {_csv_cure(error)}"), first_line, start, lines.position)
            continue
        if not record:
            continue
        row += 1
        if row == 0:  # the header
            continue
        value: Mapping | BadRow
        if lines.bad is not None:
            value = lines.bad
        elif len(record) != len(header):
            value = BadRow(
                f"has {len(record)} fields, the header {len(header)} ({', '.join(shown(h, 20) for h in header[:8])}); "
                f"put fields that hold {shown(delimiter)} or line breaks in quotation marks"
            )
        else:
            value = dict(zip(header, record, strict=True))
        yield Found(value, first_line, start, lines.position)


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

    def bytes(self, positions: Sequence[int] | np.ndarray | range) -> Iterator[tuple[int, bytes]]:
        """File number and the very bytes of rows, in the order asked for."""
        stack = contextlib.ExitStack()
        with stack:
            current, stream, at = -1, None, 0
            for position in positions:
                number = int(np.searchsorted(self.first, position, side="right")) - 1 if len(self.files) > 1 else 0
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
        for number, data in self.bytes(positions):
            if self.kind == "CSV":
                text = data.decode().removeprefix("\ufeff")
                record = next(r for r in _csv(io.StringIO(text, newline="\n"), self.files[number].delimiter) if r)
                yield dict(zip(self.headers[number], record, strict=True))
            else:
                yield _decode(data.decode().strip())[0]

    def header_bytes(self, number: int) -> bytes:
        """The very bytes of a CSV file's header line."""
        file = self.files[number]
        with file.open() as stream:
            end = csv_header(stream, file.name, file.delimiter)[1]
            stream.seek(0)
            return stream.read(end)
