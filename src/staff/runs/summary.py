"""What a finished selection has to say to people: its summary, and the table of several."""

from __future__ import annotations

import csv
import math
import shlex
from collections.abc import Callable
from typing import Any

import numpy as np

from staff.config import DEFAULT_METHOD, SelectConfig, flags_of
from staff.data.layouts import visible
from staff.data.turns import build
from staff.methods.fidelity import ADVICE, Fidelity, within
from staff.planning import sum_in_words
from staff.report import facts as told
from staff.report.facts import figure
from staff.report.table import SOURCES
from staff.runs.outputs import Run, remarks


def reading_flags(config: SelectConfig) -> str:
    """The flags with which a coreset is read, and so trained on, as it was scored.

    Where a pool is found (--split and the like) does not go along: a coreset is a file.
    """
    names = ("columns", "train_on", "max_length", "chat_template", "template_date", "on_long")
    return flags_of(config.reading, *names)


def _entry(label: str, *texts: str) -> list[str]:
    """What there is to say of one thing, a line each, its name before the first."""
    return [f"{'' if number else label:11}{text}" for number, text in enumerate(texts)]


HONEST = (
    "evenly over what rows are about and how hard they are: on clean data as good as a random choice or a",
    "little better (small trials), better where rows look wrong to the draft (--method staff: the paper's)",
)


def summary(run: Run, config: SelectConfig, in_words: Callable[[str], str] = str) -> str:
    """What a person wants to know of a finished selection: first in plain words, then in the paper's.

    Args:
        in_words: says a line that is not the data's in other words.
    """
    selection, manifest, coreset = run.selection, run.manifest, run.path / "coreset.jsonl"
    n, m = manifest["n"], manifest["m"]
    tokens = f", {manifest['tokens']:,} tokens" if "tokens" in manifest else ""
    about = remarks(manifest, config.reading.max_length)
    if manifest["skipped"]:
        about.append(f"rows left out are listed in {run.path / 'skipped.jsonl'}")
    lines = ["", *_entry("pool", f"{n} samples ({manifest['format']}){tokens}", *about)]
    always = f", {manifest['always']} of them from --keep" if "always" in manifest else ""
    if "kept_tokens" in manifest:
        always += f", {manifest['kept_tokens']:,} of {manifest['settings']['budget_tokens']:,} tokens"
    lines += _entry("coreset", f"{m} samples, {m / n:.0%} of the pool{always}", *_against_pool(run))
    lines += _entry("groups", *_group_lines(manifest))
    if manifest["method"] == DEFAULT_METHOD:
        lines += _entry("choice", *([told.BY_SCORES] if told.by_scores_alone(manifest) else HONEST))
    lines += (rows := _pool_again(run))
    if run.fidelity:
        lines += _entry("fidelity", *_verdict_lines(run.fidelity, config))
    lines += _entry("", *(f"warning: {said}" for said in _warnings(run, config)))
    lines += ["", "in the paper's terms", *_entry("regions", *_region_lines(run))]
    if run.fidelity:
        lines += _entry("agreement", *_fidelity_lines(run.fidelity))
    if selection.filled or selection.filled_from_cut:
        lines += _entry(
            "fill",
            f"{selection.filled} samples drawn at random, since the budgets left them over",
            f"{selection.filled_from_cut} taken back from those that were set aside",
        )
    train, scores = run.path / "train", run.path / "scores.parquet"
    files = f"for other trainers see {train}, for every row's scores {scores}"
    lines += ["", _cost_table(run.cost), "", f"coreset is {coreset}; {files}"]
    if config.push_to_hub:
        lines.append(f"it is on the hub as the data set {config.push_to_hub}")
    if config.reading.dataset_info:  # which names the columns in a way of its own
        coreset = next((run.path / "train").glob("coreset-*.jsonl"), coreset)
    target = f"--model {shlex.quote(config.target or 'MODEL')}{reading_flags(config)}"
    if config.training.lora_targets:
        target += f" --lora-targets {shlex.join(config.training.lora_targets)}"
    data, adapter = shlex.quote(str(coreset)), shlex.quote(str(run.path / "adapter"))
    lines.append(f"train on it: staff finetune --data {data} {target} --output {adapter}")
    return "\n".join(line if line in rows else in_words(line) for line in lines)


def _against_pool(run: Run) -> list[str]:
    """Lengths and scores of what was kept beside those of the pool."""
    facts, lines = run.facts, []
    for name in told.axes(facts):
        values = facts.columns[name]
        is_known = np.isfinite(values)
        parts = values[is_known], values[is_known & facts.kept]
        if all(map(len, parts)):
            each = ["".join(f"{figure(q):>8}" for q in np.quantile(part, (0.1, 0.5, 0.9))) for part in parts]
            lines.append(f"{facts.word(name):36}{each[0]}    {each[1]}")
    head = f"{'one, five, nine in ten lie below':36}{'pool':>24}    {'coreset':>24}"
    return [head, *lines] if lines else []


def _pool_again(run: Run) -> list[str]:
    """Where the rows come from, and one that was kept and one that was not, of middling score; nothing where
    the pool can't be read again."""
    try:
        rows, facts = run.rows, run.facts
        lines = []
        first = next(iter(rows.raw([0])))
        source = next((name for name in SOURCES if name in first), None)
        if source and not run.manifest.get("groups"):
            records = told.labels_of(np.array(rows.column(source), object), facts.kept)
            shares = [
                f"{_in_a_line(record['name'], 40)}: {record['of_pool']:.1%} of the pool, "
                f"{record['of_coreset']:.1%} of the coreset"
                for record in records[:SOURCES_SHOWN]
            ]
            more = [f"and {len(records) - SOURCES_SHOWN} more"] * (len(records) > SOURCES_SHOWN)
            lines += _entry(source, *shares, *more) if len(records) > 1 else []
        for fate, of in (("kept", facts.kept), ("dropped", ~facts.kept)):
            places = np.flatnonzero(of & ~np.isin(facts.columns["row"], list(facts.dropped)))
            if len(places):
                scores = facts.columns.get(facts.score or "", facts.columns["row"])[places]
                place = places[np.argsort(scores, kind="stable")[len(places) // 2]]
                (row,) = rows.raw([int(place)])
                turns = [turn.text for turn in build(rows.layout, row, rows.train_on).turns]
                said = " -> ".join(_in_a_line(text, TURN_SHOWN) for text in turns[-2:])
                lines += _entry(fate, f"row {facts.columns['row'][place]}, for one: {said}")
        return lines
    except (ValueError, OSError, StopIteration):
        return []


def _in_a_line(text: str, limit: int) -> str:
    """A text of the data for a terminal: on one line, escaped, cut."""
    line = visible(" ".join(text[: 4 * limit].split()))
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _region_lines(run: Run) -> list[str]:
    """What was cut and verified; nothing for methods without regions."""
    selection, n = run.selection, run.manifest["n"]
    regions = [region for region in selection.regions if region.size]
    if not regions:
        return ["none: the method cuts none"]
    lines = [f"{len(regions)} with samples, of {len(selection.regions)}"]
    if len(selection.verified):
        verified = [region for region in regions if not math.isnan(region.ratio)]
        ratios, count = sorted(region.ratio for region in verified), len(selection.verified)
        pool_share, budget_share = _verified_shares(run)
        lines += [
            f"{count} samples verified on the target ({count / n:.1%} of the pool), in {len(verified)}",
            f"that hold {pool_share:.0%} of the pool and {budget_share:.0%} of the coreset",
            f"V_i from {ratios[0]:.3g} to {ratios[-1]:.3g}",
        ]
    return lines


def _verified_shares(run: Run) -> tuple[float, float]:
    """Of the pool and of the coreset, what lies in regions that were verified."""
    manifest = run.manifest
    verified = [r for r in run.selection.regions if r.size and not math.isnan(r.ratio)]
    left = manifest["n"] - sum(manifest.get("dropped", {}).values())
    kept = sum(region.selected for region in verified) / max(manifest["m"], 1)
    return sum(region.size for region in verified) / left, kept


def _warnings(run: Run, config: SelectConfig) -> list[str]:
    """What speaks against trusting a coreset, beside the draft's verdict."""
    if run.manifest["method"] == "staff" and not len(run.selection.verified):
        return [f"none verified, {_why_unverified(config)}"]
    if len(run.selection.verified) and min(_verified_shares(run)) < 0.5:
        return ["less than half lies in verified regions. Fewer --num-regions hold more samples each"]
    return []


def grid_table(runs: list[Run], config: SelectConfig) -> str:
    """A line a coreset, what is to be said of each, how alike they are, and what all of it cost."""
    lines = ["", *remarks(runs[0].manifest, config.reading.max_length)]
    lines.append(
        f"{'coreset':24}{'pruning rate':>13}{'samples':>9}{'verified':>10}{'middle length':>15}  fidelity"
    )
    for run in runs:
        rate = "" if run.manifest["pruning_rate"] is None else f"{run.manifest['pruning_rate']:g}"
        verdict = run.fidelity.verdict if run.fidelity else ""
        lengths = run.facts.columns.get("response_tokens")
        length = "" if lengths is None else figure(told.medians(lengths, run.facts.kept)[1])
        line = f"{run.path.name:24}{rate:>13}{len(run.indices):9}{len(run.selection.verified):10}{length:>15}"
        lines.append(f"{line}  {verdict}".rstrip())
    lengths = next(
        (r.facts.columns["response_tokens"] for r in runs if "response_tokens" in r.facts.columns), None
    )
    if lengths is not None:
        lines.append(
            f"{'the pool':24}{'':13}{runs[0].manifest['n']:9}{'':10}{figure(np.nanmedian(lengths)):>15}"
        )
    lines += ["", *_entry("groups", *_groups_of_several(runs))]
    # what is verified hangs on neither rate nor pick: coresets of which the same is true are named together
    each = {
        "fidelity": lambda run: _verdict_lines(run.fidelity, config) + _fidelity_lines(run.fidelity),
        "warning": lambda run: [f"warning: {said}" for said in _warnings(run, config)],
        "short": lambda run: _short_groups(run.manifest),
    }
    for label, of in each.items():
        alike: dict[tuple[str, ...], list[str]] = {}
        for run in runs:
            if said := () if label == "fidelity" and not run.fidelity else tuple(of(run)):
                alike.setdefault(said, []).append(run.path.name)
        for said, names in alike.items():
            lines += _entry(label, f"of {', '.join(names)}", *said)
    folder = runs[0].path.parent
    lines += ["", f"{'of the smaller, shared by':50}{'share':>7}{'by chance':>11}"]
    with open(folder / "overlap.csv", encoding="utf-8") as file:
        for pair in csv.DictReader(file):
            both = f"{pair['first']} and {pair['second']}"
            lines.append(f"{both:50}{float(pair['overlap']):7.2f}{float(pair['chance_overlap']):11.2f}")
    lines += ["", _cost_table(runs[-1].cost), ""]
    lines.append(f"coresets are in {folder}, one folder each (cells.csv, overlap.csv)")
    return "\n".join(lines)


def _groups_of_several(runs: list[Run]) -> list[str]:
    """The largest groups' shares of the pool and of each coreset."""
    by_name = [{g["group"]: g["selected"] for g in run.manifest.get("groups", ())} for run in runs]
    groups = sorted(runs[0].manifest.get("groups", ()), key=lambda group: -group["rows"])
    lines = []
    for group in groups[:GROUPS_SHOWN]:
        asked = f"{group['asked']:.1%} asked for, " if "asked" in group else ""
        shares = [f"{own.get(group['group'], 0) / max(run.manifest['m'], 1):.1%} of {run.path.name}"
                  for run, own in zip(runs, by_name, strict=True)]  # fmt: skip
        pool = f"{group['rows'] / runs[0].manifest['n']:.1%} of the pool"
        lines.append(f"{group['group']}: {pool}, {asked}{', '.join(shares)}")
    return lines + [f"and {len(groups) - GROUPS_SHOWN} more, in manifest.json"] * (len(groups) > GROUPS_SHOWN)


SOURCES_SHOWN = 6
TURN_SHOWN = 60  # letters of a turn of a sample
GROUPS_SHOWN = 12


def _group_lines(manifest: dict[str, Any]) -> list[str]:
    """The largest groups: their shares of the pool, asked for, and of the coreset; and what flowed on."""
    groups = sorted(manifest.get("groups", ()), key=lambda group: -group["rows"])
    lines = []
    for group in groups[:GROUPS_SHOWN]:
        asked = f"{group['asked']:.1%} asked for, " if "asked" in group else ""
        of = group["selected"] / max(manifest["m"], 1)
        pool = group["rows"] / manifest["n"]
        lines.append(f"{group['group']}: {pool:.1%} of the pool, {asked}{of:.1%} of the coreset")
    if len(groups) > GROUPS_SHOWN:
        lines.append(f"and {len(groups) - GROUPS_SHOWN} more, in manifest.json")
    return lines + _short_groups(manifest)


def _short_groups(manifest: dict[str, Any]) -> list[str]:
    """The groups that had too few rows for the share asked for."""
    m = manifest["m"]
    short = [group for group in manifest.get("groups", ()) if group.get("asked", 0) * m > group["left"] + 0.5]
    return [
        f"{group['group']} has only {group['left']} of the {group['asked'] * m:.0f} rows asked for: what it "
        f"lacks went to the others"
        for group in short[:GROUPS_SHOWN]
    ]


def _why_unverified(config: SelectConfig) -> str:
    if not config.target:
        return "for there is no --target: V_i is 1 in all regions"
    return (
        "for no region holds more than its draw takes: try fewer --num-regions, a smaller "
        "--verification-budget, or --verification adaptive"
    )


def _verdict_lines(fidelity: Fidelity, config: SelectConfig) -> list[str]:
    """Is the draft to be trusted, and what to do where not."""
    lines = [f"{fidelity.verdict}: {fidelity.reason}"]
    if fidelity.verdict in ADVICE:
        lines.append("warning: " * (fidelity.verdict == "poor") + ADVICE[fidelity.verdict])
    if fidelity.verdict == "unknown" and config.verification == "adaptive":
        lines.append("--verification fixed or a smaller --verification-error scores more samples")
    return lines


def _fidelity_lines(fidelity: Fidelity) -> list[str]:
    """The numbers that the verdict was told from."""
    lines: list[str] = []
    if fidelity.spearman is None:
        return lines
    of = f"told from {fidelity.samples} samples that stand for {fidelity.pool_share:.0%} of the pool"
    lines.append(f"draft and target rank alike with {fidelity.shown()}, {of}")
    beside = {"with length taken out": fidelity.without_length, "length alone": fidelity.length}
    beside |= {"the draft's loss alone": fidelity.loss, "Kendall": fidelity.kendall}
    lines.append("; ".join(f"{name} {within(estimate)}" for name, estimate in beside.items() if estimate))
    if fidelity.adjusted_rand:
        rand = f"adjusted Rand index of {within(fidelity.adjusted_rand)}"
        plain = f"the plain one is {fidelity.rand:.2f}, by chance {fidelity.rand_by_chance:.2f}"
        lines.append(f"their regions agree with an {rand}; {plain}")
    return lines


def _cost_table(cost: dict[str, Any]) -> str:
    """Seconds, tokens and passes of each stage, beside what scoring the target directly would cost."""
    rows = [
        (stage, row.get("seconds", 0.0), row.get("tokens"), row.get("passes"))
        for stage, row in cost["stages"].items()
    ]
    rows.append(("in all", cost["seconds"], None, cost.get("passes")))
    if "direct" in cost and any(
        (row["kind"], row["model"]) == ("score", "draft") for row in cost["stages"].values()
    ):
        rows.append(("without a draft (direct)", cost["direct"]["seconds"], None, cost["direct"]["passes"]))
    lines = [f"{'cost':26}{'seconds':>9}{'tokens':>12}{'passes of the target':>22}"]
    for stage, seconds, tokens, passes in rows:
        counted = "" if tokens is None else f"{tokens:,.0f}"
        in_passes = "" if passes is None else f"{passes:.2f}"
        lines.append(f"{stage:26}{seconds:9.1f}{counted:>12}{in_passes:>22}")
    if "sum" in cost:
        lines += [sum_in_words(cost["sum"]), cost["verdict"]]
    return "\n".join(lines)
