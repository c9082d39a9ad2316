"""Methods x pruning rates x seeds: every cell is select, fine-tune, evaluate; what cells share is done once."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from staff import pipeline
from staff.comparison import evaluate as evaluation
from staff.comparison import diversity, metrics
from staff.comparison.grid import (
    FULL,
    UNTOUCHED,
    Cell,
    Comparison,
    Task,
    evaluate_config,
    finetune_config,
    select_config,
)
from staff.config import SelectConfig
from staff.data import rows as formats
from staff.files import (
    fingerprint,
    hash_file,
    read_arrays,
    read_checked,
    write_arrays,
    write_checked,
    write_text,
)
from staff.methods import Method
from staff.models import load as models
from staff.runs.outputs import Run
from staff.runs.pieces import models_of
from staff.runs.store import differences

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]

SPACE = 1  # raised when the same pool would make another space
POLL_SECONDS = 2.0  # how often a process looks for cells that others have let go of
WHERE = ("split", "dataset_info", "dataset_config", "revision")  # where a pool is found; a coreset is a file
COLUMNS = (
    "task", "method", "pruning_rate", "seed", "n", "m", "verified", "rouge1", "rouge2", "rougeL", "bleu", "chrf", "exact", "loss",
    "distinct2", "nearest", "clusters", "select_seconds", "select_tokens", "select_flops", "select_passes",
    "finetune_seconds", "finetune_tokens", "finetune_flops", "finetune_passes", "finetune_steps",
    "evaluate_seconds", "total_seconds", "total_passes", "folder",
)  # fmt: skip


def compare(comparison: Comparison, *, update: bool = False, on_progress: Progress | None = None) -> Path:
    """Work through the grid, or through what is left of it; several processes may do so at once.

    Leaves, in comparison.output, selections/ (a run folder for each task and seed), cells/ (adapter, per-example scores and
    cell.json of each cell) and results.csv, a row a finished cell, written anew after each. How diverse a coreset is comes
    from its row numbers, once its cell is finished.

    Args:
        update: go on where the settings of selection, fine-tuning or evaluation have changed, doing again what no longer fits.
        on_progress: called with (stage, done, in all).

    Returns:
        results.csv.

    Raises:
        ValueError: something that the user can mend. What is finished stays.
    """
    tell = on_progress or (lambda stage, done, total: None)
    output = comparison.output
    output.mkdir(parents=True, exist_ok=True)
    _begin(comparison, update)
    with _held(output / "locks" / "target", wait=True):
        grid = _Grid(comparison)
    cells = comparison.cells()
    while True:
        progress = False
        for cell in cells:
            if grid.result(cell) is not None:
                continue
            tell("cells", sum(grid.result(other) is not None for other in cells), len(cells))
            with _held(output / "locks" / cell.folder.replace("/", "_")) as mine:
                if mine and grid.result(cell) is None and grid.work(cell, tell):
                    progress = True
                    write_results(grid, cells)
        left = sum(grid.result(cell) is None for cell in cells)
        tell("cells", len(cells) - left, len(cells))
        if not left:
            return write_results(grid, cells)
        if not progress:
            time.sleep(POLL_SECONDS)  # the rest is in other processes' hands


def _begin(comparison: Comparison, update: bool) -> None:
    """Write down the settings that all cells share, or compare with those that the folder was begun with."""
    now: dict[str, Any] = {"target": comparison.target}
    for task in comparison.tasks.values():
        for stage in ("train", "test", "select", "finetune", "evaluate"):
            now[f"{task.name}: {stage}"] = getattr(task, stage)
    now = json.loads(json.dumps(now))
    path = comparison.output / "begun.json"
    before = read_checked(path)
    if before is not None and not update:
        changed = [
            line
            for line in differences(before["settings"], now)
            if line.split(":")[0] in (*comparison.tasks, "target")
        ]
        changed = [line for line in changed if ": None -> " not in line]  # a new task
        if changed:
            raise ValueError(
                f"{comparison.output} was begun with other settings:\n  " + "\n  ".join(changed) + "\n"
                "Name another --output, or add --update to do again what no longer fits"
            )
    write_checked(path, {"settings": {**(before or {"settings": {}})["settings"], **now}})


@contextlib.contextmanager
def _held(path: Path, wait: bool = False) -> Iterator[bool]:
    """A lock among processes, dropped by the system with its process; yields whether it was got."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except ImportError:  # no flock on Windows: one process only
            pass
        except BlockingIOError:
            yield False
            return
        yield True


class _Grid:
    """The cells of a comparison and what they share: the target, each task's lengths, the selection runs."""

    def __init__(self, comparison: Comparison):
        source = models.resolve(comparison.target)
        self.inputs = {
            "target": fingerprint(
                {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in source.files()}
            )
        }
        if source.gguf:  # unpacked once, so that adapters have a base that every library loads
            folder = comparison.output / "models" / self.inputs["target"]
            folder.mkdir(parents=True, exist_ok=True)
            config = finetune_config(comparison, next(iter(comparison.tasks.values())), ("x",), 0, "x")
            source = models.unpack_gguf(
                source, folder, models.pick_dtype(config.dtype, models.pick_device(config.device))
            )
        is_here = Path(comparison.target).exists()
        self.comparison = dataclasses.replace(
            comparison,
            target=str(source.folder.resolve()) if is_here and not source.adapter else comparison.target,
        )
        for task in comparison.tasks.values():
            for name in (*task.train, *task.test):
                self.inputs[name] = hash_file(Path(name)) if Path(name).is_file() else name
        self._done: dict[Cell, dict[str, Any]] = {}
        self._runs: dict[tuple, list[Run]] = {}
        self._lengths: dict[str, dict[str, np.ndarray]] = {}
        self._spaces: dict[str, dict[str, np.ndarray]] = {}
        self._can_tell_spread = True

    def folder(self, cell: Cell) -> Path:
        return self.comparison.output / cell.folder

    def made_of(self, cell: Cell) -> str:
        """What a cell's result depends on."""
        task = self.comparison.tasks[cell.task]
        key: dict[str, Any] = {
            "target": self.inputs["target"],
            "test": [self.inputs[name] for name in task.test],
            "evaluate": task.evaluate,
        }
        if cell.method != UNTOUCHED:
            key |= {"train": [self.inputs[name] for name in task.train], "finetune": task.finetune}
        if cell.method in self.comparison.variants:
            variant = self.comparison.variants[cell.method]
            method = variant.method
            key |= {"select": task.select, "settings": variant.settings, "function": method.function.__name__}
            key |= {"needs": dict(method.needs), "verify": method.verify, "fixed": dict(method.fixed)}
        return fingerprint({**key, **dataclasses.asdict(cell)})

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """A finished cell's figures, None where it is not finished."""
        if cell not in self._done:
            found = read_checked(self.folder(cell) / "cell.json")
            if not found or found["made_of"] != self.made_of(cell):
                return None
            self._done[cell] = found["figures"]
        return self._done[cell]

    def work(self, cell: Cell, tell: Progress) -> bool:
        """Select, fine-tune, evaluate, write cell.json. False: the selection is in another process's hands."""
        comparison, folder = self.comparison, self.folder(cell)
        task = comparison.tasks[cell.task]
        figures: dict[str, Any] = {**dataclasses.asdict(cell), "folder": cell.folder}
        lengths = self.lengths(task)
        tokens, responses = lengths["tokens"], lengths["responses"]
        chosen = np.arange(len(tokens))
        data: tuple[str, ...] = task.train
        cost: dict[str, float] = {}
        if cell.method in comparison.variants:
            run = self.selection(cell, tell)
            if run is None:
                return False
            chosen, data = run.selection.indices, (str(run.path / "coreset.jsonl"),)
            config = select_config(comparison, task, cell.method, int(cell.seed or 0), str(run.path))
            cost = selection_cost(comparison.variants[cell.method].method, config, run)
            figures["verified"] = len(run.selection.verified)
        figures |= {"n": len(tokens), "m": len(chosen) if cell.method != UNTOUCHED else 0}
        model, spent = comparison.target, {}
        if cell.method != UNTOUCHED:
            reading = (
                task.finetune
                if data == task.train
                else {k: v for k, v in task.finetune.items() if k not in WHERE}
            )
            wanted = finetune_config(
                comparison,
                dataclasses.replace(task, finetune=reading),
                data,
                int(cell.seed or 0),
                str(folder / "adapter"),
            )
            model = str(pipeline.finetune(wanted, update=True, on_progress=tell))
            spent = (read_checked(folder / "adapter" / "manifest.json") or {}).get("cost", {})
            epochs = (
                wanted.epochs
                if wanted.max_steps is None
                else wanted.max_steps / -(-len(chosen) // wanted.batch_size)
            )
            figures |= {"finetune_seconds": spent.get("seconds"), "finetune_steps": spent.get("steps")}
            figures["finetune_tokens"] = float(tokens[chosen].sum() * epochs)
            rows = formats.read(list(data), **wanted.reading.keywords())
            figures["distinct2"] = metrics.distinct([example.turns[-1].text for example in rows.examples()])
        if "size" in spent:
            size = models.Size(**spent["size"])
            whole = size.scoring_flops(int(tokens.sum()), int(responses.sum()))
            figures["finetune_flops"] = (
                size.training_flops(int(tokens[chosen].sum()), int(responses[chosen].sum())) * epochs
            )
            figures["finetune_passes"] = figures["finetune_flops"] / whole
            figures["select_passes"] = cost.get("flops", 0.0) / whole
            figures["total_passes"] = figures["select_passes"] + figures["finetune_passes"]
            figures["full_epoch_passes"] = (
                size.training_flops(int(tokens.sum()), int(responses.sum())) / whole
            )
        figures |= {f"select_{name}": cost.get(name, 0.0) for name in ("seconds", "tokens", "flops")}
        figures["total_seconds"] = figures["select_seconds"] + (figures.get("finetune_seconds") or 0.0)
        scores = folder / "scores.jsonl"
        summary = evaluation.evaluate(evaluate_config(comparison, task, model, str(scores)), on_progress=tell)
        figures |= {**summary["metrics"], "loss": summary["loss"], "evaluate_seconds": summary["seconds"]}
        write_checked(folder / "cell.json", {"made_of": self.made_of(cell), "figures": figures})
        return True

    def selection(self, cell: Cell, tell: Progress) -> Run | None:
        """The coreset of a cell, out of the run that makes those of all methods and rates that share it; None: another process is at it."""
        comparison, task = self.comparison, self.comparison.tasks[cell.task]
        group, name = comparison.group(cell.method), self._selection_name(cell)
        if (name, *group) not in self._runs:
            folder = comparison.output / "selections" / name
            config = select_config(comparison, task, cell.method, int(cell.seed or 0), str(folder))
            table = {other: comparison.variants[other].method for other in group}
            with _held(comparison.output / "locks" / ("selection_" + name.replace("/", "_"))) as mine:
                if not mine:
                    return None
                self._runs[name, *group] = pipeline.select(
                    config, update=True, on_progress=tell, methods=table
                )
        made = self._runs[name, *group]
        return next(
            run
            for run in made
            if (run.manifest["method"], run.manifest["pruning_rate"]) == (cell.method, cell.pruning_rate)
        )

    def _selection_name(self, cell: Cell) -> str:
        settings = self.comparison.variants[cell.method].settings
        return f"{cell.task}/seed{cell.seed}" + (f"-{fingerprint(dict(settings))[:6]}" if settings else "")

    def spread(self, cell: Cell) -> dict[str, float]:
        """How diverse a finished cell's coreset is (`diversity.spread`), from its row numbers as they lie on disk; kept beside the cell.

        Nothing for the untouched model, nor where scikit-learn is not there.
        """
        if cell.method == UNTOUCHED or not self._can_tell_spread:
            return {}
        made_of = fingerprint([self.made_of(cell), self._space_key(cell.task)])
        path = self.folder(cell) / "diversity.json"
        kept = read_checked(path)
        if kept and kept["made_of"] == made_of:
            return kept["figures"]
        rows = self._chosen(cell)
        if rows is None:
            logger.warning(
                "%s: its coreset is not there any more, so how diverse it was is not known", cell.folder
            )
            return {}
        try:
            space = self._space(cell.task)
        except ImportError as error:
            logger.warning("how diverse coresets are stays open: %s", error)
            self._can_tell_spread = False
            return {}
        numbers = space["numbers"]
        positions = np.arange(len(numbers)) if cell.method == FULL else np.searchsorted(numbers, rows)
        figures = {
            name: value for name, value in diversity.spread(space, positions).items() if value == value
        }
        write_checked(path, {"made_of": made_of, "figures": figures})
        return figures

    def _chosen(self, cell: Cell) -> np.ndarray | None:
        """(m,) row numbers of a cell's coreset, none for the full data; None where they are not there."""
        if cell.method == FULL:
            return np.empty(0, np.int64)
        folder = self.comparison.output / "selections" / self._selection_name(cell)
        for place in (
            folder / f"{cell.method}-{cell.pruning_rate:g}",
            folder,
        ):  # the run's own folder where it made one coreset alone
            manifest = read_checked(place / "manifest.json")
            if manifest and (manifest["method"], manifest["pruning_rate"]) == (
                cell.method,
                cell.pruning_rate,
            ):
                return np.load(place / "indices.npy", allow_pickle=False)
        return None

    def _space_key(self, name: str) -> str:
        task = self.comparison.tasks[name]
        reading = finetune_config(self.comparison, task, task.train, 0, "x").reading
        return fingerprint([SPACE, [self.inputs[part] for part in task.train], dataclasses.asdict(reading)])

    def _space(self, name: str) -> dict[str, np.ndarray]:
        """`diversity.text_space` of a task's pool, prompts and responses, with the (n,) row numbers; taken once."""
        if name not in self._spaces:
            path = self.comparison.output / "selections" / name / f"space-{self._space_key(name)}.npz"
            with _held(self.comparison.output / "locks" / f"space_{name}", wait=True):
                kept = read_arrays(path)
                if kept is None:
                    task = self.comparison.tasks[name]
                    reading = finetune_config(self.comparison, task, task.train, 0, "x").reading
                    rows = formats.read(list(task.train), **reading.keywords())
                    texts = ("\n".join(turn.text for turn in example.turns) for example in rows.examples())
                    kept = {"numbers": rows.numbers, **diversity.text_space(texts)}
                    write_arrays(path, kept)
            self._spaces[name] = kept
        return self._spaces[name]

    def lengths(self, task: Task) -> dict[str, np.ndarray]:
        """(n,) tokens of each sample of a task's pool in the target's tokens, and of its response alone; taken once."""
        if task.name not in self._lengths:
            from staff.data.tokens import tokenise

            config = finetune_config(self.comparison, task, task.train, 0, "x")
            key = fingerprint(
                [self.inputs["target"], [self.inputs[name] for name in task.train], config.max_length]
            )
            path = self.comparison.output / "selections" / task.name / f"lengths-{key}.npz"
            kept = read_arrays(path)
            if kept is None:
                tokenizer = models.load_tokenizer(
                    models.resolve(self.comparison.target), config.trust_remote_code
                )
                pool = tokenise(
                    formats.read(list(task.train), **config.reading.keywords()).examples(),
                    tokenizer,
                    config.max_length,
                )
                kept = {"tokens": pool.lengths, "responses": pool.response_tokens()}
                write_arrays(path, kept)
            self._lengths[task.name] = kept
        return self._lengths[task.name]


def selection_cost(method: Method, config: SelectConfig, run: Run) -> dict[str, float]:
    """What a method's own selection took of a run that several methods share: seconds, tokens, flops.

    Every stage that its needs call for counts in full, since alone it would have had to do it, the fine-tuned target of
    a baseline too; verification counts by the samples it asked for. Loading models counts for none.
    """
    stages, known = run.cost["stages"], models_of(config)
    shares: dict[str, float] = {"tokenise": 1.0} if method.needs or method.verify else {}
    for need in method.needs.values():
        label, _, quantity = need.partition("/")
        name, _, checkpoints = label.partition("@")
        if name not in known:
            continue
        model = known[name]
        if model.epochs:
            shares[f"fine-tune the {model.base}"] = 1.0
        if quantity == "effort_running":
            continue
        if quantity == "similarity":
            shares["gradients of the validation rows"] = 1.0
        twin = next(
            (other for other, spec in known.items() if spec == model and other != name), None
        )  # an untuned draft is the raw one
        for alias in (name, twin):
            stage = f"score on the {str(alias).replace('_', ' ')}"
            if quantity == "unconditional_loss":
                stage += " without prompts"
            if quantity == "similarity":
                stage = f"gradients of the {str(alias).replace('_', ' ')}"
            wanted = (
                {other for other in stages if other.startswith(f"{stage} at ")}
                if checkpoints
                else {stage} & stages.keys()
            )
            if wanted:
                shares |= dict.fromkeys(wanted, 1.0)
                break
    stage = f"verify on the {str(method.verify).partition('/')[0]}"
    if method.verify and stages.get(stage, {}).get("samples"):
        shares[stage] = min(1.0, len(run.selection.verified) / stages[stage]["samples"])
    return {
        name: sum(stages.get(stage, {}).get(name, 0.0) * share for stage, share in shares.items())
        for name in ("seconds", "tokens", "flops")
    }


def write_results(grid: _Grid, cells: list[Cell]) -> Path:
    """results.csv anew: a row a finished cell, every figure with its cost."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    for cell in cells:
        found = grid.result(cell)
        if found:
            table.writerow({**found, **grid.spread(cell)})
    path = grid.comparison.output / "results.csv"
    write_text(path, text.getvalue())
    return path
