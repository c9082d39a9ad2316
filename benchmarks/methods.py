"""Seconds and peak memory of every method against n, a process a case.

    python benchmarks/methods.py                 all cases; prints a table, writes benchmarks/out/methods.json
    python benchmarks/methods.py staff kcenter   these methods alone

Scores are lognormal. Features stand in for hidden states: 24 latent dimensions in 200 clumps, mapped to 576
and blurred; "noise" has no structure at all, the worst there is for approximate neighbours. What graph.py
makes of features (neighbours, clusters) is timed apart from the selection. Seconds are the least of seven
runs up to 1,000,000 scores, else those of one. Memory is the process's peak, the given arrays and the
interpreter included.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

LINEAR = [
    "random",
    "direct",
    "el2n",
    "perplexity",
    "ifd",
    "ccs",
    "s2l",
    "staff",
]  # el2n: also grand, loss, entropy, length, less
RELEASED_SECONDS = 80e-6  # a sample, the authors' released selection script on a machine of this kind
OUT = Path(__file__).parent / "out" / "methods.json"

CASES = [
    *({"method": name, "n": n, "p": 0.8} for n in (100_000, 1_000_000, 20_000_000) for name in LINEAR),
    {"method": "moderate", "n": 100_000, "p": 0.9, "features": "clumps"},
    {"method": "d2", "n": 100_000, "p": 0.9, "features": "clumps"},
    {"method": "d2", "n": 100_000, "p": 0.2, "features": "clumps"},
    {"method": "d2", "n": 100_000, "p": 0.9, "features": "noise"},
    {"method": "facility_location", "n": 100_000, "p": 0.9, "features": "clumps"},
    {"method": "kcenter", "n": 100_000, "p": 0.9, "features": "clumps"},
    {"method": "kcenter", "n": 100_000, "p": 0.9, "features": "noise"},
    {"method": "s2l", "n": 100_000, "p": 0.9, "features": "trajectories"},
]


def make_features(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, 576) float32 features, or (n, 20) falling losses for "trajectories"."""
    if kind == "trajectories":
        start, end, rate = rng.lognormal(size=(3, n, 1)).astype(np.float32)
        return (
            end
            + start * np.exp(-rate * np.linspace(0, 3, 20, dtype=np.float32))
            + 0.05 * rng.normal(size=(n, 20)).astype(np.float32)
        )
    if kind == "noise":
        return rng.standard_normal((n, 576), dtype=np.float32)
    latent = (
        rng.standard_normal((n, 24), dtype=np.float32)
        + 4 * rng.standard_normal((200, 24), dtype=np.float32)[rng.integers(200, size=n)]
    )
    blur = 0.3 * rng.standard_normal((n, 576), dtype=np.float32)
    return latent @ rng.standard_normal((24, 576), dtype=np.float32) / 5 + blur


def run(case: dict) -> dict:
    """One case: make the numbers, time the graph and the selection."""
    from staff import graph
    from staff.methods import METHODS

    notes: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("staff").addHandler(handler)
    logging.getLogger("staff").setLevel(logging.INFO)

    method, n = METHODS[case["method"]], case["n"]
    rng = np.random.default_rng(0)
    scores = rng.lognormal(size=n).astype(np.float32)
    arguments: dict = {}
    if method.verify:
        target = (scores * rng.uniform(0.5, 2, n)).astype(np.float32)
        arguments["verify"] = lambda positions: target[positions]
    if "scores" in method.needs:
        arguments["scores"] = scores
    if "unconditional_loss" in method.needs:
        arguments["unconditional_loss"] = (scores + rng.normal(size=n)).astype(np.float32)
    graph_seconds = 0.0
    if "features" in case:
        features = make_features(case["features"], n, rng)
        for name, need in method.needs.items():
            if need.made:
                start = time.perf_counter()
                arguments[name] = graph.derive(need.made, features, 0)
                graph_seconds += time.perf_counter() - start
            elif name == "features":
                arguments[name] = features
    elif "clusters" in method.needs:
        arguments["clusters"] = rng.integers(0, 100, n)

    seconds = []
    for _ in range(7 if n <= 1_000_000 and "features" not in case else 1):
        start = time.perf_counter()
        method.select(n, budget=round((1 - case["p"]) * n), rng=np.random.default_rng(0), **arguments)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        **case,
        "select_seconds": min(seconds),
        "graph_seconds": graph_seconds,
        "peak_bytes": peak,
        "notes": notes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*", help="methods to run; all where none is named")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(run(json.loads(arguments.case))))
        return
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    machine = f"{os.cpu_count()} cores, {platform.machine()}, "
    machine += f"Python {platform.python_version()}, numpy {np.__version__}"
    print(f"commit {commit}; {machine}; load before the start {os.getloadavg()[0]:.1f}\n")
    print("| method | n | p | features | graph s | select s | µs a sample | peak GB | notes |")
    print("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | --- |")
    results = []
    for case in CASES:
        if arguments.methods and case["method"] not in arguments.methods:
            continue
        child = subprocess.run(
            [sys.executable, __file__, "--case", json.dumps(case)],
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode:
            sys.exit(child.stderr)
        row = json.loads(child.stdout)
        results.append(row)
        if row["method"] == "staff":
            row["notes"].append(
                f"{RELEASED_SECONDS * row['n'] / row['select_seconds']:.0f} times the released script's speed"
            )
        per_sample = 1e6 * (row["select_seconds"] + row["graph_seconds"]) / row["n"]
        cells = [
            row["method"],
            f"{row['n']:,}",
            f"{row['p']}",
            row.get("features", ""),
            f"{row['graph_seconds']:.1f}",
        ]
        cells += [
            f"{row['select_seconds']:.3f}",
            f"{per_sample:.3f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            "; ".join(row["notes"]),
        ]
        print("| " + " | ".join(cells) + " |", flush=True)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps({"commit": commit, "machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
