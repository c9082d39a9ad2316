"""What a finished selection leaves: the files of a coreset, the tables over several, and how they are known again."""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from staff.data import export
from staff.data import rows as formats
from staff.config import SelectConfig, flat, from_mapping, read_yaml
from staff.methods import Method
from staff.methods.likeness import Likeness, likeness, nestedness
from staff.runs.scorefile import write_scores
from staff.files import changed_files, hash_file, read_arrays, read_checked, write_arrays, write_checked, write_json, write_text, write_whole
from staff.runs.store import Ledger
from staff.types import Region, Selection
from staff.runs.pieces import PACKAGES, Work, commit, version_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A finished selection.

    Attributes:
        path: its folder.
        indices: (m,) int64 row numbers in the input that were kept.
        selection: pool positions, regions, what was verified.
        scores: (n,) float32 scores that the method chose by; None for random.
        cost: what cost.json holds.
        manifest: what manifest.json holds.
    """

    path: Path
    indices: np.ndarray
    selection: Selection
    scores: np.ndarray | None
    cost: dict[str, Any] = field(repr=False)
    manifest: dict[str, Any] = field(repr=False)
    read_rows: Callable[[], formats.Rows] = field(repr=False, compare=False)

    @cached_property
    def rows(self) -> formats.Rows:
        """The pool, read again where the run was finished before."""
        return self.read_rows()


@dataclass(frozen=True)
class Cell:
    """One coreset of a run: a method at one pruning rate.

    Attributes:
        folder: where its files go: the run's folder itself where it makes one coreset only.
        kept: what a finished cell is known by again, in work/.
    """

    method: str
    pruning_rate: float | None
    folder: Path
    kept: Path


def write(config, run, cell: Cell, method: Method, rows: formats.Rows, selection: Selection, scores, work: Work, key: str) -> Run:
    """Write the results; the manifest comes last and says that all are there."""
    folder = cell.folder
    folder.mkdir(exist_ok=True)
    indices = rows.numbers[selection.indices]
    model = config.target if config.target and not config.target.endswith(".gguf") else "MODEL"
    files = export.write_coreset(folder, rows, selection.indices, model, same=config.format == "same")
    write_whole(folder / "indices.npy", lambda aside: _save_array(aside, indices))
    if selection.regions:
        names = [field.name for field in dataclasses.fields(Region)]
        lines = [",".join(["region", *names])]
        lines += [",".join(map(_cell, [i, *dataclasses.astuple(region)])) for i, region in enumerate(selection.regions)]
        write_text(folder / "regions.csv", "\n".join(lines) + "\n")
    write_scores(folder / "scores.parquet", _score_columns(config, method, rows, selection, scores, work))
    fidelity = _fidelity(scores, selection, work.ledger("target")) if len(selection.verified) else None
    kept = {"indices": selection.indices, "verified": selection.verified, "filled": np.array([selection.filled, selection.filled_from_cut])}
    kept |= {} if selection.region_of is None else {"region_of": selection.region_of}
    kept |= {} if scores is None else {"scores": scores}
    write_arrays(cell.kept, kept)
    cost = work.cost(method, selection)
    write_json(folder / "cost.json", cost)
    written = (*files, "indices.npy", "scores.parquet", "cost.json", *(["regions.csv"] if selection.regions else []))
    manifest = {
        "staff": version_of("staff-coreset"),
        "commit": commit(),
        "finished": key,
        "method": cell.method,
        "pruning_rate": cell.pruning_rate,
        "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "n": len(rows),
        "m": len(indices),
        "skipped": len(rows.skipped),
        "format": rows.format,
        "notes": list(rows.notes),
        "inputs": work.inputs,
        "settings": {name: value for name, value in flat(config).items() if name not in ("data", "output")},
        "seed": config.seed,
        "fidelity": fidelity,
        "files": {name: hash_file(folder / name) for name in written},
        "versions": {name: version_of(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    if work.sources:
        manifest |= {"device": work.device_name(), "dtype": str(work.dtype).removeprefix("torch.")}
        pool = work.pool("draft" if "draft" in work.sources else "target")
        manifest |= {"tokens": int(pool.lengths.sum()), **facts_of(rows, pool)}
    write_checked(folder / "manifest.json", manifest)
    return Run(folder, indices, selection, scores, cost, manifest, lambda: rows)


def _score_columns(config, method: Method, rows: formats.Rows, selection: Selection, scores, work: Work) -> dict[str, Any]:
    """Of every sample: row number, id, what it was chosen by, loss and response tokens where a model gave them, region (-1: cut), kept."""
    need = "" if config.scores else method.needs.get("scores", "")
    model, _, quantity = need.partition("/")
    has_ids = rows.layout.id is not None
    columns = {"row": rows.numbers, "id": [example.id for example in rows.examples()] if has_ids else [None] * len(rows)}
    if scores is not None:
        columns[quantity or "score"] = scores
    if quantity in ("effort", "el2n", "entropy"):
        columns["loss"] = work.quantities(model)["loss"]
    if work.sources:
        columns["tokens"] = work.pool("draft" if "draft" in work.sources else "target").response_tokens()
    if selection.region_of is not None:
        columns["region"] = selection.region_of
    return {**columns, "selected": np.isin(np.arange(len(rows)), selection.indices)}


def pushed(config: SelectConfig, runs: list[Run]) -> list[Run]:
    """The same runs, their coresets on the hub where that was asked for: OWNER/NAME, of several OWNER/NAME-FOLDER."""
    for run in runs if config.push_to_hub else ():
        name = config.push_to_hub if len(runs) == 1 else f"{config.push_to_hub}-{run.path.name}"
        export.push_to_hub(run.path / "coreset.jsonl", str(name))
    return runs


def remarks(facts: Mapping[str, Any], max_length: int) -> list[str]:
    """What a user should know of how the data was read and cut, a sentence each.

    Args:
        facts: a manifest, or what `_facts` gives.
        max_length: tokens at most.
    """
    said = list(facts.get("notes", ()))
    if facts.get("skipped"):
        said.append(f"{facts['skipped']} rows can't be used and were left out")
    longer = f"longer than --max-length {max_length}"
    if facts.get("truncated"):
        said.append(f"{facts['truncated']} prompts lost their start: {longer}")
    if facts.get("cut_responses"):
        said.append(f"{facts['cut_responses']} responses lost their end: {longer}")
    if facts.get("spelled"):
        said.append(f"{facts['spelled']} rows hold text that spells the model's control tokens; it is read as such, as trainers do")
    return said


def facts_of(rows: formats.Rows, pool) -> dict[str, Any]:
    counts = {"truncated": pool.truncated, "cut_responses": pool.cut_responses, "spelled": pool.spelled}
    return {"notes": list(rows.notes), "skipped": len(rows.skipped), **counts}


def warn(rows: formats.Rows, pool, max_length: int, skipped: Path) -> None:
    """The remarks as warnings, where no summary says them; rows left out are listed in a file."""
    for remark in remarks(facts_of(rows, pool), max_length):
        logger.warning(remark)
    if rows.skipped:
        write_whole(skipped, rows.write_skipped)
        logger.warning("they are listed in %s", skipped)


def write_tables(folder: Path, cells: list[Cell], runs: list[Run]) -> None:
    """cells.csv, a line a coreset; likeness.csv, how alike methods choose and how nested one's coresets are across rates."""
    lines = ["method,pruning_rate,m,verified,folder"]
    for cell, run in zip(cells, runs, strict=True):
        values = (cell.method, cell.pruning_rate, len(run.indices), len(run.selection.verified), cell.folder.name)
        lines.append(",".join(map(_cell, values)))
    write_text(folder / "cells.csv", "\n".join(lines) + "\n")
    coresets = {cell.folder.name: run.selection.indices for cell, run in zip(cells, runs, strict=True)}
    n = runs[0].manifest["n"]
    found = []
    for method in dict.fromkeys(cell.method for cell in cells):
        found += nestedness({cell.folder.name: coresets[cell.folder.name] for cell in cells if cell.method == method}, n)
    for rate in dict.fromkeys(cell.pruning_rate for cell in cells):
        found += likeness({cell.folder.name: coresets[cell.folder.name] for cell in cells if cell.pruning_rate == rate}, n)
    names = [field.name for field in dataclasses.fields(Likeness)]
    lines = [",".join(names), *(",".join(map(_cell, dataclasses.astuple(pair))) for pair in found)]
    write_text(folder / "likeness.csv", "\n".join(lines) + "\n")


def _fidelity(scores: np.ndarray, selection: Selection, target: Ledger) -> float | None:
    """Spearman's rank correlation of draft and target over the samples that both scored."""
    from numpy import argsort, corrcoef

    on_draft, on_target = scores[selection.verified], target(selection.verified)
    if len(on_draft) < 3 or np.ptp(on_draft) == 0 or np.ptp(on_target) == 0:
        return None
    return float(corrcoef(argsort(argsort(on_draft)), argsort(argsort(on_target)))[0, 1])


def _save_array(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)


def _cell(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def find_finished(cell: Cell, key: str | None, read: Callable[[], formats.Rows]) -> Run | None:
    """A coreset as it lies on disk, where it was finished with these settings and its files are as they were written."""
    path = cell.folder
    manifest = read_checked(path / "manifest.json")
    if manifest is None or key not in (None, manifest["finished"]) or changed_files(path, manifest["files"]):
        return None
    kept = read_arrays(cell.kept)
    if kept is None:
        return None
    cost = json.loads((path / "cost.json").read_text(encoding="utf-8"))
    indices = np.load(path / "indices.npy", allow_pickle=False)
    regions: tuple[Region, ...] = ()
    if "region_of" in kept:
        lines = (path / "regions.csv").read_text(encoding="utf-8").splitlines()[1:]
        kinds = (float, float, int, int, float, int, int)
        regions = tuple(Region(*(kind(cell) for kind, cell in zip(kinds, line.split(",")[1:], strict=True))) for line in lines)
    filled = map(int, kept["filled"])
    selection = Selection(kept["indices"], regions, kept.get("region_of"), kept["verified"], *filled)
    return Run(path, indices, selection, kept.get("scores"), cost, manifest, read)


def load_run(path: str | Path) -> Run:
    """A finished run from its folder; the pool is read again from where it was.

    Raises:
        ValueError: the folder holds no finished run, or its files have changed since.
    """
    folder = Path(path)
    if not (folder / "manifest.json").exists():
        raise ValueError(f"{folder} holds no finished run (no manifest.json)")
    path = next(place / "config.yaml" for place in (folder, folder.parent) if (place / "config.yaml").exists())
    config = from_mapping(SelectConfig, read_yaml(path), str(path))
    kept = folder / "work" / "selection.npz"
    if not kept.exists():
        kept = folder.parent / "work" / f"selection-{folder.name}.npz"
    finished = find_finished(Cell("", None, folder, kept), None, lambda: formats.read(list(config.data), **config.reading.keywords()))
    if finished is None:
        raise ValueError(f"{folder}: its files are not as they were written; type `staff select --config {path}` again")
    return finished
