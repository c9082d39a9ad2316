"""Text -> rows: JSON Lines, JSON and CSV. Failures name file, row and line."""

from __future__ import annotations

import array
import codecs
import contextlib
import csv
import io
import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from staff.data.kinds import LONGEST_ROW, TextFile, records_of
from staff.data.layouts import BadRow, shown
from staff.data.writers import write_lines

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
            raise ValueError(
                f"{name}: line {line}: a comma before the closing bracket is no JSON; take it away"
            )
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


def _is_quoted(text: str, delimiter: str) -> bool:
    """Are quotation marks round fields? Tab-separated text as translation corpora have it knows no quoting.

    A field there may begin with a mark, and Python's csv reads on to the next one, over tabs and line ends.
    """
    records, line = records_of(text, delimiter), 0
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
    records = records_of(text, delimiter, quoted)
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
