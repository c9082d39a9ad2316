"""The fidelity study, tables and a picture: python experiments/fidelity/table.py > RESULTS.md"""

import csv
import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).parent
SHOWN = (
    "spearman_raw",
    "partial_raw",
    "regions_raw",
    "overlap_raw",
    "spearman_tuned",
    "partial_tuned",
    "overlap_tuned",
)
ABOUT = """# How little fine-tuning does a draft need?

600 rows of each task, target `base`; means over seeds, ± half of what lies between the lowest and the \
highest.
`regions`: adjusted Rand index of the regions; `coreset`: share of the coreset (p = 80 %) that \
STAFF's with this \
draft
and the target's own have in common, 0.2 by chance; U: passes of the target, v included; s: seconds \
on a busy machine.
docs/drafts.md says what it means.

![rank correlation with the raw target against cost](fidelity.png)"""
NAMES = (
    "ρ raw",
    "ρ raw, length out",
    "regions",
    "coreset",
    "ρ tuned",
    "ρ tuned, length out",
    "coreset, tuned",
)
RATE = 1e-4  # the tool's own; the other is a row at the end of each draft's
IN_SHORT = (  # (scope, column) of each; beside it, in brackets, with length taken out
    (("last-value", "spearman_raw"), ("last-value", "partial_raw")),
    (("last-block", "spearman_raw"), ("last-block", "partial_raw")),
    (("last-value", "spearman_tuned"), ("last-value", "partial_tuned")),
)


def settings(rows: list[dict]) -> list[tuple]:
    return sorted(
        {
            (row["draft"], float(row["epochs"]), float(row["share"]), float(row["learning_rate"]))
            for row in rows
        }
    )


def cells(rows: list[dict], setting: tuple, **of) -> list[dict]:
    """The seeds of one setting, a task and a scope."""
    draft, *numbers = setting
    wanted = [
        row for row in rows if row["draft"] == draft and all(row[name] == value for name, value in of.items())
    ]
    return [
        row
        for row in wanted
        if [float(row[name]) for name in ("epochs", "share", "learning_rate")] == numbers
    ]


def mean(rows: list[dict], name: str) -> float:
    return float(np.mean([float(row[name]) for row in rows])) if rows else math.nan


def in_short(rows: list[dict], tasks: list[str]) -> list[str]:
    names = ("ρ raw, last-value (length out)", "last-block", "ρ tuned, last-value")
    head = [
        "draft",
        "T",
        "f",
        "U",
        *(name if place else f"`{task}` {name}" for task in tasks for place, name in enumerate(names)),
    ]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for setting in settings(rows):
        draft, epochs, share, rate = setting
        if rate != RATE:
            continue
        values = [f"{mean(cells(rows, setting, scope='last-value'), 'passes'):.2f}"]
        for task in tasks:
            for pair in IN_SHORT:
                value, without = (
                    f"{mean(cells(rows, setting, task=task, scope=scope), name):.2f}" for scope, name in pair
                )
                values.append(f"{value} ({without})")
        lines.append(f"| {draft} | {epochs:g} | {share:g} | {' | '.join(values)} |")
    return lines


def whole(rows: list[dict]) -> list[str]:
    length = abs(mean(rows, "length"))
    lines = [f"\n### {rows[0]['task']}, {rows[0]['scope']} (response length alone: {length:.2f})\n"]
    lines += [
        f"| draft | T | f | rate | seeds | {' | '.join(NAMES)} | U | s |",
        "|" + " --- |" * (7 + len(NAMES)),
    ]
    for setting in settings(rows):
        found, values = cells(rows, setting), []
        for name in SHOWN:
            numbers = [float(row[name]) for row in found]
            spread = f" ±{(max(numbers) - min(numbers)) / 2:.2f}" if len(numbers) > 1 else ""
            values.append(f"{np.mean(numbers):.2f}{spread}")
        seconds = mean(found, "tune_seconds") + mean(found, "score_seconds")
        draft, epochs, share, rate = setting
        values += [f"{mean(found, 'passes'):.2f}", f"{seconds:.0f}"]
        lines.append(f"| {draft} | {epochs:g} | {share:g} | {rate:g} | {len(found)} | {' | '.join(values)} |")
    return lines


def draw(rows: list[dict], tasks: list[str], scopes: list[str]) -> None:
    """Rank correlation with the raw target against the cost of a selection, a line for each T over f."""
    figure = Figure(figsize=(5 * len(tasks), 3.4 * len(scopes)), layout="constrained")
    panels = figure.subplots(len(scopes), len(tasks), squeeze=False, sharex=True, sharey="row")
    for line, scope in zip(panels, scopes, strict=True):
        for axes, task in zip(line, tasks, strict=True):
            own = [row for row in rows if (row["task"], row["scope"]) == (task, scope)]
            for place, draft in enumerate(dict.fromkeys(row["draft"] for row in own)):
                for epochs, mark in zip((0, 1, 2, 3), "os^D", strict=True):
                    found = [
                        cells(own, s) for s in settings(own) if (s[0], s[1], s[3]) == (draft, epochs, RATE)
                    ]
                    points = [(mean(some, "passes"), mean(some, "spearman_raw")) for some in found]
                    if points:
                        look = {
                            "color": f"C{place}",
                            "alpha": 0.4 + 0.2 * epochs,
                            "label": f"{draft}, T = {epochs}",
                        }
                        axes.plot(*zip(*points, strict=True), f"{mark}-", **look)
            axes.axvline(1, color="0.7", zorder=0)
            axes.axhline(abs(mean(own, "length")), color="0.7", linestyle=":", zorder=0)
            axes.set_title(f"{task}, {scope}")
    for axes in panels[-1]:
        axes.set_xlabel(
            "cost of the selection in passes of the target (line: scoring the target itself)", fontsize=8
        )
    for axes in panels[:, 0]:
        axes.set_ylabel("Spearman's ρ with the target\n(dotted: response length alone)", fontsize=8)
    panels[0, 0].legend(fontsize=7, ncols=2)
    figure.savefig(HERE / "fidelity.png", dpi=110)


def main() -> None:
    with open(HERE / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    tasks, scopes = (list(dict.fromkeys(row[name] for row in rows)) for name in ("task", "scope"))
    lines = [ABOUT, "", *in_short(rows, tasks)]
    for task in tasks:
        for scope in scopes:
            lines += whole([row for row in rows if (row["task"], row["scope"]) == (task, scope)])
    print("\n".join(lines))
    draw(rows, tasks, scopes)


if __name__ == "__main__":
    main()
