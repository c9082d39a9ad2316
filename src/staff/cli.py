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
from staff import flags
from staff.bars import Bars
from staff.data.layouts import visible
from staff.runs import summary as console

FAILED = 2  # something that the user can mend
INTERRUPTED = 130
SWITCHES = {
    "update": "go on in a folder that was begun with other settings or inputs, keeping what still fits",
    "quiet": "no progress and no summary; errors alone",
    "json": "one line of JSON at the end in place of the summary",
}


def select(arguments: Sequence[str]) -> None:
    """Choose the coreset of a pool: the main job.

    staff select --data train.jsonl --target T --draft D --pruning-rate 0.8 --output runs/x
    """
    from staff import pipeline
    from staff.runs import reports

    config, given = _parse("select", arguments)
    if "auto" in config.method:
        config = _tried(config, given)
    configs.check_whole(configs.unnamed(config, "data", "output") + pipeline.missing(config))
    with Bars(quiet=given.quiet) as progress:
        runs = pipeline.select(config, update=given.update, on_progress=progress)
    page = reports.try_report(Path(config.output or ""), runs)
    values = [{"coreset": str(run.path / "coreset.jsonl"), **run.manifest, "cost": run.cost} for run in runs]
    if len(runs) == 1:
        text, told = console.summary(runs[0], config), values[0]
    else:
        text, told = console.grid_table(runs, config), {"coresets": values}
    _say(
        given,
        text + (f"\nwhat was kept, and why: {page}" if page else ""),
        told | {"report": page and str(page)},
    )


def _tried(config: configs.SelectConfig, given: argparse.Namespace) -> configs.SelectConfig:
    """The settings that a try-out ends with; what came out is said."""
    from staff.tryout import run as tryout

    with Bars(quiet=given.quiet) as progress:
        about = tryout.try_ways(config, update=given.update, on_progress=progress)
    if not given.json:
        _say(given, tryout.describe_tries(about, str(config.output)), about)
    return tryout.settled(config, about)


def try_ways(arguments: Sequence[str]) -> None:
    """Find out by small fine-tunings which way of choosing helps on this data; writes no coreset.

    staff try --data train.jsonl --target T --draft D --validation V.jsonl --pruning-rate 0.8 --output runs/x
    """
    from staff.tryout import run as tryout

    config, given = _parse("try", arguments)
    with Bars(quiet=given.quiet) as progress:
        about = tryout.try_ways(config, update=given.update, on_progress=progress)
    _say(given, tryout.describe_tries(about, str(config.output)), about)


def finetune(arguments: Sequence[str]) -> None:
    """Fine-tune a model on a file with LoRA, a coreset for example.

    staff finetune --data runs/x/coreset.jsonl --model T --output runs/x/adapter
    """
    from staff import jobs

    config, given = _parse("finetune", arguments)
    with Bars(quiet=given.quiet) as progress:
        path = jobs.finetune(config, update=given.update, on_progress=progress)
    _say(
        given,
        f"adapter    {path} (load it with peft.AutoPeftModelForCausalLM.from_pretrained)",
        {"adapter": str(path)},
    )


def score(arguments: Sequence[str]) -> None:
    """Write the scores of every sample on one model: effort, loss, tokens.

    staff score --data train.jsonl --model D --output scores.parquet
    """
    from staff import jobs

    config, given = _parse("score", arguments)
    with Bars(quiet=given.quiet) as progress:
        path, n = jobs.score(config, on_progress=progress)
    _say(
        given,
        f"scores     {path} ({n} samples; take them up again with staff select --scores {path})",
        {"scores": str(path), "n": n},
    )


def evaluate(arguments: Sequence[str]) -> None:
    """Answer a test file with a model: ROUGE, BLEU, chrF, exact match, loss, a row an example.

    staff evaluate --data test.jsonl --model runs/x/adapter --output runs/x/answers.jsonl
    """
    from staff.comparison import evaluate as evaluation

    config, given = _parse("evaluate", arguments)
    with Bars(quiet=given.quiet) as progress:
        summary = evaluation.evaluate(config, on_progress=progress)
    _say(given, evaluation.describe(summary, config.output), summary)


def plan(arguments: Sequence[str]) -> None:
    """Predict what every method would take on this machine, where it pays, and what to do.

    staff plan --data train.jsonl --target T --draft D
    staff plan --config comparison.yaml
    """
    from staff import planning

    if (given := _given("plan", arguments)).config and "tasks" in configs.read_yaml(given.config):
        return _forecast(given)
    config, given = _parse("plan", arguments)
    with Bars() as progress:
        made = planning.make_plan(config, progress)
    _say(given, planning.describe_plan(made), made)


def _forecast(given: argparse.Namespace) -> None:
    from staff.comparison import forecast as forecasting
    from staff.comparison.grid import read_comparison

    if others := vars(given).keys() - {"config", "preset", "json"}:
        raise ValueError(f"{given.config} is a comparison, which says all itself; leave out --{min(others)}")
    comparison = read_comparison(given.config, "runs/compare")
    with Bars() as progress:
        found = forecasting.forecast(comparison, progress)
    _say(given, forecasting.describe_forecast(found), found)


def drafts(arguments: Sequence[str]) -> None:
    """Compare drafts with the target on a few hundred rows: which is faithful, at what cost.

    staff drafts --data train.jsonl --target T --candidates D self:8 --picture drafts.png
    """
    from staff import candidates

    config, given = _parse("drafts", arguments)
    with Bars(quiet=given.quiet) as progress:
        found = candidates.compare_drafts(config, progress)
    text = candidates.describe_drafts(found)
    if config.picture:
        is_drawn = candidates.draw_drafts(found, Path(config.picture))
        text += (
            f"\n\npicture    {config.picture}" if is_drawn else "\n\nno picture: matplotlib is not installed"
        )
    _say(given, text, found)


def diagnose(arguments: Sequence[str]) -> None:
    """Say what is in a pool, with one pass of a small model, and what that means for choosing from it.

    staff diagnose --data train.jsonl --model D --validation few.jsonl --test test.jsonl
    """
    from staff import diagnosis

    config, given = _parse("diagnose", arguments)
    with Bars(quiet=given.quiet) as progress:
        found = diagnosis.diagnose(config, progress)
    _say(given, diagnosis.describe_diagnosis(found, config.output), found)


def compare(arguments: Sequence[str]) -> None:
    """Methods, pruning rates and seeds against each other: select, fine-tune, evaluate; tables, costs.

    staff init comparison.yaml && staff compare --config comparison.yaml
    """
    given = _given("compare", arguments)
    if not given.config:
        raise ValueError(
            "name what to compare with --config FILE.yaml; staff init comparison.yaml writes one"
        )
    if given.workers > 1:  # before torch comes in: the cores are shared out
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // given.workers)))
    from staff.comparison import grid
    from staff.comparison import run as comparing
    from staff.comparison import tables as results

    comparison = grid.read_comparison(given.config, given.output)
    if not given.tables:
        command = [sys.executable, "-m", "staff.cli", "compare", "--config", str(given.config), "--quiet"]
        beside = [[*command, "--output", str(comparison.output)]] * (given.workers - 1)
        with Bars(quiet=given.quiet) as progress:
            comparing.compare(comparison, update=given.update, on_progress=progress, beside=beside)
    text = results.report(comparison.output, {name: task.metrics for name, task in comparison.tasks.items()})
    files = {name: str(comparison.output / name) for name in ("results.csv", "results.md", "differences.csv")}
    page = comparison.output / results.COMPARISON_PAGE
    seen = f", the page to open is {page}" if page.exists() else ""
    _say(given, f"{text}\ntables are in {files['results.md']}{seen}", files)


def worker(arguments: Sequence[str]) -> None:
    """Score shards of a run that a driver laid out: started by torchrun, Slurm or by hand.

    staff worker --run runs/x
    """
    given = _given("worker", arguments)
    if not given.run:
        raise ValueError("name the run's folder with --run: the driver's --output")
    from staff.runs import pieces
    from staff.runs import worker as working

    working.work(Path(given.run), pieces.OPENERS, given.name, given.wait)


def inspect(arguments: Sequence[str]) -> None:
    """Show how a file is read: format, columns, lengths, duplicates, rows as the model sees them.

    staff inspect --data train.jsonl --model T
    """
    from rich.console import Console

    from staff import inspection

    config, given = _parse("inspect", arguments)
    report = inspection.look(config)
    if given.json:
        _say(given, "", report)
    else:
        Console(soft_wrap=True).print(inspection.render(report), emoji=False, highlight=False)


def report(arguments: Sequence[str]) -> None:
    """Make the page of a run or a comparison again, from its files.

    staff report runs/x
    """
    given = _given("report", arguments)
    if (given.folder / "results.csv").exists():
        from staff.comparison import tables

        page = tables.write_page(given.folder)
    else:
        from staff.runs import reports

        page = reports.report_run(given.folder)
    print(visible(f"page       {page}"))


def _say(given: argparse.Namespace, text: str, values: dict[str, Any]) -> None:
    if given.json:
        print(json.dumps(values, ensure_ascii=False))
    elif not getattr(given, "quiet", False):
        print(visible(text))


def methods(arguments: Sequence[str]) -> None:
    """List the methods: what each needs and where it is from.

    staff methods
    """
    from staff.methods import COST_SYMBOLS, methods_table

    _given("methods", arguments)
    for row in methods_table():
        print(f"{row.name:18}{row.about}")
        print(
            f"{'':18}needs {row.needs or 'nothing'}; cost {row.cost}"
            + (f"; {row.paper}" if row.paper else "")
        )
        if row.options:
            print(f"{'':18}options {row.options}")
    print(f"\ncost in passes of the target over the pool. {COST_SYMBOLS}")


def init(arguments: Sequence[str]) -> None:
    """Write a comparison's YAML file to begin with, every key explained.

    staff init comparison.yaml
    """
    from staff import files
    from staff.comparison.grid import TEMPLATE

    path = Path(_given("init", arguments).file)
    if path.exists():
        raise ValueError(f"{path} is there already; name a new file")
    files.write_text(path, TEMPLATE)
    print(f"{path}: fill in the tasks, then staff compare --config {path}")


def completion(arguments: Sequence[str]) -> None:
    """Print what makes a shell complete commands, flags and choices.

    eval "$(staff completion bash)"            # zsh likewise; staff completion fish | source
    """
    shell = _given("completion", arguments).shell
    if shell not in flags.SHELLS:
        raise ValueError(f"there is no completion for {shell}; for {', '.join(flags.SHELLS)} there is")
    print(flags.completion(shell, {name: (_first_line(name), _parser(name)) for name in COMMANDS}), end="")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "plan": plan,
    "drafts": drafts,
    "diagnose": diagnose,
    "try": try_ways,
    "select": select,
    "score": score,
    "worker": worker,
    "finetune": finetune,
    "evaluate": evaluate,
    "compare": compare,
    "report": report,
    "inspect": inspect,
    "methods": methods,
    "init": init,
    "completion": completion,
}
# the settings of each, and which SWITCHES it knows
SETTINGS: dict[str, tuple[type | None, str]] = {
    "plan": (configs.PlanConfig, "json"),
    "drafts": (configs.DraftsConfig, "quiet json"),
    "diagnose": (configs.DiagnoseConfig, "quiet json"),
    "try": (configs.SelectConfig, "update quiet json"),
    "select": (configs.SelectConfig, "update quiet json"),
    "score": (configs.ScoreConfig, "quiet json"),
    "finetune": (configs.FinetuneConfig, "update quiet json"),
    "evaluate": (configs.EvaluateConfig, "quiet json"),
    "compare": (None, "update quiet json"),
    "inspect": (configs.InspectConfig, "json"),
}


def _first_line(name: str) -> str:
    return (COMMANDS[name].__doc__ or "").splitlines()[0]


def _parser(name: str) -> flags.Parser:
    kind, switches = SETTINGS.get(name, (None, ""))
    parser = flags.parser_of(f"staff {name}", COMMANDS[name].__doc__ or "", kind)
    own = parser.add_argument_group(flags.OURS)
    if name == "init":
        own.add_argument("file", nargs="?", default="comparison.yaml", help="(default: comparison.yaml)")
    if name == "report":
        about = "of a run, of one of its coresets, or of a comparison"
        own.add_argument("folder", type=Path, help=about)
    if name == "completion":
        own.add_argument(
            "shell", nargs="?", default="bash", help=f"{', '.join(flags.SHELLS)} (default: bash)"
        )
    if name == "worker":
        own.add_argument(
            "--run", default=None, metavar="PATH", help="the run's folder: the driver's --output"
        )
        about = "seconds without work after which it ends (default: 600)"
        own.add_argument("--wait", type=float, default=600.0, metavar="N", help=about)
        own.add_argument("--name", default=None, help=argparse.SUPPRESS)
        own.add_argument("--quiet", action="store_true", default=False, help=SWITCHES["quiet"])
    if name == "compare":
        from staff.comparison.grid import TEMPLATE

        own.add_argument("--config", default=None, metavar="FILE.yaml", help="what to compare (required)")
        about = "the folder, in place of the file's own; the same command goes on where it stopped"
        own.add_argument("--output", default=None, metavar="PATH", help=about)
        about = "processes that work through the cells side by side (default: 1)"
        own.add_argument("--workers", type=int, default=1, metavar="N", help=about)
        about = "make the tables of what is finished, and work on nothing"
        own.add_argument("--tables", action="store_true", default=False, help=about)
        parser.epilog = f"What the YAML file may say:\n\n{TEMPLATE}"
    if kind:
        about = "a YAML file of settings: flags typed earlier"
        own.add_argument("--config", default=None, metavar="FILE.yaml", help=about)
        if _has_presets(kind):
            about = "settings under one name; what else is given overrides them"
            choices = "{" + ",".join(configs.PRESETS) + "}"
            own.add_argument("--preset", default=None, metavar=choices, help=about)
    for switch in switches.split():
        own.add_argument(f"--{switch}", action="store_true", default=False, help=SWITCHES[switch])
    return parser


def _has_presets(kind: type) -> bool:
    fields = configs.names_of(kind)
    return any(name in fields for preset in configs.PRESETS.values() for name in preset)


def _given(name: str, arguments: Sequence[str]) -> argparse.Namespace:
    """What was typed behind a command."""
    given = argparse.Namespace(**flags.parse(_parser(name), arguments))
    if getattr(given, "quiet", False):
        for handler in logging.getLogger().handlers:
            handler.setLevel(logging.ERROR)
    return given


def _parse(name: str, arguments: Sequence[str]) -> tuple[Any, argparse.Namespace]:
    """Flags over a YAML file over defaults.

    Returns:
        the config, and the switches that are no setting of the run.
    """
    kind, given = SETTINGS[name][0], _given(name, arguments)
    assert kind
    values = configs.read_yaml(given.config) if given.config else {}
    if getattr(given, "preset", None):
        values["preset"] = given.preset
    if kind is configs.PlanConfig:  # a selection's file is a plan's too
        beside = configs.names_of(configs.SelectConfig).keys() - configs.names_of(kind).keys()
        values = {name: value for name, value in values.items() if name.replace("-", "_") not in beside}
    config = configs.from_mapping(kind, values, given.config or "--preset") if values else kind()
    names = configs.names_of(kind)
    return flags.overlaid(config, {key: v for key, v in vars(given).items() if key in names}), given


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
    if arguments and arguments[0] == "help":
        arguments = [*arguments[1:2], "--help"]
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: staff COMMAND [settings]\n")
        for name in COMMANDS:
            print(f"  {name:{width}}  {_first_line(name)}")
        print("\nstaff help COMMAND lists its settings, with an example; staff -V says the version")
        sys.exit(0)
    if arguments[0] in ("-V", "--version"):
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
        print(visible(f"staff: {error}"), file=sys.stderr)
        sys.exit(FAILED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
