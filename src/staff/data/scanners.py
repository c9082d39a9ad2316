"""Text -> rows, one at a time: JSON Lines, a JSON list, CSV. A row that is wrong comes out as its reason, a file that is wrong ends it."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from staff.data.layouts import BadRow, shown

BLOCK = 1 << 20  # bytes read at a time
LONGEST_ROW = 1 << 28  # bytes; past it a file is taken for something else


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


# ---- JSON ----


def _pairs(pairs: list[tuple[str, Any]]) -> dict:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [k for k, _ in pairs]
        twice = next(k for k in keys if keys.count(k) > 1)
        raise BadRow(f"has the key {twice!r} twice; keep one")
    return row


decode_json = json.JSONDecoder(
    object_pairs_hook=_pairs
).raw_decode  # a key given twice would silently lose a value


def _json_row(text: str, last: bool = False) -> Mapping | BadRow:
    """One line of JSON Lines."""
    text = text.strip()
    try:
        value, end = decode_json(text)
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
    return BadRow(
        f'is {kind}, {shown(value)}, not an object; a row looks like {{"prompt": "...", "response": "..."}}'
    )


def _json_reason(error: json.JSONDecodeError, last: bool = False) -> str:
    text, at = error.doc, error.pos
    found = (
        f"column {at + 1}: {shown(text[at : at + 24])}"
        if at < len(text)
        else f"column {at + 1}, the end of the row"
    )
    reason = f"is not valid JSON ({error.msg} at {found})"
    if text[:2] in ("{'", "['") or text[at : at + 1] == "'":
        return f"{reason}; JSON wants double quotation marks: write rows with json.dumps, not str"
    if error.msg == "Extra data" and text[at - 1 : at + 1] == "\r{":
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
            raise ValueError(
                f"{name}: line {line_number} is longer than {LONGEST_ROW >> 20} MiB; JSON Lines has one row a line"
            )
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
        block = stream.read(
            max(BLOCK, len(text) - at)
        )  # at least twice as much as before, so that a long row costs no square
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
                raise fail(
                    "is missing: the list is not closed, the file seems cut off; fetch or write it again"
                )
            while True:
                try:
                    value, to = decode_json(text, at)
                    if to == len(text) and not ended and more():  # a number may go on
                        continue
                    found: Mapping | BadRow = _object(value)
                    break
                except json.JSONDecodeError as error:
                    if (
                        error.msg.startswith(("Unterminated", "Invalid \\")) or error.pos >= len(text) - 16
                    ) and more():
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
                raise ValueError(
                    f"{name}: line {line}: a comma before the closing bracket is no JSON; take it away"
                )
    if space() != "":
        raise ValueError(
            f"{name}: line {line}: {shown(text[at : at + 24])} after the closing bracket; one file holds one list"
        )


# ---- CSV ----


def suffix_of(path: Path) -> str:
    """The extension in small letters, without a .gz behind it."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


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
            raise ValueError(
                f"{self.name}: line {self.line + 1} is longer than {LONGEST_ROW >> 20} MiB; is it CSV?"
            )
        self.position += len(line)
        self.line += 1
        if self.line == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            self.bad = BadRow(_not_utf8(error))
            return line.decode(errors="replace")


def csv_reader(lines: Iterable[str], delimiter: str) -> Any:
    csv.field_size_limit(LONGEST_ROW >> 2)  # the library's own is 128 kB, and one for the whole process
    return csv.reader(lines, delimiter=delimiter, strict=True)


def csv_header(stream: IO[bytes], name: str, delimiter: str) -> tuple[list[str], int]:
    """Column names and the byte where the first record begins.

    Raises:
        ValueError: no header, or a name that is empty or there twice.
    """
    lines = _Lines(stream, name)
    try:
        header = next((r for r in csv_reader(lines, delimiter) if r), None)
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
            header: list[str] = next(csv_reader(io.StringIO(text, newline="\n"), delimiter), [])
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
    reader = csv_reader(lines, delimiter)
    row = -1
    while True:
        start, first_line = lines.position, lines.line + 1
        lines.bad = None
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error) or "field larger" in str(
                error
            ):  # it swallowed the rest of the file: not one row's fault
                raise ValueError(f"{name}: row {row} (line {first_line}) {_csv_cure(error)}") from None
            row += 1
            yield Found(
                BadRow(f"is not valid CSV ({error}); {_csv_cure(error)}"), first_line, start, lines.position
            )
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
