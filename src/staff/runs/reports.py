"""report.html: the page of a run, made from its files and, where it is still there unchanged, the pool."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from staff import files
from staff.config import SelectConfig, from_mapping, read_yaml
from staff.data import rows
from staff.data.locate import locate
from staff.report.page import made_or_said
from staff.runs.outputs import Run, load_run

REPORT_PAGE = "report.html"


def report_run(folder: str | Path) -> Path:
    """Make a run's page again; of a run with several coresets one for all of them.

    Raises:
        ValueError: the folder holds no finished run, or its files have changed.
    """
    folder = Path(folder)
    cells = files.read_table(folder / "cells.csv") if (folder / "cells.csv").exists() else []
    runs = [load_run(folder / cell["folder"]) for cell in cells] or [load_run(folder)]
    return write_report(folder, runs)


def write_report(folder: Path, runs: Sequence[Run], pool: rows.Rows | None = None) -> Path:
    """Write the page of some coresets of one run.

    Args:
        folder: of the run.
        pool: its rows, where they are at hand.
    """
    from staff.report.run_page import run_page
    from staff.report.table import Texts

    where = next(p for p in (folder, folder.parent) if (p / "config.yaml").exists())
    config = from_mapping(SelectConfig, read_yaml(where / "config.yaml"), str(where / "config.yaml"))
    cells = [run.facts for run in runs]
    numbers = cells[0].columns["row"]
    texts = None
    if pool is None:
        pool = _pool_again(config, runs[0].manifest, where)
    if pool is not None and np.isin(numbers, pool.numbers).all():
        texts = Texts(pool, pool.numbers)
    else:
        kept = _kept_again(config, runs)
        texts = kept and Texts(
            *kept, "The data is not where it was, or has changed: only rows that were kept have their text"
        )
    names = {
        "data": ", ".join(Path(name).name for name in config.data) or "rows in memory",
        "folder": str(folder),
    }
    for name in ("target", "draft"):  # of a path its last part
        if text := getattr(config, name):
            names[name] = Path(text).name if text.count("/") > 1 else text
    overlap = files.read_table(folder / "overlap.csv") if len(runs) > 1 else []
    page = run_page(cells, names, texts, overlap)
    files.write_text(folder / REPORT_PAGE, page)
    return folder / REPORT_PAGE


def try_report(folder: Path, runs: Sequence[Run]) -> Path | None:
    """`write_report` at the end of a run, which it does not fail."""
    return made_or_said(folder / REPORT_PAGE, lambda: write_report(folder, runs, runs[0].rows))


def _pool_again(config: SelectConfig, manifest: dict[str, Any], folder: Path) -> rows.Rows | None:
    """The pool from local files, where they are as they were."""
    reading = config.reading
    if not config.data or not (
        reading.dataset_info
        or all(Path(name).expanduser().is_file() or Path(name).is_dir() for name in config.data)
    ):
        return None
    try:
        found = locate(
            list(config.data), reading.split, reading.dataset_config, reading.revision, reading.dataset_info
        )
        hashes = (files.read_checked(folder / "work" / "hashes.json") or {}).get("hashes", {})
        contents = files.fingerprint([files.hash_file(path, hashes) for path in found.paths])
        if not found.paths or contents != manifest["inputs"].get("data"):
            return None
        return rows.read(found, **reading.keywords())
    except (ValueError, OSError):
        return None


def _kept_again(config: SelectConfig, runs: Sequence[Run]) -> tuple[rows.Rows, np.ndarray] | None:
    """The rows of the largest coreset and their row numbers."""
    run = max(runs, key=lambda run: len(run.indices))
    read = partial(rows.read, str(run.path / "coreset.jsonl"), train_on=config.reading.train_on)
    try:
        kept = read(columns=config.reading.columns)
        return (kept, run.indices) if len(kept) == len(run.indices) else None
    except (ValueError, OSError):
        return None
