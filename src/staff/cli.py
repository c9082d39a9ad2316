"""The command line: a table of commands, progress, the summary, and errors in one line."""

from __future__ import annotations

import argparse
import difflib
import io
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from staff import config as configs
from staff import console
from staff.bars import Bars

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

    config, given = _parse(configs.SelectConfig, arguments, "staff select", "update", "quiet", "json")
    configs.check_named(config, "output")
    with Bars(quiet=given.quiet) as progress:
        runs = pipeline.select(config, update=given.update, on_progress=progress)
    values = [{"coreset": str(run.path / "coreset.jsonl"), **run.manifest, "cost": run.cost} for run in runs]
    if len(runs) == 1:
        _say(given, console.summary(runs[0], config), values[0])
    else:
        _say(given, console.grid_table(runs, config), {"coresets": values})


def finetune(arguments: Sequence[str]) -> None:
    """Fine-tune a model on a file with LoRA, a coreset for example."""
    from staff import jobs

    config, given = _parse(configs.FinetuneConfig, arguments, "staff finetune", "update", "quiet", "json")
    with Bars(quiet=given.quiet) as progress:
        path = jobs.finetune(config, update=given.update, on_progress=progress)
    _say(
        given,
        f"adapter    {path} (load it with peft.AutoPeftModelForCausalLM.from_pretrained)",
        {"adapter": str(path)},
    )


def score(arguments: Sequence[str]) -> None:
    """Write the scores of every sample on one model: effort, loss, tokens."""
    from staff import jobs

    config, given = _parse(configs.ScoreConfig, arguments, "staff score", "quiet", "json")
    with Bars(quiet=given.quiet) as progress:
        path, n = jobs.score(config, on_progress=progress)
    _say(
        given,
        f"scores     {path} ({n} samples; take them up again with staff select --scores {path})",
        {"scores": str(path), "n": n},
    )


def evaluate(arguments: Sequence[str]) -> None:
    """Answer a test file with a model: ROUGE, BLEU, chrF, exact match, loss, a row an example."""
    from staff.comparison import evaluate as evaluation

    config, given = _parse(configs.EvaluateConfig, arguments, "staff evaluate", "quiet", "json")
    with Bars(quiet=given.quiet) as progress:
        summary = evaluation.evaluate(config, on_progress=progress)
    _say(given, evaluation.describe(summary, config.output), summary)


def plan(arguments: Sequence[str]) -> None:
    """Predict what every method would take on this machine, where it pays, and what to do."""
    from staff import plan as planning

    config, given = _parse(configs.PlanConfig, arguments, "staff plan", "json")
    made = planning.make_plan(config)
    _say(given, planning.describe_plan(made), made)


def drafts(arguments: Sequence[str]) -> None:
    """Compare drafts with the target on a few hundred rows: which is faithful, at what cost."""
    from staff import candidates

    config, given = _parse(configs.DraftsConfig, arguments, "staff drafts", "quiet", "json")
    with Bars(quiet=given.quiet) as progress:
        found = candidates.compare_drafts(config, progress)
    text = candidates.describe_drafts(found)
    if config.picture:
        is_drawn = candidates.draw_drafts(found, Path(config.picture))
        text += (
            f"\n\npicture    {config.picture}" if is_drawn else "\n\nno picture: matplotlib is not installed"
        )
    _say(given, text, found)


def compare(arguments: Sequence[str]) -> None:
    """Methods, pruning rates and seeds against each other: select, fine-tune, evaluate; tables with
    intervals, and costs."""
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
        with Bars(quiet=given.quiet) as progress:
            comparing.compare(comparison, update=given.update, on_progress=progress)
    text = results.report(comparison.output, {name: task.metrics for name, task in comparison.tasks.items()})
    files = {name: str(comparison.output / name) for name in ("results.csv", "results.md", "differences.csv")}
    _say(
        given,
        f"{text}\ntables are in {files['results.md']}",
        files,
    )


def inspect(arguments: Sequence[str]) -> None:
    """Show how a file is read: format, columns, lengths, duplicates, the first rows as the model sees
    them."""
    from rich.console import Console

    from staff import inspection
    from staff.data import rows as formats

    config, given = _parse(configs.InspectConfig, arguments, "staff inspect", "json")
    configs.check_named(config, "data")
    tokenizer = inspection.tokenizer_of(config.model, config.trust_remote_code) if config.model else None
    rows = formats.read(list(config.data), **{**config.reading.keywords(), "on_bad_row": "skip"})
    report = inspection.inspect(rows, tokenizer, config.reading.max_length, config.reading)
    if given.json:
        _say(given, "", report)
    else:
        Console(soft_wrap=True).print(inspection.render(report), emoji=False, highlight=False)


def _say(given: argparse.Namespace, text: str, values: dict[str, Any]) -> None:
    if given.json:
        print(json.dumps(values, ensure_ascii=False))
    elif not getattr(given, "quiet", False):
        print(console.visible(text))


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
    "drafts": drafts,
    "select": select,
    "score": score,
    "finetune": finetune,
    "evaluate": evaluate,
    "compare": compare,
    "inspect": inspect,
    "methods": methods,
}


def _parse(
    kind: type, arguments: Sequence[str], program: str, *switches: str
) -> tuple[Any, argparse.Namespace]:
    """Flags over a YAML file over defaults.

    Returns:
        the config, and the switches that are no setting of the run.
    """
    import tyro

    fields = configs.names_of(kind)
    has_presets = any(name in fields for preset in configs.PRESETS.values() for name in preset)
    flags = argparse.ArgumentParser(program, add_help=False, allow_abbrev=False)
    flags.add_argument("--config", metavar="FILE.yaml", help="a YAML file of settings: flags typed earlier")
    if has_presets:
        about = "settings under one name; what else is given overrides them"
        flags.add_argument("--preset", choices=tuple(configs.PRESETS), help=about)
    for switch in switches:
        flags.add_argument(f"--{switch}", action="store_true", help=SWITCHES[switch])
    given, rest = flags.parse_known_args(list(arguments))
    values = configs.read_yaml(given.config) if given.config else {}
    if has_presets and given.preset:
        values["preset"] = given.preset
    default = configs.from_mapping(kind, values, given.config or "--preset") if values else kind()
    if getattr(given, "quiet", False):
        for handler in logging.getLogger().handlers:
            handler.setLevel(logging.ERROR)
    about = f"{kind.__doc__}\n\n{flags.format_help().partition('options:')[2]}"
    style = (tyro.conf.OmitArgPrefixes,)
    config = tyro.cli(kind, args=rest, default=default, prog=program, description=about, config=style)
    return config, given


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

    Exit status: 0 done, 2 something that the user can mend (one message says what), 130 stopped by Ctrl-C, 1
    a fault of ours or nobody left to read the output.
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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII alone
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
        print(console.visible(f"staff: {error}"), file=sys.stderr)
        sys.exit(FAILED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
