"""Which way of choosing helps on this data, told by small fine-tunings (`staff try`, `--method auto`)."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from staff import files
from staff.comparison.evaluate import evaluate, read_examples
from staff.comparison.grid import FULL, UNTOUCHED, Cell, Comparison, Task, Variant, select_config
from staff.comparison.run import WHERE, Figures, choose, compare, finished_cells, selection_cost
from staff.comparison.statistics import paired_margin
from staff.comparison.tables import LOWER
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
    meant,
    names_of,
    unnamed,
)
from staff.data import rows as reading
from staff.data.duplicates import digest_of, words_of
from staff.data.rows import Rows
from staff.diagnosis import SIGNS, diagnose, tokens_of
from staff.methods import METHODS
from staff.methods.fidelity import USABLE, Estimate, fidelity, within
from staff.models.families import self_blocks
from staff.pipeline import QUERY, given_options
from staff.planning import finetuning_passes
from staff.runs.outputs import Run
from staff.types import AGAINST_VALIDATION, Progress

logger = logging.getLogger(__name__)

AUTO, RANDOM, NAME = "auto", "random", "tryout"
# ways of choosing that are a method with a setting; every other is a method's own name
WAYS: dict[str, dict[str, Any]] = {
    "dedup": {"method": RANDOM, "dedup": "near"},
    "drop-suspects": {"method": RANDOM, "drop_suspects": True},
}
PAIR = 2  # seeds that a round adds
FEWEST_STEPS = 10  # of a fine-tuning that says anything
MOST_WAYS = 6  # that are tried, where none are named
ERRORS = 2.0  # standard errors that the margin must lie beyond
JUDGED_FOR = 600  # seconds that a user's judge may take for one model's answers


def _method_of(way: str) -> str:
    return str(WAYS.get(way, {"method": way})["method"])


def halves(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Positions of validation rows that steer (query rows) and of those that judge: by a hash of each row's
    text, so that a row stays on its side whatever else the file holds."""
    judges = np.array([digest_of(example)[0] % 2 for example in rows.examples()], bool)
    return np.flatnonzero(~judges), np.flatnonzero(judges)


@dataclasses.dataclass(frozen=True)
class Tries:
    """What a try-out does, and what that costs.

    Attributes:
        ways: candidates, random first, in the order in which they are given up where they are too many.
        on_draft: does a first round fine-tune the draft on every way's coreset?
        rounds: how many ways each round on the target has; every one adds PAIR seeds to those before it.
        full: is the model of PAIR seeds of the full data beside them?
        steps: of each fine-tuning.
        predicted: what looking, choosing, training and judging take, in scoring passes of the target over the
            pool (U), all of it as passes, and as a share of one full fine-tuning.
    """

    ways: tuple[str, ...]
    on_draft: bool
    rounds: tuple[int, ...]
    full: bool
    steps: int
    predicted: Mapping[str, float]


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
    ways = _candidates(config, found["signs"] if found else ())[:MOST_WAYS]
    _options(config, ways)
    num_judges = len(reading.read(judges, **_plain_reading(config)))
    sizes = len(pool), share, num_judges, found, _relative_cost(config)
    no_draft = _no_draft(config, sizes[-1])
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
        least = _least(config, ways, *sizes)
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
        rows = [_row(partial(_values, config, on_draft), way, seeds[:PAIR]) for way in left]
        about["draft"]["ways"] = rows
        left = _better(rows, plan.rounds[0])
        gone = ", ".join(way for way in plan.ways if way not in left)
        reasons = [f"on the draft (Spearman {within(about['draft']['fidelity'])}) {gone} came last"]
    judge = partial(_values, config, partial(_target_cell, config, comparison.output))
    for number, count in enumerate(plan.rounds):
        own = seeds[: PAIR * (number + 1)]
        if number:
            left = _better([_row(judge, way, own[:-PAIR]) for way in left], count)
        some = {way: comparison.variants[way] for way in left}
        full = plan.full and not number
        compare(dataclasses.replace(comparison, variants=some, seeds=own, full=full), runs=runs, **how)
    done, tokens = finished_cells(dataclasses.replace(comparison, seeds=seeds, full=plan.full))
    about |= {"steps": plan.steps, "predicted": plan.predicted}
    drafts = [on_draft(cell.method, int(cell.seed or 0)) for cell in coresets]
    others = [*drafts, untouched / "draft"] if about["draft"] else []
    judged = {untouched / "target": 1.0, **dict.fromkeys(others, sizes[-1])}
    tuned = [(files.read_checked(folder / "cell.json") or {})["figures"] for folder in drafts]
    about["counted"] = _counted(config, comparison, found, done, tokens, coresets, tuned, judged)
    about |= _decided(config, judge, plan, done, left)
    about["untouched"] = float(_judged(config, untouched / "target").mean())
    about["reasons"] += reasons
    if not plan.full:
        about["reasons"].append("--try-cost is too short for a model of the full data beside them")
    if about["chosen"] == RANDOM:
        about["reasons"] += _larger(config, about, left)
    return _written(output, about)


def settled(config: SelectConfig, about: Mapping[str, Any]) -> SelectConfig:
    """The settings of the selection that a try-out (`try_ways`) ends with, all pruning rates by one way."""
    way = about["chosen"]
    query, known = str(Path(config.output or "") / QUERY), METHODS[_method_of(way)].options()
    own = tuple(pair for pair in config.option if pair.partition("=")[0] in known)
    told = {"method": (way,), "validation": query, "option": own, **WAYS.get(way, {})}
    return dataclasses.replace(config, **told)


# ---- what goes in ----


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
    _options(config, _candidates(config, SIGNS))
    pool = reading.read(list(config.data), **config.reading.keywords())
    if config.budget_tokens is not None:
        tokens = int(tokens_of(config, pool, config.target, "--target").lengths.sum())
        return pool, min(1.0, config.budget_tokens / tokens)
    share = (config.budget or 0) / len(pool) if (rate := _rate(config)) is None else 1 - rate
    if not 0 < share <= 1:
        raise ValueError(f"--budget {config.budget}: of {len(pool)} rows at least one is to be kept")
    return pool, share


def _rate(config: SelectConfig) -> float | None:
    """The pruning rate to try: the highest, where what is chosen matters most; None where it is a budget."""
    return max(config.pruning_rate, default=None)


def _options(config: SelectConfig, ways: Iterable[str]) -> dict[str, Any]:
    """Those given with --option; each is one of some way's method."""
    return given_options(config.option, {name: METHODS[name] for name in map(_method_of, ways)})


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


def _candidates(config: SelectConfig, signs: Iterable[str]) -> tuple[str, ...]:
    """Ways to try, random first: those named, else what fits what was found in the pool."""
    for way in config.trying.ways:
        if way not in METHODS and way not in WAYS:
            raise ValueError(f"--ways: there is no {way!r}; {meant(way, [*WAYS, *METHODS])}")
    if config.trying.ways:
        return tuple(dict.fromkeys((RANDOM, *config.trying.ways)))
    likely = ["less", "rds"] if "mixed" in signs else []
    likely += ["drop-suspects"] if "suspects" in signs else []
    likely += ["dedup"] if "copies" in signs else []
    others = ["dedup", *(["coverage", DEFAULT_METHOD, "staff"] if config.draft else [])]
    return tuple(dict.fromkeys((RANDOM, *likely, *others)))


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
    return folder / Cell(NAME, way, None if way == FULL else _rate(config), seed).folder


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
    variants, options = {}, _options(config, _candidates(config, SIGNS))
    for way in plan.ways:
        settings = {name: value for name, value in WAYS.get(way, {}).items() if name != "method"}
        method = METHODS[_method_of(way)]
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
    rates = (_rate(config),)
    return Comparison(output, config.target, {NAME: task}, variants, rates, (), full=False, untouched=False)


# ---- what it costs ----


def rounds_of(num_ways: int) -> tuple[int, ...]:
    """How many ways each round has, random among them: the worse half goes, till one is left beside it."""
    rounds = [num_ways]
    while rounds[-1] > 2:
        rounds.append(max(2, math.ceil(rounds[-1] / 2)))
    return (*rounds, 2) if len(rounds) == 1 else tuple(rounds)


def _relative_cost(config: SelectConfig) -> float:
    """r, the cost of a token in the draft over that in the target, by their configurations; 0 without one."""
    from staff.models import drafts, families, load

    def cost(name: str, blocks: int | None = None) -> float:
        model = load.without_weights(load.resolve(name), config.engine.trust_remote_code)
        size = load.measure(drafts.cut(model, blocks, config.draft_blocks) if blocks else model)
        return size.scoring_flops(2, 1, config.scoring.scope)

    blocks = families.self_blocks(config.draft)
    draft = config.target if blocks else config.draft
    return cost(draft, blocks) / cost(config.target) if draft else 0.0


def _no_draft(config: SelectConfig, r: float) -> str:
    """Why no round is on the draft; empty where one may be. r as of _relative_cost."""
    if self_blocks(config.draft) is not None:
        return f"{config.draft} is no model of its own to fine-tune"
    if not config.draft:
        return "there is none"
    return f"{config.draft} costs as much as the target" if r >= 1 else ""


def _selecting(ways: Iterable[str], r: float) -> float:
    """What choosing costs at most, in U: a pass of the draft for what its needs share, one for each other."""
    methods = [METHODS[_method_of(way)] for way in ways]
    needs = {need for method in methods for need in method.needs.values()}
    passes = {(need.model, need.quantity if need.quantity in AGAINST_VALIDATION else "") for need in needs}
    passes |= {("raw_draft", ""), ("raw_draft", "alone")} if "drop-suspects" in ways else set()
    total = 0.0
    for model, quantity in passes:
        # a gradient kept for comparing takes a pass there and two back
        total += (0.0 if model == "pool" else 1.0 if "target" in model else r) * (
            3 if quantity.startswith("simil") else 1
        )
    return total + 0.1 * any(method.verify for method in methods)


def _judging(config: SelectConfig, n: int, judges: int, found: Mapping[str, Any] | None) -> float:
    """What judging one model costs, in U: the references' loss, the prompts, a step for each token said."""
    lengths = (found or {}).get("lengths", {})
    row = sum(lengths[part]["50%"] for part in ("prompt", "response")) if lengths else 200
    return judges / n * (2 + config.trying.answer_tokens / max(row, 1))


def plan_tries(
    config: SelectConfig,
    ways: Sequence[str],
    n: int,
    share: float,
    judges: int,
    found: Mapping[str, Any] | None = None,
    r: float = 0.0,
    on_draft: bool | None = None,
) -> Tries | None:
    """What --try-cost buys: as many of the ways as it bears, at as many steps as the coreset's own training
    has at most, the full data beside them where that leaves the steps their least; None where it is less than
    two seeds of two ways.

    Args:
        on_draft: does the draft take the first round of more than two ways? None: it is not asked whether it
            is faithful; else the untouched draft is judged for that.
    """
    full = finetuning_passes(config.trying.full_epochs)
    fewest, most = _steps(config, n, share)
    judging, step = _judging(config, n, judges, found), 2 * config.training.batch_size / n
    parts = {"looking": r * found["passes"] if found else 0.0}
    for count in range(len(ways), 1, -1):
        some = tuple(ways[:count])
        parts["choosing"] = _selecting(some, r)
        is_first = bool(on_draft) and count > 2
        untouched = 1 + r * (is_first or on_draft is False)
        left = config.trying.try_cost * full - parts["looking"] - parts["choosing"] - judging * untouched
        most_ways = math.ceil(count / 2) if is_first else count
        for rounds, beside in product(dict.fromkeys((rounds_of(most_ways), (most_ways,))), (True, False)):
            cells = PAIR * (sum(rounds) + beside + r * count * is_first)
            steps = min(most, int((left / cells - judging) / step))
            if steps < fewest:
                continue
            # with money left over, the last two meet over more seeds
            more = 2 * PAIR
            while steps == most and len(rounds) < 8 and rounds[-1] == 2:
                if (cells + more) * (judging + steps * step) > left:
                    break
                rounds, cells = (*rounds, 2), cells + more
            parts |= {"training": cells * steps * step, "judging": judging * (cells + untouched)}
            return Tries(some, is_first, rounds, beside, steps, _summed(config, parts))
    return None


def _steps(config: SelectConfig, n: int, share: float) -> tuple[int, int]:
    """Steps of a fine-tuning at least and at most: what says anything, and the coreset's own training."""
    batches = -(-round(share * n) // config.training.batch_size)
    most = max(1, round(config.trying.full_epochs * batches))
    return min(FEWEST_STEPS, most), most


def _summed(config: SelectConfig, parts: Mapping[str, float]) -> dict[str, float]:
    """Parts of the cost in U, their sum, and that as a share of one full fine-tuning."""
    passes = sum(parts.values())
    return {**parts, "passes": passes, "share": passes / finetuning_passes(config.trying.full_epochs)}


def _least(
    config: SelectConfig,
    ways: Sequence[str],
    n: int,
    share: float,
    judges: int,
    found: Mapping[str, Any] | None,
    r: float,
) -> float:
    """The share of a full fine-tuning that two seeds of two ways take."""
    cells, looking = 2 * PAIR, r * found["passes"] if found else 0.0
    passes = looking + _selecting(ways[:2], r) + _judging(config, n, judges, found) * (cells + 1)
    passes += cells * _steps(config, n, share)[0] * 2 * config.training.batch_size / n
    return passes / finetuning_passes(config.trying.full_epochs)


def _counted(
    config: SelectConfig,
    comparison: Comparison,
    found: Mapping[str, Any] | None,
    done: Mapping[Cell, Figures],
    tokens: int,
    coresets: Mapping[Cell, Run],
    tuned: Iterable[Figures],
    judged: Mapping[Path, float],
) -> dict[str, float]:
    """What the try-outs took, in U: the diagnosis, every way's choosing once, each fine-tuning, each judging
    by its tokens.

    Args:
        done: fine-tunings of the target.
        tokens: of the pool.
        coresets: that the draft was fine-tuned on.
        tuned: what that took.
        judged: folders of answers besides, each with the cost of a token in its model, the target's being 1.
    """
    (task,) = comparison.tasks.values()
    one_pass = next(f["finetune_flops"] / f["finetune_passes"] for f in done.values())
    choosing = {cell.method: 0.0 for cell in (*done, *coresets)}
    for cell, run in coresets.items():
        chosen = select_config(comparison, task, cell.method, int(cell.seed or 0), str(run.path))
        took = selection_cost(comparison.variants[cell.method].method, chosen, run)["flops"]
        choosing[cell.method] = max(choosing[cell.method], took)
    for cell, figures in done.items():
        choosing[cell.method] = max(choosing[cell.method], figures["select_flops"])
    judging = 0.0
    for folder, weight in {**judged, **{comparison.output / f["folder"]: 1.0 for f in done.values()}}.items():
        examples = read_examples(folder / "scores.jsonl")
        said = 2 * sum(examples["prompt_tokens"]) + 2 * sum(examples["answer_tokens"])
        judging += weight * said / tokens
    flops = {"looking": found["flops"] if found else 0.0, "choosing": sum(choosing.values())}
    flops["training"] = sum(figures["finetune_flops"] for figures in (*done.values(), *tuned))
    parts = {name: value / one_pass for name, value in flops.items()}
    return _summed(config, {**parts, "judging": judging})


# ---- what came out ----


def _values(
    config: SelectConfig, cell_of: Callable[..., Path], way: str, seeds: Sequence[int], metric: str = ""
) -> np.ndarray:
    """(S, N) of a way, higher is better: a row a seed, a column a judging row."""
    return np.stack([_judged(config, cell_of(way, seed), metric) for seed in seeds])


def _judged(config: SelectConfig, cell: Path, metric: str = "") -> np.ndarray:
    metric = metric or config.trying.metric
    examples = read_examples(cell / "scores.jsonl")
    if config.trying.metric_command and metric != "loss":
        return _by_command(config.trying.metric_command, cell, examples)
    return (-1 if metric in LOWER else 1) * np.array(examples[metric], np.float64)


def _by_command(command: str, cell: Path, examples: Mapping[str, list[Any]]) -> np.ndarray:
    """What a user's own judge says: answers and references as JSON Lines on its standard input, a number a
    row on its standard output; higher is better. Asked once for each model.

    Raises:
        ValueError: it fails, or says something else.
    """
    key = files.fingerprint([command, files.hash_file(cell / "scores.jsonl")])
    before = files.read_checked(cell / "judged.json")
    if before and before["key"] == key:
        return np.array(before["values"], np.float64)
    columns = ("row", "id", "prediction", "reference")
    lines = zip(*(examples[name] for name in columns), strict=True)
    names = ("row", "id", "answer", "reference")
    given = "".join(
        json.dumps(dict(zip(names, line, strict=True)), ensure_ascii=False) + "\n" for line in lines
    )
    try:
        told = subprocess.run(
            command,
            shell=True,
            input=given,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=JUDGED_FOR,
        )
    except (subprocess.TimeoutExpired, UnicodeDecodeError) as error:
        raise ValueError(f"--metric-command {command}: {error}") from None
    if told.returncode:
        last = (told.stderr.strip().splitlines() or ["nothing on its standard error"])[-1]
        raise ValueError(f"--metric-command {command} ended with {told.returncode}: {last}")
    said, n = told.stdout.split("\n"), len(examples["row"])
    said = said[:-1] if said[-1] == "" else said
    if len(said) != n:
        raise ValueError(
            f"--metric-command {command} printed {len(said)} lines for {n} rows; a number a row is asked"
        )
    try:
        values = [float(line) for line in said]
    except ValueError:
        wrong = next(i for i, line in enumerate(said) if not _is_number(line))
        what = f"line {wrong + 1} is {said[wrong][:60]!r}"
        raise ValueError(f"--metric-command {command}: {what}; a number a row is asked") from None
    if not np.isfinite(values).all():
        wrong = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"--metric-command {command}: line {wrong + 1} is {said[wrong]}, which is no figure")
    files.write_checked(cell / "judged.json", {"key": key, "values": values})
    return np.array(values, np.float64)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _best(table: Iterable[Mapping[str, Any]], left: Sequence[str]) -> Mapping[str, Any]:
    """Of the ways that are left, random apart, that of the largest margin."""
    rows = [row for row in table if row["way"] in left and row["way"] != RANDOM]
    return max(rows, key=lambda row: row["margin"])


def _row(judge: Callable[..., np.ndarray], way: str, seeds: Sequence[int]) -> dict[str, Any]:
    """A way beside random, over some seeds."""
    own = judge(way, seeds)
    margin, error = paired_margin(own - judge(RANDOM, seeds))
    loss, _ = paired_margin(judge(way, seeds, "loss") - judge(RANDOM, seeds, "loss"))
    row = {"way": way, "seeds": len(seeds), "mean": float(own.mean()), "margin": margin, "error": error}
    return {**row, "low": margin - ERRORS * error, "high": margin + ERRORS * error, "loss_margin": loss}


def _better(rows: Iterable[Mapping[str, Any]], count: int) -> list[str]:
    """So many ways that go on, random among them whatever it did."""
    others = sorted((row for row in rows if row["way"] != RANDOM), key=lambda row: -row["margin"])
    return [RANDOM, *(row["way"] for row in others[: count - 1])]


def _decided(
    config: SelectConfig,
    judge: Callable[..., np.ndarray],
    plan: Tries,
    done: Mapping[Cell, Figures],
    left: Sequence[str],
) -> dict[str, Any]:
    """The table of what the target was fine-tuned on, the choice and its reasons."""
    table: list[dict[str, Any]] = []
    for way in (*plan.ways, FULL):
        of = {int(cell.seed or 0): figures for cell, figures in done.items() if cell.method == way}
        if of:
            passes = max(figures["select_passes"] for figures in of.values())
            table.append({**_row(judge, way, list(of)), "passes": passes})
    full = table.pop() if plan.full else None
    best = _best(table, left)
    shown = f"{best['way']} lies {best['margin']:+.3g} from random, {ERRORS:g} standard errors are "
    shown += f"{ERRORS * best['error']:.3g} ({best['seeds']} seeds)"
    is_above = best["margin"] > ERRORS * best["error"]
    chosen = best["way"] if is_above else RANDOM
    reasons = [f"{shown}: {'take it' if is_above else 'random'}"]
    if config.trying.metric == "loss" and not config.trying.metric_command:
        reasons.append("judged by loss: across methods it hardly goes with a task's own metric (--metric)")
    return {"chosen": chosen, "reasons": reasons, "ways": table, "full": full}


def _larger(config: SelectConfig, about: Mapping[str, Any], left: Sequence[str]) -> list[str]:
    """What a try-out would cost that could tell the best way from random, were its margin as it looks."""
    best = _best(about["ways"], left)
    if best["margin"] <= 0 or not best["error"]:
        return []
    times = (ERRORS * best["error"] / best["margin"]) ** 2
    if times > 1000:
        return ["no try-out of a sensible size would tell it from random"]
    share = times * about["predicted"]["share"]
    return [f"if that is its real margin, a try-out would tell it at --try-cost {share:.2g}"]


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
