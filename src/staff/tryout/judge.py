"""What came out of a try-out: every way beside random, and which to take."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from staff import files
from staff.comparison.evaluate import read_examples
from staff.comparison.grid import FULL, Cell
from staff.comparison.run import Figures
from staff.comparison.statistics import paired_margin
from staff.comparison.tables import LOWER
from staff.config import SelectConfig
from staff.tryout.cost import Tries
from staff.tryout.ways import RANDOM

ERRORS = 2.0  # standard errors that the margin must lie beyond
JUDGED_FOR = 600  # seconds that a user's judge may take for one model's answers


def values(
    config: SelectConfig, cell_of: Callable[..., Path], way: str, seeds: Sequence[int], metric: str = ""
) -> np.ndarray:
    """(S, N) of a way, higher is better: a row a seed, a column a judging row."""
    return np.stack([judged_rows(config, cell_of(way, seed), metric) for seed in seeds])


def judged_rows(config: SelectConfig, cell: Path, metric: str = "") -> np.ndarray:
    metric = metric or config.trying.metric
    examples = read_examples(cell / "scores.jsonl")
    if config.trying.metric_command and metric != "loss":
        return _by_command(config.trying.metric_command, cell, examples)
    return (-1 if metric in LOWER else 1) * np.array(examples[metric], np.float64)


def _by_command(command: str, cell: Path, examples: Mapping[str, list[Any]]) -> np.ndarray:
    """What a user's own judge says: answers and references as JSON Lines on its standard input, a number a
    row on its standard output; higher is better. Asked once for each model.

    Raises:
        ValueError: it fails, or says something else.
    """
    key = files.fingerprint([command, files.hash_file(cell / "scores.jsonl")])
    before = files.read_checked(cell / "judged.json")
    if before and before["key"] == key:
        return np.array(before["values"], np.float64)
    columns = ("row", "id", "prediction", "reference")
    lines = zip(*(examples[name] for name in columns), strict=True)
    names = ("row", "id", "answer", "reference")
    given = "".join(
        json.dumps(dict(zip(names, line, strict=True)), ensure_ascii=False) + "\n" for line in lines
    )
    try:
        told = subprocess.run(
            command,
            shell=True,
            input=given,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=JUDGED_FOR,
        )
    except (subprocess.TimeoutExpired, UnicodeDecodeError) as error:
        raise ValueError(f"--metric-command {command}: {error}") from None
    if told.returncode:
        last = (told.stderr.strip().splitlines() or ["nothing on its standard error"])[-1]
        raise ValueError(f"--metric-command {command} ended with {told.returncode}: {last}")
    said, n = told.stdout.split("\n"), len(examples["row"])
    said = said[:-1] if said[-1] == "" else said
    if len(said) != n:
        raise ValueError(
            f"--metric-command {command} printed {len(said)} lines for {n} rows; a number a row is asked"
        )
    try:
        values = [float(line) for line in said]
    except ValueError:
        wrong = next(i for i, line in enumerate(said) if not _is_number(line))
        what = f"line {wrong + 1} is {said[wrong][:60]!r}"
        raise ValueError(f"--metric-command {command}: {what}; a number a row is asked") from None
    if not np.isfinite(values).all():
        wrong = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"--metric-command {command}: line {wrong + 1} is {said[wrong]}, which is no figure")
    files.write_checked(cell / "judged.json", {"key": key, "values": values})
    return np.array(values, np.float64)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def row_of(judge: Callable[..., np.ndarray], way: str, seeds: Sequence[int]) -> dict[str, Any]:
    """A way beside random, over some seeds."""
    own = judge(way, seeds)
    margin, error = paired_margin(own - judge(RANDOM, seeds))
    loss, _ = paired_margin(judge(way, seeds, "loss") - judge(RANDOM, seeds, "loss"))
    row = {"way": way, "seeds": len(seeds), "mean": float(own.mean()), "margin": margin, "error": error}
    return {**row, "low": margin - ERRORS * error, "high": margin + ERRORS * error, "loss_margin": loss}


def better(rows: Iterable[Mapping[str, Any]], count: int) -> list[str]:
    """So many ways that go on, random among them whatever it did."""
    others = sorted((row for row in rows if row["way"] != RANDOM), key=lambda row: -row["margin"])
    return [RANDOM, *(row["way"] for row in others[: count - 1])]


def _best(table: Iterable[Mapping[str, Any]], left: Sequence[str]) -> Mapping[str, Any]:
    """Of the ways that are left, random apart, that of the largest margin."""
    rows = [row for row in table if row["way"] in left and row["way"] != RANDOM]
    return max(rows, key=lambda row: row["margin"])


def decided(
    config: SelectConfig,
    judge: Callable[..., np.ndarray],
    plan: Tries,
    done: Mapping[Cell, Figures],
    left: Sequence[str],
) -> dict[str, Any]:
    """The table of what the target was fine-tuned on, the choice and its reasons."""
    table: list[dict[str, Any]] = []
    for way in (*plan.ways, FULL):
        of = {int(cell.seed or 0): figures for cell, figures in done.items() if cell.method == way}
        if of:
            passes = max(figures["select_passes"] for figures in of.values())
            table.append({**row_of(judge, way, list(of)), "passes": passes})
    full = table.pop() if plan.full else None
    best = _best(table, left)
    shown = f"{best['way']} lies {best['margin']:+.3g} from random, {ERRORS:g} standard errors are "
    shown += f"{ERRORS * best['error']:.3g} ({best['seeds']} seeds)"
    is_above = best["margin"] > ERRORS * best["error"]
    chosen = best["way"] if is_above else RANDOM
    reasons = [f"{shown}: {'take it' if is_above else 'random'}"]
    if config.trying.metric == "loss" and not config.trying.metric_command:
        reasons.append("judged by loss: across methods it hardly goes with a task's own metric (--metric)")
    return {"chosen": chosen, "reasons": reasons, "ways": table, "full": full}


def larger(config: SelectConfig, about: Mapping[str, Any], left: Sequence[str]) -> list[str]:
    """What a try-out would cost that could tell the best way from random, were its margin as it looks."""
    best = _best(about["ways"], left)
    if best["margin"] <= 0 or not best["error"]:
        return []
    times = (ERRORS * best["error"] / best["margin"]) ** 2
    if times > 1000:
        return ["no try-out of a sensible size would tell it from random"]
    share = times * about["predicted"]["share"]
    return [f"if that is its real margin, a try-out would tell it at --try-cost {share:.2g}"]
