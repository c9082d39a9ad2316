"""Scores taken during the last epoch of a draft's tuning, against a pass of their own: python experiments/fidelity/running.py

Prints a Markdown table: rank correlation with the separate pass of the same tuned draft, and of both with the raw target, for draft `nano`.
"""

import sys
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
from run import LEARNING_RATE, ROWS, SEEDS, TASKS, efforts, load
from scipy.stats import spearmanr

from staff import formats
from staff.finetune import finetune
from staff.pool import tokenise
from staff.store import read_arrays

EPOCHS = (1, 3)


def main() -> None:
    print("| task | T | with the separate pass | it with the raw target | the separate pass with the raw target | saved |")
    print("| --- | --- | --- | --- | --- | --- |")
    for task, file in TASKS.items():
        target, tokenizer = load("base")
        pool = tokenise(islice(formats.read([file]).examples(), ROWS), tokenizer, 512)
        raw = efforts(target, pool)[0]["last-value"]
        for epochs in EPOCHS:
            found = []
            for seed in SEEDS:
                model, positions = load("nano")[0], np.arange(len(pool))
                with tempfile.TemporaryDirectory() as folder:
                    settings = {"epochs": epochs, "seed": seed, "learning_rate": LEARNING_RATE, "running": "last-value"}
                    tuned = finetune(model, pool, positions, Path(folder), **settings)
                    running = (read_arrays(Path(folder) / "running.npz") or {})["effort"]
                separate = efforts(tuned, pool)[0]["last-value"]
                found.append([spearmanr(a, b)[0] for a, b in ((running, separate), (running, raw), (separate, raw))])
            means, spread = np.mean(found, 0), np.ptp(found, 0) / 2
            cells = [f"{mean:.3f} ±{half:.3f}" for mean, half in zip(means, spread, strict=True)]
            print(f"| {task} | {epochs} | {' | '.join(cells)} | 1 of {2 * epochs + 1} r |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
