"""The stages of a run, in order: read, tokenise, tune the draft, score, verify, select, write."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from staff.config import FinetuneConfig, ScoreConfig, SelectConfig, check_named, flat, to_yaml, yaml_value
from staff.data import rows as formats
from staff.data.locate import locate
from staff.files import (
    changed_files,
    failures_are_said,
    fingerprint,
    hash_file,
    read_checked,
    remove,
    sealed,
    write_checked,
    write_json,
    write_text,
    write_whole,
)
from staff.methods import METHODS, Method
from staff.methods.groups import select_by_group
from staff.runs.outputs import Cell, Run, find_finished, pushed, warn, write, write_tables
from staff.runs.pieces import PACKAGES, TRAINING, Progress, Work, check_running, commit, version_of
from staff.runs.scorefile import read_scores, write_scores
from staff.runs.store import RunDirectory
from staff.types import Selection

logger = logging.getLogger(__name__)

NOT_RESULTS = (
    "data",
    "output",
    "scores",
    "validation",
    "checkpoint_seconds",
    "push_to_hub",
    "device",
    "trust_remote_code",
)  # named by content, or of no consequence


def select(
    config: SelectConfig,
    data: Any = None,
    *,
    update: bool = False,
    on_progress: Progress | None = None,
    methods: Mapping[str, Method] = METHODS,
) -> list[Run]:
    """Choose the coresets of a pool and write them to the run's folder, or finish a run that was cut off.

    Args:
        config: what to do: one coreset for each method and pruning rate. What they share is done once.
        data: the pool, where it is not files: a list of dicts, a Dataset, a DataFrame.
        update: go on in a folder that was begun with other settings or inputs, keeping what still fits.
        on_progress: called with (stage, done, in all).
        methods: the table that config.method names entries of; a comparison adds variants of its own.

    Returns:
        a Run for each coreset, methods outside, rates inside.

    Raises:
        ValueError: something that the user can mend; nothing was half-written.
    """
    _check(config, data, methods)
    sources = _sources(config, methods)
    settings = {name: value for name, value in flat(config).items() if name not in NOT_RESULTS}
    reading = config.reading
    places = (reading.split, reading.dataset_config, reading.revision, reading.dataset_info)
    located = locate(list(config.data), *places) if data is None else None
    paths = (
        located.paths if located and located.keep is None else ()
    )  # () where nothing on disk could be compared

    def read() -> formats.Rows:
        return formats.read(located if data is None else data, **reading.keywords())

    run = RunDirectory(config.output or tempfile.mkdtemp(prefix="staff-"))
    with contextlib.closing(run), failures_are_said(run.path):
        tell = _noted(run, on_progress)
        contents = {name: _content_of(run, source) for name, source in sources.items()}
        contents |= {
            name: _hash_of(run, name, path)
            for name in ("scores", "validation")
            if (path := getattr(config, name))
        }
        if paths:
            contents["data"] = lambda: fingerprint([run.hash_file(path) for path in paths])
        inputs = {name: content() for name, content in contents.items()}
        rows = None if paths else read()
        if rows is not None:
            inputs["data"] = _fingerprint_rows(rows)

        def unchanged(*names: str) -> None:
            for name in names or contents:
                if name in contents and contents[name]() != inputs[name]:
                    what = ", ".join(config.data) if name == "data" else f"--{name} {getattr(config, name)}"
                    raise ValueError(
                        f"{what} changed while the run was reading it: put it back and go on, or start again with --update"
                    )

        cells = _cells(config, run)
        keys = [
            fingerprint(
                {
                    "method": _named(methods, cell.method),
                    "rate": cell.pruning_rate,
                    "settings": settings,
                    "inputs": inputs,
                }
            )
            for cell in cells
        ]
        finished = [find_finished(cell, key, read) for cell, key in zip(cells, keys, strict=True)]
        if all(finished):
            return pushed(config, [done for done in finished if done])
        tell("read", 0, 1)
        rows = rows if rows is not None else read()
        tell("read", 1, 1)
        budgets = [_budget(config, cell.pruning_rate, len(rows)) for cell in cells]
        if sources:
            _check_models(config, sources)
        run.begin(settings, inputs, update)
        write_text(run.path / "config.yaml", to_yaml(config))
        work = Work(config, run, rows, sources, inputs, tell, unchanged, _takes_running(config, methods))
        selections = []
        for cell, budget, done in zip(cells, budgets, finished, strict=True):
            (cell.folder / "manifest.json").unlink(missing_ok=True)
            selections.append(done or _choose(config, methods, cell.method, budget, rows, work))
        work.free()
        unchanged()
        runs = []
        for cell, key, chosen in zip(cells, keys, selections, strict=True):
            runs.append(
                chosen
                if isinstance(chosen, Run)
                else write(config, run, cell, methods[cell.method], rows, *chosen, work, key)
            )
        if len(cells) > 1:
            write_tables(run.path, cells, runs)
        run.note("done")
        return pushed(config, runs)


def _noted(run: RunDirectory, on_progress: Progress | None) -> Progress:
    """The progress, with a line in the run's log for each stage that begins; the log begins with what runs here."""
    begun: set[str] = set()
    run.note(
        " ".join(
            [
                f"staff {version_of('staff-coreset')} {commit() or ''}",
                *(f"{name} {version_of(name)}" for name in PACKAGES),
            ]
        )
    )

    def tell(stage: str, done: int, total: int) -> None:
        if stage not in begun:
            begun.add(stage)
            run.note(f"{stage}: {done} of {total}")
        if on_progress:
            on_progress(stage, done, total)

    return tell


def _content_of(run: RunDirectory, source) -> Callable[[], str]:
    return lambda: fingerprint({path.name: run.hash_file(path) for path in source.files()})


def _hash_of(run: RunDirectory, name: str, path: str) -> Callable[[], str]:
    found = _existing(name, path)
    return lambda: run.hash_file(found)


def _cells(config: SelectConfig, run: RunDirectory) -> list[Cell]:
    rates = config.pruning_rate or (None,)
    if len(rates) * len(config.method) == 1:
        return [Cell(config.method[0], rates[0], run.path, run.work / "selection.npz")]
    names = [
        (method, rate, method if rate is None else f"{method}-{rate:g}")
        for method in config.method
        for rate in rates
    ]
    return [
        Cell(method, rate, run.path / name, run.work / f"selection-{name}.npz")
        for method, rate, name in names
    ]


def _named(methods: Mapping[str, Method], name: str) -> Any:
    """A method in a fingerprint: its name, and of a variant what it is."""
    method = methods[name]
    if METHODS.get(name) == method:
        return name
    return [name, method.function.__name__, dict(method.needs), method.verify, dict(method.fixed)]


def _choose(
    config: SelectConfig,
    methods: Mapping[str, Method],
    name: str,
    budget: int,
    rows: formats.Rows,
    work: Work,
) -> tuple[Selection, np.ndarray | None]:
    """The selection of one cell, and the scores that it was made by."""
    method = methods[name]
    wanted = [need for name in config.method for need in methods[name].needs.values()]
    arrays: dict[str, Any] = {
        name: work.array(need, wanted)
        for name, need in method.needs.items()
        if not (name == "scores" and config.scores)
    }
    if config.scores and "scores" in method.needs:
        arrays["scores"] = read_scores(
            config.scores, rows.numbers, [example.id for example in rows.examples()]
        )
    scores = arrays.pop("scores", None)
    if method.verify and "target" in work.sources:
        arrays["verify"] = work.ledger(method.verify.split("/")[0])
    arguments = {
        **arrays,
        **_options(config, method),
        "budget": budget,
        "rng": np.random.default_rng(config.seed),
    }
    counted = np.zeros(len(rows)) if scores is None else scores
    if config.group_by is None:
        return method.select(counted, **arguments), scores
    groups = [
        str(row.get(config.group_by)) if config.group_by in row else None
        for row in rows.raw(range(len(rows)))
    ]
    if None in groups:
        raise ValueError(
            f"--group-by {config.group_by}: row {rows.numbers[groups.index(None)]} has no such column"
        )
    return select_by_group(method, groups, counted, **arguments), scores


def _options(config: SelectConfig, method: Method) -> dict[str, Any]:
    """A method's own options: the settings of the same name, then those given with --option."""
    known = method.options()
    options = {name: getattr(config, name) for name in known if hasattr(config, name)}
    for name, value in (pair.split("=", 1) for pair in config.option):
        if name in known:
            options[name] = yaml_value(value)
    return options


def _existing(name: str, path: str) -> Path:
    if not Path(path).is_file():
        raise ValueError(f"--{name} {path}: there is no such file")
    return Path(path)


def _check(config: SelectConfig, data: Any, methods: Mapping[str, Method]) -> None:
    """What can be known to be wrong before anything is read or loaded."""
    if data is None and not config.data:
        raise ValueError("name the pool with --data FILE")
    for name in config.method:
        if name not in methods:
            raise ValueError(f"--method must be one of {', '.join(methods)}; found {name!r}")
    if not config.pruning_rate and config.budget is None:
        raise ValueError(
            "say how much to keep: --pruning-rate 0.8 keeps a fifth, --budget 500 keeps 500 samples"
        )
    for pair in config.option:
        name = pair.split("=", 1)[0]
        known = {option for method in config.method for option in methods[method].options()}
        if "=" not in pair or name not in known:
            raise ValueError(
                f"--option {pair}: give name=value; the options of {', '.join(config.method)} are {', '.join(sorted(known)) or 'none'}"
            )
    if _takes_running(config, methods):
        check_running(config)
    for name in config.method:
        if not config.draft_epochs and any(
            need.startswith("draft@") for need in methods[name].needs.values()
        ):
            raise ValueError(
                f"--method {name} follows the draft through its tuning, and it is not tuned: give --draft-epochs, 3 say"
            )
    if "less" in config.method and not config.validation:
        raise ValueError("--method less needs a few rows of the task as it will be judged: --validation FILE")


def _takes_running(config: SelectConfig, methods: Mapping[str, Method]) -> bool:
    return any("draft/effort_running" in methods[name].needs.values() for name in config.method)


def _budget(config: SelectConfig, pruning_rate: float | None, n: int) -> int:
    """m of a pool of n usable rows."""
    if pruning_rate is None:
        assert config.budget is not None
        if config.budget > n:
            raise ValueError(f"--budget {config.budget}: the pool has only {n} usable rows")
        return config.budget
    budget = round((1 - pruning_rate) * n)
    if budget == 0:
        raise ValueError(f"--pruning-rate {pruning_rate} leaves none of {n} rows: lower it, or give --budget")
    return budget


def _sources(config: SelectConfig, methods: Mapping[str, Method]) -> dict[str, Any]:
    """The models that the methods ask for, found; hub ids are fetched here."""
    wanted: set[str] = set()
    for method in (methods[name] for name in config.method):
        # the user's own scores stand in for a model's; the target verifies where there is one
        needs = [need for name, need in method.needs.items() if not (config.scores and name == "scores")]
        if method.verify and (config.target or not config.scores):
            needs.append(method.verify)
        wanted |= {need.split("/")[0].split("@")[0] for need in needs}
    if not wanted:
        return {}
    from staff.models import load as models

    if not config.target:
        raise ValueError("name the model that the coreset is for with --target")
    target = models.resolve(config.target, "--target")
    if not wanted & {"draft", "raw_draft"}:
        return {"target": target}
    if not config.draft:
        siblings = ", ".join(models.suggest_drafts(config.target))
        known = (
            f"Known smaller siblings of its family: {siblings}"
            if siblings
            else "No smaller sibling of its family is known here"
        )
        raise ValueError(
            f"--method {' '.join(config.method)} needs a small draft of the target's family: name one with --draft. {known}. "
            "Without one: --draft self:8 keeps 8 of the target's own blocks, --method direct scores the target itself"
        )
    is_self = models.self_blocks(config.draft) is not None
    return {"target": target, "draft": target if is_self else models.resolve(config.draft, "--draft")}


def _check_models(config: SelectConfig, sources: dict[str, Any]) -> None:
    """A scope or a load that can't be had is known before any work is done."""
    from staff.models import load as models

    for source in {id(source): source for source in sources.values()}.values():
        models.check(source, config.scope, config.load_in, config.trust_remote_code)


def _fingerprint_rows(rows: formats.Rows) -> str:
    digest = hashlib.sha256()
    for row in rows.raw(range(len(rows))):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode(errors="surrogatepass") + b"\n")
    return digest.hexdigest()[:12]


def finetune(config: FinetuneConfig, *, update: bool = False, on_progress: Progress | None = None) -> Path:
    """Fine-tune a model on a file with LoRA; the adapter is left in config.output.

    Args:
        update: begin again in a folder that was begun with other settings or inputs.

    Returns:
        the folder of the adapter, as PEFT, TRL and vLLM load it.

    Raises:
        ValueError: something that the user can mend.
    """
    from staff.models import load as models

    check_named(config, "data", "model", "output")
    assert config.output
    rows = formats.read(list(config.data), **config.reading.keywords())
    source = models.resolve(config.model, "--model")
    run = RunDirectory(config.output)
    with contextlib.closing(run), failures_are_said(run.path):
        tell = _noted(run, on_progress)
        inputs = {"data": _fingerprint_rows(rows), "model": _content_of(run, source)()}
        settings = {name: value for name, value in flat(config).items() if name not in NOT_RESULTS}
        run.begin(settings, inputs, update)
        key = {"settings": settings, "inputs": inputs}
        manifest = read_checked(run.path / "manifest.json")
        if (
            manifest
            and manifest["finished"] == fingerprint(key)
            and not changed_files(run.path, manifest["files"])
        ):
            logger.info("%s is finished: nothing to do", run.path)
            return run.path
        from staff.data.tokens import tokenise
        from staff.models import (
            finetune as training,
        )  # here, so that a finished one is recognised without torch

        device = models.pick_device(config.device)
        dtype = models.pick_dtype(config.dtype, device)
        given = source
        if source.gguf:
            source = models.unpack_gguf(
                source, run.piece("model", {"gguf": inputs["model"], "dtype": str(dtype)}), dtype
            )
        tokenizer = models.load_tokenizer(source, config.trust_remote_code)
        folder = run.piece("adapter", key)
        if sealed(folder) is None:
            pool = tokenise(
                rows.examples(), tokenizer, config.max_length, lambda done: tell("tokenise", done, len(rows))
            )
            warn(rows, pool, config.max_length, run.path / "skipped.jsonl")
            model = models.load_model(source, dtype, device, config.trust_remote_code)
            began, steps = time.monotonic(), []

            def advance(done: int, total: int) -> None:
                steps.append(done)
                tell("fine-tune", done, total)

            tuned = training.finetune(
                model,
                pool,
                np.arange(len(pool)),
                folder,
                epochs=config.epochs,
                max_steps=config.max_steps,
                on_progress=advance,
                **{name: getattr(config, name) for name in TRAINING},
            )
            # of a resumed one, what all steps would have taken at the pace of those since
            seconds = (time.monotonic() - began) * steps[-1] / (steps[-1] - steps[0] + 1) if steps else 0.0
            size = dataclasses.asdict(models.measure(tuned))
            write_json(
                folder / "cost.json", {"seconds": seconds, "steps": steps[-1] if steps else 0, "size": size}
            )
        cost = json.loads((folder / "cost.json").read_text()) if (folder / "cost.json").exists() else {}
        if _content_of(run, given)() != inputs["model"]:
            raise ValueError(
                f"--model {config.model} changed while it was read: put it back, or start again with --update"
            )
        tokenizer.save_pretrained(folder / "tokenizer")
        found = [*(folder / name for name in training.ADAPTER), *sorted((folder / "tokenizer").iterdir())]
        for path in found:
            write_whole(run.path / path.name, partial(shutil.copyfile, path))
        if not given.adapter:
            _name_base(run.path / "adapter_config.json", config.model)
        write_text(run.path / "config.yaml", to_yaml(config))
        about = {
            "staff": version_of("staff-coreset"),
            "commit": commit(),
            "finished": fingerprint(key),
            **key,
            "seed": config.seed,
        }
        about |= {
            "versions": {name: version_of(name) for name in PACKAGES},
            "python": platform.python_version(),
        }
        about |= {
            "machine": platform.machine(),
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
        }
        about |= {"cost": cost, "files": {path.name: hash_file(run.path / path.name) for path in found}}
        write_checked(run.path / "manifest.json", about)
        for piece in (*run.work.glob("model-*"), *run.work.glob("adapter-*")):
            remove(piece)
        return run.path


def _name_base(path: Path, model: str) -> None:
    """Let an adapter name its base as it was given, not a folder that it was unpacked or cached in."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    base = Path(model).expanduser()
    write_json(path, {**settings, "base_model_name_or_path": str(base.resolve()) if base.exists() else model})


def score(config: ScoreConfig, *, on_progress: Progress | None = None) -> tuple[Path, int]:
    """Score every sample of a pool on one model and write a Parquet file; what is done is kept beside it until the end.

    Returns:
        the file, and n.

    Raises:
        ValueError: something that the user can mend.
    """
    check_named(config, "data", "model", "output")
    output = Path(str(config.output))
    if output.suffix != ".parquet":
        raise ValueError(
            f"--output {output}: the scores are written as Parquet; name a file that ends in .parquet"
        )
    from staff.models import load as models

    source = models.resolve(config.model, "--model")
    rows = formats.read(list(config.data), **config.reading.keywords())
    run = RunDirectory(output.with_suffix(".unfinished"))
    with contextlib.closing(run), failures_are_said(run.path):
        tell = _noted(run, on_progress)
        inputs = {"data": _fingerprint_rows(rows), "target": _content_of(run, source)()}

        def unchanged(*names: str) -> None:
            if _content_of(run, source)() != inputs["target"]:
                raise ValueError(
                    f"--model {config.model} changed while it was read: put it back and go on, or type the same command again"
                )

        names = {field.name for field in dataclasses.fields(SelectConfig)}
        shared = {
            name: getattr(config, name)
            for name in names & {field.name for field in dataclasses.fields(config)}
        }
        stand_in = SelectConfig(**shared)
        run.begin(
            {name: value for name, value in flat(stand_in).items() if name not in NOT_RESULTS},
            inputs,
            update=True,
        )
        work = Work(stand_in, run, rows, {"target": source}, inputs, tell, unchanged)
        found = work.quantities("target")
        columns = {"row": rows.numbers, "id": [example.id for example in rows.examples()], **found}
        write_scores(output, {**columns, "tokens": work.pool("target").response_tokens()})
        warn(rows, work.pool("target"), config.max_length, output.with_suffix(".skipped.jsonl"))
    remove(run.path)
    return output, len(rows)
