"""What a comparison will take, before any of it: a few samples timed, and the stages summed over the grid."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from staff.comparison.grid import (
    UNTOUCHED,
    Comparison,
    Task,
    Variant,
    evaluate_config,
    finetune_config,
    select_config,
)
from staff.config import PlanConfig, SelectConfig, flat, from_mapping, names_of
from staff.data import rows as formats
from staff.planning import foretold, job_of, stages
from staff.runs.keys import model_specs
from staff.timing import Look, look_at_models
from staff.types import Progress, Stage

ANSWERED = 8  # prompts of a test file that are timed
TOKENS_TIMED = 16  # tokens of each at most

Known = tuple[formats.Rows, dict[str, Look]]


def forecast(comparison: Comparison, on_progress: Progress | None = None) -> dict[str, Any]:
    """Seconds of each part of a comparison on this machine, by one process.

    Returns:
        tasks: name -> models (judged), selection_seconds, finetune_seconds, evaluate_seconds (None where the
        target is not at hand); seconds, of all; timed, were all models at hand.

    Raises:
        ValueError: something that the user can mend.
    """
    tell = on_progress or (lambda stage, done, total: None)
    found: dict[str, Any] = {}
    is_timed, an_answer = True, None
    for name, task in comparison.tasks.items():
        known: dict[str, Known] = {}
        for variant in comparison.variants:
            config = select_config(comparison, task, variant, 0, "x")
            if str(config.draft) not in known:
                known[str(config.draft)] = _look(comparison, task, config, tell)
        rows, looks = next(iter(known.values()))
        tuning = finetune_config(comparison, task, task.train, 0, "x")
        target = looks["target"]
        is_timed &= all(seen.is_timed for _, other in known.values() for seen in other.values())
        if an_answer is None and target.is_timed:
            an_answer = _time_answers(comparison, task, tell)
        selecting = 0.0
        for group in {tuple(comparison.group(variant)) for variant in comparison.variants}:
            config = select_config(comparison, task, group[0], 0, "x")
            taken = _selecting(comparison, task, group, known)
            own = {stage for stage in taken if _is_each_seeds(stage, config)}
            if any(stage.kind != "verify" for stage in own):
                own.add(Stage("load"))
            for stage, seconds in taken.items():
                selecting += seconds * (len(comparison.seeds) if stage in own else 1)
        training, cells = 0.0, [cell for cell in comparison.cells() if cell.task == name]
        for cell in cells:
            if cell.method != UNTOUCHED:
                share = 1 - (cell.pruning_rate or 0.0)
                epochs, steps = tuning.epochs * share, tuning.max_steps
                passes = epochs if steps is None else steps * tuning.training.batch_size / len(rows)
                training += passes * target.tokens * target.speed.training + target.speed.loading
        tests = len(formats.read(list(task.test), **tuning.reading.keywords()))
        length = min(
            target.response / len(rows), evaluate_config(comparison, task, "x", "x.jsonl").max_new_tokens
        )
        answering = (
            None if an_answer is None else len(cells) * (tests * length * an_answer + target.speed.loading)
        )
        found[name] = {
            "models": len(cells),
            "selection_seconds": selecting,
            "finetune_seconds": training,
            "evaluate_seconds": answering,
        }
    parts = ("selection_seconds", "finetune_seconds", "evaluate_seconds")
    return {
        "tasks": found,
        "seconds": sum(row[part] or 0.0 for row in found.values() for part in parts),
        "timed": is_timed,
    }


def _look(comparison: Comparison, task: Task, config: SelectConfig, tell: Progress) -> Known:
    tuning = finetune_config(comparison, task, task.train, 0, "x")
    shared = {name: value for name, value in flat(config).items() if name in names_of(PlanConfig)}
    shared |= flat(tuning.training)
    plan = from_mapping(PlanConfig, {**shared, "epochs": tuning.epochs}, f"plan of {task.name}")
    rows = formats.read(list(task.train), **config.reading.keywords())
    return look_at_models(plan, rows, tell)


def _is_each_seeds(stage: Stage, config: SelectConfig) -> bool:
    """Does every seed do a stage anew? What was drawn or tuned by a seed is its own."""
    tuned = [name for name, spec in model_specs(config).items() if spec.epochs]
    is_seeded = config.scoring.scope in ("lora", "released") and stage.kind != "load"
    return stage.kind in ("verify", "tune", "converse") or stage.model in tuned or is_seeded


def _selecting(
    comparison: Comparison, task: Task, group: tuple[str, ...], known: Mapping[str, Known]
) -> dict[Stage, float]:
    """Seconds of each stage of the selection run of some variants that share it, at one seed: what two of
    them need is done once."""
    parts: dict[Stage, float] = {}
    for name in group:
        variant: Variant = comparison.variants[name]
        config = select_config(comparison, task, name, 0, "x")
        rows, looks = known[str(config.draft)]
        chosen = foretold(config, looks, rows, 0) if variant.method.verify else None
        target, n = looks["target"], len(rows)
        job = job_of(config, target, n, chosen, target_epochs=config.target_epochs, epochs=0.0)
        speeds = {label: seen.speed for label, seen in looks.items()}
        parts |= stages(variant.method, job, speeds) or {}
    return parts


def _time_answers(comparison: Comparison, task: Task, tell: Progress) -> float:
    """Seconds of a token of an answer, in a small batch."""
    from staff.data.samples import prompts_of
    from staff.models import load
    from staff.models.answering import Answerer

    tell(str(Stage("answer")), 0, 1)
    config = evaluate_config(comparison, task, comparison.target, "x.jsonl")
    rows, engine, how = (
        formats.read(list(task.test), **config.reading.keywords()),
        config.engine,
        config.reading,
    )
    source = load.resolve(comparison.target)
    tokenizer = load.load_tokenizer(source, engine.trust_remote_code)
    examples = [example for _, example in zip(range(ANSWERED), rows.examples(), strict=False)]
    room = how.max_length - config.max_new_tokens
    prompts, end, _ = prompts_of(examples, tokenizer, room, how, rows.numbers[: len(examples)])
    device = load.pick_device(engine.device)
    dtype = load.pick_dtype(engine.dtype, device)
    model = load.load_model(source, dtype, device, engine.trust_remote_code, engine.load_in)
    answerer = Answerer(model, tokenizer, end, min(TOKENS_TIMED, config.max_new_tokens), config.batch_tokens)
    began = time.perf_counter()
    tokens = sum(answerer.answer(prompts)["answer_tokens"])
    tell(str(Stage("answer")), 1, 1)
    return (time.perf_counter() - began) / max(tokens, 1)


def describe_forecast(found: Mapping[str, Any]) -> str:
    """A forecast as a person reads it."""
    lines = ["", f"{'task':24}{'models':>8}{'choosing':>12}{'training':>12}{'answering':>12}"]
    for name, row in found["tasks"].items():
        answering = row["evaluate_seconds"]
        told = "" if answering is None else f"{answering:.0f}"
        seconds = f"{row['selection_seconds']:12.0f}{row['finetune_seconds']:12.0f}{told:>12}"
        lines.append(f"{name:24}{row['models']:8}{seconds}")
    by = "" if found["timed"] else "; what is not on this machine by its size alone, at least"
    hours = found["seconds"] / 3600
    return "\n".join(
        [
            *lines,
            "",
            f"seconds on this machine, by one process{by}; in all {found['seconds']:.0f} ({hours:.1f} hours)",
        ]
    )
