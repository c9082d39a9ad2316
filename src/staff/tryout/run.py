"""Which way of choosing helps on this data, told by small fine-tunings (`staff try`, `--method auto`)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from staff import files
from staff.comparison.evaluate import evaluate, read_examples
from staff.comparison.grid import FULL, UNTOUCHED, Cell, Comparison, Task, Variant
from staff.comparison.run import WHERE, choose, compare, finished_cells
from staff.config import (
    DEFAULT_METHOD,
    DiagnoseConfig,
    EvaluateConfig,
    FinetuneConfig,
    SelectConfig,
    Trying,
    check_whole,
    flat,
    from_mapping,
    names_of,
    unnamed,
)
from staff.data import rows as reading
from staff.data.duplicates import digest_of, words_of
from staff.data.rows import Rows
from staff.diagnosis import SIGNS, diagnose, tokens_of
from staff.methods import METHODS
from staff.methods.fidelity import USABLE, Estimate, fidelity, within
from staff.pipeline import QUERY
from staff.runs.outputs import Run
from staff.tryout.cost import (
    PAIR,
    Tries,
    counted_cost,
    least_share,
    no_draft_because,
    plan_tries,
    relative_cost,
)
from staff.tryout.judge import better, decided, judged_rows, larger, row_of, values
from staff.tryout.ways import AUTO, RANDOM, WAYS, candidates, method_of, options_of, rate_of
from staff.types import Progress

logger = logging.getLogger(__name__)

NAME = "tryout"
MOST_WAYS = 6  # that are tried, where none are named


def try_ways(
    config: SelectConfig, *, update: bool = False, on_progress: Progress | None = None
) -> dict[str, Any]:
    """Find out which way of choosing to take, or go on where that was cut off.

    Leaves, in config.output, diagnosis.json, query.jsonl and judge.jsonl (halves of the validation rows),
    tryouts/ (a comparison's folder: results.csv, a row a fine-tuning), tryouts-draft/ (such a one of the
    draft), untouched/ (answers of the models as they come), tryout.csv and tryout.json.

    Returns:
        what tryout.json holds: chosen, reasons (sentences), ways (a row each: way, seeds, mean, margin to
        random, error, loss_margin, passes), full (such a row of the full data, or None), draft (None, or
        fidelity, Spearman's correlation with its interval, and ways as above), untouched, metric, steps;
        predicted and counted, each with looking, choosing, training, judging, passes and share.

    Raises:
        ValueError: something that the user can mend.
    """
    output = Path(config.output or "")
    pool, share = _checked_pool(config)
    files.check_mark(output, "run")
    files.mark(output, "run")
    queries, judges = _split(config, pool, output)
    found = None
    if config.draft:
        shared = ("data", "target", "draft_blocks", "reading", "engine", "seed")
        told: dict[str, Any] = {name: getattr(config, name) for name in shared}
        told |= {"validation": str(queries), "output": str(output / "diagnosis.json"), "model": config.draft}
        found = diagnose(DiagnoseConfig(**told), on_progress)
        if not {"copies", "suspects", "mixed"} & set(found["signs"]):
            logger.warning("a clean pool of one task: a tie with random is to be expected")
    ways = candidates(config, found["signs"] if found else ())[:MOST_WAYS]
    known = {name for way in ways for name in METHODS[method_of(way)].options()}
    if unused := [pair for pair in config.option if pair.partition("=")[0] not in known]:
        logger.warning("--option %s: none of %s has it", ", ".join(unused), ", ".join(ways))
    num_judges = len(reading.read(judges, **_plain_reading(config)))
    sizes = len(pool), share, num_judges, found, relative_cost(config)
    no_draft = no_draft_because(config, sizes[-1])
    plan = plan_tries(config, ways, *sizes, on_draft=None if no_draft else True)
    about: dict[str, Any] = {"metric": config.trying.metric_command or config.trying.metric, "ways": []}
    about["draft"] = None
    reasons, untouched = [], output / "untouched"
    if plan and plan.on_draft:
        models = {"draft": str(config.draft), "target": config.target}
        losses = [_untouched(config, judges, models[name], untouched / name, on_progress) for name in models]
        faith = _fidelity(*losses)
        about["draft"] = {"fidelity": faith and [*faith], "ways": []}
        if faith is None or faith[1] < USABLE:
            plan = plan_tries(config, ways, *sizes, on_draft=False)
            shown = f"Spearman {within(faith)}" if faith else "too few rows, or all alike"
            reasons = [
                f"no round on the draft: it may rank the judging rows otherwise than the target ({shown})"
            ]
    elif config.draft and no_draft and len(ways) > 2:
        reasons = [f"no round on the draft: {no_draft}"]
    if plan is None:
        least = least_share(config, ways, *sizes)
        reason = (
            f"--try-cost {config.trying.try_cost:g} of a full fine-tuning is less than two seeds of two ways "
            f"take, which would be {least:.2g}: random, without a try"
        )
        logger.warning("%s", reason)
        return _written(output, {**about, "chosen": RANDOM, "reasons": [reason]})
    logger.warning(
        "trying %s in %d fine-tunings of %d steps: %.2f passes of the target, %.0f %% of a full fine-tuning",
        ", ".join(plan.ways),
        (sum(plan.rounds) + plan.full + plan.on_draft * len(plan.ways)) * PAIR,
        plan.steps,
        plan.predicted["passes"],
        100 * plan.predicted["share"],
    )
    comparison = _comparison(config, plan, judges, queries, output / "tryouts")
    seeds = tuple((config.seed * 100 + i) % 2**32 for i in range(PAIR * len(plan.rounds)))
    how: dict[str, Any] = {"update": update, "on_progress": on_progress}
    _untouched(config, judges, config.target, untouched / "target", on_progress)
    left, coresets = list(plan.ways), dict[Cell, Run]()
    runs: dict[str, list[Run]] = {}
    on_draft = partial(_draft_cell, output / "tryouts-draft")
    if plan.on_draft:
        runs, coresets = choose(dataclasses.replace(comparison, seeds=seeds[:PAIR]), **how)
        _tune_draft(config, comparison, coresets, output / "tryouts-draft", how)
        rows = [row_of(partial(values, config, on_draft), way, seeds[:PAIR]) for way in left]
        about["draft"]["ways"] = rows
        left = better(rows, plan.rounds[0])
        gone = ", ".join(way for way in plan.ways if way not in left)
        reasons = [f"on the draft (Spearman {within(about['draft']['fidelity'])}) {gone} came last"]
    judge = partial(values, config, partial(_target_cell, config, comparison.output))
    for number, count in enumerate(plan.rounds):
        own = seeds[: PAIR * (number + 1)]
        if number:
            left = better([row_of(judge, way, own[:-PAIR]) for way in left], count)
        some = {way: comparison.variants[way] for way in left}
        full = plan.full and not number
        compare(dataclasses.replace(comparison, variants=some, seeds=own, full=full), runs=runs, **how)
    done, tokens = finished_cells(dataclasses.replace(comparison, seeds=seeds, full=plan.full))
    about |= {"steps": plan.steps, "predicted": plan.predicted}
    drafts = [on_draft(cell.method, int(cell.seed or 0)) for cell in coresets]
    others = [*drafts, untouched / "draft"] if about["draft"] else []
    judged = {untouched / "target": 1.0, **dict.fromkeys(others, sizes[-1])}
    tuned = [(files.read_checked(folder / "cell.json") or {})["figures"] for folder in drafts]
    about["counted"] = counted_cost(config, comparison, found, done, tokens, coresets, tuned, judged)
    about |= decided(config, judge, plan, done, left)
    about["untouched"] = float(judged_rows(config, untouched / "target").mean())
    about["reasons"] += reasons
    if not plan.full:
        about["reasons"].append("--try-cost is too short for a model of the full data beside them")
    if about["chosen"] == RANDOM:
        about["reasons"] += larger(config, about, left)
    return _written(output, about)


def settled(config: SelectConfig, about: Mapping[str, Any]) -> SelectConfig:
    """The settings of the selection that a try-out (`try_ways`) ends with, all pruning rates by one way."""
    way = about["chosen"]
    query, known = str(Path(config.output or "") / QUERY), METHODS[method_of(way)].options()
    own = tuple(pair for pair in config.option if pair.partition("=")[0] in known)
    told = {"method": (way,), "validation": query, "option": own, **WAYS.get(way, {})}
    return dataclasses.replace(config, **told)


def halves(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Positions of validation rows that steer (query rows) and of those that judge: by a hash of each row's
    text, so that a row stays on its side whatever else the file holds."""
    judges = np.array([digest_of(example)[0] % 2 for example in rows.examples()], bool)
    return np.flatnonzero(~judges), np.flatnonzero(judges)


def _checked_pool(config: SelectConfig) -> tuple[Rows, float]:
    """The pool, and what share of it is kept at the pruning rate to try, about."""
    missing = unnamed(config, "data", "output", "target")
    if not config.validation:
        missing.append(
            "give rows of the task as it will be judged with --validation FILE: half of them judge"
        )
    if not config.pruning_rate and config.budget is None and config.budget_tokens is None:
        missing.append("say how much to keep with --pruning-rate, --budget or --budget-tokens")
    check_whole(missing)
    if config.method not in ((AUTO,), (DEFAULT_METHOD,)):
        raise ValueError(f"--method {AUTO} stands alone; what it tries is named with --ways")
    options_of(config, candidates(config, SIGNS))
    pool = reading.read(list(config.data), **config.reading.keywords())
    if config.budget_tokens is not None:
        tokens = int(tokens_of(config, pool, config.target, "--target").lengths.sum())
        return pool, min(1.0, config.budget_tokens / tokens)
    share = (config.budget or 0) / len(pool) if (rate := rate_of(config)) is None else 1 - rate
    if not 0 < share <= 1:
        raise ValueError(f"--budget {config.budget}: of {len(pool)} rows at least one is to be kept")
    return pool, share


def _plain_reading(config: SelectConfig) -> dict[str, Any]:
    """How rows are read that were written out again: as the pool, but for where it was found."""
    return {**config.reading.keywords(), **dict.fromkeys(("split", "config", "revision", "dataset_info"))}


def _split(config: SelectConfig, pool: Rows, output: Path) -> tuple[Path, Path]:
    """The two halves of the validation rows, as files.

    Raises:
        ValueError: rows of it stand in the pool, or a half is empty.
    """
    rows = reading.read(config.validation, **_plain_reading(config))

    def plain(example: Any) -> str:
        return " ".join(words_of("\n".join(turn.text for turn in example.turns)))

    places = {plain(example): place for place, example in enumerate(rows.examples())}
    both = [(places[text], i) for i, e in enumerate(pool.examples()) if (text := plain(e)) in places]
    if both:
        pairs = ", ".join(
            f"{rows.numbers[mine]} (row {pool.numbers[other]} of it)" for mine, other in both[:5]
        )
        more = f" and {len(both) - 5} more" if len(both) > 5 else ""
        raise ValueError(
            f"--validation {config.validation} has rows that stand in the pool too: {pairs}{more}; take them "
            f"out of one of the two, for a model that was trained on them can't be judged by them"
        )
    parts = halves(rows)
    if not all(map(len, parts)):
        raise ValueError(
            f"--validation {config.validation}: {len(rows)} rows are too few to steer and to judge"
        )
    paths = output / QUERY, output / "judge.jsonl"
    for path, positions in zip(paths, parts, strict=True):
        rows.write_jsonl(path, positions.tolist())
    return paths


def _untouched(
    config: SelectConfig, judges: Path, model: str, folder: Path, on_progress: Progress | None
) -> dict[str, list[Any]]:
    """The judging rows as a model answers them as it comes; its losses among them."""
    settings = {**_judging_settings(config), "data": [str(judges)], "model": model}
    settings["output"] = str(folder / "scores.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    evaluate(from_mapping(EvaluateConfig, settings, "the try-out"), on_progress=on_progress)
    return read_examples(folder / "scores.jsonl")


def _fidelity(draft: Mapping[str, list[Any]], target: Mapping[str, list[Any]]) -> Estimate | None:
    """Spearman's correlation of two models' losses on rows that stand for any number of their like; None
    where there are too few."""
    _, *places = np.intersect1d(draft["row"], target["row"], return_indices=True)
    one, other = (np.array(of["loss"])[at] for of, at in zip((draft, target), places, strict=True))
    many = 1000 * len(one)
    return fidelity(np.zeros(len(one), np.int64), np.array([many]), many, one, other).spearman


def _tune_draft(
    config: SelectConfig,
    comparison: Comparison,
    coresets: Mapping[Cell, Run],
    folder: Path,
    how: Mapping[str, Any],
) -> None:
    """The draft fine-tuned on coresets and judged, a task each: it has no pool of its own to choose from."""
    (task,) = comparison.tasks.values()
    own = {name: value for name, value in task.finetune.items() if name not in WHERE}
    for seed in dict.fromkeys(int(cell.seed or 0) for cell in coresets):
        tasks = {}
        for name, run in ((f"{c.method}-{seed}", run) for c, run in coresets.items() if c.seed == seed):
            data = (str(run.path / "coreset.jsonl"),)
            tasks[name] = dataclasses.replace(task, name=name, train=data, finetune=own, select={})
        compare(Comparison(folder, str(config.draft), tasks, {}, (), (seed,), untouched=False), **how)


def _draft_cell(folder: Path, way: str, seed: int) -> Path:
    return folder / Cell(f"{way}-{seed}", FULL, None, seed).folder


def _target_cell(config: SelectConfig, folder: Path, way: str, seed: int) -> Path:
    return folder / Cell(NAME, way, None if way == FULL else rate_of(config), seed).folder


def _judging_settings(config: SelectConfig) -> dict[str, Any]:
    told = {name: value for name, value in _given(config, EvaluateConfig).items() if name not in WHERE}
    return {**told, "max_new_tokens": min(config.trying.answer_tokens, config.reading.max_length - 1)}


def _given(config: SelectConfig, kind: type = SelectConfig) -> dict[str, Any]:
    """Settings of selection, or of another stage, that are not as usual and that no comparison sets."""
    usual = flat(SelectConfig())
    own = {"data", "target", "method", "pruning_rate", "output", "seed", "validation", "push_to_hub"}
    own |= {"option", "public", "license", "format", *names_of(Trying)}
    there = names_of(kind).keys() - own
    return {name: value for name, value in flat(config).items() if name in there and value != usual[name]}


def _comparison(config: SelectConfig, plan: Tries, judges: Path, queries: Path, output: Path) -> Comparison:
    """The try-outs as a comparison of one task, whose test rows are the judging ones."""
    variants, options = {}, options_of(config, candidates(config, SIGNS))
    for way in plan.ways:
        settings = {name: value for name, value in WAYS.get(way, {}).items() if name != "method"}
        method = METHODS[method_of(way)]
        fixed = {name: value for name, value in options.items() if name in method.options()}
        variants[way] = Variant(way, dataclasses.replace(method, fixed={**method.fixed, **fixed}), settings)
    task = Task(
        NAME,
        tuple(config.data),
        (str(judges),),
        select={**_given(config), "validation": str(queries)},
        finetune={**_given(config, FinetuneConfig), "max_steps": plan.steps},
        evaluate=_judging_settings(config),
        metrics=tuple(dict.fromkeys((config.trying.metric, "loss"))),
    )
    rates = (rate_of(config),)
    return Comparison(output, config.target, {NAME: task}, variants, rates, (), full=False, untouched=False)


def _written(output: Path, about: dict[str, Any]) -> dict[str, Any]:
    columns = ("way", "seeds", "mean", "margin", "error", "low", "high", "loss_margin", "passes")
    rows = [*about["ways"], *([about["full"]] if about.get("full") else [])]
    files.write_csv(output / "tryout.csv", columns, ([row[name] for name in columns] for row in rows))
    files.write_json(output / "tryout.json", about)
    return about


def describe_tries(about: Mapping[str, Any], output: str) -> str:
    """What came out as a person reads it."""
    lines = ["", f"take       {about['chosen']}", *(f"{'':11}{reason}" for reason in about["reasons"])]
    if about["ways"]:
        lines += ["", f"{'way':18}{'seeds':>6}{about['metric'][:12]:>14}{'to random':>11}  between (2 s.e.)"]
        lines[-1] += f"{'by loss':>16}{'choosing':>10}"
        for row in (*about["ways"], *([about["full"]] if about["full"] else [])):
            lines.append(
                f"{row['way']:18}{row['seeds']:6}{row['mean']:14.3f}{row['margin']:+11.3f}  "
                f"{row['low']:+.3f} to {row['high']:+.3f}{row['loss_margin']:+12.3f}{row['passes']:10.2f}"
            )
        lines.append(f"{UNTOUCHED:24}{about['untouched']:14.3f}")
        for row in about["draft"]["ways"] if about["draft"] else []:
            name, between = f"draft, {row['way']}", f"{row['low']:+.3f} to {row['high']:+.3f}"
            lines.append(f"{name:18}{row['seeds']:6}{row['mean']:14.3f}{row['margin']:+11.3f}  {between}")
        took, thought = about["counted"], about["predicted"]
        lines += [
            "",
            f"cost       {took['passes']:.2f} passes of the target ({thought['passes']:.2f} predicted), "
            f"{took['share']:.0%} of one full fine-tuning: "
            + ", ".join(f"{name} {took[name]:.2f}" for name in took if name not in ("passes", "share")),
        ]
    return "\n".join([*lines, "", f"the try-out is in {output}: tryout.json, tryout.csv, tryouts/"])
