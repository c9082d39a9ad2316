"""Which default does not lose to chance? python experiments/default/run.py [results.csv]

default.yaml says what is compared and how it is judged. A row a cell is added to the file as it
comes, and what is there is not done again. Needs ${STAFF_DATA} and ${STAFF_MODELS} (DATA.md).
"""

import csv
import os
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
import yaml
from ways import WAYS, Seen

from staff import graph
from staff.config import expand
from staff.data import rows
from staff.data.tokens import Pool, batches, collate, tokenise
from staff.methods import METHODS
from staff.models import anatomy, load
from staff.models import files as model_files
from staff.models.finetune import train_lora
from staff.scoring import scopes
from staff.scoring.gradnorm import mean_by_sample, response_scores
from staff.scoring.scorer import Scorer

HERE = Path(__file__).parent
SETTINGS = expand(yaml.safe_load((HERE / "default.yaml").read_text(encoding="utf-8")))
COLUMNS = ("seed", "task", "pruning_rate", "way", "m", "tokens", "loss", "seconds", "losses")
CPU = torch.device("cpu")


def fresh(name: str) -> torch.nn.Module:
    source = model_files.resolve(SETTINGS[name])
    return load.load_model(source, load.pick_dtype("auto", CPU), CPU, False)


@cache
def short_rows(task: str, part: str) -> Pool:
    tokenizer = load.load_tokenizer(model_files.resolve(SETTINGS["target"]), False)
    examples = rows.read([f"{os.environ['STAFF_DATA']}/{task}/{part}.jsonl"]).examples()
    pool = tokenise(examples, tokenizer, 1024)
    return pool.take(np.flatnonzero(pool.lengths <= SETTINGS["longest"]))


def pool_of(task: str, seed: int) -> Pool:
    every = short_rows(task, "train")
    size = min(SETTINGS["pool"], len(every) * 9 // 10)
    return every.take(np.sort(np.random.default_rng([seed, 7]).choice(len(every), size, replace=False)))


class Target:
    """Efforts on the target by position, each worked out once."""

    def __init__(self, pool: Pool, scope: str):
        self.pool, self.known = pool, np.full(len(pool), np.nan)
        self.scope, self.scorer = scope, None

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        new = positions[np.isnan(self.known[positions])]
        if len(new):
            self.scorer = self.scorer or Scorer(fresh("target"), self.scope)
            self.known[new] = self.scorer.scores(self.pool, new)["effort"]
        return self.known[positions]


def look(pool: Pool, seed: int) -> Seen:
    """All that a way may look at, from two passes of the draft; the target is asked as it goes."""
    scorer, every = Scorer(fresh("draft"), "last-block"), np.arange(len(pool))
    found = scorer.scores(pool, every, features=True)
    alone = Scorer(fresh("draft"), "last-value").scores(pool.responses_alone(), every)["loss"]
    features = found["features"]
    return Seen(
        found["effort"].astype(np.float64),
        found["loss"].astype(np.float64) / alone,
        pool.response_tokens(),
        features,
        graph.unit_clusters(features, seed=seed),
        graph.neighbours(features, seed=seed),
        Target(pool, "last-block"),
    )


def preset(pool: Pool, seed: int):
    """The paper's coreset, its draft tuned: (budget, rng) -> what a way gives."""
    every = np.arange(len(pool))
    with tempfile.TemporaryDirectory() as folder:
        draft = train_lora(fresh("draft"), pool, every, Path(folder), epochs=3, seed=seed)
    scores, target = Scorer(draft, "last-value").scores(pool, every)["effort"], Target(pool, "last-value")
    options = {"scores": scores, "verify": target, "num_regions": 50, "verification_budget": 10}
    choose = METHODS["staff"].select
    return lambda budget, rng: (choose(len(pool), budget=budget, rng=rng, **options).indices, None)


def tuned(pool: Pool, positions: np.ndarray, weights: np.ndarray | None, seed: int) -> torch.nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        return train_lora(
            fresh("target"),
            pool,
            positions,
            Path(folder),
            epochs=1,
            max_steps=SETTINGS["steps"],
            batch_size=SETTINGS["batch_size"],
            learning_rate=SETTINGS["learning_rate"],
            lora_rank=SETTINGS["lora_rank"],
            seed=seed,
            weights=weights,
        )


@torch.inference_mode()
def losses(model: torch.nn.Module, pool: Pool) -> np.ndarray:
    """(n,) mean cross-entropy of each response's tokens."""
    head, found = scopes.head_of(model), np.zeros(len(pool))
    for places in batches(pool.lengths, 2048):
        batch = collate(pool, places)
        hidden = anatomy.final_states(model, input_ids=batch.input_ids, use_cache=False)
        each = response_scores(hidden[batch.sample_of, batch.before], head, batch.labels).loss
        found[places] = mean_by_sample(each, batch.sample_of, batch.counts).numpy()
    return found


def cells() -> list[tuple[int, str, float, str]]:
    """In the order in which they are done: a seed for every task before the next seed; the second screening
    comes once the first tier has three seeds."""
    tasks, rates, paper = SETTINGS["tasks"], SETTINGS["pruning_rates"], ["preset paper"]
    first, second, seeds = SETTINGS["first"], SETTINGS["second"], SETTINGS["seeds"]
    parts = [(seeds[0], rates, first), (seeds[0], rates[:1], second)]
    parts += [(seed, rates, first) for seed in seeds[1:3]] + [(seeds[1], rates[:1], second)]
    parts += [(seed, rates, paper) for seed in SETTINGS["paper"]]
    parts += [(seed, rates, first) for seed in seeds[3:]]
    return [
        (seed, task, rate, way) for seed, at, ways in parts for task in tasks for rate in at for way in ways
    ]


def main() -> None:
    torch.set_num_threads(1)
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results.csv"
    if not path.exists():
        path.write_text(",".join(COLUMNS) + "\n")
    with open(path, newline="") as file:
        done = {(int(r["seed"]), r["task"], float(r["pruning_rate"]), r["way"]) for r in csv.DictReader(file)}
    at: tuple = ()
    for cell in cells():
        seed, task, rate, way = cell
        if cell in done:
            continue
        began = time.process_time()
        if at != (seed, task):
            at, pool = (seed, task), pool_of(task, seed)
            test = short_rows(task, "test").take(np.arange(SETTINGS["test"]))
            seen, by_preset = look(pool, seed), None
        budget = round((1 - rate) * len(pool))
        rng = np.random.default_rng([seed, way == "random again"])
        if way == "preset paper":
            by_preset = by_preset or preset(pool, seed)
            positions, weights = by_preset(budget, rng)
        else:
            positions, weights = WAYS[way](seen, budget, rng)
        assert len(positions) == budget == len(np.unique(positions)), (way, len(positions))
        found = losses(tuned(pool, positions, weights, seed), test)
        line = [*cell, budget, pool.lengths[positions].sum(), f"{found.mean():.4f}"]
        line += [f"{time.process_time() - began:.1f}"]
        with open(path, "a", newline="") as file:
            each = " ".join(f"{loss:.3f}" for loss in found)
            csv.writer(file, lineterminator="\n").writerow([*line, each])
        print(*line, flush=True)


if __name__ == "__main__":
    main()
