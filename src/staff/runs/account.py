"""What the stages of a run took, summed over every time that it was started, and what that is in passes of
the target."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from staff import planning as plan
from staff.types import Stage

FILE = "account.jsonl"  # and account-NAME.jsonl of each worker: lines of several machines don't mix
OF_THE_POOL = ("tokenise", "dedup", "unpack")  # kinds of stages whose parts have no names
Numbers = dict[str, float]

_own = FILE


def write_to(name: str) -> None:
    """Let this process write its lines to a file of its own."""
    global _own
    _own = f"account-{name}.jsonl"


def spend(
    work: Path, stage: Stage, *, once: str | None = None, seconds: float = 0.0, **operations: float
) -> None:
    """Append a line: what a part of a stage took, in seconds, samples, tokens, flops, whatever is known.

    Args:
        once: names the part. Written before its result is kept, so that a kill in between loses nothing;
            where it had to be done again, its seconds count each time and its operations once.
    """
    entry = {"stage": dataclasses.asdict(stage), "once": once, "seconds": seconds, **operations}
    with open(work / _own, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # the last line of a killed run
                file.write(b"\n")
        file.write(json.dumps(entry).encode() + b"\n")


def _entries(work: Path) -> Iterator[tuple[Stage, str | None, Numbers]]:
    for path in sorted(work.glob("account*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            try:
                entry = json.loads(line)
                stage, once = Stage(**entry.pop("stage")), entry.pop("once")
                yield stage, once, {str(name): value + 0 for name, value in entry.items()}
            except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
                continue  # the last line of a killed run


def spent(work: Path) -> dict[Stage, Numbers]:
    """What each stage took over all the times that the run was started.

    Returns:
        stage -> seconds, of which repeated_seconds went into parts that were lost and done again, and
        operations.
    """
    total: dict[Stage, Numbers] = {}
    seen: dict[tuple[Stage, str], Numbers] = {}
    for stage, once, numbers in _entries(work):
        sums = total.setdefault(stage, {})
        before = seen.get((stage, once), {}) if once else {}
        if before:
            sums["repeated_seconds"] = sums.get("repeated_seconds", 0) + before["seconds"]
        for name, value in numbers.items():
            sums[name] = sums.get(name, 0) + value - (before.get(name, 0) if name != "seconds" else 0)
        if once:
            seen[stage, once] = numbers
    return total


def hand_on(work: Path, to: Path, pieces: Collection[str]) -> None:
    """Write down in another run, which has begun nothing, what some pieces took in this one, for it has them.

    Args:
        pieces: names of their folders, with which the names of their parts begin.
    """
    (to / FILE).unlink(missing_ok=True)
    for stage, once, numbers in _entries(work):
        if once.split()[0] in pieces if once else stage.kind in OF_THE_POOL:
            spend(to, stage, once=once, **numbers)


def cost_of_run(
    stages: Mapping[Stage, Numbers],
    target_pass: float | None = None,
    terms: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """What cost.json holds: stages by their sentence, the sum, and what scoring the target directly would
    have taken.

    Args:
        stages: of `spent`.
        target_pass: floating-point operations of one scoring pass of the target over the pool (U); None where
            no target was named, so that nothing can be said in passes.
        terms: of the sum (`plan.staff_passes`), where a draft speculated.
    """
    rows: dict[str, dict[str, Any]] = {
        str(stage): {**dataclasses.asdict(stage), **numbers} for stage, numbers in stages.items()
    }
    found: dict[str, Any] = {"stages": rows, "seconds": sum(row.get("seconds", 0) for row in rows.values())}
    on_target = stages.get(Stage("verify", "target")) or stages.get(Stage("score", "target"))
    if not target_pass:
        return found
    for row in rows.values():
        if "flops" in row:
            row["passes"] = row["flops"] / target_pass
    found["passes"] = sum(row.get("passes", 0) for row in rows.values())
    if on_target and on_target.get("flops"):
        found["direct"] = {"passes": 1.0, "seconds": on_target["seconds"] * target_pass / on_target["flops"]}
    if terms:
        found["sum"] = {**terms, "passes": plan.staff_passes(**terms)}
        found["verdict"] = plan.verdict(found["sum"]["passes"], **terms)
    return found


def stages_of(cost: Mapping[str, Any]) -> dict[Stage, Numbers]:
    """The stages in what cost.json holds, by what they are and not by their sentence."""
    names = [field.name for field in dataclasses.fields(Stage)]
    return {
        Stage(**{name: row[name] for name in names}): {k: v for k, v in row.items() if k not in names}
        for row in cost["stages"].values()
    }
