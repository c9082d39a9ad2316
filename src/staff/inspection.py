"""What is in the data: how it is read, lengths, duplicates, and the first rows as the model will see them. No
weights, no torch."""

from __future__ import annotations

import hashlib
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape

from staff.config import Reading
from staff.data.chat import USUAL
from staff.data.layouts import shown
from staff.data.rows import Rows
from staff.data.turns import Example

ROWS_FOR_COLUMNS = 1_000  # their kinds are of the first rows
ROWS_FOR_TOKENS = 50_000  # past that, rows evenly spread stand for all
ROWS_FOR_NEAR = 20_000
ROWS_SHOWN = 3
LETTERS_SHOWN = 1_500
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
SIMILAR = 0.8  # Jaccard similarity of word triples
SPELLED = "text that spells the model's control tokens, which trainers read as such"
BARS = "▁▂▃▄▅▆▇█"


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
    tokens = None
    if tokenizer is not None:
        rows, tokens = _tokens(rows, tokenizer, max_length, reading)
    prompt_words, response_words = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    whole, prompts = np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.uint64)
    turns: Counter[int] = Counter()
    ids: Counter[str] = Counter()
    odd: Counter[str] = Counter()
    control = None
    if tokenizer is not None:
        from staff.data.chat import control_tokens, spells

        control = control_tokens(tokenizer)
    for i, example in enumerate(rows.examples()):
        prompt, response = _halves(example)
        prompt_words[i], response_words[i] = len(prompt.split()), len(response.split())
        whole[i], prompts[i] = _digest(f"{prompt}\0{response}"), _digest(prompt)
        turns[len(example.turns)] += 1
        if example.id is not None:
            ids[example.id] += 1
        text = f"{prompt}\n{response}"
        if _CONTROL.search(text):
            odd["control characters"] += 1
        if control is not None and spells(control, example):
            odd[SPELLED] += 1
    text_only = rows.layout.text is not None
    lengths = {"words": _lengths(response_words)} if text_only else {"prompt words": _lengths(prompt_words)}
    if not text_only:
        lengths["response words"] = _lengths(response_words)
    if tokens is not None:
        lengths["tokens"], lengths["response tokens"] = tokens.pop("lengths"), tokens.pop("response_lengths")
    return {
        "format": rows.format,
        "paths": [str(p) for p in rows.paths],
        "notes": list(rows.notes),
        "rows": len(rows),
        "skipped": [(int(n), reason) for n, reason in rows.skipped],
        "columns": _columns(rows),
        "turns": dict(sorted(turns.items())),
        "train_on": rows.train_on,
        "lengths": lengths,
        "duplicates": _repeats(rows, whole),
        "duplicate_prompts": None if text_only else _repeats(rows, prompts),
        "near_duplicates": _near_duplicates(rows),
        "ids": {
            "rows": sum(ids.values()),
            "different": len(ids),
            "most": [(i, c) for i, c in ids.most_common(3) if c > 1],
        },
        "characters": dict(odd),
        "tokens": tokens,
        "first": _first(rows, tokenizer, max_length, reading),
    }


def load_tokenizer(model: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a hub id (of which only the tokenizer's files are fetched), a folder, a LoRA adapter
    or a .gguf file.

    Raises:
        ValueError: there is none.
    """
    from staff.data.locate import read_json
    from staff.models import files as model_files
    from staff.models import load as models

    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return models.load_tokenizer(models.resolve(model, "--model"), trust_remote_code)
    if not path.is_dir():
        if path.exists() or not model_files.HUB_ID.fullmatch(model) or model.startswith("."):
            raise ValueError(
                f"--model {model}: there is no such folder or .gguf file, and it is not a hub id "
                f"(owner/model)"
            )
        path = model_files.fetch(model, "--model", (*model_files.DESCRIBES, "adapter_config.json", "*.py"))
    if (path / "adapter_config.json").is_file() and not (path / "tokenizer_config.json").is_file():
        base = str(read_json(path / "adapter_config.json").get("base_model_name_or_path"))
        return load_tokenizer(str(path / base) if (path / base).exists() else base, trust_remote_code)
    return models.load_tokenizer(models.Source(model, path), trust_remote_code)


_CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")


def _halves(example: Example) -> tuple[str, str]:
    """What comes before the last trained turn, and that turn."""
    return "\n".join(t.text for t in example.turns[:-1]), example.turns[-1].text


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _lengths(values: np.ndarray) -> dict:
    """Quantiles and a histogram of 20 bins up to the 99th percentile; the last bin holds what is longer
    too."""
    if len(values) == 0:
        return {"quantiles": {}, "histogram": [], "edges": []}
    top = max(float(np.quantile(values, 0.99)), 1.0)
    counts, edges = np.histogram(np.minimum(values, top), bins=20, range=(0, top))
    quantiles = {
        f"{q:.0%}": int(v)
        for q, v in zip(QUANTILES, np.quantile(values, QUANTILES, method="lower"), strict=True)
    }
    return {
        "quantiles": quantiles,
        "mean": float(values.mean()),
        "histogram": counts.tolist(),
        "edges": edges.round(1).tolist(),
    }


def _repeats(rows: Rows, digests: np.ndarray) -> dict:
    """How many rows repeat an earlier one, and examples: (row number, row numbers it is equal to)."""
    order = np.argsort(digests, kind="stable")
    same = digests[order][1:] == digests[order][:-1]
    later = order[1:][same]
    first = sorted(
        (int(rows.numbers[order[i]]), int(rows.numbers[order[i + 1]])) for i in np.flatnonzero(same)
    )
    return {"rows": len(later), "examples": first[:5]}


def _columns(rows: Rows) -> list[dict]:
    """Name, kinds of values and empty ones of each column, in the first rows."""
    kinds: dict[str, Counter[str]] = {}
    looked = 0
    for row in rows.raw(range(min(len(rows), ROWS_FOR_COLUMNS))):
        looked += 1
        for column, value in row.items():
            empty = (
                value is None
                or (isinstance(value, str) and not value.strip())
                or (isinstance(value, list | dict) and not value)
            )
            kinds.setdefault(str(column), Counter())["empty" if empty else type(value).__name__] += 1
    layout = rows.layout
    names = ("prompt", "response", "text", "messages", "query", "system", "history", "tools", "id")
    used = {getattr(layout, name): name for name in names if getattr(layout, name) is not None}
    return [
        {
            "name": c,
            "kinds": dict(k),
            "missing": looked - k.total(),
            "used_as": used.get(c),
            "rows_looked_at": looked,
        }
        for c, k in kinds.items()
    ]


def _spread(n: int, most: int) -> np.ndarray:
    return np.arange(n) if n <= most else np.linspace(0, n - 1, most).astype(np.int64)


def _some(rows: Rows, positions: np.ndarray) -> Iterator[Example]:
    """The examples at ascending positions, in one pass."""
    wanted = iter(positions.tolist())
    following = next(wanted, None)
    for i, example in enumerate(rows.examples()):
        if i == following:
            yield example
            following = next(wanted, None)
            if following is None:
                return


def _tokens(rows: Rows, tokenizer: Any, max_length: int, reading: Reading) -> tuple[Rows, dict]:
    """The rows that the chat template can render, and the lengths of some, what max_length takes away of
    them, and what is lost."""
    from staff.data.tokens import CUT, SHORTENED, STRIPPED, tokenise

    positions = _spread(len(rows), ROWS_FOR_TOKENS)
    skipping = replace(reading, on_bad_row="skip", on_long="cut-prompt")
    pool = tokenise(
        _some(rows, positions), tokenizer, 1 << 40, None, skipping
    )  # whole, to see what is taken away
    refused = {int(positions[place]): reason for place, reason in pool.dropped}
    if len(refused) == len(positions):
        position = min(refused)
        raise ValueError(
            f"none of {len(refused)} rows can be used; the first one, row {rows.numbers[position]}, "
            f"{refused[position]}"
        )
    numbers = rows.numbers[np.setdiff1d(positions, list(refused))]
    length, response = pool.lengths, pool.response_tokens()
    long = np.isin(rows.numbers, numbers[length > max_length])
    short = tokenise(_some(rows, np.flatnonzero(long)), tokenizer, max_length, None, skipping)
    cut = rows.numbers[long][np.setdiff1d(np.arange(long.sum()), [place for place, _ in short.dropped])][
        short.marked(CUT)
    ]
    return (rows.without(refused) if refused else rows), {
        "max_length": max_length,
        "on_long": reading.on_long,
        "rows_looked_at": len(positions),
        "truncated": len(short.marked(SHORTENED)),
        "cut_responses": len(cut),
        "cut_examples": cut[:5].tolist(),
        "stripped": numbers[pool.marked(STRIPPED)].tolist(),
        "total": int(length[length <= max_length].sum() + short.lengths.sum()),
        "lengths": _lengths(length),
        "response_lengths": _lengths(response),
    }


def _near_duplicates(rows: Rows) -> dict:
    """Pairs of rows that share most of their word triples, equal ones left out, by MinHash (datasketch)."""
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        return {"rows": None, "reason": "not looked for: pip install datasketch"}
    positions = _spread(len(rows), ROWS_FOR_NEAR)
    index = MinHashLSH(threshold=SIMILAR, num_perm=64)
    empty = MinHash(
        num_perm=64, seed=1, hashfunc=zlib.crc32
    )  # copied: making the permutations is most of a sketch's cost
    seen: set[int] = set()
    near = 0
    examples: list[tuple[int, int]] = []
    for position, example in zip(positions.tolist(), _some(rows, positions), strict=True):
        text = "\n".join(_halves(example)).casefold()
        digest = _digest(text)
        if digest in seen:
            continue
        seen.add(digest)
        words = text.split()
        triples = {" ".join(words[i : i + 3]).encode() for i in range(max(len(words) - 2, 1))}
        sketch = empty.copy()
        sketch.update_batch(triples)
        match = index.query(sketch)
        if match:
            near += 1
            if len(examples) < 5:
                examples.append((int(rows.numbers[min(match)]), int(rows.numbers[position])))
        index.insert(position, sketch, check_duplication=False)
    return {"rows": near, "rows_looked_at": len(positions), "examples": examples, "similarity": SIMILAR}


def _first(rows: Rows, tokenizer: Any, max_length: int, reading: Reading) -> list[dict]:
    """The first rows as the model will see them: pieces of text, and whether the loss is on them."""
    examples = list(rows.examples(0, ROWS_SHOWN))
    numbers = rows.numbers[:ROWS_SHOWN].tolist()
    if tokenizer is None:
        return [
            {"row": n, "pieces": [(f"{t.role}: {t.text}\n", t.train) for t in e.turns]}
            for n, e in zip(numbers, examples, strict=True)
        ]
    from staff.data.tokens import tokenise

    pool = tokenise(examples, tokenizer, max_length, None, replace(reading, on_bad_row="skip"))
    unusable = {place for place, _ in pool.dropped}
    first = []
    for i, number in enumerate(number for place, number in enumerate(numbers) if place not in unusable):
        ids, mask = pool.ids(i), pool.is_response[pool.offsets[i] : pool.offsets[i + 1]]
        turning = np.flatnonzero(np.diff(mask)) + 1
        pieces = zip(np.split(ids, turning), chain([0], turning.tolist()), strict=True)
        first.append(
            {"row": number, "pieces": [(tokenizer.decode(p.tolist()), bool(mask[at])) for p, at in pieces]}
        )
    return first


# ---- as text ----


def render(report: dict) -> str:
    """The report as rich markup; what comes from the data is escaped. Print it with `emoji=False,
    highlight=False`."""
    lines = [f"[bold]{_safe(report['format'])}[/bold]: {report['rows']:,} usable rows"]
    lines += [f"  {_safe(p)}" for p in report["paths"][:10]] + (
        [f"  and {len(report['paths']) - 10} files more"] if len(report["paths"]) > 10 else []
    )
    lines += [f"  [yellow]{_safe(n)}[/yellow]" for n in report["notes"]]
    if report["skipped"]:
        total = report["rows"] + len(report["skipped"])
        lines.append(f"\n[bold red]{len(report['skipped']):,} of {total:,} rows can't be used[/bold red]")
        lines += [f"  row {n} {_safe(reason)}" for n, reason in report["skipped"][:5]]
        lines += [f"  and {len(report['skipped']) - 5:,} more"] if len(report["skipped"]) > 5 else []
    lines.append("\n[bold]Columns[/bold]" + _of(report["columns"], report["rows"]))
    for column in report["columns"]:
        kinds = ", ".join(f"{k} {c}" for k, c in column["kinds"].items())
        missing = f", missing {column['missing']}" if column["missing"] else ""
        used = f"  [green]{_safe(column['used_as'])}[/green]" if column["used_as"] else "  not used"
        lines.append(f"  {_safe(column['name'])}: {_safe(kinds)}{missing}{used}")
    if set(report["turns"]) - {1, 2}:
        turns = ", ".join(f"{c:,} rows of {t}" for t, c in list(report["turns"].items())[:8])
        lines.append(f"  turns: {turns}; loss on {_which(report['train_on'])}")
    lines.append("\n[bold]Lengths[/bold]")
    for name, length in report["lengths"].items():
        quantiles = "  ".join(f"{q} {v:,}" for q, v in length["quantiles"].items())
        lines.append(f"  {name:<16}{_bars(length['histogram'])}  {quantiles}")
    tokens = report["tokens"]
    if tokens is not None:
        of = (
            ""
            if tokens["rows_looked_at"] == report["rows"]
            else f" (of {tokens['rows_looked_at']:,} rows looked at)"
        )
        lines.append(
            f"  with at most {tokens['max_length']:,} tokens: {tokens['truncated']:,} rows lose the start "
            f"of their prompt's text, "
            f"{tokens['cut_responses']:,} the end of their response{of}; {tokens['total']:,} tokens remain"
        )
        if tokens["stripped"]:
            lines.append(
                f"  {len(tokens['stripped']):,} answers have reasoning that the chat template leaves away, "
                f"so that it is not learnt: "
                f"rows {', '.join(map(str, tokens['stripped'][:5]))}"
            )
        if tokens["on_long"] != "cut-prompt":
            what = "are left out" if tokens["on_long"] == "drop" else "stop a run"
            lines.append(f"  with --on-long {tokens['on_long']} such rows {what} instead")
        if tokens["cut_examples"]:
            lines.append(
                f"  responses cut: rows {', '.join(map(str, tokens['cut_examples']))}; a larger "
                f"--max-length keeps them"
            )
    lines.append("\n[bold]Duplicates[/bold]")
    lines.append(f"  equal rows: {_pairs(report['duplicates'])}")
    if report["duplicate_prompts"] is not None:
        lines.append(f"  equal prompts: {_pairs(report['duplicate_prompts'])}")
    near = report["near_duplicates"]
    if near["rows"] is None:
        lines.append(f"  near-duplicates: {_safe(near['reason'])}")
    else:
        of = (
            ""
            if near["rows_looked_at"] == report["rows"]
            else f" (of {near['rows_looked_at']:,} rows looked at)"
        )
        lines.append(
            f"  near-duplicates, {near['similarity']:.0%} of word triples shared: {_pairs(near)}{of}"
        )
    ids = report["ids"]
    if ids["rows"] > ids["different"]:
        most = ", ".join(f"{shown(i, 30)} {c} times" for i, c in ids["most"])
        lines.append(
            f"  ids: {ids['rows'] - ids['different']:,} rows repeat one ({_safe(most)}); rows are known by "
            f"number all the same"
        )
    for what, count in report["characters"].items():
        lines.append(f"  [yellow]{count:,} rows have {what}[/yellow]")
    lines.append("\n[bold]First rows as the model will see them[/bold] (grey: no loss)")
    for row in report["first"]:
        lines.append(f"[bold]row {row['row']}[/bold]")
        lines.append(
            "".join(
                f"[bold]{_safe(_cut(t))}[/bold]"
                if trained
                else f"[bright_black]{_safe(_cut(t))}[/bright_black]"
                for t, trained in row["pieces"]
            )
        )
    return "\n".join(lines)


def _safe(text: object) -> str:
    """Data in markup: no tag, and nothing that a terminal would obey (control characters, turned writing
    direction)."""
    return escape(
        "".join(
            c
            if c in "\n\t" or (unicodedata.category(c) not in ("Cc", "Cs") and c not in _TURNING)
            else repr(c)[1:-1]
            for c in str(text)
        )
    )


_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def _cut(text: str) -> str:
    if len(text) <= LETTERS_SHOWN:
        return text
    half = LETTERS_SHOWN // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"


def _of(columns: Sequence[dict], rows: int) -> str:
    looked = columns[0]["rows_looked_at"] if columns else 0
    return "" if looked == rows else f" (of the first {looked:,} rows)"


def _which(train_on: str) -> str:
    return "the last assistant turn" if train_on == "last" else "every assistant turn"


def _bars(counts: Iterable[int]) -> str:
    counts = list(counts)
    top = max(counts, default=0)
    return "".join(" " if c == 0 else BARS[min(len(BARS) - 1, c * len(BARS) // (top + 1))] for c in counts)


def _pairs(found: dict) -> str:
    if not found["rows"]:
        return "none"
    pairs = ", ".join(f"{b} like {a}" for a, b in found["examples"])
    more = ", ..." if found["rows"] > len(found["examples"]) else ""
    return f"{found['rows']:,} rows repeat an earlier one (rows {pairs}{more})"
