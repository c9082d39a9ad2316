"""What a selection costs and whether it pays: the sum in passes of the target (U), the clock, the advice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from staff.config import DEFAULT_METHOD, PlanConfig, SelectConfig, check_named, flat
from staff.methods import METHODS, Method
from staff.methods.fidelity import Fidelity, fidelity
from staff.methods.groups import select_by_group
from staff.methods.strata import split
from staff.methods.verification import default_regions, default_verified
from staff.timing import SMALL_JOB, Look, Speed, look_at_models, one_pass
from staff.types import AGAINST_VALIDATION, Progress, Selection, Stage

if TYPE_CHECKING:
    from staff.data.rows import Rows

SNAPSHOTS = 4  # of a draft's tuning, that loss trajectories are taken over


def staff_passes(
    epochs: float, share: float, relative_cost: float, verified_share: float, alone: float = 0.0
) -> float:
    """A draft's and its verification's cost in U: (2 T f + 1 + u) r + v.

    A LoRA epoch is about two scoring passes (forward, and gradients of inputs; frozen weights need no third).

    Args:
        epochs: T, epochs of fine-tuning the draft.
        share: f, share of the pool it is fine-tuned on.
        relative_cost: r, cost of a token in the draft over that in the target.
        verified_share: v, share of the pool that the target scores.
        alone: u, the responses' share of the tokens, where the draft scores them without their prompts too.
    """
    return (2 * epochs * share + 1 + alone) * relative_cost + verified_share


def finetuning_passes(epochs: float) -> float:
    """Fine-tuning the target on the whole pool with LoRA, in U."""
    return 2 * epochs


def sum_in_words(terms: Mapping[str, float]) -> str:
    """The sum with its numbers, as a run and a plan print it."""
    alone, u = (" + {alone:.2f}", " + u") if terms.get("alone") else ("", "")
    numbers = "(2 x {epochs:g} x {share:g} + 1" + alone + ") x {relative_cost:.2f} + {verified_share:.2f}"
    return f"by the sum (2 T f + 1{u}) r + v = {numbers.format(**terms)} = {terms['passes']:.2f} passes"


def break_even(epochs: float, share: float, verified_share: float, alone: float = 0.0) -> float:
    """The r below which a draft costs less than scoring the target directly (1 U)."""
    return max(0.0, 1 - verified_share) / (2 * epochs * share + 1 + alone)


def most_verified(
    n: int, num_regions: int | None, verification_budget: int | None, hard_cutoff: float
) -> int:
    """How many samples the target scores at most: a region is verified where it holds more than its draw
    takes. K and b_v left out follow the pool, as in the run."""
    num_regions = num_regions or default_regions(n)
    verification_budget = verification_budget or default_verified(n, num_regions)
    uncut = n - int(hard_cutoff * n + 1e-9)
    return verification_budget * min(num_regions, uncut // (verification_budget + 1))


def verdict(
    passes: float,
    epochs: float,
    share: float,
    relative_cost: float,
    verified_share: float,
    alone: float = 0.0,
) -> str:
    """One sentence on whether the draft is the cheaper way; the same before a run and behind it."""
    if passes <= 1:
        spent = f"{passes:.2f} passes of the target in place of the 1 of --method direct"
        return f"the draft is the cheaper way: {spent}"
    limit = break_even(epochs, share, verified_share, alone)
    cure = f"a draft of less than {limit:.2f} of the target's cost" if limit > 0 else "fewer verified samples"
    return (
        f"the draft is not the cheaper way: {passes:.2f} passes of the target where --method direct takes "
        f"1. It would be with {cure}, with fewer --draft-epochs or a smaller --draft-share"
    )


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


def stages(method: Method, job: Job, speeds: Mapping[str, Speed]) -> dict[Stage, float] | None:
    """Predicted seconds of each stage of a method's selection.

    Reading and tokenising are left out: small, and much the same for all. So are a quality model, of which
    nothing is known, and validation rows. Answers are timed in small batches: a run's are larger.

    Args:
        speeds: "target", and "draft" where there is one.

    Returns:
        None where it needs a draft and there is none, or none that is tuned.
    """
    seconds: dict[Stage, float] = {}
    for need in (*method.needs.values(), *method.asks.values()):
        if need.model == "pool":
            continue
        if need.base not in speeds or (need.checkpoints and not job.draft_epochs):
            return None
        speed, response = speeds[need.base], job.tokens * job.response_share
        scoring, forward = job.tokens * speed.scoring, job.tokens * (speed.forward or speed.scoring)
        answers = response * (speed.answering or speed.scoring)
        if need.model == "draft" and job.draft_epochs:
            seconds[Stage("tune", "draft")] = job.draft_epochs * job.draft_share * job.tokens * speed.training
        if need.model == "tuned_target":
            seconds[Stage("tune", "target")] = job.target_epochs * job.tokens * speed.training
        if need.quantity == "rewards":
            share = float(str({**method.options(), **method.fixed}["seed_share"]))
            tuning = job.target_epochs * share * job.tokens * speed.training
            seconds[Stage("tune", "target", "on the seed")] = tuning
            asked = (1 - share) * (forward * (1 - job.response_share) + answers)
            seconds[Stage("converse", "target", "tuned on the seed")] = asked
        elif need.quantity == "whispers":  # prompts of some samples each, read once more up to two fifths
            told: Any = {**method.options(), **method.fixed}
            prompts = told["questions"] / told["demonstrations"]
            reading = 1.4 * (1 + told["demonstrations"]) * forward
            seconds[Stage("converse", need.model)] = prompts * (reading + answers)
        elif need.quantity in AGAINST_VALIDATION:
            took = forward if need.quantity == "rds" else scoring
            seconds[Stage(AGAINST_VALIDATION[need.quantity], need.model)] = took
        elif need.quantity == "prompt_features":
            seconds[Stage("states", need.model, "over prompts")] = forward * (1 - job.response_share)
        elif need.quantity == "unconditional_loss":
            seconds[Stage("score", need.model, "without prompts")] = job.response_share * scoring
        else:
            part = "at checkpoints" * need.checkpoints
            seconds[Stage("score", need.model, part)] = scoring * (SNAPSHOTS if need.checkpoints else 1)
    if method.verify:
        verified = job.verified_share * job.tokens * speeds[method.verify.base].scoring
        seconds[Stage("verify", method.verify.model)] = verified
    bases = {need.base for need in method.all_needs()} & speeds.keys()
    loading = sum(speeds[base].loading for base in bases)
    return {Stage("load"): loading, **seconds} if loading else seconds


def table(
    job: Job,
    speeds: Mapping[str, Speed],
    pruning_rates: tuple[float, ...],
) -> list[dict[str, Any]]:
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
            told = {str(stage): took for stage, took in parts.items()}
            row = {"method": name, "stages": told, "selection_seconds": selection, "total_seconds": totals}
            rows.append({**row, "break_even": selection / full if selection < full else None})
    return rows


def advice(job: Job, speeds: Mapping[str, Speed], pruning_rate: float) -> str:
    """What to do at a pruning rate, in words: this draft, the target itself, random, or all data.

    Of cost alone: which coreset is the better one is for `staff compare` to say.
    """
    full, seconds = job.epochs * job.tokens * speeds["target"].training, {}
    for name in (DEFAULT_METHOD, "direct"):
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
    what = {DEFAULT_METHOD: "use this draft", "direct": "score the target directly"}[best]
    beside = "".join(f", {took:.0f} s with --method {name}" for name, took in seconds.items() if name != best)
    return (
        f"{at}: {what} (--method {best}): choosing takes {seconds[best]:.0f} s{beside}, and with training "
        f"{total:.0f} s where training on all takes {full:.0f} s"
    )


def pretend(
    looks: Mapping[str, Look], n: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray] | None:
    """Efforts of a whole pool on the draft and on the target, spread as those of the samples that were
    scored: each has its rank's value, and the target's by the ratio of a sample of like rank.

    Returns:
        (n,), (n,) in no particular order; None where the models were not at hand.
    """
    draft, target = looks.get("draft"), looks["target"]
    if draft is None or not draft.is_timed or not target.is_timed:
        return None
    ranks = rng.permutation(n) + rng.random(n)
    scores = np.quantile(draft.scores["effort"].astype(np.float64), ranks / n)
    both = draft.scores["effort"][np.searchsorted(draft.positions, target.positions)].astype(np.float64)
    ratios = np.divide(target.scores["effort"], both, out=np.ones_like(both), where=both > 0)
    near = np.clip(ranks / n * len(both) + rng.normal(size=n), 0, len(both) - 1).astype(int)
    return scores, scores * ratios[np.argsort(both, kind="stable")][near]


def foretold(
    config: PlanConfig | SelectConfig, looks: Mapping[str, Look], rows: Rows, seed: int
) -> Selection | None:
    """What STAFF would make of such efforts: which regions hold enough to be verified, and how many samples
    the target then scores; None where no model scored any."""
    efforts = pretend(looks, len(rows), np.random.default_rng(seed))
    if efforts is None:
        return None
    groups = None if config.group_by is None else rows.column(config.group_by)
    method, (scores, target), given = METHODS["staff"], efforts, flat(config)
    told: dict[str, Any] = {name: given[name] for name in method.options() if name in given}
    told |= {"budget": 0, "rng": np.random.default_rng(config.seed)}
    told |= {"scores": scores, "verify": target.__getitem__}
    if groups is None:
        return method.select(len(scores), **told)
    return select_by_group(method, groups, len(scores), **told)


def job_of(
    config: PlanConfig | SelectConfig,
    target: Look,
    n: int,
    chosen: Selection | None,
    *,
    target_epochs: float,
    epochs: float,
) -> Job:
    """What is to be done with a pool of n samples; verified as `foretold` has it, else at its most."""
    most = most_verified(n, config.num_regions, config.verification_budget, config.hard_cutoff)
    return Job(
        tokens=target.tokens,
        response_share=target.response / target.tokens,
        draft_epochs=config.draft_epochs,
        draft_share=config.draft_share,
        target_epochs=target_epochs,
        epochs=epochs,
        verified_share=(len(chosen.verified) if chosen else most) / n,
    )


def faithful(looks: Mapping[str, Look], n: int) -> Fidelity:
    """What the samples that both models scored say of the draft."""
    target, draft = looks["target"], looks["draft"]
    places = np.searchsorted(draft.positions, target.positions)
    scores = draft.scores["effort"][places].astype(np.float64)
    regions = np.zeros(len(places), np.int64)
    partition = split(scores, default_regions(len(scores)))[1]
    loss = draft.scores["loss"][places]
    return fidelity(regions, np.array([n]), n, scores, target.scores["effort"], None, loss, partition)


def make_plan(config: PlanConfig, on_progress: Progress | None = None, data: Any = None) -> dict[str, Any]:
    """Time the models on samples of a pool and predict what every method would take, and what a selection
    would verify.

    Returns:
        n, tokens; num_regions, verified_regions, verified (None: not known before a model has scored),
        most_verified, by STAFF; sum (the default's, in passes) and its verdict; fidelity; speeds (seconds a
        token), sizes in operations of a pass, timed (label -> was it at hand), small (those of which
        the scoring alone was timed), full_seconds, methods (`table`), advice (a sentence for each rate).

    Raises:
        ValueError: something that the user can mend.
    """
    from staff.data import rows as formats

    check_named(config, data)
    tell = on_progress or (lambda stage, done, total: None)
    tell(str(Stage("read")), 0, 1)
    rows = formats.read(list(config.data) if data is None else data, **config.reading.keywords())
    rows, looks = look_at_models(config, rows, tell, SMALL_JOB)
    target, n = looks["target"], len(rows)
    chosen = foretold(config, looks, rows, config.seed)
    most = most_verified(n, config.num_regions, config.verification_budget, config.hard_cutoff)
    job = job_of(config, target, n, chosen, target_epochs=config.epochs, epochs=config.epochs)
    speeds = {label: seen.speed for label, seen in looks.items()}
    passes = {label: one_pass(seen, config.scoring.scope) for label, seen in looks.items()}
    made: dict[str, Any] = {
        "n": n,
        "tokens": target.tokens,
        "most_verified": most,
        "verified": len(chosen.verified) if chosen else None,
        "num_regions": len(chosen.regions) if chosen else None,
        "verified_regions": sum(region.verified > 0 for region in chosen.regions) if chosen else None,
        "timed": {label: seen.is_timed for label, seen in looks.items()},
        "small": [label for label, seen in looks.items() if seen.is_timed and passes[label] < SMALL_JOB],
        "flops": passes,
        "speeds": {label: asdict(speed) for label, speed in speeds.items()},
        "full_seconds": config.epochs * target.tokens * target.speed.training,
        "methods": table(job, speeds, config.pruning_rate),
        "advice": [advice(job, speeds, rate) for rate in config.pruning_rate],
    }
    if "draft" in looks:
        terms = {
            "epochs": config.draft_epochs,
            "share": config.draft_share,
            "relative_cost": passes["draft"] / passes["target"],
            "verified_share": 0.0,
            "alone": job.response_share if rows.layout.text is None else 0.0,
        }
        made["sum"] = {**terms, "passes": staff_passes(**terms)}
        made["verdict"] = verdict(made["sum"]["passes"], **terms)
        if chosen:
            made["fidelity"] = faithful(looks, n).as_dict()
    return made


def describe_plan(plan: Mapping[str, Any]) -> str:
    """A plan as a person reads it."""
    rates = list(plan["methods"][0]["total_seconds"])
    n, away = plan["n"], [label for label, is_timed in plan["timed"].items() if not is_timed]
    where = "predicted seconds on this machine"
    if away:
        others = [label for label in plan["timed"] if label not in away]
        by = f"the speed of the {others[0]}" if others else "a plain matrix product, which no model reaches"
        where += f"; the {' and the '.join(away)} by size alone, and by {by}: at least"
    if plan["small"]:
        where += f"; the {' and the '.join(plan['small'])}'s scoring is timed, the rest by operations"
    header = "".join(f"{f'{float(rate):.0%} pruned':>13}" for rate in rates)
    lines = ["", f"pool       {n} samples, {plan['tokens']:,} tokens{' or so' * bool(away)}; {where}"]
    if plan["verified"] is not None:
        regions = f"{plan['verified_regions']} of {plan['num_regions']} regions"
        share = plan["verified"] / n
        some = f"about {plan['verified']} samples on the target ({share:.1%}), in {regions}"
        lines.append(f"verified   with --method staff {some}")
    elif "sum" in plan:
        share = plan["most_verified"] / n
        some = f"{plan['most_verified']} samples on the target at most ({share:.1%})"
        lines.append(f"verified   with --method staff {some}")
    if "fidelity" in plan:
        told = Fidelity(**plan["fidelity"])
        some = f"{told.shown()}, from {told.samples} samples; --method staff tells it from those it verifies"
        lines.append(f"fidelity   {told.verdict}: {some}")
    if "sum" in plan:
        lines += [f"cost       {sum_in_words(plan['sum'])}", f"           {plan['verdict']}"]
    lines += ["", f"{'method':20}{'choosing':>10}{header}{'pays from':>11}"]
    for row in plan["methods"]:
        pays = "never" if row["break_even"] is None else f"{row['break_even']:.0%}"
        totals = "".join(f"{seconds:13.1f}" for seconds in row["total_seconds"].values())
        lines.append(f"{row['method']:20}{row['selection_seconds']:10.1f}{totals}{pays:>11}")
    lines += [
        f"{'all data':20}{0:10.1f}" + f"{plan['full_seconds']:13.1f}" * len(rates),
        "with the training on what is kept",
        "",
        f"{'method':20}seconds of each stage",
    ]
    for row in plan["methods"]:
        parts = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in row["stages"].items())
        lines.append(f"{row['method']:20}{parts or 'none'}")
    return "\n".join([*lines, "", *plan["advice"]])
