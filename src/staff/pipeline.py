"""The stages of a run, in order: read, tokenise, tune the draft, score, verify, select, write."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from staff import formats
from staff.config import FinetuneConfig, ScoreConfig, SelectConfig, flat, from_mapping, read_yaml, to_yaml
from staff.methods import METHODS, Method
from staff.scorefile import read_scores, write_scores
from staff.sources import locate
from staff.store import Ledger, RunDirectory, fingerprint, hash_file, read_arrays, remove, write_arrays, write_aside, write_json, write_text
from staff.types import Region, Selection
from staff.work import PACKAGES, TRAINING, Progress, Work, version_of

logger = logging.getLogger(__name__)

NOT_RESULTS = ("data", "output", "scores", "checkpoint_seconds", "device", "trust_remote_code")  # named by content, or of no consequence


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


def select(config: SelectConfig, data: Any = None, *, update: bool = False, on_progress: Progress | None = None) -> Run:
    """Choose the coreset of a pool and write it to the run's folder, or finish a run that was cut off.

    Args:
        config: what to do.
        data: the pool, where it is not files: a list of dicts, a Dataset, a DataFrame.
        update: go on in a folder that was begun with other settings or inputs, keeping what still fits.
        on_progress: called with (stage, done, in all).

    Raises:
        ValueError: something that the user can mend; nothing was half-written.
    """
    method, options = _check(config, data)
    tell = on_progress or (lambda stage, done, total: None)
    sources = _sources(config, method)
    settings = {name: value for name, value in flat(config).items() if name not in NOT_RESULTS}

    def read() -> formats.Rows:
        return formats.read(data if data is not None else list(config.data), **config.reading.keywords())

    reading = config.reading
    located = (
        None
        if data is not None
        else locate(list(config.data), reading.split, reading.dataset_config, reading.revision, reading.dataset_info)
    )
    run = RunDirectory(config.output or tempfile.mkdtemp(prefix="staff-"))
    try:
        inputs = {name: fingerprint({path.name: run.hash_file(path) for path in source.files()}) for name, source in sources.items()}
        if config.scores:
            inputs["scores"] = run.hash_file(_existing(config.scores))
        rows = None
        if located and located.paths and located.keep is None:
            inputs["data"] = fingerprint([run.hash_file(path) for path in located.paths])
        else:  # nothing on disk that could be compared without reading it
            rows = read()
            inputs["data"] = _fingerprint_rows(rows)
        key = fingerprint({"settings": settings, "inputs": inputs})
        finished = _finished(run.path, key, read)
        if finished:
            return finished
        tell("read", 0, 1)
        rows = rows or read()
        budget = _budget(config, len(rows))
        run.begin(settings, inputs, update)
        write_text(run.path / "config.yaml", to_yaml(config))
        (run.path / "manifest.json").unlink(missing_ok=True)
        began = time.time()
        work = Work(config, run, rows, sources, inputs, tell)
        scores = _scores(config, method, rows, work)
        verify = work.ledger(method.verify.split("/")[0]) if method.verify and "target" in sources else None
        arguments = {} if verify is None else {"verify": verify}
        selection = method.select(scores, budget=budget, rng=np.random.default_rng(config.seed), **arguments, **options)
        work.free()
        if (
            located
            and located.paths
            and located.keep is None
            and inputs["data"] != fingerprint([run.hash_file(path) for path in located.paths])
        ):
            raise ValueError(f"{', '.join(config.data)} changed while the run was reading it: start again with --update")
        kept_scores = scores if method.needs else None
        return _write(config, run, read, rows, selection, kept_scores, work, key, began)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(f"{run.path}: the disk is full. Free some space; the same command goes on from here") from error
        raise
    finally:
        run.close()


def _scores(config: SelectConfig, method: Method, rows: formats.Rows, work: Work) -> np.ndarray:
    """(n,) what the method chooses by: the user's own scores, or those of a model of this run."""
    if config.scores and method.needs:
        return read_scores(config.scores, rows.numbers, [example.id for example in rows.examples()])
    return work.scores(method.needs["scores"].split("/")[0]) if method.needs else np.zeros(len(rows))


def _existing(path: str) -> Path:
    if not Path(path).is_file():
        raise ValueError(f"--scores {path}: there is no such file")
    return Path(path)


def _check(config: SelectConfig, data: Any) -> tuple[Method, dict[str, Any]]:
    """The method and its options, before anything is read or loaded."""
    if data is None and not config.data:
        raise ValueError("name the pool with --data FILE")
    if config.method not in METHODS:
        raise ValueError(f"--method must be one of {', '.join(METHODS)}; found {config.method!r}")
    if config.pruning_rate is None and config.budget is None:
        raise ValueError("say how much to keep: --pruning-rate 0.8 keeps a fifth, --budget 500 keeps 500 samples")
    method = METHODS[config.method]
    given = {name: getattr(config, name) for name in method.options() if hasattr(config, name)}
    method.check_options(given)
    return method, given


def _budget(config: SelectConfig, n: int) -> int:
    """m of a pool of n usable rows."""
    if config.budget is not None:
        if config.budget > n:
            raise ValueError(f"--budget {config.budget}: the pool has only {n} usable rows")
        return config.budget
    assert config.pruning_rate is not None
    budget = round((1 - config.pruning_rate) * n)
    if budget == 0:
        raise ValueError(f"--pruning-rate {config.pruning_rate} leaves none of {n} rows: lower it, or give --budget")
    return budget


def _sources(config: SelectConfig, method: Method) -> dict[str, Any]:
    """The models that a method asks for, found; hub ids are fetched here."""
    wanted = {need.split("/")[0].split("@")[0] for need in (*method.needs.values(), method.verify or "") if need}
    if config.scores:  # the user's own stand in for a model's; the target is asked where there is one
        wanted = {"target"} if method.verify and config.target else set()
    if not wanted:
        return {}
    from staff import models

    if not config.target:
        raise ValueError("name the model that the coreset is for with --target")
    target = models.resolve(config.target, "--target")
    if "draft" not in wanted:
        return {"target": target}
    if not config.draft:
        siblings = models.suggest_drafts(config.target)
        known = (
            "Known smaller siblings of its family: " + ", ".join(siblings) if siblings else "No smaller sibling of its family is known here"
        )
        raise ValueError(
            f"--method {config.method} needs a small draft of the target's family: name one with --draft. {known}. "
            "Without one: --draft self:8 keeps 8 of the target's own blocks, --method direct scores the target itself"
        )
    is_self = models.self_blocks(config.draft) is not None
    return {"target": target, "draft": target if is_self else models.resolve(config.draft, "--draft")}


def _fingerprint_rows(rows: formats.Rows) -> str:
    digest = hashlib.sha256()
    for row in rows.raw(range(len(rows))):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode(errors="surrogatepass") + b"\n")
    return digest.hexdigest()[:12]


def _write(config, run, read, rows, selection, scores, work, key, began) -> Run:
    """Write the results; the manifest comes last and says that all are there."""
    method = METHODS[config.method]
    indices = rows.numbers[selection.indices]
    write_aside(run.path / "coreset.jsonl", lambda aside: rows.write_jsonl(aside, selection.indices))
    write_aside(run.path / "indices.npy", lambda aside: _save_array(aside, indices))
    if selection.regions:
        names = [field.name for field in dataclasses.fields(Region)]
        lines = [",".join(["region", *names])]
        lines += [",".join(map(_cell, [i, *dataclasses.astuple(region)])) for i, region in enumerate(selection.regions)]
        write_text(run.path / "regions.csv", "\n".join(lines) + "\n")
    if rows.skipped:
        write_text(
            run.path / "skipped.jsonl",
            "".join(json.dumps({"row": row, "reason": why}, ensure_ascii=False) + "\n" for row, why in rows.skipped),
        )
    fidelity = _fidelity(scores, selection, work.ledger("target")) if len(selection.verified) else None
    kept = {"indices": selection.indices, "verified": selection.verified, "filled": np.array([selection.filled, selection.filled_from_cut])}
    kept |= {} if selection.region_of is None else {"region_of": selection.region_of}
    kept |= {} if scores is None else {"scores": scores}
    write_arrays(run.work / "selection.npz", kept)
    cost = work.cost(method, selection)
    write_json(run.path / "cost.json", cost)
    manifest = {
        "staff": version_of("staff-coreset"),
        "finished": key,
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "n": len(rows),
        "m": len(indices),
        "skipped": len(rows.skipped),
        "format": rows.format,
        "inputs": work.inputs,
        "seed": config.seed,
        "fidelity": fidelity,
        "files": {name: hash_file(run.path / name) for name in ("coreset.jsonl", "indices.npy")},
        "versions": {name: version_of(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    if work.sources:
        manifest |= {"device": str(work.device), "dtype": str(work.dtype).removeprefix("torch.")}
        pool = work.pool("draft" if "draft" in work.sources else "target")
        manifest |= {"tokens": int(pool.lengths.sum()), "truncated": pool.truncated, "cut_responses": pool.cut_responses}
    write_json(run.path / "manifest.json", manifest)
    return Run(run.path, indices, selection, scores, cost, manifest, lambda: rows)


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


def _finished(path: Path, key: str | None, read: Callable[[], formats.Rows]) -> Run | None:
    """The run as it lies on disk, where it was finished with these settings and its results are as they were written."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        cost = json.loads((path / "cost.json").read_text(encoding="utf-8"))
        whole = key in (None, manifest["finished"]) and all(hash_file(path / name) == digest for name, digest in manifest["files"].items())
        kept = read_arrays(path / "work" / "selection.npz")
        indices = np.load(path / "indices.npy", allow_pickle=False)
    except (OSError, ValueError, KeyError):
        return None
    if not whole or kept is None:
        return None
    regions: tuple[Region, ...] = ()
    if "region_of" in kept:
        lines = (path / "regions.csv").read_text(encoding="utf-8").splitlines()[1:]
        kinds = (float, float, int, int, float, int, int)
        regions = tuple(Region(*(kind(cell) for kind, cell in zip(kinds, line.split(",")[1:], strict=True))) for line in lines)
    filled = map(int, kept["filled"])
    selection = Selection(kept["indices"], regions, kept.get("region_of"), kept["verified"], *filled)
    return Run(path, indices, selection, kept.get("scores"), cost, manifest, read)


def finetune(config: FinetuneConfig, *, on_progress: Progress | None = None) -> Path:
    """Fine-tune a model on a file with LoRA; the adapter is left in config.output.

    Returns:
        the folder of the adapter, as PEFT, TRL and vLLM load it.

    Raises:
        ValueError: something that the user can mend.
    """
    from staff import finetune as training
    from staff import models
    from staff.pool import tokenise

    for name in ("data", "model", "output"):
        if not getattr(config, name):
            raise ValueError(f"name the {name} with --{name}")
    assert config.output
    tell = on_progress or (lambda stage, done, total: None)
    rows = formats.read(list(config.data), **config.reading.keywords())
    source = models.resolve(config.model, "--model")
    device = models.pick_device(config.device)
    dtype = models.pick_dtype(config.dtype, device)
    run = RunDirectory(config.output)
    try:
        inputs = {"data": _fingerprint_rows(rows), "model": fingerprint({path.name: run.hash_file(path) for path in source.files()})}
        settings = {name: value for name, value in flat(config).items() if name not in NOT_RESULTS}
        run.begin(settings, inputs, update=False)
        if (run.path / "adapter_model.safetensors").exists() and (run.path / "config.yaml").exists():
            logger.info("%s is finished: nothing to do", run.path)
            return run.path
        if source.gguf:
            source = models.unpack_gguf(source, run.piece("model", {"gguf": inputs["model"], "dtype": str(dtype)}), dtype)
        tokenizer = models.load_tokenizer(source, config.trust_remote_code)
        pool = tokenise(rows.examples(), tokenizer, config.max_length, lambda done: tell("tokenise", done, len(rows)))
        model = models.load_model(source, dtype, device, config.trust_remote_code)
        training.finetune(
            model,
            pool,
            np.arange(len(pool)),
            run.path,
            epochs=config.epochs,
            on_progress=lambda done, total: tell("fine-tune", done, total),
            **{name: getattr(config, name) for name in TRAINING},
        )
        tokenizer.save_pretrained(run.path)
        write_text(run.path / "config.yaml", to_yaml(config))
        for unpacked in run.work.glob("model-*"):
            remove(unpacked)
        return run.path
    finally:
        run.close()


def score(config: ScoreConfig, *, on_progress: Progress | None = None) -> tuple[Path, int]:
    """Score every sample of a pool on one model and write a Parquet file; what is done is kept beside it until the end.

    Returns:
        the file, and n.

    Raises:
        ValueError: something that the user can mend.
    """
    for name in ("data", "model", "output"):
        if not getattr(config, name):
            raise ValueError(f"name the {name} with --{name}")
    output = Path(str(config.output))
    if output.suffix != ".parquet":
        raise ValueError(f"--output {output}: the scores are written as Parquet; name a file that ends in .parquet")
    from staff import models

    tell = on_progress or (lambda stage, done, total: None)
    source = models.resolve(config.model, "--model")
    rows = formats.read(list(config.data), **config.reading.keywords())
    run = RunDirectory(output.with_suffix(".unfinished"))
    try:
        inputs = {"data": _fingerprint_rows(rows), "target": fingerprint({path.name: run.hash_file(path) for path in source.files()})}
        names = {field.name for field in dataclasses.fields(SelectConfig)}
        shared = {name: getattr(config, name) for name in names & {field.name for field in dataclasses.fields(config)}}
        stand_in = SelectConfig(**shared)
        run.begin({name: value for name, value in flat(stand_in).items() if name not in NOT_RESULTS}, inputs, update=True)
        work = Work(stand_in, run, rows, {"target": source}, inputs, tell)
        found = work.quantities("target")
        columns = {"row": rows.numbers, "id": [example.id for example in rows.examples()], **found}
        write_scores(output, {**columns, "tokens": work.pool("target").response_tokens()})
    finally:
        run.close()
    remove(run.path)
    return output, len(rows)


def load_run(path: str | Path) -> Run:
    """A finished run from its folder; the pool is read again from where it was.

    Raises:
        ValueError: the folder holds no finished run, or its files have changed since.
    """
    folder = Path(path)
    if not (folder / "manifest.json").exists():
        raise ValueError(f"{folder} holds no finished run (no manifest.json)")
    config = from_mapping(SelectConfig, read_yaml(folder / "config.yaml"), str(folder / "config.yaml"))
    finished = _finished(folder, None, lambda: formats.read(list(config.data), **config.reading.keywords()))
    if finished is None:
        raise ValueError(f"{folder}: its files are not as they were written; run `staff select --config {folder / 'config.yaml'} --update`")
    return finished
