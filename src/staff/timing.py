"""How fast models score and train on this machine: a few dozen samples, timed."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from staff import plan
from staff.config import PlanConfig
from staff.data import rows as formats
from staff.data.tokens import Pool, tokenise
from staff.models import adapters
from staff.models import load as models
from staff.models.finetune import finetune, sample_order
from staff.scoring.scorer import Scorer

SAMPLES = 48  # scored, after as many that warm up
STEPS = 6  # of training, the first of which warms up


def measure(model: Any, pool: Pool, config: PlanConfig) -> plan.Speed:
    """Seconds a token of scoring and of LoRA training, on samples drawn at random; the model is changed."""
    rng = np.random.default_rng(config.seed)
    positions = rng.permutation(len(pool))[: 2 * SAMPLES]
    positions = np.resize(positions, 2 * SAMPLES)
    with_adapter: Any = (
        adapters.add_lora(model, config.training.lora_rank, config.training.lora_rank, config.seed)
        if config.scoring.scope == "lora"
        else None
    )
    scorer = Scorer(with_adapter or model, config.scoring.scope)
    scorer.scores(pool, positions[:SAMPLES], config.scoring.batch_tokens)
    began = time.perf_counter()
    scorer.scores(pool, positions[SAMPLES:], config.scoring.batch_tokens)
    scoring = (time.perf_counter() - began) / pool.lengths[positions[SAMPLES:]].sum()
    if with_adapter:
        model = with_adapter.unload()  # training puts on one of its own
    steps: list[float] = []
    chosen = np.resize(positions, STEPS * config.training.batch_size)
    with tempfile.TemporaryDirectory(prefix="staff-") as folder:
        finetune(
            model, pool, chosen, Path(folder), epochs=1, batch_size=config.training.batch_size, lora_rank=config.training.lora_rank, seed=config.seed,
            on_progress=lambda done, total: steps.append(time.perf_counter()),
        )  # fmt: skip
    order = sample_order(len(chosen), config.seed, 0)
    timed = pool.lengths[
        chosen[order[config.training.batch_size :]]
    ].sum()  # without the first step, which warms up
    return plan.Speed(float(scoring), float((steps[-1] - steps[0]) / timed))


def make_plan(config: PlanConfig) -> dict[str, Any]:
    """Time the models on samples of a pool and predict what every method would take.

    Returns:
        n, tokens, speeds (seconds a token), full_seconds, methods (`plan.table`), advice (a sentence for each pruning rate).

    Raises:
        ValueError: something that the user can mend.
    """
    from staff.models import drafts as draft

    if not config.data or not config.target:
        raise ValueError("name the pool with --data FILE and the model that the coreset is for with --target")
    rows = formats.read(list(config.data), **config.reading.keywords())
    device = models.pick_device(config.engine.device)
    dtype = models.pick_dtype(config.engine.dtype, device)
    keep = models.self_blocks(config.draft)
    names = {"target": config.target} | (
        {"draft": config.target if keep else config.draft} if config.draft else {}
    )
    sources = {label: models.resolve(str(name), f"--{label}") for label, name in names.items()}
    speeds, pools = {}, {}
    for label, source in sources.items():
        pools[label] = tokenise(
            rows.examples(),
            models.load_tokenizer(source, config.engine.trust_remote_code),
            config.reading.max_length,
            None,
            config.reading,
            rows.numbers,
        )
        model = models.load_model(
            source, dtype, device, config.engine.trust_remote_code, config.engine.load_in
        )
        speeds[label] = measure(
            draft.cut(model, keep) if label == "draft" and keep else model, pools[label], config
        )
    if "draft" in speeds:  # a tokenizer of its own may make more or fewer tokens of the same text
        scale = pools["draft"].lengths.sum() / pools["target"].lengths.sum()
        speeds["draft"] = plan.Speed(speeds["draft"].scoring * scale, speeds["draft"].training * scale)
    tokens = int(pools["target"].lengths.sum())
    job = plan.Job(
        tokens=tokens,
        response_share=float(pools["target"].response_tokens().sum() / tokens),
        draft_epochs=config.draft_epochs,
        draft_share=config.draft_share,
        target_epochs=config.epochs,
        epochs=config.epochs,
        verified_share=min(1.0, config.num_regions * config.verification_budget / len(rows)),
    )
    return {
        "n": len(rows),
        "tokens": tokens,
        "speeds": {label: vars(speed) for label, speed in speeds.items()},
        "full_seconds": config.epochs * tokens * speeds["target"].training,
        "methods": plan.table(job, speeds, config.pruning_rate),
        "advice": [plan.advice(job, speeds, rate) for rate in config.pruning_rate],
    }


def describe(made: dict[str, Any]) -> str:
    """A plan as a person reads it."""
    rates = list(made["methods"][0]["total_seconds"])
    lines = [
        "",
        f"pool       {made['n']} samples, {made['tokens']:,} tokens; predicted seconds on this machine, loading aside",
        "",
    ]
    lines.append(
        f"{'method':20}{'choosing':>10}"
        + "".join(f"{f'{float(rate):.0%} pruned':>13}" for rate in rates)
        + f"{'pays from':>11}"
    )
    for row in made["methods"]:
        pays = "never" if row["break_even"] is None else f"{row['break_even']:.0%}"
        totals = "".join(f"{seconds:13.1f}" for seconds in row["total_seconds"].values())
        lines.append(f"{row['method']:20}{row['selection_seconds']:10.1f}{totals}{pays:>11}")
    lines.append(f"{'all data':20}{0:10.1f}" + f"{made['full_seconds']:13.1f}" * len(rates))
    lines += [
        "",
        "with the training on what is kept; verification at its most, num_regions x verification_budget samples",
        "",
    ]
    lines.append(f"{'method':20}seconds of each stage")
    for row in made["methods"]:
        found = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in row["stages"].items())
        lines.append(f"{row['method']:20}{found or 'none'}")
    return "\n".join([*lines, "", *made["advice"]])
