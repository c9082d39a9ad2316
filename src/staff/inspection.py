"""What is in the data: how it is read, lengths, duplicates, and the first rows as the model will see them. No
weights, no torch."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape

from staff.config import InspectConfig, Reading, check_named
from staff.data.chat import USUAL, control_tokens, spells
from staff.data.duplicates import NearIndex
from staff.data.layouts import shown, visible
from staff.data.locate import read_json
from staff.data.rows import Rows, read
from staff.data.tokens import CUT, SHORTENED, STRIPPED, in_common, tokenise
from staff.data.turns import Example
from staff.models import files as model_files
from staff.models import load as models

ROWS_FOR_COLUMNS = 1_000  # their kinds are of the first rows
ROWS_FOR_TOKENS = 50_000  # past that, rows evenly spread stand for all
ROWS_FOR_NEAR = 20_000
ROWS_SHOWN = 3
LETTERS_SHOWN = 1_500
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
SIMILAR = 0.8  # Jaccard similarity of word triples
ROWS_AS_SEEN = "[bold]First rows as the model will see them[/bold]"  # behind it stands the data's own text
SPELLS_CONTROL = "text that spells the model's control tokens, which trainers read as such"
BARS = " ▁▂▃▄▅▆▇█"
CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")


def inspect(rows: Rows, tokenizer: Any = None, max_length: int = 1024, reading: Reading = USUAL) -> dict:
    """Look at rows, and at their tokens where a tokenizer is given.

    Args:
        rows: opened data.
        tokenizer: a transformers tokenizer; None: lengths in words alone.
        max_length: tokens at most, as for training; what is longer is truncated.
        reading: its chat_template, template_date and on_long hold here.

    Returns:
        The report, plain data: format, paths, notes, rows, skipped, columns, turns, lengths (name ->
        quantiles and histogram), duplicates, near_duplicates, ids, characters, tokens (None without a
        tokenizer), first (the first rows).
    """
    tokens, control = None, None
    if tokenizer is not None:
        rows, tokens = _tokens(rows, tokenizer, max_length, reading)
        control = control_tokens(tokenizer)
    words = np.zeros((2, len(rows)), np.int64)  # of prompts, of responses
    digests = np.zeros((2, len(rows)), np.uint64)  # of prompts, of whole rows
    turns, ids, odd = Counter[int](), Counter[str](), Counter[str]()
    for i, example in enumerate(rows.examples()):
        prompt, response = _halves(example)
        words[:, i] = len(prompt.split()), len(response.split())
        digests[:, i] = _digest(prompt), _digest(f"{prompt}\0{response}")
        turns[len(example.turns)] += 1
        if example.id is not None:
            ids[example.id] += 1
        if CONTROL.search(prompt) or CONTROL.search(response):
            odd["control characters"] += 1
        if spells(control, example):
            odd[SPELLS_CONTROL] += 1
    text_only = rows.layout.text is not None
    names = ("", "words") if text_only else ("prompt words", "response words")
    lengths = {name: _lengths(counts) for name, counts in zip(names, words, strict=True) if name}
    if tokens is not None:
        lengths["tokens"], lengths["response tokens"] = tokens.pop("lengths"), tokens.pop("response_lengths")
    return {
        "format": rows.format,
        "paths": [str(path) for path in rows.paths],
        "notes": list(rows.notes),
        "rows": len(rows),
        "skipped": [(int(number), reason) for number, reason in rows.skipped],
        "columns": _columns(rows),
        "turns": dict(sorted(turns.items())),
        "train_on": rows.train_on,
        "lengths": lengths,
        "duplicates": _repeats(rows, digests[1]),
        "duplicate_prompts": None if text_only else _repeats(rows, digests[0]),
        "near_duplicates": _near_duplicates(rows),
        "ids": {
            "rows": ids.total(),
            "different": len(ids),
            "most": [(label, count) for label, count in ids.most_common(3) if count > 1],
        },
        "characters": dict(odd),
        "tokens": tokens,
        "first": _first(rows, tokenizer, max_length, reading),
    }


def look(config: InspectConfig, data: Any = None) -> dict:
    """What `inspect` says of the data that a config names, or of these rows."""
    check_named(config, data)
    tokenizer = tokenizer_of(config.model, config.trust_remote_code) if config.model else None
    keywords = {**config.reading.keywords(), "on_bad_row": "skip"}
    rows = read(list(config.data) if data is None else data, **keywords)
    return inspect(rows, tokenizer, config.reading.max_length, config.reading)


def tokenizer_of(model: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a hub id (of which only the tokenizer's files are fetched), a folder, a LoRA adapter
    or a .gguf file.

    Raises:
        ValueError: there is none.
    """
    if Path(model).suffix == ".gguf":
        return models.load_tokenizer(models.resolve(model, "--model"), trust_remote_code)
    wanted = (*model_files.DESCRIBES, "adapter_config.json", "*.py")
    path = model_files.folder_of(model, "--model", wanted)
    if (path / "adapter_config.json").is_file() and not (path / "tokenizer_config.json").is_file():
        base = str(read_json(path / "adapter_config.json").get("base_model_name_or_path"))
        return tokenizer_of(str(path / base) if (path / base).exists() else base, trust_remote_code)
    return models.load_tokenizer(models.Source(model, path), trust_remote_code)


def _halves(example: Example) -> tuple[str, str]:
    """What comes before the last trained turn, and that turn."""
    return "\n".join(turn.text for turn in example.turns[:-1]), example.turns[-1].text


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _lengths(values: np.ndarray) -> dict:
    """Quantiles and a histogram of 20 bins up to the 99th percentile; the last holds what is longer too."""
    if len(values) == 0:
        return {"quantiles": {}, "histogram": [], "edges": []}
    top = max(float(np.quantile(values, 0.99)), 1.0)
    counts, edges = np.histogram(np.minimum(values, top), bins=20, range=(0, top))
    quantiles = zip(QUANTILES, np.quantile(values, QUANTILES, method="lower").tolist(), strict=True)
    named = {"quantiles": {f"{q:.0%}": int(value) for q, value in quantiles}, "mean": float(values.mean())}
    return {**named, "histogram": counts.tolist(), "edges": edges.round(1).tolist()}


def _repeats(rows: Rows, digests: np.ndarray) -> dict:
    """How many rows repeat an earlier one, and examples: (row number, number of a row it is equal to)."""
    order = np.argsort(digests, kind="stable")
    same = np.flatnonzero(digests[order][1:] == digests[order][:-1])
    numbers = rows.numbers[order]
    pairs = sorted(zip(numbers[same].tolist(), numbers[same + 1].tolist(), strict=True))
    return {"rows": len(pairs), "examples": pairs[:5]}


def _columns(rows: Rows) -> list[dict]:
    """Name, kinds of values and empty ones of each column, in the first rows."""
    kinds: dict[str, Counter[str]] = {}
    looked = min(len(rows), ROWS_FOR_COLUMNS)
    for row in rows.raw(range(looked)):
        for column, value in row.items():
            empty = value is None or (isinstance(value, list | dict) and not value)
            empty |= isinstance(value, str) and not value.strip()
            kinds.setdefault(str(column), Counter())["empty" if empty else type(value).__name__] += 1
    names = ("prompt", "response", "text", "messages", "query", "system", "history", "tools", "id")
    used = {getattr(rows.layout, name): name for name in names}
    columns = []
    for column, count in kinds.items():
        about = {"name": column, "kinds": dict(count), "missing": looked - count.total()}
        columns.append({**about, "used_as": used.get(column), "rows_looked_at": looked})
    return columns


def _spread(rows: Rows, most: int) -> Rows:
    """Rows evenly spread, where there are more than so many."""
    places = np.linspace(0, len(rows) - 1, most).astype(np.int64)
    return replace(rows, numbers=rows.numbers[places]) if len(rows) > most else rows


def _tokens(rows: Rows, tokenizer: Any, max_length: int, reading: Reading) -> tuple[Rows, dict]:
    """The rows that the chat template can render, and the lengths of some, what max_length takes away of
    them, and what is lost."""
    some, how = _spread(rows, ROWS_FOR_TOKENS), replace(reading, on_bad_row="skip", on_long="cut-prompt")
    whole = tokenise(some.examples(), tokenizer, 1 << 40, None, how)  # to see what is taken away
    usable, _ = in_common(some, {"whole": whole})
    refused = np.setdiff1d(some.numbers, usable.numbers)
    rows = replace(rows, numbers=np.setdiff1d(rows.numbers, refused), skipped=usable.skipped)
    long = replace(usable, numbers=usable.numbers[whole.lengths > max_length])
    short = tokenise(long.examples(), tokenizer, max_length, None, how)
    cut = np.delete(long.numbers, [place for place, _ in short.dropped])[short.marked(CUT)]
    return rows, {
        "max_length": max_length,
        "on_long": reading.on_long,
        "rows_looked_at": len(some),
        "truncated": len(short.marked(SHORTENED)),
        "cut_responses": len(cut),
        "cut_examples": cut[:5].tolist(),
        "stripped": usable.numbers[whole.marked(STRIPPED)].tolist(),
        "total": int(whole.lengths[whole.lengths <= max_length].sum() + short.lengths.sum()),
        "lengths": _lengths(whole.lengths),
        "response_lengths": _lengths(whole.response_tokens()),
    }


def _near_duplicates(rows: Rows) -> dict:
    """Pairs of rows that share most of their word triples, equal ones left out."""
    if find_spec("datasketch") is None:
        return {"rows": None, "reason": "not looked for: pip install datasketch"}
    some, seen, index = _spread(rows, ROWS_FOR_NEAR), set[int](), NearIndex(SIMILAR)
    pairs = []
    for number, example in zip(some.numbers.tolist(), some.examples(), strict=True):
        text = "\n".join(_halves(example)).casefold()
        digest = _digest(text)
        if digest not in seen and (like := index.find_or_add(number, text)) is not None:
            pairs.append((like, number))
        seen.add(digest)
    looked = {"rows_looked_at": len(some), "similarity": SIMILAR}
    return {"rows": len(pairs), "examples": pairs[:5], **looked}


def _first(rows: Rows, tokenizer: Any, max_length: int, reading: Reading) -> list[dict]:
    """The first rows as the model will see them: pieces of text, and whether the loss is on them."""
    examples, numbers = list(rows.examples(0, ROWS_SHOWN)), rows.numbers[:ROWS_SHOWN]
    if tokenizer is None:
        pieces = [[(f"{turn.role}: {turn.text}\n", turn.train) for turn in e.turns] for e in examples]
    else:
        pool = tokenise(examples, tokenizer, max_length, None, replace(reading, on_bad_row="skip"))
        numbers, pieces = np.delete(numbers, [place for place, _ in pool.dropped]), []
        for i in range(len(pool)):
            ids, mask = pool.ids(i), pool.is_response[pool.offsets[i] : pool.offsets[i + 1]]
            turning = np.flatnonzero(np.diff(mask)) + 1
            parts = zip(np.split(ids, turning), chain([0], turning.tolist()), strict=True)
            pieces.append([(tokenizer.decode(part.tolist()), bool(mask[at])) for part, at in parts])
    return [{"row": row, "pieces": parts} for row, parts in zip(numbers.tolist(), pieces, strict=True)]


# ---- as text ----


def render(report: dict) -> str:
    """The report as rich markup; what comes from the data is escaped. Print it with `emoji=False,
    highlight=False`."""
    rows, paths, skipped, tokens = (report[name] for name in ("rows", "paths", "skipped", "tokens"))
    lines = [f"[bold]{_safe(report['format'])}[/bold]: {rows:,} usable rows"]
    lines += [f"  {_safe(path)}" for path in paths[:10]] + _more(paths, 10, " files more")
    lines += [f"  [yellow]{_safe(note)}[/yellow]" for note in report["notes"]]
    if skipped:
        counts = f"{len(skipped):,} of {rows + len(skipped):,}"
        lines.append(f"\n[bold red]{counts} rows can't be used[/bold red]")
        lines += [f"  row {n} {_safe(reason)}" for n, reason in skipped[:5]] + _more(skipped, 5, " more")
    looked = report["columns"][0]["rows_looked_at"] if report["columns"] else 0
    lines.append("\n[bold]Columns[/bold]" + ("" if looked == rows else f" (of the first {looked:,} rows)"))
    for column in report["columns"]:
        kinds = ", ".join(f"{kind} {count}" for kind, count in column["kinds"].items())
        missing = f", missing {column['missing']}" if column["missing"] else ""
        used = f"  [green]{_safe(column['used_as'])}[/green]" if column["used_as"] else "  not used"
        lines.append(f"  {_safe(column['name'])}: {_safe(kinds)}{missing}{used}")
    if set(report["turns"]) - {1, 2}:
        turns = ", ".join(f"{count:,} rows of {turn}" for turn, count in list(report["turns"].items())[:8])
        which = "the last assistant turn" if report["train_on"] == "last" else "every assistant turn"
        lines.append(f"  turns: {turns}; loss on {which}")
    lines.append("\n[bold]Lengths[/bold]")
    for name, length in report["lengths"].items():
        quantiles = "  ".join(f"{q} {value:,}" for q, value in length["quantiles"].items())
        lines.append(f"  {name:<16}{_bars(length['histogram'])}  {quantiles}")
    lines += _about_tokens(tokens, rows) if tokens is not None else []
    lines.append(f"\n[bold]Duplicates[/bold]\n  equal rows: {_pairs(report['duplicates'])}")
    if report["duplicate_prompts"] is not None:
        lines.append(f"  equal prompts: {_pairs(report['duplicate_prompts'])}")
    near, ids = report["near_duplicates"], report["ids"]
    if near["rows"] is None:
        lines.append(f"  near-duplicates: {_safe(near['reason'])}")
    else:
        what = f"near-duplicates, {near['similarity']:.0%} of word triples shared"
        lines.append(f"  {what}: {_pairs(near)}{_of(near, rows)}")
    if ids["rows"] > ids["different"]:
        most = ", ".join(f"{shown(label, 30)} {count} times" for label, count in ids["most"])
        what = f"{ids['rows'] - ids['different']:,} rows repeat one ({_safe(most)})"
        lines.append(f"  ids: {what}; rows are known by number all the same")
    for what, count in report["characters"].items():
        lines.append(f"  [yellow]{count:,} rows have {what}[/yellow]")
    lines.append(f"\n{ROWS_AS_SEEN} (grey: no loss)")
    for row in report["first"]:
        styles = (("bold" if trained else "bright_black", text) for text, trained in row["pieces"])
        lines.append(f"[bold]row {row['row']}[/bold]")
        lines.append("".join(f"[{style}]{_safe(_cut(text))}[/{style}]" for style, text in styles))
    return "\n".join(lines)


def _about_tokens(tokens: dict, rows: int) -> list[str]:
    """What is taken away of the rows, and what helps."""
    lines = [
        f"  with at most {tokens['max_length']:,} tokens: {tokens['truncated']:,} rows lose the start of "
        f"their prompt's text, {tokens['cut_responses']:,} the end of their response{_of(tokens, rows)}; "
        f"{tokens['total']:,} tokens remain"
    ]
    if tokens["stripped"]:
        what = "answers have reasoning that the chat template leaves away, so that it is not learnt"
        some = ", ".join(map(str, tokens["stripped"][:5]))
        lines.append(f"  {len(tokens['stripped']):,} {what}: rows {some}")
    if tokens["on_long"] != "cut-prompt":
        what = "are left out" if tokens["on_long"] == "drop" else "stop a run"
        lines.append(f"  with --on-long {tokens['on_long']} such rows {what} instead")
    if tokens["cut_examples"]:
        some = ", ".join(map(str, tokens["cut_examples"]))
        lines.append(f"  responses cut: rows {some}; a larger --max-length keeps them")
    return lines


def _safe(text: object) -> str:
    """Data in markup: no tag, and nothing that a terminal would obey."""
    return escape(visible(str(text)))


def _cut(text: str) -> str:
    if len(text) <= LETTERS_SHOWN:
        return text
    half = LETTERS_SHOWN // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"


def _more(items: list, said: int, what: str) -> list[str]:
    return [f"  and {len(items) - said:,}{what}"] if len(items) > said else []


def _of(looked_at: dict, rows: int) -> str:
    looked = looked_at["rows_looked_at"]
    return "" if looked == rows else f" (of {looked:,} rows looked at)"


def _bars(counts: list[int]) -> str:
    top = max(counts, default=0)
    return "".join(BARS[count and 1 + count * (len(BARS) - 1) // (top + 1)] for count in counts)


def _pairs(repeats: dict) -> str:
    if not repeats["rows"]:
        return "none"
    pairs = ", ".join(f"{later} like {earlier}" for earlier, later in repeats["examples"])
    more = ", ..." if repeats["rows"] > len(repeats["examples"]) else ""
    return f"{repeats['rows']:,} rows repeat an earlier one (rows {pairs}{more})"
