"""How far is a coreset's mean gradient from the pool's? python experiments/default/gradients.py

For every way, task and rate: the squared distance between the mean gradient (weighted, where the way has
weights) of the target's last block over a coreset and that over its pool, over that of random coresets, on
average over draws; and what of it stays when draws are averaged, the square of the bias. It needs one pass of
the target where fine-tuning needs hundreds, and tells a rule that leans from one that is merely unlucky.
Gradients are kept as count sketches of 2,048 numbers (Charikar and others 2002), which keep distances to
about 2 %. Thought of after the first losses had come in: an explanation, not the measure that was fixed.
"""

import csv
from dataclasses import replace

import numpy as np
import torch
from run import HERE, SETTINGS, fresh, look, pool_of
from ways import WAYS

from staff.data.tokens import Pool, batches, collate
from staff.scoring.gradnorm import gradient_matrix
from staff.scoring.scorer import Scorer

WIDTH, DRAWS, SEED = 2048, 300, 1


def sketches(pool: Pool) -> np.ndarray:
    """(n, WIDTH) of each sample's gradient."""
    scorer, rng = Scorer(fresh("target"), "last-block"), np.random.default_rng(0)
    found = torch.zeros(len(pool), WIDTH)
    places: list = []
    for batch_of in batches(pool.lengths, 512):
        matrices = scorer.measure(collate(pool, batch_of), gradient_matrix)
        places = places or [
            (
                torch.from_numpy(rng.integers(WIDTH, size=m[0].numel())),
                torch.from_numpy(rng.choice([-1.0, 1.0], m[0].numel()).astype(np.float32)),
            )
            for m in matrices
        ]
        part = torch.zeros(len(batch_of), WIDTH)
        for matrix, (bucket, sign) in zip(matrices, places, strict=True):
            part.index_add_(1, bucket, matrix.flatten(1).float() * sign)
        found[torch.from_numpy(batch_of)] = part
    return found.double().numpy()


def errors(way: str, seen, gradients: np.ndarray, budget: int) -> tuple[float, float]:
    """Mean squared distance from the pool's mean gradient, and that of the mean over draws, less what its own
    spread adds."""
    means = []
    for draw in range(DRAWS if way != "facility_location" else 1):
        positions, weights = WAYS[way](seen, budget, np.random.default_rng([SEED, draw]))
        means.append(np.average(gradients[positions], 0, None if weights is None else weights[positions]))
    off = np.array(means) - gradients.mean(0)
    error, of_mean = (off**2).sum(1).mean(), (off.mean(0) ** 2).sum()
    return error, max(0.0, (of_mean - error / len(off)) / (1 - 1 / len(off)) if len(off) > 1 else error)


def main() -> None:
    torch.set_num_threads(1)
    with open(HERE / "gradients.csv", "w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(("task", "pruning_rate", "way", "error", "bias"))
        for task in SETTINGS["tasks"]:
            pool = pool_of(task, SEED)
            gradients = sketches(pool)
            seen = replace(look(task, SEED), verify=np.linalg.norm(gradients, axis=1).__getitem__)
            for rate in SETTINGS["pruning_rates"]:
                budget = round((1 - rate) * len(pool))
                chance, _ = errors("random", seen, gradients, budget)
                for way in WAYS:
                    found = [f"{part / chance:.3f}" for part in errors(way, seen, gradients, budget)]
                    out.writerow((task, rate, way, *found))
                    print(task, rate, way, *found, flush=True)


if __name__ == "__main__":
    main()
