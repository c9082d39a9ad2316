"""What is done with one model and a file: fine-tune it, score every sample on it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from staff import files
from staff.config import FinetuneConfig, ScoreConfig, SelectConfig, Training, check_named, to_yaml
from staff.data import rows
from staff.models import files as model_files
from staff.pipeline import ingredients
from staff.runs import account
from staff.runs.keys import LORA
from staff.runs.outputs import fingerprint_rows, row_columns, warn
from staff.runs.scorefile import read_weights, write_scores
from staff.runs.store import Inputs, RunFolder, content_of, find_finished, open_run
from staff.types import Need, Progress, Stage

if TYPE_CHECKING:  # torch comes in with it
    from staff.models.files import Source


def finetune(
    config: FinetuneConfig, data: Any = None, *, update: bool = False, on_progress: Progress | None = None
) -> Path:
    """Fine-tune a model on a file with LoRA; the adapter is left in config.output.

    Args:
        data: the rows, where they are in no files.
        update: begin again in a folder that was begun with other settings or inputs.

    Returns:
        the folder of the adapter, as PEFT, TRL and vLLM load it.

    Raises:
        ValueError: something that the user can mend.
    """
    output = Path(str(config.output))
    config, pool, source = opened(config, output, [output], data)
    _check_finetune(config, source)
    held_out = rows.read(list(config.eval_data), **config.reading.keywords()) if config.eval_data else None
    files.check_outputs([output], {"--eval-data": held_out.paths if held_out else ()})
    with open_run(str(config.output), "adapter", on_progress) as run:
        contents: dict[str, Any] = {"model": partial(content_of, run, source)}
        contents |= {"weights": partial(run.hash_file, Path(config.weights))} if config.weights else {}
        inputs = Inputs(contents, {name: f"--{name} {getattr(config, name)}" for name in contents})
        inputs["data"] = fingerprint_rows(pool)
        inputs["tokenizer"] = model_files.tokenizer_fingerprint(source, config.reading.chat_template)
        if held_out:
            inputs["eval_data"] = fingerprint_rows(held_out)
        made_of = {"settings": ingredients(config), "inputs": dict(inputs)}
        run.begin(made_of["settings"], inputs, update)
        if not find_finished(run.path, files.fingerprint(made_of)):
            _tune(config, run, pool, source, inputs, made_of, held_out)
        if config.merge:
            _merge(config, run, source, inputs)
        for piece in (*run.work.glob("model-*"), *run.work.glob("adapter-*")):
            files.remove(piece)
        return run.path


def opened(config: Any, folder: Path, outputs: list[Path], data: Any = None) -> tuple[Any, rows.Rows, Source]:
    """The config with the day held fixed that a chat template writes, its data, and its model's files.

    Args:
        folder: of the run, where it was begun before.
        outputs: what will be written, which must be nothing that is read.
    """
    check_named(config, data)
    pool = rows.read(list(config.data) if data is None else data, **config.reading.keywords())
    source = model_files.resolve(config.model, "--model")
    files.check_outputs(outputs, {"--data": pool.paths, "--model": source.files()})
    reading = model_files.with_date(config.reading, [source], folder / "work" / "begun.json")
    return dataclasses.replace(config, reading=reading), pool, source


def _check_finetune(config: FinetuneConfig, source: Source) -> None:
    """What can't be done is known before any work."""
    method = model_files.check_quantised(source, config.engine.load_in)
    if config.merge and method:
        cure = "leave --merge away, or fine-tune the model that it was made from with --load-in"
        raise ValueError(f"--merge: {source.name} is quantised already ({method}); {cure}")
    if config.report_to and find_spec(config.report_to) is None:
        package = config.report_to
        raise ValueError(f"--report-to {package} needs the {package} package: pip install {package}")


def _tune(
    config: FinetuneConfig,
    run: RunFolder,
    pool: rows.Rows,
    source: Source,
    inputs: Inputs,
    made_of: dict[str, Any],
    held_out: rows.Rows | None,
) -> None:
    import numpy as np

    from staff.data.chat import template_of
    from staff.data.tokens import in_common, tokenise  # torch comes in here
    from staff.models import apart, load
    from staff.models import finetune as training

    engine, given, weights = config.engine, source, None
    device = load.pick_device(engine.device)
    dtype = load.pick_dtype(engine.dtype, device)
    source = _unpacked(source, run, inputs, dtype)
    tokenizer = load.load_tokenizer(source, engine.trust_remote_code)
    tokenizer.chat_template = template_of(tokenizer, config.reading)
    if config.weights:
        ids, beside = (
            [example.id for example in pool.examples()],
            {path.parent.resolve() for path in pool.paths},
        )
        weights = read_weights(config.weights, pool.numbers, ids, beside)
        every = pool.numbers
    folder = run.piece("adapter", made_of)
    stage = Stage("tune", "model")
    if files.sealed(folder) is None:
        tell = run.counter(Stage("tokenise"), len(pool))
        reading = config.reading
        tokens = tokenise(pool.examples(), tokenizer, reading.max_length, tell, reading, pool.where)
        pool, usable = in_common(pool, {"": tokens})
        tokens = usable[""]
        load.check_room(source, tokens, pool.numbers, engine.trust_remote_code)
        warn(pool, tokens, config.reading.max_length, run.path / "skipped.jsonl")
        judged = None
        if held_out:
            judged = tokenise(
                held_out.examples(), tokenizer, reading.max_length, None, reading, held_out.where
            )
            held_out, usable = in_common(held_out, {"": judged})
            judged = usable[""]
            load.check_room(source, judged, held_out.numbers, engine.trust_remote_code)
        report = {"report_to": config.report_to, "run_name": run.path.name} if config.report_to else None
        if config.report_to == "tensorboard":
            os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run.path / "tensorboard"))
        how = source, dtype, device, engine.trust_remote_code, engine.load_in
        model = load.load_model(*how) if config.launch.processes == 1 else None
        # before the adapter, whose seal ends this stage
        measured = load.measure(model or load.without_weights(source, engine.trust_remote_code))
        files.write_json(folder / "size.json", dataclasses.asdict(measured))
        tune: Any = training.train_lora if model else partial(apart.train_apart, launch=config.launch)
        tune(
            model or apart.loaded_as(*how),
            tokens,
            np.arange(len(tokens)),
            folder,
            epochs=config.epochs,
            max_steps=config.max_steps,
            seed=config.seed,
            weights=None if weights is None else weights[np.searchsorted(every, pool.numbers)],
            log=run.path / "log.jsonl",
            held_out=judged,
            report=report,
            on_progress=run.clock(stage),
            **dataclasses.asdict(config.training),
        )
    inputs.check("model")
    tokenizer.save_pretrained(folder / "tokenizer")
    parts = [*(folder / name for name in training.ADAPTER), *sorted((folder / "tokenizer").iterdir())]
    for path in parts:
        files.write_whole(run.path / path.name, partial(shutil.copyfile, path))
    if not given.adapter:
        _name_base(run.path / "adapter_config.json", config.model)
    files.write_text(run.path / "config.yaml", to_yaml(config))
    if (run.path / "log.jsonl").exists():
        draw_losses(run.path / "log.jsonl", run.path / "loss.png")
    spent = account.spent(run.work).get(stage, {})
    steps, size = (files.sealed(folder) or {}).get("steps"), _read(folder / "size.json")
    cost = {"seconds": spent.get("seconds"), "steps": steps, "size": size}
    about = {**made_of, "seed": config.seed, "cost": cost, **load.facts(device, dtype)}
    run.finish(files.fingerprint(made_of), about, [path.name for path in parts])


def _unpacked(source: Source, run: RunFolder, inputs: Inputs, dtype: Any) -> Source:
    """A model's files; a .gguf file is unpacked once."""
    from staff.models import load

    if not source.gguf:
        return source
    folder = run.piece("model", {"gguf": inputs["model"], "dtype": str(dtype)})
    return load.unpack_gguf(source, folder, dtype)


def _merge(config: FinetuneConfig, run: RunFolder, source: Source, inputs: Inputs) -> None:
    """The model with the adapter folded in, in merged/: the weights as they came, not as they were loaded for
    the tuning."""
    from staff.models import load

    folder, adapter = run.path / "merged", files.hash_file(run.path / "adapter_model.safetensors")
    if (files.sealed(folder) or {}).get("adapter") == adapter:
        return
    device = load.pick_device(config.engine.device)
    dtype = load.pick_dtype(config.engine.dtype, device)
    run.tell(Stage("merge", "model"), 0, 1)
    source = _unpacked(source, run, inputs, dtype)
    model: Any = load.merged(source, run.path, dtype, config.engine.trust_remote_code)

    def write(aside: Path) -> None:
        model.save_pretrained(aside)
        load.load_tokenizer(dataclasses.replace(source, folder=run.path)).save_pretrained(aside)
        files.seal(aside, sorted(path.name for path in aside.iterdir()), adapter=adapter)

    files.remove(folder)
    files.write_whole(folder, write)
    run.tell(Stage("merge", "model"), 1, 1)


def draw_losses(log: Path, picture: Path) -> bool:
    """A picture of log.jsonl: the loss of each step, and of what was held out; False where matplotlib is not
    installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    told = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, label, look in (("loss", "a step", "-"), ("eval_loss", "held out", "o--")):
        if points := [(line["step"], line[name]) for line in told if name in line]:
            axes.plot(*zip(*points, strict=True), look, label=label)
    axes.set_xlabel("steps")
    axes.set_ylabel("mean loss over response tokens")
    axes.legend()
    files.write_whole(picture, partial(figure.savefig, format="png", dpi=120))
    return True


def _name_base(path: Path, model: str) -> None:
    """Let an adapter name its base as it was given, not a folder that it was unpacked or cached in."""
    settings, base = _read(path), Path(model).expanduser()
    name = str(base.resolve()) if base.exists() else model
    files.write_json(path, {**settings, "base_model_name_or_path": name})


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def score(config: ScoreConfig, data: Any = None, *, on_progress: Progress | None = None) -> tuple[Path, int]:
    """Score every sample of a pool on one model and write a Parquet file; what is done lies beside it until
    the end.

    Returns:
        the file, and n.

    Raises:
        ValueError: something that the user can mend.
    """
    output = Path(str(config.output))
    if config.output and output.suffix != ".parquet":
        cure = "name a file that ends in .parquet"
        raise ValueError(f"--output {output}: scores are written as Parquet; {cure}")
    skipped, unfinished = output.with_suffix(".skipped.jsonl"), output.with_suffix(".unfinished")
    config, pool, source = opened(config, unfinished, [output, skipped], data)

    def of_the_model(stage: str, done: int, total: int) -> None:
        if on_progress:
            on_progress(stage.replace("the target", "the model"), done, total)

    with open_run(unfinished, "scores", of_the_model) as run:
        contents = {"target": partial(content_of, run, source)}
        inputs = Inputs(contents, {"target": f"--model {config.model}"})
        inputs["data"] = fingerprint_rows(pool)
        training = Training(**{name: getattr(config, name) for name in LORA})
        groups = {name: getattr(config, name) for name in ("reading", "scoring", "engine", "spread")}
        stand_in = SelectConfig(seed=config.seed, training=training, **groups)
        run.begin(ingredients(stand_in), inputs, update=True)
        from staff.runs.pieces import Pieces  # torch comes in here

        pieces = Pieces(stand_in, run, pool, {"target": source}, inputs, [Need("target", "effort")])
        pool = pieces.usable_rows()
        scores = pieces.scores("target")
        pieces.free()
        tokens = pieces.pool("target")
        response = tokens.response_tokens()
        columns = {**row_columns(pool), **scores}
        columns |= {"prompt_tokens": tokens.lengths - response, "response_tokens": response}
        write_scores(output, columns)
        warn(pool, tokens, config.reading.max_length, skipped)
    files.remove(unfinished)
    return output, len(pool)
