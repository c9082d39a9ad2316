"""Every word for people: progress, summaries, tables."""

from __future__ import annotations

import csv
import math
import shlex
from typing import Any

from staff.config import DEFAULT_METHOD, SelectConfig, flags_of
from staff.data.layouts import visible as visible
from staff.methods.fidelity import ADVICE, Fidelity, within
from staff.planning import sum_in_words
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
    "evenly over what rows are about and how hard they are: on clean data it learns what a random choice",
    "learns, no less; there is more to gain where rows look wrong or repeat (--preset paper is STAFF itself)",
)


def summary(run: Run, config: SelectConfig) -> str:
    """What a person wants to know of a finished selection."""
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
    lines += _entry("coreset", f"{m} samples, {m / n:.0%} of the pool{always}")
    lines += _entry("groups", *_group_lines(manifest))
    if manifest["method"] == DEFAULT_METHOD:
        lines += _entry("choice", *HONEST)
    regions = [region for region in selection.regions if region.size]
    if regions:
        lines += _entry("regions", f"{len(regions)} with samples, of {len(selection.regions)}")
    if len(selection.verified):
        verified = [region for region in regions if not math.isnan(region.ratio)]
        pool_share = sum(region.size for region in verified) / (n - sum(manifest.get("dropped", {}).values()))
        budget_share = sum(region.selected for region in verified) / max(m, 1)
        ratios, count = sorted(region.ratio for region in verified), len(selection.verified)
        lines += _entry(
            "verified",
            f"{count} samples on the target ({count / n:.1%} of the pool), in {len(verified)} regions",
            f"that hold {pool_share:.0%} of the pool and {budget_share:.0%} of the coreset",
            f"V_i from {ratios[0]:.3g} to {ratios[-1]:.3g}",
        )
        if min(pool_share, budget_share) < 0.5:
            cure = "Fewer --num-regions hold more samples each"
            lines += _entry("", f"warning: less than half lies in verified regions. {cure}")
    elif manifest["method"] == "staff":
        lines += _entry("", f"warning: none verified, {_why_unverified(config)}")
    if run.fidelity:
        lines += _entry("fidelity", *_fidelity_lines(run.fidelity, config))
    if selection.filled or selection.filled_from_cut:
        lines += _entry(
            "fill",
            f"{selection.filled} samples drawn at random, since the budgets left them over",
            f"{selection.filled_from_cut} taken back from the hardest ones that were set aside",
        )
    files = f"for other trainers see {run.path / 'train'}, for every row's scores scores.parquet"
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
    return "\n".join(lines)


def grid_table(runs: list[Run], config: SelectConfig) -> str:
    """A line a coreset, how alike they are, and what all of it cost."""
    lines = ["", *remarks(runs[0].manifest, config.reading.max_length)]
    lines.append(f"{'coreset':24}{'pruning rate':>13}{'samples':>9}{'verified':>10}  fidelity")
    for run in runs:
        rate = "" if run.manifest["pruning_rate"] is None else f"{run.manifest['pruning_rate']:g}"
        told = run.fidelity.verdict if run.fidelity else ""
        line = f"{run.path.name:24}{rate:>13}{len(run.indices):9}{len(run.selection.verified):10}  {told}"
        lines.append(line.rstrip())
    # what is verified hangs on neither rate nor pick: runs of a method say the same
    for said in {
        run.manifest["method"]: _fidelity_lines(run.fidelity, config) for run in runs if run.fidelity
    }.values():
        lines += ["", *_entry("fidelity", *said)]
    for run in runs:
        lines += [f"{run.path.name}: {said}" for said in _short_groups(run.manifest)]
    if any(run.manifest["method"] == "staff" and not len(run.selection.verified) for run in runs):
        lines += ["", f"warning: staff verified none, {_why_unverified(config)}"]
    folder = runs[0].path.parent
    lines += ["", f"{'of the smaller, shared by':50}{'share':>7}{'by chance':>11}"]
    with open(folder / "overlap.csv", encoding="utf-8") as file:
        for pair in csv.DictReader(file):
            both = f"{pair['first']} and {pair['second']}"
            lines.append(f"{both:50}{float(pair['overlap']):7.2f}{float(pair['chance_overlap']):11.2f}")
    lines += ["", _cost_table(runs[-1].cost), ""]
    lines.append(f"coresets are in {folder}, one folder each (cells.csv, overlap.csv)")
    return "\n".join(lines)


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


def _fidelity_lines(fidelity: Fidelity, config: SelectConfig) -> list[str]:
    """How faithful the draft is: the verdict first, then the numbers it was told from."""
    lines = [f"{fidelity.verdict}: {fidelity.reason}"]
    if fidelity.verdict in ADVICE:
        lines.append("warning: " * (fidelity.verdict == "poor") + ADVICE[fidelity.verdict])
    if fidelity.verdict == "unknown" and config.verification == "adaptive":
        lines.append("--verification fixed or a smaller --verification-error scores more samples")
    if fidelity.spearman is None:
        return lines
    told = f"told from {fidelity.samples} samples that stand for {fidelity.pool_share:.0%} of the pool"
    lines.append(f"draft and target rank alike with {fidelity.shown()}, {told}")
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
