"""What a finished selection leaves: the files of a coreset, the tables over several, and how they are known
again."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from staff import files
from staff.config import SelectConfig, from_mapping, read_yaml
from staff.data import export, hub, rows
from staff.methods.fidelity import Fidelity
from staff.methods.overlap import Overlap, nestedness, overlaps
from staff.report import notebook
from staff.report.facts import Facts, read_columns
from staff.runs.aside import Aside
from staff.runs.scorefile import write_scores
from staff.runs.store import RunFolder, find_finished
from staff.types import Region, Selection

if TYPE_CHECKING:  # a finished run is recognised without it
    import altair as alt
    import datasets
    import pyarrow as pa

    from staff.data.tokens import Pool

logger = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class Run:
    """A finished selection.

    Attributes:
        path: its folder.
        indices: (m,) int64 row numbers in the input that were kept.
        selection: pool positions, regions, what was verified.
        cost: what cost.json holds.
        manifest: what manifest.json holds.
    """

    path: Path
    indices: np.ndarray
    selection: Selection
    cost: dict[str, Any]
    manifest: dict[str, Any]
    read_rows: Callable[[], rows.Rows] = field(compare=False)

    @cached_property
    def rows(self) -> rows.Rows:
        """The pool, read again where the run was finished before."""
        rows = self.read_rows()
        if len(rows) == self.manifest["n"]:
            return rows
        # the chat template refused some that the file has: they were left out
        usable = set(self.scores.column("row").to_pylist())
        return rows.without({i: "" for i, number in enumerate(rows.numbers.tolist()) if number not in usable})

    @cached_property
    def scores(self) -> pa.Table:
        """A row for each usable row of the pool: what scores.parquet holds."""
        import pyarrow.parquet as pq

        return pq.read_table(self.path / "scores.parquet")

    @cached_property
    def coreset(self) -> list[dict[str, Any]]:
        """The rows that were kept, as they came."""
        return [dict(row) for row in self.rows.raw(self.selection.indices)]

    @property
    def fidelity(self) -> Fidelity | None:
        """How faithful the draft is, told from the verified samples; None where none were."""
        known: dict[str, Any] = self.manifest.get("fidelity") or {}
        numbers: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
        return Fidelity(**numbers) if numbers else None

    @cached_property
    def facts(self) -> Facts:
        """What its page and its charts show."""
        path = self.path / "dropped.jsonl"
        named = path.name in self.manifest["files"]
        lines = path.read_text(encoding="utf-8").splitlines() if named else []
        dropped = {entry["row"]: entry["reason"] for entry in map(json.loads, lines)}
        settings = self.manifest.get("settings", {})
        said = remarks(self.manifest, settings.get("max_length", 0))
        columns = read_columns(self.scores)
        return Facts(self.path.name, self.manifest, self.cost, self.selection.regions, columns, said, dropped)

    def plot_regions(self) -> alt.TopLevelMixin:
        """How many samples each region holds and how many were kept, budgets before and after verification,
        V with its intervals; a row for each group.

        Raises:
            ValueError: the method has no regions.
        """
        return notebook.regions(self.facts)

    def plot_fidelity(self) -> alt.TopLevelMixin:
        """The verified samples: the draft's score against the target's.

        Raises:
            ValueError: nothing was verified.
        """
        return notebook.fidelity_of(self.facts)

    def plot_shares(self, column: str) -> alt.TopLevelMixin:
        """Shares of pool and coreset along a column of `scores`: bins of a number, values of a text.

        Raises:
            ValueError: there is no such column.
        """
        return notebook.shares(self.facts, column)

    def plot_samples(self, x: str, y: str) -> alt.TopLevelMixin:
        """Every sample by two columns of `scores`, kept or dropped.

        Raises:
            ValueError: there is no such column.
        """
        return notebook.samples(self.facts, x, y)

    def _repr_html_(self) -> str:
        return notebook.card(self.facts, repr(self))

    def summary(self) -> str:
        """What a person wants to know of it, as `staff select` prints it, in Python's words."""
        from staff.runs.summary import summary
        from staff.words import in_words

        return summary(self, config_of(self.path), in_words)

    def dataset(self) -> datasets.Dataset:
        """The coreset as TRL's `SFTTrainer` takes it, so that it trains on the text and the labels that were
        scored.

        Rows have `prompt` and `completion`, or `messages`, as lists of messages, to which SFTTrainer puts the
        chat template (to texts it puts none); where it would put the loss elsewhere `input_ids` and `labels`.

        Raises:
            ValueError: `datasets` is not installed, or too old; or TRL has no words for these rows.
        """
        return export.dataset_of(self.path / "train")

    def __repr__(self) -> str:
        n, m, method = (self.manifest[name] for name in ("n", "m", "method"))
        lines = [f"Run: {m} of {n} samples kept by {method}, in {self.path}"]
        if self.fidelity:
            lines.append(f"  draft: {self.fidelity.verdict}, {self.fidelity.shown()}")
        if "passes" in self.cost:
            lines.append(
                f"  cost: {self.cost['passes']:.2f} passes of the target, {self.cost['seconds']:.0f} s"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Coreset:
    """One coreset of a run, made or to be made: a method at one pruning rate.

    Attributes:
        folder: where its files go: the run's folder itself where it makes one coreset only.
        selection_path: what a finished selection is known by again, in work/.
    """

    method: str
    pruning_rate: float | None
    folder: Path
    selection_path: Path


def coresets_of(config: SelectConfig, run: RunFolder) -> list[Coreset]:
    """A coreset for each method and pruning rate, methods outside."""
    named = _named(config)
    if len(named) == 1:
        return [Coreset(*named[0][:2], run.path, run.work / "selection.npz")]
    return [Coreset(m, rate, run.path / name, run.work / f"selection-{name}.npz") for m, rate, name in named]


def _named(config: SelectConfig) -> list[tuple[str, float | None, str]]:
    rates = config.pruning_rate or (None,)
    return [(m, rate, m if rate is None else f"{m}-{rate:g}") for m in config.method for rate in rates]


def write(
    run: RunFolder,
    coreset: Coreset,
    key: str,
    config: SelectConfig,
    aside: Aside,
    selection: Selection,
    columns: dict[str, Any],
    cost: Mapping[str, Any],
    about: Mapping[str, Any],
    target: tuple[Any, Pool | None, Path | None] = (None, None, None),
) -> Run:
    """Write the results; the manifest comes last and says that all are there.

    Args:
        key: what the coreset is made of, as a fingerprint.
        aside: the pool, and what of it was set aside.
        selection: among the rows that are left.
        columns: of scores.parquet, a value for each row that is left.
        about: what else the manifest says.
        target: its tokenizer, the pool in its tokens, and its folder, where they are known.
    """
    folder = coreset.folder
    folder.mkdir(exist_ok=True)
    pool = aside.left()
    indices = pool.numbers[selection.indices]
    here = Path(config.target).expanduser()
    tokenizer, tokens, unpacked = target
    model: str | None = str(here.resolve()) if here.is_dir() else config.target
    if config.target.endswith(".gguf"):  # which no other trainer loads
        model = str(unpacked.absolute()) if unpacked else None
    same = config.format == "same"
    names = export.write_coreset(
        folder, pool, selection.indices, model or None, config.reading, tokenizer, tokens, same=same
    )
    files.write_whole(folder / "indices.npy", partial(_save_array, indices))
    if selection.regions:
        header = ["region", *(f.name for f in dataclasses.fields(Region))]
        regions = [[i, *dataclasses.astuple(region)] for i, region in enumerate(selection.regions)]
        files.write_csv(folder / "regions.csv", header, regions)
        names.append("regions.csv")
    if aside.reasons:
        aside.write(folder / "dropped.jsonl")
        names.append("dropped.jsonl")
    pool, selection = aside.rows, aside.widened(selection)
    columns = row_columns(pool) | aside.columns(columns, config.dedup is not None)
    write_scores(folder / "scores.parquet", columns)
    filled = np.array([selection.filled, selection.filled_from_cut])
    arrays = {"indices": selection.indices, "verified": selection.verified, "filled": filled}
    arrays |= {} if selection.weights is None else {"weights": selection.weights}
    arrays |= {} if selection.region_of is None else {"region_of": selection.region_of}
    files.write_arrays(coreset.selection_path, arrays)
    files.write_json(folder / "cost.json", cost)
    facts = {
        "method": coreset.method,
        "pruning_rate": coreset.pruning_rate,
        "n": len(pool),
        "m": len(indices),
        **about,
    }
    manifest = run.finish(key, facts, [*names, "indices.npy", "scores.parquet", "cost.json"], folder)
    return Run(folder, indices, selection, dict(cost), manifest, lambda: pool)


def _save_array(array: np.ndarray, path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)


def row_columns(pool: rows.Rows) -> dict[str, Any]:
    """Row numbers and ids, as scores.parquet begins."""
    has_ids = pool.layout.id is not None
    return {"row": pool.numbers, "id": [e.id for e in pool.examples()] if has_ids else [None] * len(pool)}


def fingerprint_rows(pool: rows.Rows) -> str:
    """A fingerprint of every value of every usable row."""
    digest = hashlib.sha256()
    for row in pool.raw(range(len(pool))):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode(errors="surrogatepass") + b"\n")
    return digest.hexdigest()[:12]


def publish(config: SelectConfig, runs: list[Run]) -> list[Run]:
    """The same runs, their coresets on the hub where that was asked for: OWNER/NAME, of several
    OWNER/NAME-FOLDER."""
    made_of = {
        "data": config.data or ("rows in memory",),
        "target": (config.target,),
        "draft": (config.draft or "",),
    }
    told = {name: names for name, names in made_of.items() if all(names)}
    for run, name in zip(runs, hub_names(config), strict=False):
        card = hub.card_of(run.manifest, told, config.license)
        hub.push(run.path / "coreset.jsonl", name, card, config.public)
    return runs


def hub_names(config: SelectConfig) -> list[str]:
    """The data sets that the coresets go to, if they do."""
    names = [name for _, _, name in _named(config)]
    several = [f"{config.push_to_hub}-{name}" for name in names]
    return (several if len(names) > 1 else [config.push_to_hub]) if config.push_to_hub else []


def remarks(facts: Mapping[str, Any], max_length: int) -> list[str]:
    """What a user should know of how the data was read and cut, a sentence each.

    Args:
        facts: a manifest, or what `facts_of` gives.
        max_length: tokens at most.
    """
    said = list(facts.get("notes", ()))
    longer = f"longer than --max-length {max_length}"
    sentences = {
        "skipped": "rows can't be used and were left out",
        "truncated": f"prompts lost the start of their text: {longer}",
        "cut_responses": f"responses lost their end: {longer}",
        "stripped": "answers have reasoning that the chat template leaves away: it is not learnt",
        "spelled": "rows hold text that spells control tokens of the model; it is read so, as trainers do",
    }
    for reason, count in facts.get("dropped", {}).items():
        said.append(f"{count} {reason}s were set aside before the choice: dropped.jsonl lists them")
    if facts.get("suspects"):
        wrong = f"{facts['suspects']} rows look wrong: the draft finds their answers no likelier with the"
        said.append(f"{wrong} prompt than without. They were not drawn: no weight in scores.parquet")
    for name, sentence in sentences.items():
        if facts.get(name):
            some = facts.get(f"{name}_rows", [])
            where = (
                f" (rows {', '.join(map(str, some[:5]))}{' and others' * (len(some) > 5)})" if some else ""
            )
            said.append(f"{facts[name]} {sentence}{where}")
    return said


def facts_of(pool: rows.Rows, tokens: Any = None) -> dict[str, Any]:
    """What was noticed in reading, and in tokenising where that was done."""
    facts = {"notes": list(pool.notes), "skipped": len(pool.skipped), "format": pool.format}
    for name, positions in tokens.remarkable().items() if tokens else ():
        facts |= {name: len(positions), f"{name}_rows": pool.numbers[positions].tolist()}
    return facts


def warn(pool: rows.Rows, tokens: Any, max_length: int, skipped: Path) -> None:
    """The remarks as warnings, where no summary says them; rows left out are listed in a file."""
    for remark in remarks(facts_of(pool, tokens), max_length):
        logger.warning(remark)
    if pool.skipped:
        files.write_whole(skipped, pool.write_skipped)
        logger.warning("they are listed in %s", skipped)


def write_tables(folder: Path, coresets: Sequence[Coreset], runs: Sequence[Run]) -> None:
    """cells.csv, a line a coreset; overlap.csv, how alike methods choose and how nested one's coresets
    are."""
    lines = [
        (c.method, c.pruning_rate, len(run.indices), len(run.selection.verified), c.folder.name)
        for c, run in zip(coresets, runs, strict=True)
    ]
    files.write_csv(folder / "cells.csv", ["method", "pruning_rate", "m", "verified", "folder"], lines)
    chosen = {run.path.name: run.selection.indices for run in runs}
    facts = runs[0].manifest
    room = facts["n"] - sum(facts.get("dropped", {}).values()), facts.get("always", 0)
    pairs = []
    for method in dict.fromkeys(c.method for c in coresets):
        pairs += nestedness(
            {c.folder.name: chosen[c.folder.name] for c in coresets if c.method == method}, *room
        )
    for rate in dict.fromkeys(c.pruning_rate for c in coresets):
        pairs += overlaps(
            {c.folder.name: chosen[c.folder.name] for c in coresets if c.pruning_rate == rate}, *room
        )
    header = [f.name for f in dataclasses.fields(Overlap)]
    files.write_csv(folder / "overlap.csv", header, map(dataclasses.astuple, pairs))


def find_run(coreset: Coreset, key: str | None, read: Callable[[], rows.Rows]) -> Run | None:
    """A coreset as it lies on disk, where it was finished with this key and its files are as they were
    written."""
    path = coreset.folder
    manifest = find_finished(path, key)
    arrays = files.read_arrays(coreset.selection_path) if manifest else None
    if manifest is None or arrays is None:
        return None
    cost = json.loads((path / "cost.json").read_text(encoding="utf-8"))
    regions: tuple[Region, ...] = ()
    if "region_of" in arrays:
        with open(path / "regions.csv", encoding="utf-8", newline="") as file:
            regions = tuple(map(_region, csv.DictReader(file)))
    filled, from_cut = map(int, arrays["filled"])
    region_of, verified, weights = arrays.get("region_of"), arrays["verified"], arrays.get("weights")
    selection = Selection(arrays["indices"], regions, region_of, verified, filled, from_cut, weights)
    indices = np.load(path / "indices.npy", allow_pickle=False)
    return Run(path, indices, selection, cost, manifest, read)


COUNTS = ("size", "verified", "budget", "selected", "even_budget")  # of a Region; the rest are numbers


def _region(line: Mapping[str, str]) -> Region:
    values = {name: (int if name in COUNTS else float)(text) for name, text in line.items() if text}
    return Region(**{name: value for name, value in values.items() if name != "region"})  # type: ignore[arg-type]


def settings_path(folder: Path) -> Path:
    """The config.yaml that a coreset's folder was made by: its own, or that of several."""
    return next(p / "config.yaml" for p in (folder, folder.parent) if (p / "config.yaml").exists())


def config_of(folder: Path) -> SelectConfig:
    """The settings that a coreset's folder was made by."""
    path = settings_path(folder)
    return from_mapping(SelectConfig, read_yaml(path), str(path))


def load_run(path: str | Path) -> Run:
    """A finished run from its folder; the pool is read again from where it was.

    Raises:
        ValueError: the folder holds no finished run, or its files have changed since.
    """
    folder = Path(path)
    if not (folder / "manifest.json").exists():
        raise ValueError(f"{folder} holds no finished run (no manifest.json)")
    if (kind := files.marked_as(folder)) not in (None, "run"):
        raise ValueError(f"{folder} is no run's folder: another command made it ({kind})")
    config = config_of(folder)
    selection_path = folder / "work" / "selection.npz"
    if not selection_path.exists():
        selection_path = folder.parent / "work" / f"selection-{folder.name}.npz"
    read = partial(rows.read, list(config.data), **config.reading.keywords())
    finished = find_run(Coreset("", None, folder, selection_path), None, read)
    if finished is None:
        again = f"type `staff select --config {settings_path(folder)}` again"
        raise ValueError(f"{folder}: its files are not as they were written; {again}")
    return finished
