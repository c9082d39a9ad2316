"""The main job, as Algorithm 1 of the paper reads: speculate on the draft, verify on the target, select."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from staff import files
from staff.config import (
    SelectConfig,
    Trying,
    anywhere,
    check_whole,
    meant,
    parse_shares,
    to_yaml,
    unnamed,
    yaml_value,
)
from staff.data import duplicates, hub, metrics, rows
from staff.data.locate import locate
from staff.methods import METHODS, Method
from staff.methods.fidelity import fidelity
from staff.methods.groups import narrowed, select_by_group, wanted_shares
from staff.models.files import with_date
from staff.runs import account, outputs
from staff.runs.aside import Aside, among_all, set_aside
from staff.runs.outputs import Run
from staff.runs.scorefile import column_qualities, read_scores
from staff.runs.store import Inputs, RunFolder, content_of, open_run
from staff.types import AGAINST_VALIDATION, OF_ONE_PASS, Need, Progress, Selection, Stage

if TYPE_CHECKING:  # torch comes in with them
    from staff.models.files import Source
    from staff.runs.pieces import Pieces

# named by content, or of no consequence to the results
NO_INGREDIENTS = {"data", "output", "scores", "validation", "push_to_hub", "checkpoint_seconds", "device"}
NO_INGREDIENTS |= {"keep", "weights", "max_unpacked", "trust_remote_code", "public", "license"}
NO_INGREDIENTS |= {"eval_data", "merge", "report_to"}  # of a fine-tuning
NO_INGREDIENTS |= {"workers", "engine", "ray_address", "worker_timeout", "device_map", "max_memory"}
NO_INGREDIENTS |= {"accelerate_config"}
NO_INGREDIENTS |= {field.name for field in dataclasses.fields(Trying)}  # of what chose the method

QUERY = "query.jsonl"  # of a try-out, in the run's own folder: nothing here writes it
FILES = ("scores", "validation", "keep")  # settings that name one


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
    check_settings(config, data, methods)
    sources, judge = find_models(config, methods), find_quality_model(config, methods)
    begun = Path(config.output or "") / "work" / "begun.json"
    config = dataclasses.replace(config, reading=with_date(config.reading, sources.values(), begun))
    settings = ingredients(config)
    reading = config.reading
    places = (reading.split, reading.dataset_config, reading.revision, reading.dataset_info)
    located = locate(list(config.data), *places) if data is None else None
    read = partial(rows.read, located if data is None else data, **reading.keywords())
    paths = located.paths if located and located.keep is None else ()
    if config.output:
        given = {f"--{name}": [Path(path)] for name in FILES if (path := getattr(config, name))}
        if config.validation and Path(config.validation) == Path(config.output) / QUERY:
            del given["--validation"]
        given |= {f"--{name}": source.files() for name, source in {**sources, **judge}.items()}
        files.check_outputs([Path(config.output)], {**given, "--data": paths})
    with open_run(config.output or tempfile.mkdtemp(prefix="staff-"), "run", on_progress) as run:
        pool = None if paths else read()
        inputs = _inputs(config, run, {**sources, **judge}, paths, pool)
        coresets = outputs.coresets_of(config, run)
        keys = [_key(methods, c.method, c.pruning_rate, settings, inputs) for c in coresets]
        finished = [outputs.find_run(coreset, key, read) for coreset, key in zip(coresets, keys, strict=True)]
        if not all(finished):
            run.tell(Stage("read"), 0, 1)
            pool = pool or read()
            run.tell(Stage("read"), 1, 1)
            always = _always(config, pool)
            for coreset in coresets:
                m = _budget(config, coreset.pruning_rate, len(pool))
                if m is not None and len(always) > m:
                    raise ValueError(f"--keep {config.keep} has {len(always)} rows, and only {m} are kept")
            _groups(config, pool)
            is_text = pool.layout.text is not None
            if config.quality_column:
                column_qualities(pool, config.quality_column)
            for name in config.method:
                needs = needs_of(config, methods[name], is_text).values()
                if is_text and any(n.quantity == "unconditional_loss" for n in needs):
                    raise ValueError(f"--method {name} weighs what prompts help, and plain texts have none")
                if is_text and methods[name].asks:
                    raise ValueError(f"--method {name} has prompts answered, and plain texts have none")
                options(config, methods[name], pool)  # a column that is not there
            if config.drop_suspects and is_text:
                raise ValueError("--drop-suspects weighs what prompts help, and plain texts have none")
            aside = set_aside(config, run, pool, inputs["data"])
            for coreset in coresets:
                _budget(config, coreset.pruning_rate, len(pool), aside)
            _check_models(config, sources)
            run.begin(settings, inputs, update)
            files.write_text(run.path / "config.yaml", to_yaml(config))
            pieces: Pieces | None = None
            if sources:
                from staff.runs.pieces import Pieces  # torch comes in here

                all_needs = [needs_of(config, methods[name], is_text) for name in config.method]
                wanted = [need for needed in all_needs for need in needed.values()]
                pieces = Pieces(config, run, pool, sources, inputs, wanted)
                pool = pieces.usable_rows()
                aside = set_aside(config, run, pool, inputs["data"])  # where a template refused a row
                pieces.set_aside(aside)
            pool, members = aside.left(), np.arange(len(aside.kept))
            held = aside.places_of(always)
            if config.drop_suspects:
                assert pieces is not None
                ratios = pieces.loss_ratios()
                suspects = np.setdiff1d(np.flatnonzero(ratios >= config.suspect_ratio), held)
                aside, members = aside.with_suspects(suspects, ratios[suspects]), np.delete(members, suspects)
            budgets = [_budget(config, coreset.pruning_rate, len(aside.rows), aside) for coreset in coresets]
            labels = _groups(config, aside.rows)
            groups = None if labels is None else np.array(labels)[aside.kept]
            asked = None if groups is None else _wanted(config, groups[members])
            members = np.setdiff1d(members, held)
            selections: dict[int, tuple[Selection, np.ndarray | None]] = {}
            for place, (coreset, budget) in enumerate(zip(coresets, budgets, strict=True)):
                if finished[place]:
                    continue
                (coreset.folder / "manifest.json").unlink(missing_ok=True)
                method = methods[coreset.method]
                arguments = options(config, method, pool)
                # speculate: numbers of the whole pool, from the draft (Eq. 2)
                if config.scores and "scores" in method.needs:
                    ids = [example.id for example in pool.examples()]
                    arguments["scores"] = read_scores(config.scores, pool.numbers, ids)
                for argument, need in needs_of(config, method, is_text).items():
                    if groups is None or argument != method.groups:
                        assert pieces is not None
                        arguments[argument] = pieces.array(need)
                # verify: efforts of single samples on the target, asked for from within (Eq. 3)
                if method.verify and pieces and "target" in sources:
                    arguments["verify"] = pieces.ledger(method.verify.model)
                for argument, need in method.asks.items():
                    assert pieces is not None
                    arguments[argument] = pieces.asked(need)
                # select: regions, ratios, budgets, picks (Eq. 3, Eq. 4)
                own = narrowed(method, members, arguments) if len(members) < len(pool) else arguments
                choose = partial(_choose, method, own, config.seed, len(pool), members, held, groups, asked)
                if budget is not None:
                    selection = choose(budget)
                else:
                    assert pieces is not None
                    selection = _within_tokens(config, pieces.pool("target").lengths, choose, members, held)
                selections[place] = selection, arguments.get("scores")
            if pieces:
                pieces.free()
            inputs.check()
            target = pieces.target() if pieces and selections else (None, None, None)
            for place, (selection, scores) in selections.items():
                columns, cost, about = _results(
                    config, pool, methods[coresets[place].method], selection, scores, pieces, run, groups
                )
                if labels is not None and groups is not None:
                    left, kept = groups[np.union1d(members, held)], groups[selection.indices]
                    about["groups"] = _about_groups(np.array(labels), left, kept, asked)
                about |= {"always": len(held)} if config.keep else {}
                if selection.weights is not None:  # those that the method would not draw
                    never = np.isnan(selection.weights).sum() - (len(pool) - len(np.union1d(members, held)))
                    about |= {"suspects": int(never)} if never else {}
                if config.budget_tokens is not None and target[1] is not None:
                    about["kept_tokens"] = int(target[1].lengths[selection.indices].sum())
                about |= aside.facts() | {"inputs": dict(inputs), "settings": settings, "seed": config.seed}
                finished[place] = outputs.write(
                    run, coresets[place], keys[place], config, aside, selection, columns, cost, about, target
                )
        runs = [done for done in finished if done]
        if len(runs) > 1 and not all((run.path / name).exists() for name in ("cells.csv", "overlap.csv")):
            outputs.write_tables(run.path, coresets, runs)
        return outputs.publish(config, runs)


def _choose(
    method: Method,
    arguments: Mapping[str, Any],
    seed: int,
    n: int,
    members: np.ndarray,
    held: np.ndarray,
    groups: np.ndarray | None,
    asked: Mapping[str, Fraction] | None,
    budget: int,
) -> Selection:
    """m samples by a method: those that are always in, and the rest of these members."""
    told: Any = {**arguments, "budget": budget - len(held), "rng": np.random.default_rng(seed)}
    if groups is None:
        selection = method.select(len(members), **told)
    else:
        told |= {"wanted": asked, "held": Counter(groups[held].tolist())}
        selection = select_by_group(method, groups[members], len(members), **told)
    return among_all(selection, members, n, held)


def _within_tokens(
    config: SelectConfig,
    lengths: np.ndarray,
    choose: Callable[[int], Selection],
    members: np.ndarray,
    held: np.ndarray,
) -> Selection:
    """As many samples as go into --budget-tokens: one more, chosen in the same way, would not."""
    assert config.budget_tokens is not None

    def tokens(selection: Selection) -> int:
        return int(lengths[selection.indices].sum())

    low, high = len(held), len(held) + len(members)
    if tokens(whole := choose(high)) <= config.budget_tokens:
        return whole
    fitting = choose(low)
    while high - low > 1:
        middle = (low + high) // 2
        selection = choose(middle)
        if tokens(selection) <= config.budget_tokens:
            low, fitting = middle, selection
        else:
            high = middle
    if not len(fitting.indices) or tokens(fitting) > config.budget_tokens:
        least = tokens(fitting if len(held) else choose(1))
        what = f"{'--keep alone' if len(held) else 'the first sample'} has {least}"
        raise ValueError(f"--budget-tokens {config.budget_tokens}: {what} tokens; give more")
    return fitting


def check_settings(config: SelectConfig, data: Any, methods: Mapping[str, Method]) -> None:
    """What can be known to be wrong before anything is read or loaded."""
    for name in config.method:
        if name not in methods:
            raise ValueError(f"--method {name}: there is no such method; {meant(name, methods)}")
    check_whole(unnamed(config, "data") * (data is None) + missing(config, methods))
    given_options(config.option, {name: methods[name] for name in config.method})
    for name in config.method:
        needs = methods[name].all_needs()
        if not config.draft_epochs and any(need.checkpoints and need.model == "draft" for need in needs):
            raise ValueError(
                f"--method {name} follows the draft through its tuning, and it is not tuned: give "
                f"--draft-epochs, 3 say"
            )
        if any(need.quantity in AGAINST_VALIDATION for need in needs) and not config.validation:
            raise ValueError(
                f"--method {name} needs a few rows of the task as it will be judged: --validation FILE"
            )
        if any(need.quantity == "quality" for need in needs):
            if not config.quality_model and not config.quality_column:
                raise ValueError(
                    f"--method {name} needs to know how good a row is: --quality-model MODEL (a reward "
                    f"model), or --quality-column COLUMN"
                )
            told = {*methods[name].fixed, *(pair.partition("=")[0] for pair in config.option)}
            if config.quality_column and "alpha" not in told:
                given = f"--quality-column {config.quality_column}"
                raise ValueError(f"{given}: say above which a row is good, as in --option alpha=3")
        if methods[name].asks:
            metrics.judge_answers(
                ["a word"], ["a word"]
            )  # a package that is missing is known before the work
    if config.dedup not in (None, "exact") and find_spec("datasketch") is None:
        raise ValueError(duplicates.MISSING)
    for flag in FILES:
        path = getattr(config, flag)
        if path and not Path(path).is_file():
            raise ValueError(f"--{flag} {path}: there is no such file")
    hub.check_names(outputs.hub_names(config), config.public)


def given_options(pairs: Sequence[str], methods: Mapping[str, Method]) -> dict[str, Any]:
    """Options of some methods by name, from what was given as name=value.

    Raises:
        ValueError: none of the methods has it, or it is no number where one is asked.
    """
    known = {name: value for method in methods.values() for name, value in method.options().items()}
    found = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if "=" not in pair or name not in known:
            of = f"of the options of {', '.join(methods)}, {meant(name, sorted(known) or ['none'])}"
            raise ValueError(f"--option {pair}: give name=value; {of}")
        wanted, found[name] = known[name], yaml_value(text)
        is_number = isinstance(found[name], (int, float)) and not isinstance(found[name], bool)
        is_column = any(name in method.columns for method in methods.values())
        if (isinstance(wanted, (int, float)) or (wanted is None and not is_column)) and not is_number:
            example = f", as in {name}={wanted}" if wanted is not None else ""
            raise ValueError(f"--option {pair}: {name} is a number{example}")
    return found


def missing(config: SelectConfig, methods: Mapping[str, Method] = METHODS) -> list[str]:
    """What a selection can't do without and has not been told, a sentence each; the data apart."""
    found, wanted = [], wanted_models(config, methods)
    if wanted and not config.target:
        found += unnamed(config, "target")
    if "draft" in wanted and not config.draft:
        from staff.models import families

        suggested = families.suggest_drafts(config.target)
        siblings = [
            name if share is None else f"{name} (r about {share:.2f})" for name, share in suggested.items()
        ]
        known = "No smaller sibling of its family is known here"
        if siblings:
            smaller = "members" if None in suggested.values() else "smaller siblings"
            known = f"Known {smaller} of its family: {', '.join(siblings)}; untuned, a draft costs r + v"
        asking = "--drop-suspects" if config.drop_suspects else f"--method {' '.join(config.method)}"
        found.append(
            f"{asking} needs a small draft of the target's family: name one with --draft. "
            f"{known * bool(config.target)}{'. ' * bool(config.target)}Without one: --draft self:8 keeps 8 "
            f"of the target's own blocks, --method direct scores the target itself"
        )
    if not config.pruning_rate and config.budget is None and config.budget_tokens is None:
        found.append(
            "say how much to keep: --pruning-rate 0.8 keeps a fifth, --budget 500 keeps 500 samples, "
            "--budget-tokens 1000000 as many as go into that"
        )
    return found


def ingredients(config: Any) -> dict[str, Any]:
    """The settings that results hang on, by name."""
    return {name: value for name, value in anywhere(config).items() if name not in NO_INGREDIENTS}


def needs_of(config: SelectConfig, method: Method, is_text: bool = False) -> dict[str, Need]:
    """What a method is given of the models: the user's own scores stand in for theirs, and what it can do
    without is not asked of a draft that there is not, nor of plain texts, which have no prompts."""
    left = {"scores"} if config.scores else set()
    if config.scores and not config.draft:
        left |= {*method.optional}
    return {
        argument: need
        for argument, need in method.needs.items()
        if argument not in left
        and not (is_text and argument in method.optional and need.quantity == "unconditional_loss")
    }


def wanted_models(config: SelectConfig, methods: Mapping[str, Method]) -> set[str]:
    """Which of "target" and "draft" the methods ask for."""
    wanted: set[str] = set()
    for method in (methods[name] for name in config.method if name in methods):
        needs = [*needs_of(config, method).values()]
        # the target verifies where there is one
        if method.verify and (config.target or not config.scores):
            needs.append(method.verify)
        wanted |= {need.base for need in (*needs, *method.asks.values())}
    if config.drop_suspects:
        wanted.add("draft")
    if config.budget_tokens is not None:
        wanted.add("target")
    return wanted


def find_models(config: SelectConfig, methods: Mapping[str, Method]) -> dict[str, Source]:
    """The models that the methods ask for, found; hub ids are fetched here.

    Returns:
        "target" and "draft" -> files, those that are needed.
    """
    if not (wanted := wanted_models(config, methods)):
        return {}
    from staff.models import families
    from staff.models import files as model_files

    target = model_files.resolve(config.target, "--target")
    if "draft" not in wanted:
        return {"target": target}
    assert config.draft
    if families.self_blocks(config.draft) is not None:
        return {"target": target, "draft": target}
    return {"target": target, "draft": model_files.resolve(config.draft, "--draft")}


def find_quality_model(config: SelectConfig, methods: Mapping[str, Method]) -> dict[str, Source]:
    """The reward model where a method asks for one, by its name among the inputs."""
    needs = [need for name in config.method for need in methods[name].needs.values()]
    if not config.quality_model or not any(need.quantity == "quality" for need in needs):
        return {}
    from staff.models.reward import find_judge

    return {"quality_model": find_judge(config.quality_model)}


def _check_models(config: SelectConfig, sources: Mapping[str, Source]) -> None:
    """A scope or a load that is not available is known before any work is done."""
    if sources:
        from staff.models import load

        for source in {id(source): source for source in sources.values()}.values():
            load.check_model(
                source, config.scoring.scope, config.engine.load_in, config.engine.trust_remote_code
            )


def _inputs(
    config: SelectConfig,
    run: RunFolder,
    sources: Mapping[str, Source],
    paths: tuple[Path, ...],
    pool: rows.Rows | None,
) -> Inputs:
    contents: dict[str, Any] = {name: partial(content_of, run, source) for name, source in sources.items()}
    given = {name: getattr(config, name) for name in FILES if getattr(config, name)}
    contents |= {name: partial(run.hash_file, Path(path)) for name, path in given.items()}
    if paths:
        contents["data"] = lambda: files.fingerprint([run.hash_file(path) for path in paths])
    named = {name: f"--{name} {getattr(config, name)}" for name in (*sources, *given)}
    inputs = Inputs(contents, {**named, "data": ", ".join(config.data)})
    if pool is not None:
        inputs["data"] = outputs.fingerprint_rows(pool)
    return inputs


def _key(
    methods: Mapping[str, Method], name: str, rate: float | None, settings: Mapping[str, Any], inputs: Inputs
) -> str:
    """What a coreset is made of: a method's name, and of a variant what it is."""
    method = methods[name]
    named: Any = name
    if METHODS.get(name) != method:
        needs = {argument: str(need) for argument, need in method.needs.items()}
        asks = {argument: str(need) for argument, need in method.asks.items()}
        named = [name, method.function.__name__, needs, str(method.verify), asks, dict(method.fixed)]
    return files.fingerprint({"method": named, "rate": rate, "settings": settings, "inputs": inputs})


def _budget(
    config: SelectConfig, pruning_rate: float | None, n: int, aside: Aside | None = None
) -> int | None:
    """m of a pool of n usable rows, those set aside counted; at most what is left. None: tokens decide."""
    if config.budget_tokens is not None:
        return None
    budget = config.budget if pruning_rate is None else round((1 - pruning_rate) * n)
    assert budget is not None
    asked = f"--budget {budget}" if pruning_rate is None else f"--pruning-rate {pruning_rate}"
    if budget > n:
        raise ValueError(f"{asked}: the pool has only {n} usable rows")
    if budget == 0 and pruning_rate is not None:
        raise ValueError(f"{asked} leaves none of {n} rows: lower it, or give --budget")
    left = n - len(aside.reasons) if aside else n
    if aside and budget > left:
        why = ", ".join(f"{count} {reason}s" for reason, count in Counter(aside.reasons.values()).items())
        cure = f"keep {left} at most, a pruning rate of {1 - left / n:.3g} or more"
        cure += " (and --update)" if aside.ratios else ""
        raise ValueError(f"{asked}: {budget} of {n} rows, and {left} are left without {why}: {cure}")
    return budget


def _always(config: SelectConfig, pool: rows.Rows) -> np.ndarray:
    """Row numbers of those that are always in, ascending."""
    if config.keep is None:
        return np.empty(0, np.int64)
    wanted = rows.read(config.keep, **config.reading.keywords())
    try:
        return np.unique(pool.numbers[duplicates.places_of(wanted, pool)])
    except ValueError as error:
        raise ValueError(f"--keep {config.keep}: {error}") from None


def _groups(config: SelectConfig, pool: rows.Rows) -> list[str] | None:
    """The label of each row, where the budget is shared over groups."""
    if config.group_by is None:
        return None
    groups = pool.column(config.group_by)
    for name in parse_shares(config.shares)[0] if config.shares else ():
        if name not in groups:
            there = meant(name, sorted(set(groups))[:20])
            raise ValueError(f"--shares {config.shares}: no row's {config.group_by} is {name!r}; {there}")
    return groups


def _wanted(config: SelectConfig, groups: np.ndarray | None) -> dict[str, Fraction] | None:
    """The share of each group of the rows that are left, where shares were asked for."""
    if groups is None or config.shares is None:
        return None
    return wanted_shares(*parse_shares(config.shares), Counter(groups.tolist()))


def _about_groups(
    labels: np.ndarray, left: np.ndarray, kept: np.ndarray, wanted: Mapping[str, Fraction] | None
) -> list[dict[str, Any]]:
    """What the manifest says of each group: rows of the pool, rows left to choose from, rows kept, and the
    share that was asked for."""
    there, in_coreset = Counter(left.tolist()), Counter(kept.tolist())
    return [
        {"group": label, "rows": rows, "left": there[label], "selected": in_coreset[label]}
        | ({} if wanted is None else {"asked": float(wanted.get(label, 0))})
        for label, rows in sorted(Counter(labels.tolist()).items())
    ]


def options(config: SelectConfig, method: Method, pool: rows.Rows) -> dict[str, Any]:
    """A method's own options: the settings of the same name, then those given with --option; of one that
    names a column its values."""
    known = method.options()
    values = {name: getattr(config, name) for name in known if hasattr(config, name)}
    values |= given_options([pair for pair in config.option if pair.partition("=")[0] in known], {"": method})
    for name in method.columns:
        named = values.get(name, method.fixed.get(name))
        if named is not None:
            values[name] = np.array(pool.column(str(named), f"--option {name}="))
    return values


def _results(
    config: SelectConfig,
    pool: rows.Rows,
    method: Method,
    selection: Selection,
    scores: np.ndarray | None,
    pieces: Pieces | None,
    run: RunFolder,
    groups: np.ndarray | None,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What is written of a selection beside the rows: columns of scores.parquet, the cost, what the manifest
    says."""
    need = None if config.scores else method.needs.get("scores")
    values: dict[str, Any] = (
        {} if scores is None else {need.quantity if need else "score": np.asarray(scores)}
    )
    about = outputs.facts_of(pool) | ({"score": next(iter(values))} if values else {})
    terms = target_pass = None
    if pieces:
        name = "draft" if "draft" in pieces.sources else "target"
        tokens = pieces.pool(name)
        response = tokens.response_tokens()
        if need and need.quantity in OF_ONE_PASS and not need.made:
            values["loss"] = pieces.scores(need.model)["loss"]
        values |= {"prompt_tokens": tokens.lengths - response, "response_tokens": response}
        about |= {**outputs.facts_of(pool, tokens), **pieces.facts, "tokens": int(tokens.lengths.sum())}
        about |= pieces.self_checks(method.models())
        if len(selection.verified) and method.verify and scores is not None:
            on_target = pieces.ledger(method.verify.model)(selection.verified)
            about["fidelity"] = _fidelity(selection, scores, on_target, response, values.get("loss"), groups)
            values["target_effort"] = np.full(len(pool), np.nan, np.float32)
            values["target_effort"][selection.verified] = on_target
        if "target" in pieces.sources:
            target_pass = pieces.one_pass("target")
        if target_pass and need == Need("draft", "effort"):
            terms = {
                "epochs": config.draft_epochs,
                "share": config.draft_share,
                "relative_cost": pieces.one_pass("draft") / target_pass,
                "verified_share": len(selection.verified) / len(pool),
            }
            if Stage("score", "draft", "without prompts") in account.spent(run.work):
                terms["alone"] = float(response.sum() / tokens.lengths.sum())
    every = np.arange(len(pool))
    if selection.region_of is not None:
        values["region"] = selection.region_of  # -1: cut
    if len(selection.verified):
        values["verified"] = np.isin(every, selection.verified)
    if groups is not None:
        values["group"] = groups
    values["weight"] = selection.weights
    values["selected"] = np.isin(every, selection.indices)
    return (
        values,
        account.cost_of_run(account.spent(run.work), target_pass, terms),
        about,
    )


def _fidelity(
    selection: Selection,
    scores: np.ndarray,
    on_target: np.ndarray,
    length: np.ndarray,
    loss: np.ndarray | None,
    groups: np.ndarray | None,
) -> dict[str, Any]:
    """What the verified samples of the regions say of the draft."""
    assert selection.region_of is not None
    regions = selection.region_of[selection.verified]
    places = np.flatnonzero(regions >= 0)  # where the whole pool was verified: those cut stand for nothing
    positions = selection.verified[places]
    sizes = np.array([region.size for region in selection.regions])
    draft, n = np.asarray(scores)[positions], len(selection.region_of)
    losses = None if loss is None else loss[positions]
    # the lowest region of a group holds its lowest score, so it is never empty
    inside = selection.region_of >= 0
    of_groups = [] if groups is None else [selection.region_of[inside & (groups == g)] for g in set(groups)]
    firsts = sorted(int(own.min()) for own in of_groups if len(own)) or [0]
    told = fidelity(
        regions[places], sizes, n, draft, on_target[places], length[positions], losses, firsts=firsts
    )
    return told.as_dict()
