"""Which default does not lose to chance? python experiments/default/run.py [SETTINGS.yaml]

default.yaml says what is compared and how it is judged, smollm2.yaml the same with a real language model.
A row a cell is added to the results as it comes, and what is there is not done again. default.yaml needs
${STAFF_DATA} and ${STAFF_MODELS} (DATA.md), smollm2.yaml what `make demo` needs.
"""

import csv
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
from staff.models import adapters, anatomy, drafts, families, load
from staff.models import files as model_files
from staff.models.finetune import train_lora
from staff.scoring import scopes
from staff.scoring.gradnorm import mean_by_sample, response_scores
from staff.scoring.scorer import Scorer

HERE = Path(__file__).parent
SETTINGS = expand(yaml.safe_load(Path(*sys.argv[1:2] or [HERE / "default.yaml"]).read_text(encoding="utf-8")))
COLUMNS = ("seed", "task", "pruning_rate", "way", "m", "tokens", "wrong", "loss", "seconds", "losses")
CPU = torch.device("cpu")


@cache
def files_of(name: str) -> model_files.Source:
    source = model_files.resolve(name)
    if source.gguf:
        source = load.unpack_gguf(source, Path("runs/default-unpacked"), load.pick_dtype("auto", CPU))
    return source


def fresh(name: str) -> torch.nn.Module:
    """The target, or the draft; a draft of self:N is N of the target's own blocks."""
    blocks = families.self_blocks(SETTINGS[name])
    source = files_of(SETTINGS["target" if blocks else name])
    model = load.load_model(source, load.pick_dtype("auto", CPU), CPU, False)
    return drafts.cut(model, blocks) if blocks else model


@cache
def short_examples(path: str) -> tuple[list, Pool]:
    """The examples of a file that are not too long, and their tokens."""
    examples = list(rows.read([path]).examples())
    pool = tokenise(examples, load.load_tokenizer(files_of(SETTINGS["target"]), False), 1024)
    short = np.flatnonzero(pool.lengths <= SETTINGS["longest"])
    return [examples[i] for i in short], pool.take(short)


def test_of(task: str) -> Pool:
    return short_examples(SETTINGS["tasks"][task]["test"])[1].take(np.arange(SETTINGS["test"]))


@cache
def pool_of(task: str, seed: int) -> Pool:
    """Rows drawn for a seed; a share of their answers moved on to another row, where the task says so."""
    examples, every = short_examples(SETTINGS["tasks"][task]["train"])
    size, rng = min(SETTINGS["pool"], len(every) * 9 // 10), np.random.default_rng([seed, 7])
    drawn = np.sort(rng.choice(len(every), size, replace=False))
    wrong = wrong_of(task, seed, size)
    if not len(wrong):
        return every.take(drawn)
    given = [examples[i] for i in drawn]
    for place, other in zip(wrong, np.roll(wrong, 1), strict=True):
        *before, answer = given[place].turns
        theirs = examples[drawn[other]].turns[-1].content
        given[place] = given[place]._replace(turns=(*before, answer._replace(content=theirs)))
    return tokenise(given, load.load_tokenizer(files_of(SETTINGS["target"]), False), 1024)


def wrong_of(task: str, seed: int, size: int) -> np.ndarray:
    """Positions of the rows whose answers are moved."""
    count = round(SETTINGS["tasks"][task].get("wrong", 0) * size)
    return np.sort(np.random.default_rng([seed, 8]).choice(size, count, replace=False))


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


@cache
def look(task: str, seed: int) -> Seen:
    """All that a way may look at, from two passes of the draft; the target is asked as it goes."""
    pool = pool_of(task, seed)
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


@cache
def preset(task: str, seed: int):
    """The paper's coreset, its draft tuned: (budget, rng) -> what a way gives."""
    pool = pool_of(task, seed)
    every = np.arange(len(pool))
    with tempfile.TemporaryDirectory() as folder:
        draft = fresh("paper_draft" if "paper_draft" in SETTINGS else "draft")
        draft = train_lora(draft, pool, every, Path(folder), epochs=3, seed=seed)
    scores, target = Scorer(draft, "last-value").scores(pool, every)["effort"], Target(pool, "last-value")
    options = {"scores": scores, "verify": target, "num_regions": 50, "verification_budget": 10}
    choose = METHODS["staff"].select
    return lambda budget, rng: (choose(len(pool), budget=budget, rng=rng, **options).indices, None)


def tuned(pool: Pool, positions: np.ndarray, weights: np.ndarray | None, seed: int) -> torch.nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        model = train_lora(
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
        return adapters.load_adapter(fresh("target"), Path(folder)) if SETTINGS.get("reload") else model


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
    first, second, seeds = SETTINGS["first"], SETTINGS.get("second", []), SETTINGS["seeds"]
    parts = [(seeds[0], rates, first), (seeds[0], rates[:1], second)]
    parts += [(seed, rates, first) for seed in seeds[1:3]] + [(seeds[1], rates[:1], second)]
    parts += [(seed, rates, paper) for seed in SETTINGS["paper"]]
    parts += [(seed, rates, first) for seed in seeds[3:]]
    return [
        (seed, task, rate, way) for seed, at, ways in parts for task in tasks for rate in at for way in ways
    ]


def main() -> None:
    torch.set_num_threads(1)
    path = HERE / SETTINGS["results"]
    if not path.exists():
        path.write_text(",".join(COLUMNS) + "\n")
    with open(path, newline="") as file:
        done = {(int(r["seed"]), r["task"], float(r["pruning_rate"]), r["way"]) for r in csv.DictReader(file)}
    for cell in cells():
        seed, task, rate, way = cell
        if cell in done:
            continue
        began = time.process_time()
        drawn = 0 if SETTINGS.get("one_pool") else seed
        pool, rng = pool_of(task, drawn), np.random.default_rng([seed, way == "random again"])
        budget = round((1 - rate) * len(pool))
        if way == "preset paper":
            positions, weights = preset(task, drawn)(budget, rng)
        else:
            positions, weights = WAYS[way](look(task, drawn), budget, rng)
        assert len(positions) == budget == len(np.unique(positions)), (way, len(positions))
        found = losses(tuned(pool, positions, weights, seed), test_of(task))
        wrong = int(np.isin(positions, wrong_of(task, drawn, len(pool))).sum())
        line = [*cell, budget, pool.lengths[positions].sum(), wrong, f"{found.mean():.4f}"]
        line += [f"{time.process_time() - began:.1f}"]
        with open(path, "a", newline="") as file:
            each = " ".join(f"{loss:.3f}" for loss in found)
            csv.writer(file, lineterminator="\n").writerow([*line, each])
        print(*line, flush=True)


if __name__ == "__main__":
    main()
