"""Methods x pruning rates x seeds: a cell is select, fine-tune, evaluate; what cells share is done once."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from staff import jobs, pipeline
from staff.comparison import diversity
from staff.comparison import evaluate as evaluation
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
from staff.data import metrics
from staff.data import rows as formats
from staff.files import (
    changed_files,
    check_mark,
    clear_asides,
    differences,
    failures_are_said,
    fingerprint,
    hash_file,
    hold,
    mark,
    read_arrays,
    read_checked,
    write_arrays,
    write_checked,
    write_csv,
)
from staff.methods import Method
from staff.models import load as models
from staff.models.files import Source, tokenizer_fingerprint, with_date
from staff.runs import account, keys
from staff.runs.account import stages_of
from staff.runs.keys import model_specs, pool_key
from staff.runs.outputs import Run
from staff.types import AGAINST_VALIDATION, Need, Progress, Stage

logger = logging.getLogger(__name__)

KIND = "comparison"  # what the mark of its folder says
SPACE = 1  # raised when the same pool would make another space
POLL_SECONDS = 2.0  # how often a process looks for cells that others have let go of
WHERE = ("split", "dataset_info", "dataset_config", "revision")  # where a pool is found; a coreset is a file
COLUMNS = (
    "task", "method", "pruning_rate", "seed", "n", "m", "verified",
    "rouge1", "rouge2", "rougeL", "bleu", "chrf", "exact", "loss", "distinct2", "nearest", "clusters",
    "select_seconds", "select_tokens", "select_flops", "select_passes",
    "finetune_seconds", "finetune_tokens", "finetune_flops", "finetune_passes", "finetune_steps",
    "evaluate_seconds", "total_seconds", "total_passes", "folder",
)  # fmt: skip

# the stages, kind and part, that some quantities come from; the others come from the one pass
COUNTED = {
    "unconditional_loss": ("score", "without prompts"),
    "prompt_features": ("states", "over prompts"),
    "whispers": ("converse", ""),
    "rewards": ("converse", "tuned on the seed"),
}

Figures = dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """A comparison, and what goes into it.

    Attributes:
        comparison: its target as every library loads it.
        contents: "target", and each file or name of a task's pool and test -> fingerprint.
    """

    comparison: Comparison
    contents: Mapping[str, str]

    def place(self, *names: str) -> Path:
        return self.comparison.output.joinpath(*names)


def compare(
    comparison: Comparison,
    *,
    update: bool = False,
    on_progress: Progress | None = None,
    beside: Sequence[Sequence[str]] = (),
    runs: dict[str, list[Run]] | None = None,
) -> Path:
    """Work through the grid, or through what is left of it; several processes may do so at once.

    Leaves, in comparison.output, selections/ (a run folder for each task and seed), cells/ (adapter,
    per-example scores and cell.json of each cell) and results.csv, a row a finished cell, written anew after
    each. How diverse a coreset is comes from its row numbers, once its cell is finished.

    Args:
        update: go on where settings of selection, fine-tuning or evaluation have changed, doing again what no
            longer fits.
        on_progress: called with (stage, done, in all).
        beside: commands that work through the same folder at the same time; ended with this one.
        runs: selections that were made before, of `choose`.

    Returns:
        results.csv.

    Raises:
        ValueError: something that the user can mend. What is finished stays.
    """
    tell = on_progress or (lambda stage, done, total: None)
    cells = comparison.cells()
    metrics.judge_answers(["a word"], ["a word"])  # what is missing is known before the first cell
    check_mark(comparison.output, KIND)
    with failures_are_said(comparison.output), contextlib.ExitStack() as stack:
        grid = _opened(comparison, update)
        stack.enter_context(_at_work(beside))
        finished: dict[Cell, Figures] = {}
        runs = {} if runs is None else runs  # selections that this process has looked at, by folder

        def look() -> int:
            finished.update({c: f for c in cells if c not in finished and (f := _figures(grid, c))})
            tell("cells", len(finished), len(cells))
            return len(finished)

        while look() < len(cells):
            has_worked = False
            for cell in cells:
                if cell in finished:
                    continue
                with hold(grid.place("locks", cell.folder.replace("/", "_"))) as is_mine:
                    is_done = is_mine and _figures(grid, cell) is None and _work(grid, cell, runs, tell)
                if is_done:
                    has_worked = True
                    look()
                    _write_results(grid, finished)
            if not has_worked:
                time.sleep(POLL_SECONDS)  # the rest is in other processes' hands
        return _write_results(grid, finished)


def choose(
    comparison: Comparison, *, update: bool = False, on_progress: Progress | None = None
) -> tuple[dict[str, list[Run]], dict[Cell, Run]]:
    """The coresets of a comparison, before anything is trained on them.

    Returns:
        all selection runs, for `compare`; and the one of each cell.
    """
    check_mark(comparison.output, KIND)
    runs: dict[str, list[Run]] = {}
    found: dict[Cell, Run] = {}
    with failures_are_said(comparison.output):
        grid = _opened(comparison, update)
        for cell in (cell for cell in comparison.cells() if cell.method in comparison.variants):
            while (run := _selection(grid, cell, runs, on_progress or (lambda *_: None))) is None:
                time.sleep(POLL_SECONDS)
            found[cell] = run
    return runs, found


def _opened(comparison: Comparison, update: bool) -> Grid:
    mark(comparison.output, KIND)
    clear_asides(comparison.output.rglob(".*"), alone=False)
    _begin(comparison, update)
    with hold(comparison.output / "locks" / "target", wait=True):
        return _open(comparison)


@contextlib.contextmanager
def _at_work(commands: Sequence[Sequence[str]]) -> Iterator[None]:
    """Processes of the same comparison; what they fail at is said, and left to the others."""
    processes = [subprocess.Popen(command, stdin=subprocess.DEVNULL) for command in commands]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _begin(comparison: Comparison, update: bool) -> None:
    """Write down the settings that all cells share, or compare with those that the folder was begun with."""
    now: dict[str, Any] = {"target": comparison.target}
    for task in comparison.tasks.values():
        for stage in ("train", "test", "select", "finetune", "evaluate"):
            now[f"{task.name}: {stage}"] = getattr(task, stage)
    now = json.loads(json.dumps(now))
    path = comparison.output / "begun.json"
    before = (read_checked(path) or {}).get("settings", {})
    # a task that is new, or left out this time, is no change
    shared = [name for name in before if name in now]
    changed = differences({name: before[name] for name in shared}, {name: now[name] for name in shared})
    if changed and not update:
        raise ValueError(
            f"{comparison.output} was begun with other settings:\n  " + "\n  ".join(changed) + "\n"
            "Name another --output, or add --update to do again what no longer fits"
        )
    # of all cells, whatever day they are worked on
    day = {"template_date": datetime.date.today().isoformat()}
    write_checked(path, {"settings": {**day, **before, **now}})


def _open(comparison: Comparison) -> Grid:
    """What goes into the grid, by content; a .gguf target is unpacked: adapters need a base to load."""
    source = models.resolve(comparison.target)
    seen = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in source.files()}
    contents = {"target": fingerprint(seen)}
    for task in comparison.tasks.values():
        for name in (*task.train, *task.test):
            contents[name] = hash_file(Path(name)) if Path(name).is_file() else name
    if source.gguf:
        folder = comparison.output / "models" / contents["target"]
        folder.mkdir(parents=True, exist_ok=True)
        config = finetune_config(comparison, next(iter(comparison.tasks.values())), ("x",), 0, "x")
        dtype = models.pick_dtype(config.engine.dtype, models.pick_device(config.engine.device))
        source = models.unpack_gguf(source, folder, dtype)
    if Path(comparison.target).exists() and not source.adapter:
        comparison = dataclasses.replace(comparison, target=str(source.folder.resolve()))
    begun = comparison.output / "begun.json"
    tasks = {name: _dated(comparison, task, source, begun) for name, task in comparison.tasks.items()}
    comparison = dataclasses.replace(comparison, tasks=tasks)
    return Grid(comparison, contents)


def _dated(comparison: Comparison, task: Task, source: Source, begun: Path) -> Task:
    """A task whose stages hold the day fixed that a chat template writes."""
    reading = finetune_config(comparison, task, task.train, 0, "x").reading
    date = {"template_date": with_date(reading, [source], begun).template_date}
    if date["template_date"] is None:
        return task
    select, finetune, evaluate = ({**date, **of} for of in (task.select, task.finetune, task.evaluate))
    return dataclasses.replace(task, select=select, finetune=finetune, evaluate=evaluate)


# ---- a cell ----


def _made_of(grid: Grid, cell: Cell) -> str:
    """A fingerprint of what a cell's result depends on."""
    comparison, contents = grid.comparison, grid.contents
    task = comparison.tasks[cell.task]
    key: dict[str, Any] = {
        "target": contents["target"],
        "test": [contents[name] for name in task.test],
        "evaluate": task.evaluate,
    }
    if cell.method != UNTOUCHED:
        key |= {"train": [contents[name] for name in task.train], "finetune": task.finetune}
    if cell.method in comparison.variants:
        variant = comparison.variants[cell.method]
        method = variant.method
        key |= {"select": task.select, "settings": variant.settings, "function": method.function.__name__}
        needs = {name: str(need) for name, need in method.needs.items()}
        key |= {"needs": needs, "verify": str(method.verify), "fixed": dict(method.fixed)}
        key |= {"asks": {name: str(need) for name, need in method.asks.items()}} if method.asks else {}
    return fingerprint({**key, **dataclasses.asdict(cell)})


def _figures(grid: Grid, cell: Cell) -> Figures | None:
    """A finished cell's figures, None where it is not finished."""
    folder = grid.place(cell.folder)
    result = read_checked(folder / "cell.json")
    if not result or result["made_of"] != _made_of(grid, cell) or changed_files(folder, result["files"]):
        return None
    return result["figures"]


def _work(grid: Grid, cell: Cell, runs: dict[str, list[Run]], tell: Progress) -> bool:
    """Select, fine-tune, evaluate, write cell.json. False: the selection is in another process's hands."""
    comparison, folder = grid.comparison, grid.place(cell.folder)
    task, seed = comparison.tasks[cell.task], int(cell.seed or 0)
    lengths = _lengths(grid, task)
    tokens = lengths["tokens"]
    figures: Figures = {**dataclasses.asdict(cell), "folder": cell.folder, "n": len(tokens), "m": 0}
    chosen, data, reading = np.ones(len(tokens), bool), task.train, dict(task.finetune)
    cost: dict[str, float] = {}
    if cell.method in comparison.variants:
        run = _selection(grid, cell, runs, tell)
        if run is None:
            return False
        chosen, data = np.isin(lengths["rows"], run.indices), (str(run.path / "coreset.jsonl"),)
        reading = {name: value for name, value in reading.items() if name not in WHERE}
        config = select_config(comparison, task, cell.method, seed, str(run.path))
        cost = selection_cost(comparison.variants[cell.method].method, config, run)
        figures["verified"] = len(run.selection.verified)
    figures |= {f"select_{name}": cost.get(name, 0.0) for name in ("seconds", "tokens", "flops")}
    model = comparison.target
    if cell.method != UNTOUCHED:
        own = dataclasses.replace(task, finetune=reading)
        tuning = finetune_config(comparison, own, data, seed, str(folder / "adapter"))
        model = str(jobs.finetune(tuning, update=True, on_progress=tell))
        spent = (read_checked(folder / "adapter" / "manifest.json") or {}).get("cost", {})
        m = int(chosen.sum())
        steps = -(-m // tuning.training.batch_size)
        epochs = tuning.epochs if tuning.max_steps is None else tuning.max_steps / steps
        rows = formats.read(list(data), **tuning.reading.keywords())
        figures |= {
            "m": m,
            "distinct2": metrics.distinct([example.turns[-1].text for example in rows.examples()]),
            "finetune_seconds": spent.get("seconds"),
            "finetune_steps": spent.get("steps"),
            "finetune_tokens": float(tokens[chosen].sum() * epochs),
        }
        if "size" in spent:
            figures |= _passes(models.Size(**spent["size"]), lengths, chosen, epochs, cost.get("flops", 0.0))
    figures["total_seconds"] = figures["select_seconds"] + (figures.get("finetune_seconds") or 0.0)
    judged = evaluate_config(comparison, task, model, str(folder / "scores.jsonl"))
    summary = evaluation.evaluate(judged, on_progress=tell)
    figures |= {**summary["metrics"], "loss": summary["loss"], "evaluate_seconds": summary["seconds"]}
    made = {"scores.jsonl": hash_file(folder / "scores.jsonl")}
    about = {"made_of": _made_of(grid, cell), "figures": figures, "files": made}
    write_checked(folder / "cell.json", about)
    return True


def _passes(
    size: models.Size,
    lengths: Mapping[str, np.ndarray],
    chosen: np.ndarray,
    epochs: float,
    select_flops: float,
) -> dict[str, float]:
    """What selection and fine-tuning took, in scoring passes of the target over the pool."""
    tokens, responses = lengths["tokens"], lengths["responses"]
    one_pass = size.scoring_flops(int(tokens.sum()), int(responses.sum()))
    flops = size.training_flops(int(tokens[chosen].sum()), int(responses[chosen].sum())) * epochs
    selecting, tuning = select_flops / one_pass, flops / one_pass
    passes = {"select_passes": selecting, "total_passes": selecting + tuning}
    return {"finetune_flops": flops, "finetune_passes": tuning, **passes}


def _selection(grid: Grid, cell: Cell, runs: dict[str, list[Run]], tell: Progress) -> Run | None:
    """A cell's coreset, of the run that makes those of all that share it; None: another process is at it."""
    comparison, name = grid.comparison, _selection_name(grid, cell)
    if name not in runs:
        task, folder = comparison.tasks[cell.task], str(grid.place("selections", name))
        config = select_config(comparison, task, cell.method, int(cell.seed or 0), folder)
        table = {other: comparison.variants[other].method for other in comparison.group(cell.method)}
        with hold(grid.place("locks", "selection_" + name.replace("/", "_"))) as is_mine:
            if not is_mine:
                return None
            _take_over(grid, cell, Path(folder))
            runs[name] = pipeline.select(config, update=True, on_progress=tell, methods=table)
    wanted = (cell.method, cell.pruning_rate)
    return next(run for run in runs[name] if (run.manifest["method"], run.manifest["pruning_rate"]) == wanted)


def _take_over(grid: Grid, cell: Cell, folder: Path) -> None:
    """Begin a selection with the pieces of one that differs by its seed alone, those that no seed changes: a
    pass that is the same is made once, and what it took comes along."""
    if (folder / "work" / "begun.json").exists():
        return
    own = [dataclasses.replace(cell, seed=seed) for seed in grid.comparison.seeds if seed != cell.seed]
    for other in own:
        done = grid.place("selections", _selection_name(grid, other))
        if list(done.glob("**/manifest.json")) and not list(done.glob("work/*/shard-[0-9]*")):
            mark(folder, "run")
            pieces = [place.parent for place in done.glob("work/*-*/key.json") if _is_seedless(place)]
            for piece in pieces:
                shutil.copytree(piece, folder / "work" / piece.name, copy_function=_link, dirs_exist_ok=True)
            (folder / "work").mkdir(exist_ok=True)
            account.hand_on(done / "work", folder / "work", {piece.name for piece in pieces})
            return


def _is_seedless(key: Path) -> bool:
    try:
        return keys.is_seedless(json.loads(key.read_text(encoding="utf-8")))
    except (ValueError, AttributeError):
        return False  # damaged; it is made again


def _link(source: str, target: str) -> None:
    """The same file in two places: pieces are replaced, never written into."""
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _selection_name(grid: Grid, cell: Cell) -> str:
    settings = grid.comparison.variants[cell.method].settings
    return f"{cell.task}/seed{cell.seed}" + (f"-{fingerprint(dict(settings))[:6]}" if settings else "")


def _lengths(grid: Grid, task: Task) -> dict[str, np.ndarray]:
    """rows, tokens, responses, (n,) each: the numbers of the rows of a pool that can be trained on, and
    the target's tokens of each and of its response; taken once."""
    from staff.data.tokens import in_common, tokenise

    config = finetune_config(grid.comparison, task, task.train, 0, "x")
    source, of = models.resolve(grid.comparison.target), config.reading
    contents = fingerprint([grid.contents[name] for name in task.train])
    key = fingerprint(pool_key(contents, of, tokenizer_fingerprint(source, of.chat_template)))
    path = grid.place("selections", task.name, f"lengths-{key}.npz")
    lengths = read_arrays(path)
    if lengths is None:
        rows = formats.read(list(task.train), **of.keywords())
        tokenizer = models.load_tokenizer(source, config.engine.trust_remote_code)
        pool = tokenise(rows.examples(), tokenizer, of.max_length, None, of, rows.where)
        rows, pools = in_common(rows, {"": pool})
        pool = pools[""]
        lengths = {"rows": rows.numbers, "tokens": pool.lengths, "responses": pool.response_tokens()}
        write_arrays(path, lengths)
    return lengths


# ---- how diverse its coreset is ----


def _diversity(grid: Grid, cell: Cell) -> dict[str, float]:
    """`diversity.apart` of a finished cell, from its row numbers on disk; kept beside the cell."""
    if cell.method == UNTOUCHED:
        return {}
    task = grid.comparison.tasks[cell.task]
    made_of = fingerprint([_made_of(grid, cell), _space_key(grid, task)])
    path = grid.place(cell.folder, "diversity.json")
    before = read_checked(path)
    if before and before["made_of"] == made_of:
        return before["figures"]
    rows = None if cell.method == FULL else _chosen_rows(grid, cell)
    if rows is None and cell.method != FULL:
        what = "its coreset is not there any more, so how diverse it was is not known"
        logger.warning("%s: %s", cell.folder, what)
        return {}
    space = _space(grid, task)
    numbers = space["numbers"]
    positions = np.arange(len(numbers)) if rows is None else np.searchsorted(numbers, rows)
    spread = diversity.apart(space, positions)
    figures = {name: value for name, value in spread.items() if not np.isnan(value)}
    write_checked(path, {"made_of": made_of, "figures": figures})
    return figures


def _chosen_rows(grid: Grid, cell: Cell) -> np.ndarray | None:
    """(m,) row numbers of a cell's coreset; None where they are not there."""
    folder = grid.place("selections", _selection_name(grid, cell))
    name = cell.method if cell.pruning_rate is None else f"{cell.method}-{cell.pruning_rate:g}"
    for place in (folder / name, folder):  # the run's own folder where it made one coreset alone
        manifest = read_checked(place / "manifest.json") or {}
        if (manifest.get("method"), manifest.get("pruning_rate")) == (cell.method, cell.pruning_rate):
            return np.load(place / "indices.npy", allow_pickle=False)
    return None


def _space_key(grid: Grid, task: Task) -> str:
    reading = finetune_config(grid.comparison, task, task.train, 0, "x").reading
    return fingerprint([SPACE, [grid.contents[name] for name in task.train], dataclasses.asdict(reading)])


def _space(grid: Grid, task: Task) -> dict[str, np.ndarray]:
    """`diversity.text_space` of a task's pool, prompts and responses, and its (n,) rows; taken once."""
    path = grid.place("selections", task.name, f"space-{_space_key(grid, task)}.npz")
    with hold(grid.place("locks", f"space_{task.name}"), wait=True):
        space = read_arrays(path)
        if space is None:
            reading = finetune_config(grid.comparison, task, task.train, 0, "x").reading
            rows = formats.read(list(task.train), **reading.keywords())
            texts = ("\n".join(turn.text for turn in example.turns) for example in rows.examples())
            space = {"numbers": rows.numbers, **diversity.text_space(texts)}
            write_arrays(path, space)
    return space


# ---- the table ----


def selection_cost(method: Method, config: SelectConfig, run: Run) -> dict[str, float]:
    """What a method's own selection took of a run that several methods share: seconds, tokens, flops.

    Every stage that its needs call for counts in full, since alone it would have had to do it, the fine-tuned
    target of a baseline too; verification counts by the samples it asked for. Looking for duplicates and
    suspects counts in full for every method, loading models for none.
    """
    stages, specs = stages_of(run.cost), model_specs(config)
    shares: dict[Stage, float] = {Stage("tokenise"): 1.0} if method.models() or config.drop_suspects else {}
    shares |= {Stage("dedup"): 1.0} if config.dedup else {}
    needs = [*method.needs.values(), *method.asks.values()]
    if config.drop_suspects:
        needs += [Need("raw_draft", "loss"), Need("raw_draft", "unconditional_loss")]
    for need in needs:
        if need.quantity in ("quality", "rewards"):
            shares |= dict.fromkeys((s for s in stages if s.kind == "rate"), 1.0)
        if need.quantity == "rewards":
            shares |= {Stage("tune", "target", "on the seed"): 1.0}
        if need.model not in specs:
            continue
        spec = specs[need.model]
        if spec.epochs:
            shares[Stage("tune", spec.base)] = 1.0
        if need.quantity in AGAINST_VALIDATION:
            shares[Stage("query", part=f"for {need.quantity}")] = 1.0
        kind, part = COUNTED.get(need.quantity, (AGAINST_VALIDATION.get(need.quantity, "score"), ""))
        twins = [name for name, other in specs.items() if other == spec]  # an untuned draft is the raw one
        for name in (need.model, *twins):
            like = (kind, name, part, need.checkpoints)
            wanted = [s for s in stages if (s.kind, s.model, s.part, bool(s.snapshot)) == like]
            if wanted:
                shares |= dict.fromkeys(wanted, 1.0)
                break
    if method.verify:
        stage = Stage("verify", method.verify.model)
        samples = stages.get(stage, {}).get("samples")
        if samples:
            shares[stage] = min(1.0, len(run.selection.verified) / samples)
    return {
        name: sum(stages.get(stage, {}).get(name, 0.0) * share for stage, share in shares.items())
        for name in ("seconds", "tokens", "flops")
    }


def finished_cells(comparison: Comparison) -> tuple[dict[Cell, Figures], int]:
    """What is finished of a comparison of one task, whatever it was made for, in results.csv too; and the
    tokens of its pool."""
    grid = _open(comparison)
    finished = {cell: figures for cell in comparison.cells() if (figures := _figures(grid, cell))}
    _write_results(grid, finished)
    (task,) = grid.comparison.tasks.values()
    return finished, int(_lengths(grid, task)["tokens"].sum())


def _write_results(grid: Grid, finished: Mapping[Cell, Figures]) -> Path:
    """results.csv anew: a row a finished cell, every figure with its cost."""
    rows = [{**finished[c], **_diversity(grid, c)} for c in grid.comparison.cells() if c in finished]
    path = grid.place("results.csv")
    write_csv(path, COLUMNS, ([row.get(name) for name in COLUMNS] for row in rows))
    return path
