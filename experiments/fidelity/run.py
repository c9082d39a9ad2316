"""How little fine-tuning does a draft need? python experiments/fidelity/run.py [results.csv [TASK ...]]

Drafts fine-tuned for T epochs on a share f of the pool, against the raw and the fine-tuned target: rank
correlation of efforts (also with response length taken out), agreement of regions, overlap of coresets. A row
a draft, seed, T, f and scope is added to the file as it comes, and what is there is not done again; with
tasks named, only those. Needs ${STAFF_DATA}, ${STAFF_MODELS} (DATA.md) and `python experiments/prepare.py`.
"""

import csv
import os
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.metrics import adjusted_rand_score

from staff import planning as plan
from staff.data import rows as formats
from staff.data.tokens import tokenise
from staff.methods import METHODS
from staff.methods.strata import set_hardest_aside, split
from staff.models import drafts as draft
from staff.models import load as models
from staff.models.finetune import train_lora
from staff.scoring import scopes
from staff.scoring.scorer import Scorer

TASKS = {"medquad": "examples/medquad/train.jsonl", "wiki": "runs/data/wiki-train.jsonl"}
ROWS = 600
DRAFTS = {"nano": None, "self:2": 2}  # blocks of the target's own
TARGET_EPOCHS = 3
LEARNING_RATE = 1e-4  # the tool's default
SETTINGS = [(0, 1.0, LEARNING_RATE)]
SETTINGS += [(epochs, share, LEARNING_RATE) for share in (1.0, 0.25, 0.1, 0.5) for epochs in (1, 3)]
SETTINGS += [(3, 1.0, 1e-3)]
LATER = [(2, share, LEARNING_RATE) for share in (1.0, 0.25, 0.1, 0.5)]
SCOPES = ("last-value", "last-block")
SEEDS = (1, 2, 3)
PRUNING_RATE = 0.8
REGIONS, VERIFIED = 25, 4
COLUMNS = (
    "task", "draft", "seed", "epochs", "share", "learning_rate", "scope",
    "spearman_raw", "partial_raw", "regions_raw", "overlap_raw",
    "spearman_tuned", "partial_tuned", "regions_tuned", "overlap_tuned",
    "length", "passes", "tune_seconds", "score_seconds", "loss",
)  # fmt: skip


def load(name: str):
    source = models.resolve(os.environ["STAFF_MODELS"] + "/" + name)
    dtype = models.pick_dtype("auto", torch.device("cpu"))
    return models.load_model(source, dtype, torch.device("cpu"), False), models.load_tokenizer(source, False)


def efforts(model, pool) -> tuple[dict[str, np.ndarray], float, float]:
    """Efforts of both scopes from one pass, its seconds, and the mean loss."""
    scorer = Scorer(model, "last-block", balance=True)
    value = [site.name for site in scorer.sites].index(scopes.value_projection(model).name)
    began = time.perf_counter()
    found = scorer.scores(pool, np.arange(len(pool)))
    return (
        {"last-value": found["site_norms"][:, value], "last-block": found["effort"]},
        time.perf_counter() - began,
        found["loss"].mean(),
    )


def partial_correlation(x, y, given) -> float:
    """Spearman's correlation of x and y with the ranks of a third taken out."""
    ranks = np.stack([rankdata(part) for part in (x, y, given)])
    (_, xy, xz), (_, _, yz), _ = np.corrcoef(ranks)
    return (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))


def choose(speculative, target, seed: int):
    """STAFF's coreset, verified on a target; with the target's own scores speculative, that of `direct`."""
    budget = round((1 - PRUNING_RATE) * len(target))
    options = {"num_regions": REGIONS, "verification_budget": VERIFIED}
    rng, n = np.random.default_rng(seed), len(target)
    if speculative is target:
        return METHODS["direct"].select(n, budget=budget, rng=rng, scores=target, num_regions=REGIONS)
    verify = target.__getitem__
    return METHODS["staff"].select(n, budget=budget, rng=rng, scores=speculative, verify=verify, **options)


def against(speculative, target, length, seed: int) -> dict[str, float]:
    chosen = choose(speculative, target, seed)
    overlap = len(np.intersect1d(chosen.indices, choose(target, target, seed).indices)) / len(chosen.indices)
    return {
        "spearman": np.corrcoef(rankdata(speculative), rankdata(target))[0, 1],
        "partial": partial_correlation(speculative, target, length),
        "regions": adjusted_rand_score(regions(speculative), regions(target)),
        "overlap": overlap,
        "verified": len(chosen.verified) / len(target),
    }


def regions(scores) -> np.ndarray:
    """(n,) the region of each sample; those set aside as hardest are one of their own."""
    kept, _ = set_hardest_aside(np.asarray(scores, np.float64), 0.1)
    found = np.full(len(scores), -1)
    found[kept] = split(scores[kept], REGIONS)[1]
    return found


def tuned(model, pool, positions, epochs, seed, rate):
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        model = train_lora(model, pool, positions, Path(folder), epochs=epochs, seed=seed, learning_rate=rate)
        return model, time.perf_counter() - began


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "experiments/fidelity/results.csv")
    done = set()
    if path.exists():
        with open(path, newline="") as file:
            done = {tuple(row[name] for name in COLUMNS[:6]) for row in csv.DictReader(file)}
    else:
        path.write_text(",".join(COLUMNS) + "\n")
    tasks = {name: TASKS[name] for name in sys.argv[2:] or TASKS}
    targets: dict = {}
    first, *others = SEEDS
    parts = [(SETTINGS, first, [*DRAFTS])]
    parts += [
        (settings, seed, [name])
        for name in DRAFTS
        for settings in (SETTINGS, LATER)
        for seed in (others if settings is SETTINGS else SEEDS)
    ]
    for settings, seed, names in parts:
        for task, file in tasks.items():
            examples = list(islice(formats.read([file]).examples(), ROWS))
            for name, keep in ((name, DRAFTS[name]) for name in names):
                for epochs, share, rate in settings:
                    key = tuple(map(str, (task, name, seed, epochs, share, rate)))
                    if key in done:
                        continue
                    if (task, "raw") not in targets:
                        model, tokenizer = load("base")
                        size, pool = models.measure(model), tokenise(examples, tokenizer, 512)
                        targets[task, "raw"], seconds, _ = efforts(model, pool)
                        one_pass = size.scoring_flops(
                            int(pool.lengths.sum()), int(pool.response_tokens().sum())
                        )
                        targets[task, "pool"], targets[task, "pass"] = pool, one_pass
                        print(task, "raw target scored in", round(seconds, 1), flush=True)
                    pool = targets[task, "pool"]  # the family shares a tokenizer
                    if (task, seed) not in targets:
                        model, seconds = tuned(
                            load("base")[0], pool, np.arange(len(pool)), TARGET_EPOCHS, seed, LEARNING_RATE
                        )
                        targets[task, seed], _, loss = efforts(model, pool)
                        print(task, seed, "target tuned in", round(seconds, 1), "loss", loss, flush=True)
                    model = draft.cut(load("base")[0], keep, "first") if keep else load(name)[0]
                    r = (
                        models.measure(model).scoring_flops(
                            int(pool.lengths.sum()), int(pool.response_tokens().sum())
                        )
                        / targets[task, "pass"]
                    )
                    tune_seconds = 0.0
                    if epochs:
                        drawn = np.random.default_rng([seed, 1]).choice(
                            len(pool), round(share * len(pool)), replace=False
                        )
                        model, tune_seconds = tuned(model, pool, np.sort(drawn), epochs, seed, rate)
                    found, score_seconds, loss = efforts(model, pool)
                    length = pool.response_tokens()
                    with open(path, "a", newline="") as out:
                        for scope in SCOPES:
                            raw = against(found[scope], targets[task, "raw"][scope], length, seed)
                            after = against(found[scope], targets[task, seed][scope], length, seed)
                            alone = np.corrcoef(rankdata(length), rankdata(targets[task, "raw"][scope]))[0, 1]
                            passes = plan.staff_passes(epochs, share, r, raw["verified"])
                            line = [*key, scope]
                            for one in (raw, after):
                                line += [
                                    f"{one[part]:.4f}"
                                    for part in ("spearman", "partial", "regions", "overlap")
                                ]
                            line += [
                                f"{value:.4f}" for value in (alone, passes, tune_seconds, score_seconds, loss)
                            ]
                            csv.writer(out, lineterminator="\n").writerow(line)
                    print(key, f"{tune_seconds:.1f} s + {score_seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
