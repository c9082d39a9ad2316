"""What a comparison compares: a YAML file to tasks, variants of methods, and the grid of cells. No torch."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from staff.config import (
    EvaluateConfig,
    FinetuneConfig,
    Reading,
    SelectConfig,
    expand,
    from_mapping,
    meant,
    names_of,
    read_yaml,
)
from staff.methods import METHODS, Method
from staff.types import Need

SETTINGS = (
    "tasks", "target", "draft", "drafts", "methods", "pruning_rates", "seeds",
    "select", "finetune", "evaluate", "metrics", "full", "untouched", "output",
)  # fmt: skip
TASK = ("train", "test", "validation", "reading", "evaluate", "finetune", "select", "metrics")
OWN = ("data", "model", "output", "seed")  # the grid sets them
TEMPLATE = """\
# what `staff compare` compares; ${NAME} in any text is filled in from the environment
target: Qwen/Qwen2.5-7B                 # the model that is fine-tuned: a hub id, a folder or a .gguf file
draft: Qwen/Qwen2.5-0.5B                # or drafts: {small: ..., tiny: ...}: each makes its own variant
tasks:                                  # by name; train is the pool, test is what the models are judged on
  support: {train: data/support.jsonl, test: data/support-test.jsonl}
  # and of a task, where it needs them: validation (rows for less and rds), reading (columns and so on),
  # select, finetune, evaluate and metrics of its own
methods:                                # names of `staff methods`, or names of your own with what differs:
  random:
  staff:
  direct:
  ccs:
  ccs-on-draft: {method: ccs, needs: {scores: draft/el2n}}      # an ablation is a changed need,
  staff-eq4: {method: staff, allocation: paper}                 # an option,
  staff-unverified: {method: staff, verify: null}
  staff-tuned: {method: staff, draft_epochs: 3}                 # or a setting of its selection run
pruning_rates: [0.5, 0.8, 0.9]          # fractions of the pool removed
seeds: [1, 2, 3]                        # of three or more, the intervals are over seeds too
select: {}                              # settings of `staff select`, `finetune` and `evaluate` for all cells
finetune: {epochs: 3, learning_rate: 1e-4}
evaluate: {max_new_tokens: 128}
metrics: [rougeL, loss]                 # rouge1 rouge2 rougeL bleu chrf exact loss
full: true                              # a model trained on all of the data beside them
untouched: true                         # and the model as it is
output: runs/compare
"""
METRICS = ("rouge1", "rouge2", "rougeL", "bleu", "chrf", "exact", "loss")
FULL, UNTOUCHED = "full data", "untouched model"  # rows beside the methods


@dataclass(frozen=True)
class Task:
    """A pool to choose from and a test file to be judged on, with the settings that are its own.

    Attributes:
        select, finetune, evaluate: settings of the three stages, the comparison's own overlaid by the task's.
        metrics: what its tables show.
    """

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    select: Mapping[str, Any]
    finetune: Mapping[str, Any]
    evaluate: Mapping[str, Any]
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """A method of the comparison: an entry of METHODS, perhaps with other needs, options or settings of its
    selection run."""

    name: str
    method: Method
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One fine-tuned (or untouched) model to judge."""

    task: str
    method: str
    pruning_rate: float | None
    seed: int | None

    @property
    def folder(self) -> str:
        rate = "" if self.pruning_rate is None else f"-{self.pruning_rate:g}"
        seed = "" if self.seed is None else f"/seed{self.seed}"
        return f"cells/{self.task}/{self.method.replace(' ', '-')}{rate}{seed}"


@dataclass(frozen=True)
class Comparison:
    """All that a comparison's YAML says; a pruning rate of None where a budget of the selection's settings
    stands in its place."""

    output: Path
    target: str
    tasks: Mapping[str, Task]
    variants: Mapping[str, Variant]
    pruning_rates: tuple[float | None, ...]
    seeds: tuple[int, ...]
    full: bool = True
    untouched: bool = True

    def cells(self) -> list[Cell]:
        """The grid, in the order it is worked through: every task and seed is seen early."""
        cells = [Cell(task, UNTOUCHED, None, None) for task in self.tasks if self.untouched]
        for seed, task in product(self.seeds, self.tasks):
            cells += [Cell(task, FULL, None, seed)] if self.full else []
            cells += [
                Cell(task, name, rate, seed) for name, rate in product(self.variants, self.pruning_rates)
            ]
        return cells

    def group(self, name: str) -> list[str]:
        """The variants that share a selection run with this one: the same settings but for the method's
        own."""
        own = self.variants[name].settings
        return [other for other, variant in self.variants.items() if variant.settings == own]


def read_comparison(
    path: str | os.PathLike[str] | Mapping[str, Any], output: str | None = None
) -> Comparison:
    """A comparison from its YAML file; ${NAME} in any text is filled in from the environment.

    Args:
        path: the file, or what one says.
        output: in place of the file's own.

    Raises:
        ValueError: what is missing, or not known, and where.
    """
    values = expand(dict(path) if isinstance(path, Mapping) else read_yaml(Path(path)))
    path = "the comparison" if isinstance(path, Mapping) else os.fspath(path)
    _known(values, SETTINGS, str(path))
    for name in ("tasks", "target", "methods", "pruning_rates", "seeds"):
        if not values.get(name):
            raise ValueError(f"{path}: needs {name}")
    output = output or values.get("output")
    if not output or not isinstance(output, str):
        raise ValueError(f"{path}: needs an output folder, there or with --output; found {output!r}")
    drafts = values.get("drafts") or ({"": values["draft"]} if values.get("draft") else {})
    if not isinstance(drafts, dict):
        raise ValueError(f"{path}: drafts must be lines of 'name: model'; found {drafts!r}")
    if len(drafts) == 1:
        # a setting of all: methods without a draft then share their run with those that have one
        (draft,) = drafts.values()
        values["select"] = {"draft": draft, **_mapping(values.get("select") or {}, f"{path}: select")}
    rates = tuple(_list(values["pruning_rates"]))
    for rate in rates:
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            what = "pruning_rates are fractions of the pool removed, in [0, 1)"
            raise ValueError(f"{path}: {what}; found {rate!r}")
    seeds = tuple(_list(values["seeds"]))
    if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds):
        raise ValueError(f"{path}: seeds must be whole numbers; found {values['seeds']!r}")
    tasks: dict[str, Task] = {}
    for name, given in _mapping(values["tasks"], f"{path}: tasks").items():
        tasks[str(name)] = _task(str(name), given, values, path)
    methods = values["methods"]
    named = dict.fromkeys(map(str, methods)) if isinstance(methods, list) else methods
    named = _mapping(named, f"{path}: methods")
    variants: dict[str, Variant] = {}
    for name, given in named.items():
        variants |= _variants(str(name), given or {}, drafts, f"{path}: methods: {name}")
    found = Comparison(
        Path(output),
        values["target"],
        tasks,
        variants,
        tuple(dict.fromkeys(float(rate) for rate in rates)),
        tuple(dict.fromkeys(seeds)),
        bool(values.get("full", True)),
        bool(values.get("untouched", True)),
    )
    try:  # all settings are looked at before any work
        for task in tasks.values():
            for variant in variants.values():
                select_config(found, task, variant.name, 0, "x")
            finetune_config(found, task, ("x",), 0, "x")
            evaluate_config(found, task, "x", "x")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return found


def select_config(comparison: Comparison, task: Task, name: str, seed: int, output: str) -> SelectConfig:
    """The selection run that makes the coresets of a variant, and of all that share it, at every pruning
    rate."""
    variant = comparison.variants[name]
    values = {**task.select, **variant.settings, "data": list(task.train), "target": comparison.target}
    rates = [rate for rate in comparison.pruning_rates if rate is not None]
    values |= {"method": comparison.group(name), "pruning_rate": rates}
    values |= {"seed": seed, "output": output}
    return from_mapping(SelectConfig, values, f"select of {task.name}")


def finetune_config(
    comparison: Comparison, task: Task, data: tuple[str, ...], seed: int, output: str
) -> FinetuneConfig:
    values = {**task.finetune, "data": list(data), "model": comparison.target, "seed": seed, "output": output}
    return from_mapping(FinetuneConfig, values, f"finetune of {task.name}")


def evaluate_config(comparison: Comparison, task: Task, model: str, output: str) -> EvaluateConfig:
    values = {**task.evaluate, "data": list(task.test), "model": model, "output": output}
    return from_mapping(EvaluateConfig, values, f"evaluate of {task.name}")


def _task(name: str, given: Any, values: Mapping[str, Any], path: str | Path) -> Task:
    where = f"{path}: tasks: {name}"
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"{where}: a task's name becomes a folder: letters, digits, - and _ alone")
    given = _mapping(given, where)
    _known(given, TASK, where)
    for part in ("train", "test"):
        if not given.get(part):
            raise ValueError(f"{where}: needs a {part} file")
    reading = _mapping(given.get("reading") or {}, f"{where}: reading")
    _known(reading, names_of(Reading), f"{where}: reading")
    stages = {}
    for stage in ("select", "finetune", "evaluate"):
        stages[stage] = dict(_mapping(values.get(stage) or {}, f"{path}: {stage}"))
        stages[stage] |= _mapping(given.get(stage) or {}, f"{where}: {stage}")
        for own in OWN:
            if own in stages[stage]:
                raise ValueError(f"{where}: {stage}: {own} is set by the comparison itself; leave it out")
        stages[stage] |= reading
    if given.get("validation"):
        stages["select"]["validation"] = given["validation"]
    metrics = tuple(_list(given.get("metrics") or values.get("metrics") or ["rougeL"]))
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"{where}: there is no metric {metric!r}; there are {', '.join(METRICS)}")
    train, test = (tuple(_list(given[part])) for part in ("train", "test"))
    return Task(name, train, test, stages["select"], stages["finetune"], stages["evaluate"], metrics)


def _variants(name: str, given: Any, drafts: Mapping[str, str], where: str) -> dict[str, Variant]:
    """The variant that a line of `methods` names; of one that needs a draft, one for each draft of
    several."""
    given = dict(_mapping(given, where))
    if not re.fullmatch(r"[\w.@-]+", name):
        raise ValueError(f"{where}: a method's name becomes a folder: letters, digits, - and _ alone")
    base = given.pop("method", name)
    if not isinstance(base, str) or base not in METHODS:
        cure = f"name one with 'method:', of {', '.join(METHODS)}"
        raise ValueError(f"{where}: there is no method {base!r}; {cure}")
    method = METHODS[base]
    changed = _mapping(given.pop("needs", None) or {}, f"{where}: needs")
    _known(changed, list(method.needs), f"{where}: needs")
    if changed or "verify" in given:
        try:
            needs = {**method.needs, **{name: Need.parse(str(text)) for name, text in changed.items()}}
            text = given.pop("verify", None if method.verify is None else str(method.verify))
            verify = None if text is None else Need.parse(str(text))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if (needs, verify) != (dict(method.needs), method.verify):
            method = dataclasses.replace(method, needs=needs, verify=verify)
    own = {option: value for option, value in given.items() if option in method.options()}
    settings = {setting: value for setting, value in given.items() if setting not in own}
    set_here = {*OWN, "target", "method", "pruning_rate", "budget", "option", *names_of(Reading)}
    fields = names_of(SelectConfig).keys() - set_here
    _known(settings, sorted({*fields, *method.options(), "method", "needs", "verify"}), where)
    if own:
        method = dataclasses.replace(method, fixed=own)
    speculates = any(need.base == "draft" for need in (*method.needs.values(), *method.asks.values()))
    if "draft" in settings or not speculates or len(drafts) <= 1:
        return {name: Variant(name, method, settings)}
    several = {f"{name}@{label}": {**settings, "draft": draft} for label, draft in drafts.items()}
    return {full: Variant(full, method, own) for full, own in several.items()}


def _known(values: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    for name in values:
        if name not in names:
            raise ValueError(f"{where}: there is no {name!r}; {meant(str(name), names)}")


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be lines of 'name: value'; found {value!r}")
    return value


def _list(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]
