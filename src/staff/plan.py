"""What a selection costs and whether it pays, in passes of the target over the pool (U). Numbers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from staff.methods import METHODS, Method
from staff.types import Stage

SNAPSHOTS = 4  # of a draft's tuning, that loss trajectories are taken over


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


def verdict(passes: float, epochs: float, share: float, relative_cost: float, verified_share: float) -> str:
    """One sentence on whether the draft was the cheaper way."""
    if passes <= 1:
        return f"the draft was the cheaper way: {passes:.2f} passes of the target in place of the 1 of --method direct"
    limit = break_even(epochs, share, verified_share)
    cure = f"a draft of less than {limit:.2f} of the target's cost" if limit > 0 else "fewer verified samples"
    return (
        f"the draft was not the cheaper way: {passes:.2f} passes of the target where --method direct takes 1. "
        f"It would be with {cure}, with fewer --draft-epochs or a smaller --draft-share"
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
        verified_share: v, of the pool.
    """

    tokens: int
    response_share: float
    draft_epochs: float
    draft_share: float
    target_epochs: float
    epochs: float
    verified_share: float


def stages(method: Method, job: Job, speeds: Mapping[str, Speed]) -> dict[str, float] | None:
    """Predicted seconds of each stage of a method's selection; None where it needs a draft and there is none, or none that is tuned.

    Reading, tokenising and loading models are left out: small, and much the same for all.

    Args:
        speeds: "target", and "draft" where there is one.
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


def table(job: Job, speeds: Mapping[str, Speed], pruning_rates: tuple[float, ...]) -> list[dict]:
    """A row a method: stages, selection and total seconds at each pruning rate, and the rate from which it beats training on all.

    Returns:
        rows of method, stages, selection_seconds, total_seconds {rate: seconds}, break_even (None: it never does).
    """
    full = job.epochs * job.tokens * speeds["target"].training
    rows = []
    for name, method in METHODS.items():
        found = stages(method, job, speeds)
        if found is None:
            continue
        selection = sum(found.values())
        totals = {rate: selection + (1 - rate) * full for rate in pruning_rates}
        break_even_rate = selection / full if selection < full else None
        rows.append(
            {
                "method": name,
                "stages": found,
                "selection_seconds": selection,
                "total_seconds": totals,
                "break_even": break_even_rate,
            }
        )
    return rows


def advice(job: Job, speeds: Mapping[str, Speed], pruning_rate: float) -> str:
    """What to do at a pruning rate, in words: this draft, the target itself, random, or all data.

    Of cost alone: which coreset is the better one is for `staff compare` to say.
    """
    full = job.epochs * job.tokens * speeds["target"].training
    seconds = {row["method"]: row["selection_seconds"] for row in table(job, speeds, (pruning_rate,))}
    choices = {name: seconds[name] for name in ("staff", "direct") if name in seconds}
    best = min(choices, key=choices.__getitem__)
    total = choices[best] + (1 - pruning_rate) * full
    what = {
        "staff": "use this draft (--method staff)",
        "direct": "score the target directly (--method direct)",
    }[best]
    if total < full:
        other = next((name for name in choices if name != best), None)
        beside = f", {choices[other]:.0f} s with --method {other}" if other else ""
        return (
            f"at {pruning_rate:.0%} pruned: {what}: choosing takes {choices[best]:.0f} s{beside}, and with training {total:.0f} s "
            f"where training on all takes {full:.0f} s"
        )
    return (
        f"at {pruning_rate:.0%} pruned: train on all, {full:.0f} s, or take --method random: choosing takes {choices[best]:.0f} s "
        f"at the cheapest (--method {best}), more than the {pruning_rate * full:.0f} s of training it spares"
    )
