"""What a selection costs and whether it pays, in passes of the target over the pool (U). Numbers only."""

from __future__ import annotations


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
