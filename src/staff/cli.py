"""The command line: a table of commands, progress, the summary, and errors in one line."""

from __future__ import annotations

import csv
import difflib
import json
import logging
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from staff import config as configs

FAILED = 2  # something that the user can mend
INTERRUPTED = 130
SWITCHES = {
    "update": "go on in a folder that was begun with other settings or inputs, keeping what still fits",
    "quiet": "no progress and no summary; errors alone",
    "json": "one line of JSON at the end in place of the summary",
}


def select(arguments: Sequence[str]) -> None:
    """Choose the coreset of a pool: the main job."""
    from staff import pipeline

    config, given = _parse(configs.SelectConfig, arguments, "staff select", ("update", "quiet", "json"))
    if not config.output:
        raise ValueError("name a folder for the run with --output")
    with _Progress(quiet="quiet" in given) as progress:
        runs = pipeline.select(config, update="update" in given, on_progress=progress)
    values = [{"coreset": str(run.path / "coreset.jsonl"), **run.manifest, "cost": run.cost} for run in runs]
    if len(runs) == 1:
        _say(given, summary(runs[0], config), values[0])
    else:
        _say(given, _cells_table(runs, config), {"coresets": values})


def finetune(arguments: Sequence[str]) -> None:
    """Fine-tune a model on a file with LoRA, a coreset for example."""
    from staff import pipeline

    config, given = _parse(configs.FinetuneConfig, arguments, "staff finetune", ("update", "quiet", "json"))
    with _Progress(quiet="quiet" in given) as progress:
        path = pipeline.finetune(config, update="update" in given, on_progress=progress)
    _say(
        given,
        f"adapter    {path} (load it with peft.AutoPeftModelForCausalLM.from_pretrained)",
        {"adapter": str(path)},
    )


def score(arguments: Sequence[str]) -> None:
    """Write the scores of every sample on one model: effort, loss, tokens."""
    from staff import pipeline

    config, given = _parse(configs.ScoreConfig, arguments, "staff score", ("quiet", "json"))
    with _Progress(quiet="quiet" in given) as progress:
        path, n = pipeline.score(config, on_progress=progress)
    _say(
        given,
        f"scores     {path} ({n} samples; take them up again with staff select --scores {path})",
        {"scores": str(path), "n": n},
    )


def evaluate(arguments: Sequence[str]) -> None:
    """Answer a test file with a model: ROUGE, BLEU, chrF, exact match, loss, a row an example."""
    from staff.comparison import evaluate as evaluation

    config, given = _parse(configs.EvaluateConfig, arguments, "staff evaluate", ("quiet", "json"))
    with _Progress(quiet="quiet" in given) as progress:
        summary = evaluation.evaluate(config, on_progress=progress)
    _say(given, evaluation.describe(summary, config.output), summary)


def plan(arguments: Sequence[str]) -> None:
    """Predict what every method would take on this machine, where it pays, and what to do."""
    from staff import timing

    config, given = _parse(configs.PlanConfig, arguments, "staff plan", ("json",))
    made = timing.make_plan(config)
    _say(given, timing.describe(made), made)


def compare(arguments: Sequence[str]) -> None:
    """Methods, pruning rates and seeds against each other: select, fine-tune, evaluate; tables with intervals, and costs."""
    import argparse

    parser = argparse.ArgumentParser("staff compare", description=compare.__doc__)
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="what to compare: tasks, target, drafts, methods, pruning_rates, seeds",
    )
    parser.add_argument(
        "--output", help="the folder, in place of the file's own; the same command goes on where it stopped"
    )
    parser.add_argument(
        "--tables", action="store_true", help="make the tables of what is finished, and work on nothing"
    )
    for switch in ("update", "quiet", "json"):
        parser.add_argument(f"--{switch}", action="store_true", help=SWITCHES[switch])
    given = parser.parse_args(list(arguments))
    if not given.config:
        raise ValueError("name what to compare with --config FILE.yaml")
    from staff.comparison import grid
    from staff.comparison import run as comparing
    from staff.comparison import tables as results

    comparison = grid.read_comparison(given.config, given.output)
    if not given.tables:
        with _Progress(quiet=given.quiet) as progress:
            comparing.compare(comparison, update=given.update, on_progress=progress)
    text = results.report(comparison.output, {name: task.metrics for name, task in comparison.tasks.items()})
    files = {name: str(comparison.output / name) for name in ("results.csv", "results.md", "differences.csv")}
    _say(
        {name for name in ("quiet", "json") if getattr(given, name)},
        f"{text}\ntables are in {files['results.md']}",
        files,
    )


def inspect(arguments: Sequence[str]) -> None:
    """Show how a file is read: format, columns, lengths, duplicates, the first rows as the model sees them."""
    from rich.console import Console

    from staff import inspection
    from staff.data import rows as formats

    config, given = _parse(configs.InspectConfig, arguments, "staff inspect", ("json",))
    if not config.data:
        raise ValueError("name the data with --data FILE")
    tokenizer = inspection.load_tokenizer(config.model, config.trust_remote_code) if config.model else None
    rows = formats.read(list(config.data), **{**config.reading.keywords(), "on_bad_row": "skip"})
    report = inspection.inspect(rows, tokenizer, config.max_length)
    if "json" in given:
        _say(given, "", report)
    else:
        Console(soft_wrap=True).print(inspection.render(report), emoji=False, highlight=False)


def _say(given: set[str], text: str, values: dict[str, Any]) -> None:
    if "json" in given:
        print(json.dumps(values, ensure_ascii=False))
    elif "quiet" not in given:
        print(text)


def methods(arguments: Sequence[str]) -> None:
    """List the methods: what each needs and where it is from."""
    from staff.methods import COST_SYMBOLS, methods_table

    del arguments
    for row in methods_table():
        print(f"{row.name:18}{row.about}")
        print(
            f"{'':18}needs {row.needs or 'nothing'}; cost {row.cost}"
            + (f"; {row.paper}" if row.paper else "")
        )
        if row.options:
            print(f"{'':18}options {row.options}")
    print(f"\ncost in passes of the target over the pool. {COST_SYMBOLS}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "plan": plan,
    "select": select,
    "score": score,
    "finetune": finetune,
    "evaluate": evaluate,
    "compare": compare,
    "inspect": inspect,
    "methods": methods,
}


def _parse(
    kind: type, arguments: Sequence[str], program: str, switches: tuple[str, ...]
) -> tuple[Any, set[str]]:
    """Flags over a YAML file over defaults.

    Returns:
        the config, and which of `switches` (flags that are no setting of the run) were given.
    """
    import tyro

    rest, default, given = list(arguments), kind(), set()
    for switch in switches:
        if f"--{switch}" in rest:
            rest.remove(f"--{switch}")
            given.add(switch)
    fields = configs.flat(default)
    has_presets = any(name in fields for values in configs.PRESETS.values() for name in values)
    path = _take(rest, "config", "the name of a YAML file")
    preset = _take(rest, "preset", f"a name: {', '.join(configs.PRESETS)}") if has_presets else None
    if path or preset:
        values = configs.read_yaml(path) if path else {}
        default = configs.from_mapping(
            kind, {**values, **({"preset": preset} if preset else {})}, path or "--preset"
        )
    known = {"config FILE.yaml": "a YAML file of settings: flags typed earlier"}
    if has_presets:
        known["preset NAME"] = (
            f"settings under one name, of {', '.join(configs.PRESETS)}; what else is given overrides them"
        )
    known |= {name: SWITCHES[name] for name in switches}
    if "quiet" in given:
        for handler in logging.getLogger().handlers:
            handler.setLevel(logging.ERROR)
    description = "\n".join([kind.__doc__ or "", "", *(f"--{name}: {text}" for name, text in known.items())])
    return tyro.cli(
        kind,
        args=rest,
        default=default,
        prog=program,
        description=description,
        config=(tyro.conf.OmitArgPrefixes,),
    ), given


def _take(arguments: list[str], name: str, what: str) -> str | None:
    """The value of a flag that is no field, taken out of the arguments."""
    for place, word in enumerate(arguments):
        if word == f"--{name}" or word.startswith(f"--{name}="):
            inline = word.partition("=")[2]
            if not inline and place + 1 == len(arguments):
                raise ValueError(f"--{name} needs {what}")
            value = inline or arguments[place + 1]
            del arguments[place : place + (1 if inline else 2)]
            return value
    return None


class _Progress:
    """Shows stages as bars with the time left; plain lines where the output is no terminal."""

    def __init__(self, quiet: bool = False) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, quiet=quiet)
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _Progress:
        if self._console.is_terminal and not self._console.quiet:
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            columns = (
                TextColumn("{task.description:22}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bars = Progress(*columns, console=self._console)
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._bars:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total)
            self._bars.update(self._tasks[stage], completed=done, total=total)
            return
        if total <= 1:
            if done == 0:
                self._console.print(stage, highlight=False, markup=False)
            return
        before = self._tasks.get(stage, -1)
        tenth = 10 * done // max(total, 1)
        if tenth > before:
            self._tasks[stage] = tenth
            self._console.print(f"{stage}: {done} of {total}", highlight=False, markup=False)


def summary(run: Any, config: configs.SelectConfig) -> str:
    """What a person wants to know of a finished selection."""
    from staff.runs.outputs import remarks

    selection, cost, manifest = run.selection, run.cost, run.manifest
    n, m = manifest["n"], manifest["m"]
    lines = [
        "",
        f"pool       {n} samples ({manifest['format']})"
        + (f", {manifest['tokens']:,} tokens" if "tokens" in manifest else ""),
    ]
    lines += [f"           {remark}" for remark in remarks(manifest, config.max_length)]
    if manifest["skipped"]:
        lines.append(f"           rows left out are listed in {run.path / 'skipped.jsonl'}")
    lines.append(f"coreset    {m} samples, {m / n:.0%} of the pool")
    regions = [region for region in selection.regions if region.size]
    if regions:
        lines.append(f"regions    {len(regions)} with samples, of {len(selection.regions)}")
    if len(selection.verified):
        verified = [region for region in regions if not math.isnan(region.ratio)]
        pool_share = sum(region.size for region in verified) / n
        budget_share = sum(region.selected for region in verified) / max(m, 1)
        ratios = sorted(region.ratio for region in verified)
        count = len(selection.verified)
        lines.append(
            f"verified   {count} samples on the target ({count / n:.1%} of the pool), in {len(verified)} regions"
        )
        lines.append(
            f"           that hold {pool_share:.0%} of the pool and {budget_share:.0%} of the coreset"
        )
        lines.append(f"           V_i from {ratios[0]:.3g} to {ratios[-1]:.3g}")
        if min(pool_share, budget_share) < 0.5:
            lines.append(
                "           warning: less than half lies in verified regions. Fewer --num-regions hold more samples each"
            )
    elif manifest["method"] == "staff":
        lines.append(
            f"           warning: none verified, for none has more than {config.verification_budget} samples. Use fewer --num-regions"
        )
    if manifest.get("fidelity") is not None:
        lines.append(
            f"fidelity   draft and target rank the verified samples with Spearman {manifest['fidelity']:.2f}"
        )
        if manifest["fidelity"] < 0.3:
            lines.append(
                "           warning: the draft hardly knows what the target finds hard; try another draft, or --method direct"
            )
    if selection.filled or selection.filled_from_cut:
        lines.append(
            f"fill       {selection.filled} samples drawn at random, since the budgets left them over"
        )
        lines.append(
            f"           {selection.filled_from_cut} taken back from the hardest ones that were set aside"
        )
    files = f"for other trainers see {run.path / 'train'}, for every row's scores scores.parquet"
    lines += ["", _cost_table(cost), "", f"coreset is {run.path / 'coreset.jsonl'}; {files}"]
    if config.push_to_hub:
        lines.append(f"it is on the hub as the data set {config.push_to_hub}")
    target = f" --model {config.target}" if config.target else " --model MODEL"
    lines.append(
        f"train on it: staff finetune --data {run.path / 'coreset.jsonl'}{target} --output {run.path / 'adapter'}"
    )
    return "\n".join(lines)


def _cells_table(runs: list[Any], config: configs.SelectConfig) -> str:
    """A line a coreset, how alike they are, and what all of it cost."""
    from staff.runs.outputs import remarks

    lines = [
        "",
        *remarks(runs[0].manifest, config.max_length),
        f"{'coreset':24}{'pruning rate':>13}{'samples':>9}{'verified':>10}",
    ]
    for run in runs:
        rate = run.manifest["pruning_rate"]
        lines.append(
            f"{run.path.name:24}{'' if rate is None else f'{rate:g}':>13}{len(run.indices):9}{len(run.selection.verified):10}"
        )
    folder = runs[0].path.parent
    with open(folder / "likeness.csv", encoding="utf-8") as file:
        pairs = list(csv.DictReader(file))
    lines += ["", f"{'of the smaller, shared by':50}{'share':>7}{'by chance':>11}"]
    for pair in pairs:
        both = f"{pair['first']} and {pair['second']}"
        lines.append(f"{both:50}{float(pair['overlap']):7.2f}{float(pair['chance_overlap']):11.2f}")
    lines += [
        "",
        _cost_table(runs[-1].cost),
        "",
        f"coresets are in {folder}, one folder each (cells.csv, likeness.csv)",
    ]
    return "\n".join(lines)


def _cost_table(cost: dict[str, Any]) -> str:
    """Seconds, tokens and passes of each stage, beside what scoring the target directly would cost."""
    rows = [
        (stage, row.get("seconds", 0.0), row.get("tokens"), row.get("passes"))
        for stage, row in cost["stages"].items()
    ]
    rows.append(("in all", cost["seconds"], None, cost.get("passes")))
    if "direct" in cost and cost["stages"].keys() & {"score on the draft"}:
        rows.append(("without a draft (direct)", cost["direct"]["seconds"], None, cost["direct"]["passes"]))
    lines = [f"{'cost':26}{'seconds':>9}{'tokens':>12}{'passes of the target':>22}"]
    for stage, seconds, tokens, passes in rows:
        lines.append(
            f"{stage:26}{seconds:9.1f}{'' if tokens is None else f'{tokens:,.0f}':>12}{'' if passes is None else f'{passes:.2f}':>22}"
        )
    if "sum" in cost:
        terms = "(2 x {epochs:g} x {share:g} + 1) x {relative_cost:.2f} + {verified_share:.2f} = {passes:.2f}".format(
            **cost["sum"]
        )
        lines += [f"by the sum (2 T f + 1) r + v = {terms} passes", cost["verdict"]]
    return "\n".join(lines)


def _stop_at_once() -> None:
    """End within a moment of Ctrl-C, even inside a long product that Python can't interrupt.

    Nothing is lost by it: files are whole or absent, and the run's lock goes with the process.
    """
    if not hasattr(signal, "set_wakeup_fd") or threading.current_thread() is not threading.main_thread():
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def wait() -> None:
        while os.read(reading, 1) != bytes([signal.SIGINT]):
            pass
        show_cursor = b"\x1b[?25h" if sys.stderr.isatty() else b""
        os.write(2, show_cursor + b"\nstaff: stopped; the same command goes on from here\n")
        os._exit(INTERRUPTED)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """Run a command.

    Exit status: 0 done, 2 something that the user can mend (one message says what), 130 stopped by Ctrl-C, 1 a fault of ours
    or nobody left to read the output.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of libraries; ours are drawn here
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # libraries talking to programmers
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: staff COMMAND [flags]      (staff COMMAND --help lists the flags)\n")
        for name, command in COMMANDS.items():
            print(f"  {name:{width}}  {(command.__doc__ or '').splitlines()[0]}")
        sys.exit(0)
    if arguments[0] == "--version":
        from staff import __version__

        print(f"staff {__version__}")
        sys.exit(0)
    _stop_at_once()
    logging.basicConfig(format="staff: %(message)s", level=logging.ERROR)
    logging.getLogger("staff").setLevel(logging.WARNING)
    try:
        if arguments[0] not in COMMANDS:
            near = difflib.get_close_matches(arguments[0], COMMANDS, 1)
            cure = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
            raise ValueError(f"there is no command {arguments[0]!r}; {cure}")
        COMMANDS[arguments[0]](arguments[1:])
        sys.stdout.flush()
    except ValueError as error:
        if os.environ.get("STAFF_TRACEBACK"):
            raise
        print(f"staff: {error}", file=sys.stderr)
        sys.exit(FAILED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
