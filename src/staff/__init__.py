"""STAFF: the part of a fine-tuning data set that a large language model really needs, at a small model's
price.

    import staff
    run = staff.select("train.jsonl", target="Qwen/Qwen2.5-7B", draft="Qwen/Qwen2.5-0.5B", pruning_rate=0.8)
    run.indices, run.selection.regions, run.scores, run.coreset
    adapter = staff.finetune(run.path / "coreset.jsonl", model="Qwen/Qwen2.5-7B")

Every function does what the command of its name does, shows bars in a terminal and a notebook, and takes that
command's flags as keywords. Importing it loads no torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack

from staff.words import Findings, in_words, python_words

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import datasets
    import pandas
    import pyarrow as pa

    from staff.methods import METHODS
    from staff.runs.outputs import Run
    from staff.settings import (
        EvaluateSettings,
        FinetuneSettings,
        InspectSettings,
        PlanSettings,
        ScoreSettings,
        SelectSettings,
    )
    from staff.types import Progress, Selection

    Data: TypeAlias = (
        str
        | os.PathLike[str]
        | Sequence[str | os.PathLike[str]]
        | Iterable[Mapping[str, Any]]
        | datasets.Dataset
        | pandas.DataFrame
    )

__version__ = "0.1.0"
__all__ = [
    "METHODS",
    "Findings",
    "Run",
    "Selection",
    "compare",
    "evaluate",
    "finetune",
    "inspect",
    "load_run",
    "plan",
    "score",
    "select",
    "select_grid",
]


@python_words
def select(
    data: Data,
    *,
    method: str | None = None,
    pruning_rate: float | None = None,
    output: str | os.PathLike[str] | None = None,
    update: bool = False,
    quiet: bool = False,
    on_progress: Progress | None = None,
    **settings: Unpack[SelectSettings],
) -> Run:
    """Choose the coreset of a pool, as `staff select` does.

    Args:
        data: a path, several paths, a list of dicts, a `datasets.Dataset` or a pandas DataFrame.
        method: a key of METHODS; None: that of the preset, or the default.
        pruning_rate: the fraction of the pool removed, in [0, 1); or give `budget`, the samples kept.
        output: the run's folder; None: a new temporary one.
        update: go on in a folder that was begun with other settings, keeping what still fits.
        quiet: no bars.
        on_progress: called with (stage, done, in all), in place of bars.
        **settings: see `staff.settings.SelectSettings`.

    Returns:
        Run: path, rows, indices (row numbers kept), coreset, selection, scores, cost, manifest.

    Raises:
        ValueError: something that the caller can mend: a bad row, an unknown model, a setting out of range.
    """
    (run,) = select_grid(
        data,
        methods=() if method is None else (method,),
        pruning_rates=() if pruning_rate is None else (pruning_rate,),
        output=output,
        update=update,
        quiet=quiet,
        on_progress=on_progress,
        **settings,
    )
    return run


@python_words
def select_grid(
    data: Data,
    *,
    methods: Sequence[str] = (),
    pruning_rates: Sequence[float] = (),
    output: str | os.PathLike[str] | None = None,
    update: bool = False,
    quiet: bool = False,
    on_progress: Progress | None = None,
    **settings: Unpack[SelectSettings],
) -> list[Run]:
    """A coreset for each method and pruning rate, from the same passes over the models.

    Args:
        methods: keys of METHODS; none: that of the preset, or the default.
        pruning_rates: fractions of the pool removed, in [0, 1).

    Returns:
        a Run for each, methods outside, rates inside. The other arguments are those of `select`.
    """
    from staff import config, pipeline

    values: dict[str, Any] = {**settings, "pruning_rate": tuple(pruning_rates)}
    values |= {"method": tuple(methods)} if methods else {}
    made, rows = _settled(config.SelectConfig, data, values, output)
    with _shown(quiet, on_progress) as progress:
        if "auto" in made.method:
            if rows is not None:
                raise ValueError("method auto reads the data again and again: write it to a file first")
            from staff.tryout import run as tryout

            made = tryout.settled(made, tryout.try_ways(made, update=update, on_progress=progress))
        return pipeline.select(made, rows, update=update, on_progress=progress)


@python_words
def score(
    data: Data,
    *,
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    quiet: bool = False,
    on_progress: Progress | None = None,
    **settings: Unpack[ScoreSettings],
) -> pa.Table:
    """The scores of every sample on one model, as `staff score` writes them.

    Args:
        output: a Parquet file that is left; None: none is. The other arguments are those of `select`.

    Returns:
        row, id, effort, loss, el2n, entropy, hes, upd, prompt_tokens, response_tokens.
    """
    import pyarrow.parquet as pq

    from staff import config, jobs

    with _new("scores.parquet", output) as path, _shown(quiet, on_progress) as progress:
        made, rows = _settled(config.ScoreConfig, data, {**settings, "model": model}, path)
        return pq.read_table(jobs.score(made, rows, on_progress=progress)[0])


@python_words
def finetune(
    data: Data,
    *,
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    update: bool = False,
    quiet: bool = False,
    on_progress: Progress | None = None,
    **settings: Unpack[FinetuneSettings],
) -> Path:
    """Fine-tune a model with LoRA, as `staff finetune` does. The arguments are those of `select`.

    Returns:
        the adapter's folder, with log.jsonl and loss.png, and merged/ where that was asked for.
    """
    from staff import config, jobs

    path = output or _temporary()
    made, rows = _settled(config.FinetuneConfig, data, {**settings, "model": model}, path)
    with _shown(quiet, on_progress) as progress:
        return jobs.finetune(made, rows, update=update, on_progress=progress)


@python_words
def evaluate(
    data: Data,
    *,
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    quiet: bool = False,
    on_progress: Progress | None = None,
    **settings: Unpack[EvaluateSettings],
) -> Findings:
    """Answer test examples with a model and compare with their references, as `staff evaluate` does.

    Args:
        output: a .jsonl or .parquet file, a row an example; None: in a new temporary folder.

    Returns:
        n, metrics, loss, tokenisation, and `scores`, the file and its checksum.
    """
    from staff import config
    from staff.comparison import evaluate as evaluation

    path = output or _temporary() / "answers.jsonl"
    made, rows = _settled(config.EvaluateConfig, data, {**settings, "model": model}, path)
    with _shown(quiet, on_progress) as progress:
        found = evaluation.evaluate(made, rows, on_progress=progress)
    return Findings(found, evaluation.describe(found, str(path)))


@python_words
def inspect(
    data: Data, *, model: str | os.PathLike[str] | None = None, **settings: Unpack[InspectSettings]
) -> Findings:
    """How data is read, and what a model would see of it, as `staff inspect` shows it."""
    from rich.text import Text

    from staff import config, inspection

    made, rows = _settled(config.InspectConfig, data, {**settings, "model": model})
    found = inspection.look(made, rows)
    about, title, rows = inspection.render(found).rpartition(inspection.ROWS_AS_SEEN)
    plain = [Text.from_markup(text, emoji=False).plain for text in (about, title + rows)]
    return Findings(found, *plain)


@python_words
def plan(
    data: Data,
    *,
    target: str | os.PathLike[str],
    quiet: bool = False,
    on_progress: Progress | None = None,
    **settings: Unpack[PlanSettings],
) -> Findings:
    """What every method would take on this machine, where it pays, and what to do, as `staff plan` says."""
    from staff import config, planning

    made, rows = _settled(config.PlanConfig, data, {**settings, "target": target})
    with _shown(quiet, on_progress) as progress:
        found = planning.make_plan(made, progress, rows)
    text = planning.describe_plan(found)
    found |= {"advice": [in_words(said) for said in found["advice"]]}
    found |= {"verdict": in_words(found["verdict"])} if "verdict" in found else {}
    return Findings(found, text)


@python_words
def compare(
    comparison: str | os.PathLike[str] | Mapping[str, Any],
    *,
    output: str | os.PathLike[str] | None = None,
    update: bool = False,
    quiet: bool = False,
    on_progress: Progress | None = None,
) -> Findings:
    """Methods, pruning rates and seeds against each other, as `staff compare` does.

    Args:
        comparison: its YAML file, or what one says, as a dict.

    Returns:
        results, a row a cell, and the tables' files.
    """
    from staff.comparison import grid, tables
    from staff.comparison import run as comparing

    made = grid.read_comparison(comparison, None if output is None else str(output))
    with _shown(quiet, on_progress) as progress:
        path = comparing.compare(made, update=update, on_progress=progress)
    text = tables.report(made.output, {name: task.metrics for name, task in made.tasks.items()})
    files = {name: str(made.output / name) for name in ("results.csv", "results.md", "differences.csv")}
    return Findings({"results": tables.read_results(path), "files": files}, text)


@contextlib.contextmanager
def _shown(quiet: bool, on_progress: Progress | None) -> Iterator[Progress | None]:
    """The caller's own progress, or bars where somebody looks on."""
    if quiet or on_progress:
        yield on_progress
        return
    from staff.bars import Bars

    with Bars(lines=False) as bars:
        yield bars


def _temporary() -> Path:
    import tempfile

    return Path(tempfile.mkdtemp(prefix="staff-"))


@contextlib.contextmanager
def _new(name: str, output: str | os.PathLike[str] | None) -> Iterator[str | os.PathLike[str]]:
    """Where a file goes: the caller's place, or one that is gone afterwards."""
    import shutil

    if output is not None:
        yield output
        return
    folder = _temporary()
    try:
        yield folder / name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _settled(
    kind: type, data: Data, values: Mapping[str, Any], output: str | os.PathLike[str] | None = None
) -> tuple[Any, Any]:
    """A config, and the rows where they are in no files."""
    from staff import config

    rows: Any = data
    given = dict(values)
    paths = (
        [data] if isinstance(data, (str, os.PathLike)) else data if isinstance(data, (list, tuple)) else []
    )
    if paths and all(isinstance(path, (str, os.PathLike)) for path in paths):
        given["data"], rows = tuple(map(str, paths)), None
    if output is not None:
        given["output"] = str(output)
    return config.from_mapping(kind, given, "staff"), rows


@python_words
def load_run(path: str | os.PathLike[str]) -> Run:
    """A finished run from its folder; the pool is read again from where it was.

    Raises:
        ValueError: the folder holds no finished run.
    """
    from staff.runs import outputs

    return outputs.load_run(str(path))


def __getattr__(name: str) -> Any:
    import importlib

    homes = {"METHODS": "staff.methods", "Selection": "staff.types", "Run": "staff.runs.outputs"}
    if name not in homes:
        raise AttributeError(f"module 'staff' has no attribute {name!r}")
    return getattr(importlib.import_module(homes[name]), name)
