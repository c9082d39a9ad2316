"""Scores taken during the last epoch of a draft's tuning, against a pass of their own: python experiments/fidelity/running.py

Prints a Markdown table: rank correlation with the separate pass of the same tuned draft, and of both with the raw target, for draft `nano`
in scope last-value; and the seconds of the tuning without and with those scores, and of the separate pass. Means over seeds, ± half of
what lies between the lowest and the highest.
"""

import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
from run import LEARNING_RATE, ROWS, SEEDS, TASKS, load
from scipy.stats import spearmanr

from staff.data import rows as formats
from staff.data.tokens import tokenise
from staff.files import read_arrays
from staff.models.finetune import finetune
from staff.scoring.scorer import Scorer

EPOCHS, SCOPE = (1, 3), "last-value"
NAMES = (
    "with the separate pass",
    "it with the raw target",
    "the separate pass with the raw target",
    "tuning, s",
    "with scores, s",
    "pass, s",
)


def efforts(model, pool) -> tuple[np.ndarray, float]:
    scorer, began = Scorer(model, SCOPE), time.perf_counter()
    return scorer.scores(pool, np.arange(len(pool)))["effort"], time.perf_counter() - began


def tuned(pool, epochs: int, seed: int, running: str | None):
    """The tuned draft, the seconds it took, and its running scores where they were asked for."""
    with tempfile.TemporaryDirectory() as folder:
        model, began = load("nano")[0], time.perf_counter()
        settings = {"epochs": epochs, "seed": seed, "learning_rate": LEARNING_RATE, "running": running}
        model = finetune(model, pool, np.arange(len(pool)), Path(folder), **settings)
        return (
            model,
            time.perf_counter() - began,
            (read_arrays(Path(folder) / "running.npz") or {}).get("effort"),
        )


def main() -> None:
    print(f"| task | T | {' | '.join(NAMES)} |\n|{' --- |' * (2 + len(NAMES))}", flush=True)
    for task in sys.argv[1:] or TASKS:
        target, tokenizer = load("base")
        pool = tokenise(islice(formats.read([TASKS[task]]).examples(), ROWS), tokenizer, 512)
        raw, _ = efforts(target, pool)
        for epochs in EPOCHS:
            found = []
            for seed in SEEDS:
                _, plain_seconds, _ = tuned(pool, epochs, seed, None)
                model, seconds, running = tuned(pool, epochs, seed, SCOPE)
                separate, pass_seconds = efforts(model, pool)
                ranks = [
                    spearmanr(a, b)[0] for a, b in ((running, separate), (running, raw), (separate, raw))
                ]
                found.append([*ranks, plain_seconds, seconds, pass_seconds])
            middle, half = np.mean(found, 0), np.ptp(found, 0) / 2
            values = [f"{m:.3f} ±{h:.3f}" for m, h in zip(middle[:3], half[:3], strict=True)]
            values += [f"{m:.1f} ±{h:.1f}" for m, h in zip(middle[3:], half[3:], strict=True)]
            print(f"| {task} | {epochs} | {' | '.join(values)} |", flush=True)


if __name__ == "__main__":
    main()
