"""Does it matter which samples share a step? python experiments/order/run.py [results.csv]

Fine-tunes `base` for one epoch of 600 rows in steps of 8, the samples of a step drawn at random or of like
length (sorted among 400, steps in random order; also with each step's loss weighted by its tokens, so that
every token counts the same), and takes the mean loss on 100 test rows, over tokens and over samples. Needs
${STAFF_MODELS} (DATA.md) and `python experiments/prepare.py`.
"""

import csv
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from staff.data import rows as formats
from staff.data.tokens import tokenise
from staff.models import finetune as training
from staff.models import load as models
from staff.scoring.scorer import Scorer

TASKS = ("medquad", "wiki")
ORDERS = ("random", "like length", "like length, by tokens")
RATES = (1e-3, 1e-4)
SEEDS = (1, 2, 3)
BATCH, TOGETHER = 8, 400
COLUMNS = ("task", "rate", "seed", "order", "token_loss", "sample_loss")


def of_like_length(lengths: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    stretches = np.split(order, range(TOGETHER, len(order), TOGETHER))
    order = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in stretches])
    whole = len(order) // BATCH * BATCH
    steps = order[:whole].reshape(-1, BATCH)
    return np.concatenate([steps[rng.permutation(len(steps))].ravel(), order[whole:]])


def tuned(order: str, model, pool, rate: float, seed: int):
    in_random_order, plain_loss = training.sample_order, training._ResponseTrainer.compute_loss
    tokens_a_step = pool.response_tokens().mean() * BATCH

    def by_tokens(self, model, inputs, *others, **more):
        return plain_loss(self, model, inputs, *others, **more) * (
            len(inputs["response_ids"]) / tokens_a_step
        )

    if order != "random":
        training.sample_order = lambda samples, seed, epoch: of_like_length(pool.lengths, seed, epoch)
    if order == "like length, by tokens":
        training._ResponseTrainer.compute_loss = by_tokens
    try:
        with tempfile.TemporaryDirectory() as folder:
            positions = np.arange(len(pool))
            return training.train_lora(
                model,
                pool,
                positions,
                Path(folder),
                epochs=1,
                batch_size=BATCH,
                learning_rate=rate,
                seed=seed,
            )
    finally:
        training.sample_order, training._ResponseTrainer.compute_loss = in_random_order, plain_loss


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "experiments/order/results.csv")
    if not path.exists():
        path.write_text(",".join(COLUMNS) + "\n")
    with open(path, newline="") as file:
        done = {
            (row["task"], float(row["rate"]), int(row["seed"]), row["order"]) for row in csv.DictReader(file)
        }
    source = models.resolve(os.environ["STAFF_MODELS"] + "/base")
    dtype = models.pick_dtype("auto", torch.device("cpu"))
    tokenizer = models.load_tokenizer(source, False)
    for seed in SEEDS:
        for task in TASKS:
            pool, held_out = (
                tokenise(formats.read([f"runs/data/{task}-{part}.jsonl"]).examples(), tokenizer, 512)
                for part in ("600", "test-100")
            )
            tokens = held_out.response_tokens()
            for rate in RATES:
                for order in ORDERS:
                    if (task, rate, seed, order) in done:
                        continue
                    model = tuned(
                        order, models.load_model(source, dtype, torch.device("cpu"), False), pool, rate, seed
                    )
                    loss = Scorer(model, "last-value").scores(held_out, np.arange(len(held_out)))["loss"]
                    found = (f"{(loss * tokens).sum() / tokens.sum():.4f}", f"{loss.mean():.4f}")
                    print(task, rate, seed, order, *found, flush=True)
                    with open(path, "a", newline="") as file:
                        csv.writer(file, lineterminator="\n").writerow([task, rate, seed, order, *found])


if __name__ == "__main__":
    main()
