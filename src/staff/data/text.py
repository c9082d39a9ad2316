"""Text files -> rows: JSON Lines, JSON and CSV, gzipped or not. Failures name file, row and line."""

from __future__ import annotations

import array
import codecs
import contextlib
import csv
import gzip
import io
import json
import os
import re
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from staff.data.layouts import BadRow, shown
from staff.data.locate import suffix_of
from staff.data.writers import write_lines

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
            if not self.gzipped:
                yield packed
            else:
                with gzip.open(packed, "rb") as unpacked:
                    yield unpacked  # type: ignore[misc]

    @property
    def limit(self) -> int:
        """Bytes that it may hold, unpacked."""
        return max(self.max_unpacked * self.stamp[0], UNPACKED_AT_LEAST) if self.gzipped else 1 << 62

    def check(self, size: int) -> None:
        """Raise ValueError where a gzipped file unpacks to what no text does; it could take all memory."""
        if size > self.limit:
            raise ValueError(
                f"{self.name} unpacks to more than {self.max_unpacked} times its size, "
                f"{self.limit >> 20} MiB; if it is meant so, raise --max-unpacked, or unpack it with gunzip"
            )

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


# ---- what is it? ----


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
        raise ValueError(
            f"{name} holds a JSON object over several lines, not a list of rows ({_keys_of(text)}); "
            "give a list, [{...}, {...}], or one object a line (jq -c . FILE > rows.jsonl)"
        )
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


# ---- JSON ----


def _pairs(pairs: list[tuple[str, Any]]) -> dict:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [k for k, _ in pairs]
        twice = next(k for k in keys if keys.count(k) > 1)
        raise BadRow(f"has the key {twice!r} twice; keep one")
    return row


_decode = json.JSONDecoder(object_pairs_hook=_pairs).raw_decode  # json alone keeps the last of equal keys
_space = re.compile(r"[ \t\r\n]*").match
_mark = re.compile(r"[ \t\r\n]*([],]?)[ \t\r\n]*").match


def _line(text: str, last: bool) -> Mapping | BadRow:
    """One line of JSON Lines."""
    text = text.strip()
    try:
        value, end = _decode(text)
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, _space(text, end).end())  # type: ignore[union-attr]
    except BadRow as error:
        return error
    except (ValueError, RecursionError) as error:
        return BadRow(_json_reason(error, last))
    return _object(value)


def _object(value: object) -> Mapping | BadRow:
    if isinstance(value, dict):
        return value
    kind = {list: "a list", str: "a text", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
    example = '{"prompt": "...", "response": "..."}'
    return BadRow(f"is {kind}, {shown(value)}, not an object; a row looks like {example}")


def _json_reason(error: Exception, last: bool) -> str:
    if isinstance(error, RecursionError):
        return "is nested too deeply; flatten it"
    if not isinstance(error, json.JSONDecodeError):  # an integer of more than 4300 digits
        return f"is not valid JSON: {error}; put the value in quotation marks"
    text, at = error.doc, error.pos
    found = shown(text[at : at + 24]) if at < len(text) else ""
    place = f"at column {at + 1}{f': {found}' if found else ', the end of the row'}"
    reason = f"is not valid JSON ({error.msg} {place})"
    if text[:2] in ("{'", "['") or text[at : at + 1] == "'":
        return f"{reason}; JSON wants double quotation marks: write rows with json.dumps, not str"
    if error.msg == "Extra data" and "\r" in text[:at][-1:]:
        return f"{reason}; line ends are carriage returns alone: convert them with tr '\\r' '\\n'"
    if error.msg == "Extra data" and text[at : at + 1] == "{":
        return f"{reason}; put each object on a line of its own"
    if "control character" in error.msg:
        return f"{reason}; write it as an escape such as \\n or \\t, as json.dumps does"
    if last and (at >= len(text) - 8 or error.msg.startswith("Unterminated")):
        return f"{reason}; the file seems cut off here: fetch or write it again"
    if text == "{":
        return f"{reason}; an object over several lines: write one object a line (jq -c . FILE > rows.jsonl)"
    if not text.startswith(("{", "[")):
        return f"{reason}; it does not look like JSON at all: if it is CSV or TSV, name the file .csv or .tsv"
    return f"{reason}; correct the row"


def _not_utf8(byte: int, at: int) -> str:
    cure = "convert it, as with iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
    return f"is not UTF-8 (byte 0x{byte:02x} at byte {at}); {cure}"


class LineRows:
    """Rows of JSON Lines files, in constant memory but for 8 bytes a row: where its line begins.

    Attributes:
        files: in order.
        names: what messages call them.
        firsts: row number of each file's first row, counted over all files.
        keep: holds a temporary file that standard input was written to.
    """

    columns = ()

    def __init__(self, files: Sequence[TextFile], keep: object = None):
        self.files, self.keep = tuple(files), keep
        self.names = tuple(file.name for file in files)
        gzipped = any(file.gzipped for file in files)
        self.kind, self.suffix = ("JSONL (gzip)", ".jsonl.gz") if gzipped else ("JSONL", ".jsonl")
        self.firsts: list[int] = []
        self._starts = array.array("q")

    def scan(self, *_: object) -> Iterator[tuple[int, Mapping | BadRow]]:
        """Line and value of every row, bad ones too; blank lines are no rows."""
        self.firsts, self._starts = [], array.array("q")
        for file in self.files:
            self.firsts.append(len(self._starts))
            longest = min(LONGEST_ROW, file.limit + 1)
            position = number = 0
            with file.open() as stream:
                while line := stream.readline(longest):
                    start, number = position, number + 1
                    position += len(line)
                    file.check(position)
                    if number == 1 and line.startswith(codecs.BOM_UTF8):
                        line, start = line[3:], 3
                    ended = line.endswith(b"\n")
                    if not ended and len(line) >= longest:
                        size = f"{longest >> 20} MiB; JSON Lines has one row a line"
                        raise ValueError(f"{file.name}: line {number} is longer than {size}")
                    if line.isspace():
                        continue
                    self._starts.append(start)
                    try:
                        yield number, _line(line.decode(), last=not ended)
                    except UnicodeDecodeError as error:
                        yield number, BadRow(_not_utf8(line[error.start], error.start))

    def lines(self, numbers: np.ndarray) -> Iterator[bytes]:
        """The very bytes of rows, in the order asked for."""
        with contextlib.ExitStack() as stack:
            current, stream, at = -1, io.BytesIO(), 0
            for number in numbers.tolist():
                file = bisect_right(self.firsts, number) - 1
                if file != current:
                    stack.close()
                    stream, current, at = stack.enter_context(self.files[file].open()), file, 0  # type: ignore[assignment]
                if self._starts[number] != at:
                    at = stream.seek(self._starts[number])
                line = stream.readline()
                at += len(line)
                yield line

    def fetch(self, numbers: np.ndarray, *_: object) -> Iterator[Mapping]:
        """Rows as dicts, in the order asked for."""
        return (json.loads(line.decode()) for line in self.lines(numbers))

    def write(self, path: Path, numbers: np.ndarray) -> None:
        """Write rows with the bytes they came with."""
        write_lines(path, self.lines(numbers), self.suffix.endswith(".gz"))


def read_json_list(file: TextFile) -> Iterator[tuple[int, Mapping | BadRow]]:
    """Line and value of every row of a JSON list.

    Raises:
        ValueError: the list is broken; what comes behind can't be trusted.
    """
    data, name = file.read(), file.name
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{name}: line {line} {_not_utf8(data[error.start], error.start)}") from None
    at, row, mark = text.index("[") + 1, 0, ","
    at = _space(text, at).end()  # type: ignore[union-attr]
    line = 1 + text.count("\n", 0, at)
    while mark == ",":
        start, here = at, f"row {row} (line {line})"
        if at == len(text):
            cure = "the list is not closed, the file seems cut off; fetch or write it again"
            raise ValueError(f"{name}: {here} is missing: {cure}")
        if text[at] == "]" and row:
            cure = "a comma before the closing bracket is no JSON; take it away"
            raise ValueError(f"{name}: line {line}: {cure}")
        if text[at] != "]":
            value, at = _item(text, at, f"{name}: {here}")
            yield line, value
        end = _mark(text, at)
        mark, at = end[1], end.end()  # type: ignore[index,union-attr]
        line += text.count("\n", start, at)
        if not mark:
            found = f"{shown(text[at : at + 24])}; correct it there"
            if at == len(text):
                found = "the end of the file; the file seems cut off: fetch or write it again"
            what = "there must be a comma or a closing bracket"
            raise ValueError(f"{name}: after row {row} (line {line}) {what}, found {found}")
        row += 1
    if at < len(text):
        cure = f"{shown(text[at : at + 24])} after the closing bracket; one file holds one list"
        raise ValueError(f"{name}: line {line}: {cure}")


def _item(text: str, at: int, where: str) -> tuple[Mapping | BadRow, int]:
    """A row of a JSON list that begins at a place, and the place behind it."""
    try:
        try:
            value, end = _decode(text, at)
        except BadRow as error:  # it is JSON all the same
            return error, json.JSONDecoder().raw_decode(text, at)[1]
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            error = json.JSONDecodeError(error.msg, text[at:], error.pos - at)
        raise ValueError(f"{where} {_json_reason(error, last=True)}") from None
    return _object(value), end


# ---- CSV ----


def _records(text: str, delimiter: str, quoted: bool = True) -> Any:
    csv.field_size_limit(LONGEST_ROW)  # the library's own is 128 kB, and one for the whole process
    lines = io.StringIO(text, newline="\n")
    options: dict[str, Any] = {} if quoted else {"quoting": csv.QUOTE_NONE}
    return csv.reader(lines, delimiter=delimiter, strict=True, **options)


def _header(head: bytes, delimiter: str) -> list[str]:
    text = head.removeprefix(codecs.BOM_UTF8).decode(errors="replace").lstrip("\r\n")
    with contextlib.suppress(csv.Error):
        return next(_records(text, delimiter), [])
    return []


def find_delimiter(file: TextFile, known: Sequence[str]) -> str:
    """The delimiter whose header has most known names, then most columns; a tie goes to the extension's."""
    usual = "\t" if suffix_of(file.path) == ".tsv" else ","
    headers = {d: _header(file.head, d) for d in sorted(DELIMITERS, key=lambda d: d != usual)}
    return max(headers, key=lambda d: (sum(h in known for h in headers[d]), len(headers[d])))


def _is_quoted(text: str, delimiter: str) -> bool:
    """Are quotation marks round fields? Tab-separated text as translation corpora have it knows no quoting.

    A field there may begin with a mark, and Python's csv reads on to the next one, over tabs and line ends.
    """
    records, line = _records(text, delimiter), 0
    try:
        for _ in records:
            if records.line_num > line + 1:
                return False
            line = records.line_num
    except csv.Error:
        return False
    return True


def read_csv(file: TextFile, delimiter: str) -> tuple[list[str], bool, list[tuple[int, Mapping | BadRow]]]:
    """The header, whether quotation marks are round fields, line and value of every record under the header.

    Raises:
        ValueError: no header, a name that is there twice, or quotation marks that don't match, since where
            the next row begins is then anybody's guess.
    """
    text, name = file.read().decode(errors="surrogateescape"), file.name
    quoted = delimiter != "\t" or _is_quoted(text, delimiter)
    how = "put fields that hold {} or line breaks in quotation marks"
    if not quoted:
        how = "tab-separated text knows no quoting: where fields hold {} or line breaks, write CSV"
    records = _records(text, delimiter, quoted)
    header: list[str] = []
    rows: list[tuple[int, Mapping | BadRow]] = []
    while True:
        line = records.line_num + 1
        try:
            record = next(records)
        except StopIteration:
            break
        except csv.Error as error:
            where = f"row {len(rows)} (line {line})" if header else f"line {line}: the header"
            raise ValueError(f"{name}: {where} {_csv_reason(error)}") from None
        bad = _undecodable(delimiter.join(record))
        if not header:
            header = record
            if bad is not None:
                raise ValueError(f"{name}: line {line}: the header {bad}")
            twice = next((h for h in header if header.count(h) > 1), None)
            if twice is not None:
                cure = f"the header has the column {twice!r} twice; rename one"
                raise ValueError(f"{name}: line {line}: {cure}")
        elif bad is None and record and len(record) != len(header):
            columns = ", ".join(shown(h, 20) for h in header[:8])
            counts = f"has {len(record)} fields, the header {len(header)} ({columns})"
            rows.append((line, BadRow(f"{counts}; {how.format(shown(delimiter))}")))
        elif record:
            rows.append((line, bad or dict(zip(header, record, strict=True))))
    if not header:
        raise ValueError(f"{name} has no header line; the first line names the columns")
    return header, quoted, rows


def _undecodable(text: str) -> BadRow | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return BadRow(_not_utf8(ord(text[error.start]) & 0xFF, len(text[: error.start].encode())))
    return None


def _csv_reason(error: csv.Error) -> str:
    if "new-line" in str(error):
        cure = "line ends are carriage returns alone: convert them with tr '\\r' '\\n'"
    elif "field larger" in str(error) or "unexpected end" in str(error):
        return "a quotation mark is never closed: close it, or double it where it is part of the text"
    else:
        cure = "quotation marks inside a quoted field are doubled, and such a field ends at the delimiter"
    return f"is not valid CSV ({error}); {cure}"
