"""What a selection costs and whether it pays: the sum in passes of the target (U), the clock, the advice."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from staff.config import PlanConfig, SelectConfig, check_named
from staff.methods import METHODS, Method
from staff.methods.verification import default_regions, default_verified
from staff.types import Stage

if TYPE_CHECKING:
    from staff.data.tokens import Pool

SNAPSHOTS = 4  # of a draft's tuning, that loss trajectories are taken over
NUM_TIMED = 48  # samples scored, after as many that warm up
STEPS_TIMED = 6  # of training, the first of which warms up


def staff_passes(epochs: float, share: float, relative_cost: float, verified_share: float) -> float:
    """STAFF's cost in U: (2 T f + 1) r + v.

    A LoRA epoch is about two scoring passes (forward, and gradients of inputs; frozen weights need no third).

    Args:
        epochs: T, epochs of fine-tuning the draft.
        share: f, share of the pool it is fine-tuned on.
        relative_cost: r, cost of a token in the draft over that in the target.
        verified_share: v, share of the pool that the target scores.
    """
    return (2 * epochs * share + 1) * relative_cost + verified_share


def finetuning_passes(epochs: float) -> float:
    """Fine-tuning the target on the whole pool with LoRA, in U."""
    return 2 * epochs


def break_even(epochs: float, share: float, verified_share: float) -> float:
    """The r below which a draft costs less than scoring the target directly (1 U)."""
    return max(0.0, 1 - verified_share) / (2 * epochs * share + 1)


def most_verified(
    n: int, num_regions: int | None, verification_budget: int | None, hard_cutoff: float
) -> int:
    """How many samples the target scores at most: a region is verified where it holds more than its draw
    takes. K and b_v left out follow the pool, as in the run."""
    num_regions = num_regions or default_regions(n)
    verification_budget = verification_budget or default_verified(n, num_regions)
    uncut = n - int(hard_cutoff * n + 1e-9)
    return verification_budget * min(num_regions, uncut // (verification_budget + 1))


def verdict(passes: float, epochs: float, share: float, relative_cost: float, verified_share: float) -> str:
    """One sentence on whether the draft was the cheaper way."""
    if passes <= 1:
        spent = f"{passes:.2f} passes of the target in place of the 1 of --method direct"
        return f"the draft was the cheaper way: {spent}"
    limit = break_even(epochs, share, verified_share)
    cure = f"a draft of less than {limit:.2f} of the target's cost" if limit > 0 else "fewer verified samples"
    return (
        f"the draft was not the cheaper way: {passes:.2f} passes of the target where --method direct takes "
        f"1. It would be with {cure}, with fewer --draft-epochs or a smaller --draft-share"
    )


@dataclass(frozen=True)
class Speed:
    """What a model took on this machine, in seconds a token."""

    scoring: float
    training: float


@dataclass(frozen=True)
class Job:
    """What is to be done, in tokens as the target counts them.

    Attributes:
        tokens: of the pool.
        response_share: tokens of the responses among them.
        draft_epochs, draft_share: T and f.
        target_epochs: of the fine-tuned target that baselines score.
        epochs: of fine-tuning the target on what is kept.
        verified_share: v, of the pool, at its most.
    """

    tokens: int
    response_share: float
    draft_epochs: float
    draft_share: float
    target_epochs: float
    epochs: float
    verified_share: float


def stages(method: Method, job: Job, speeds: Mapping[str, Speed]) -> dict[str, float] | None:
    """Predicted seconds of each stage of a method's selection.

    Reading, tokenising and loading models are left out: small, and much the same for all.

    Args:
        speeds: "target", and "draft" where there is one.

    Returns:
        None where it needs a draft and there is none, or none that is tuned.
    """
    seconds: dict[str, float] = {}
    for need in method.needs.values():
        if need.model == "pool":
            continue
        if need.base not in speeds or (need.checkpoints and not job.draft_epochs):
            return None
        scoring = job.tokens * speeds[need.base].scoring
        training = job.tokens * speeds[need.base].training
        if need.model == "draft" and job.draft_epochs:
            seconds[str(Stage("tune", "draft"))] = job.draft_epochs * job.draft_share * training
        if need.model == "tuned_target":
            seconds[str(Stage("tune", "target"))] = job.target_epochs * training
        without_prompts = need.quantity == "unconditional_loss"
        part = "without prompts" * without_prompts or "at checkpoints" * need.checkpoints
        share = job.response_share if without_prompts else SNAPSHOTS if need.checkpoints else 1
        seconds[str(Stage("score", need.model, part))] = share * scoring
    if method.verify:
        verified = job.verified_share * job.tokens * speeds[method.verify.base].scoring
        seconds[str(Stage("verify", method.verify.model))] = verified
    return seconds


def table(job: Job, speeds: Mapping[str, Speed], pruning_rates: tuple[float, ...]) -> list[dict[str, Any]]:
    """A row a method: what its selection takes, and from which pruning rate on it beats training on all.

    Returns:
        rows of method, stages, selection_seconds, total_seconds {rate: seconds}, break_even (None: it never
        does).
    """
    full, rows = job.epochs * job.tokens * speeds["target"].training, []
    for name, method in METHODS.items():
        parts = stages(method, job, speeds)
        if parts is not None:
            selection = sum(parts.values())
            totals = {rate: selection + (1 - rate) * full for rate in pruning_rates}
            row = {"method": name, "stages": parts, "selection_seconds": selection, "total_seconds": totals}
            rows.append({**row, "break_even": selection / full if selection < full else None})
    return rows


def advice(job: Job, speeds: Mapping[str, Speed], pruning_rate: float) -> str:
    """What to do at a pruning rate, in words: this draft, the target itself, random, or all data.

    Of cost alone: which coreset is the better one is for `staff compare` to say.
    """
    full, seconds = job.epochs * job.tokens * speeds["target"].training, {}
    for name in ("staff", "direct"):
        parts = stages(METHODS[name], job, speeds)
        if parts is not None:
            seconds[name] = sum(parts.values())
    best = min(seconds, key=seconds.__getitem__)
    at, total = f"at {pruning_rate:.0%} pruned", seconds[best] + (1 - pruning_rate) * full
    if total >= full:
        spared = f"more than the {pruning_rate * full:.0f} s of training it spares"
        return (
            f"{at}: train on all, {full:.0f} s, or take --method random: choosing takes "
            f"{seconds[best]:.0f} s at the cheapest (--method {best}), {spared}"
        )
    what = {"staff": "use this draft", "direct": "score the target directly"}[best]
    beside = "".join(f", {took:.0f} s with --method {name}" for name, took in seconds.items() if name != best)
    return (
        f"{at}: {what} (--method {best}): choosing takes {seconds[best]:.0f} s{beside}, and with training "
        f"{total:.0f} s where training on all takes {full:.0f} s"
    )


def make_plan(config: PlanConfig) -> dict[str, Any]:
    """Time the models on samples of a pool and predict what every method would take.

    Returns:
        n, tokens, most_verified, speeds (seconds a token), full_seconds, methods (`table`), advice (a
        sentence for each pruning rate).

    Raises:
        ValueError: something that the user can mend.
    """
    from staff.data import rows as formats
    from staff.data.tokens import in_common, tokenise
    from staff.models import drafts, families
    from staff.models import load as models

    check_named(config)
    rows = formats.read(list(config.data), **config.reading.keywords())
    engine, of = config.engine, config.reading
    device = models.pick_device(engine.device)
    dtype = models.pick_dtype(engine.dtype, device)
    blocks = families.self_blocks(config.draft)
    names = {"target": config.target}
    if config.draft:
        names["draft"] = config.target if blocks else config.draft
    sources = {label: models.resolve(name, f"--{label}") for label, name in names.items()}
    speeds: dict[str, Speed] = {}
    pools: dict[str, Pool] = {}
    for label, source in sources.items():
        tokenizer = models.load_tokenizer(source, engine.trust_remote_code)
        pools[label] = tokenise(rows.examples(), tokenizer, of.max_length, None, of, rows.where)
    rows, pools = in_common(rows, pools)
    for label, source in sources.items():
        models.check_room(source, pools[label], rows.numbers, engine.trust_remote_code)
        model = models.load_model(source, dtype, device, engine.trust_remote_code, engine.load_in)
        model = drafts.cut(model, blocks) if label == "draft" and blocks else model
        speeds[label] = time_model(model, pools[label], config)
    tokens = int(pools["target"].lengths.sum())
    if "draft" in speeds:  # a tokenizer of its own may make more or fewer tokens of the same text
        scale = float(pools["draft"].lengths.sum() / tokens)
        speeds["draft"] = Speed(speeds["draft"].scoring * scale, speeds["draft"].training * scale)
    verified = most_verified(
        len(rows), config.num_regions, config.verification_budget, SelectConfig.hard_cutoff
    )
    job = Job(
        tokens=tokens,
        response_share=float(pools["target"].response_tokens().sum() / tokens),
        draft_epochs=config.draft_epochs,
        draft_share=config.draft_share,
        target_epochs=config.epochs,
        epochs=config.epochs,
        verified_share=verified / len(rows),
    )
    return {
        "n": len(rows),
        "tokens": tokens,
        "most_verified": verified,
        "speeds": {label: asdict(speed) for label, speed in speeds.items()},
        "full_seconds": config.epochs * tokens * speeds["target"].training,
        "methods": table(job, speeds, config.pruning_rate),
        "advice": [advice(job, speeds, rate) for rate in config.pruning_rate],
    }


def time_model(model: Any, pool: Pool, config: PlanConfig) -> Speed:
    """Seconds a token of scoring and of LoRA training, on samples drawn at random; the model is changed."""
    from staff.models import adapters
    from staff.models.finetune import sample_order, train_lora
    from staff.scoring.scorer import Scorer

    scoring, training = config.scoring, config.training
    drawn = np.random.default_rng(config.seed).permutation(len(pool))[: 2 * NUM_TIMED]
    drawn = np.resize(drawn, 2 * NUM_TIMED)
    adapted: Any = None
    if scoring.scope == "lora":
        rank, targets = training.lora_rank, training.lora_targets
        adapted = adapters.add_lora(model, rank, rank, config.seed, targets)
    scorer = Scorer(adapted or model, scoring.scope)
    scorer.scores(pool, drawn[:NUM_TIMED], scoring.batch_tokens)
    began = time.perf_counter()
    scorer.scores(pool, drawn[NUM_TIMED:], scoring.batch_tokens)
    a_token = (time.perf_counter() - began) / pool.lengths[drawn[NUM_TIMED:]].sum()
    if adapted:
        model = adapted.unload()  # training puts on one of its own
    steps: list[float] = []
    trained = np.resize(drawn, STEPS_TIMED * training.batch_size)
    names = ("batch_size", "lora_rank", "lora_targets")
    settings = {"epochs": 1, **{name: getattr(training, name) for name in names}}
    with tempfile.TemporaryDirectory(prefix="staff-") as folder:
        train_lora(
            model,
            pool,
            trained,
            Path(folder),
            seed=config.seed,
            on_progress=lambda done, total: steps.append(time.perf_counter()),
            **settings,
        )
    # without the first step, which warms up
    order = sample_order(len(trained), config.seed, 0)[training.batch_size :]
    return Speed(float(a_token), float((steps[-1] - steps[0]) / pool.lengths[trained[order]].sum()))


def describe_plan(plan: Mapping[str, Any]) -> str:
    """A plan as a person reads it."""
    rates = list(plan["methods"][0]["total_seconds"])
    where = "predicted seconds on this machine, loading aside"
    header = "".join(f"{f'{float(rate):.0%} pruned':>13}" for rate in rates)
    lines = ["", f"pool       {plan['n']} samples, {plan['tokens']:,} tokens; {where}", ""]
    lines.append(f"{'method':20}{'choosing':>10}{header}{'pays from':>11}")
    for row in plan["methods"]:
        pays = "never" if row["break_even"] is None else f"{row['break_even']:.0%}"
        totals = "".join(f"{seconds:13.1f}" for seconds in row["total_seconds"].values())
        lines.append(f"{row['method']:20}{row['selection_seconds']:10.1f}{totals}{pays:>11}")
    lines += [
        f"{'all data':20}{0:10.1f}" + f"{plan['full_seconds']:13.1f}" * len(rates),
        "",
        f"with the training on what is kept; verification at its most, {plan['most_verified']} of "
        f"{plan['n']} samples: how many regions hold enough to be verified shows once the draft has scored",
        "",
        f"{'method':20}seconds of each stage",
    ]
    for row in plan["methods"]:
        parts = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in row["stages"].items())
        lines.append(f"{row['method']:20}{parts or 'none'}")
    return "\n".join([*lines, "", *plan["advice"]])
