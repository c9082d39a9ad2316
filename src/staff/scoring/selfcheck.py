"""Is a score what it says? Two samples of the pool by our pass and by a plain backward pass, before any other
is scored."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from staff.data.tokens import Pool
from staff.files import is_out_of_memory
from staff.models import anatomy
from staff.scoring import scopes
from staff.scoring.gradnorm import LOSSES
from staff.scoring.scorer import FLOAT16_SCALES, Scorer

logger = logging.getLogger(__name__)

# how far our efforts may be from the plain ones, relative: several times the most that rounding was seen to
# do (docs/selfcheck.md)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.03}
OF_LOSSES = 1 / 3  # of that: a loss rounds less than a gradient
LEAST_LOSS = 1e-2  # nats; below, too few digits of 1 - p are left in a plain backward pass
_TOGETHER = "a sample's score hangs on its batch or padding there; --batch-tokens 1 scores one at a time"
CURES = {
    "loss twice": "it is random inside (dropout or noise in its forward): turn that off in its configuration",
    "loss alone": "its logits are not what they are taken for, so it can't be scored",
    "effort alone": "its gradients are not what they are taken for: try another --scope",
    "loss together": _TOGETHER,
    "effort together": _TOGETHER,
}


def check(scorer: Scorer, pool: Pool, batch_tokens: int | None = None) -> dict[str, Any]:
    """Compare the losses and efforts of two short samples of a pool with those of a plain backward pass.

    The plain way: one sample, the model's own logits, cross-entropy, the gradients of the scope's weights.
    Ours are taken alone, and of both in one padded batch where batches hold two.

    Args:
        batch_tokens: padded tokens of a scoring batch at most, where that is settled.

    Returns:
        differences: the largest by comparison (a key of CURES), of losses in nats or relative, whichever is
        less, of efforts relative; tolerance, positions and tokens of the samples, seconds.

    Raises:
        ValueError: a difference is no rounding; says which. With quantised weights, where a sample's numbers
            may hang on its batch, that is a warning.
    """
    began, model = time.monotonic(), anatomy.inner(scorer.model)
    dtype = next(p.dtype for p in model.parameters() if p.dtype in TOLERANCE)
    order = np.argsort(pool.lengths, kind="stable")
    longer = order[pool.lengths[order] > pool.lengths[order[0]]]
    positions = np.array([order[0], *(longer[len(longer) // 8 :] if len(longer) else order[1:])[:1]])
    try:
        plain = np.array([_plain(scorer, pool, i) for i in positions])
        differences = {"loss twice": _apart([_plain(scorer, pool, positions[0])[0]], plain[:1, 0])}
        ways = {"alone": 1, "together": len(positions) * int(pool.lengths[positions].max())}
        if len(positions) == 1 or ways["together"] > (batch_tokens or scorer.tokens_borne):
            del ways["together"]
        for way, tokens in ways.items():
            ours = scorer.scores(pool, positions, tokens)
            differences[f"loss {way}"] = _apart(ours["loss"], plain[:, 0])
            little = np.minimum(1, plain[:, 0] / LEAST_LOSS)
            differences[f"effort {way}"] = _apart(ours["effort"], plain[:, 1], little)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        logger.warning("no memory for the self-check of %s: it was not made", type(model).__name__)
        return {"skipped": "out of memory"}
    found = {name: float(f"{value:.1e}") for name, value in differences.items()}
    bounds = {name: TOLERANCE[dtype] * (OF_LOSSES if "loss" in name else 1) for name in found}
    wrong = next((name for name, value in found.items() if not value <= bounds[name]), None)
    if wrong:
        said = (
            f"{type(model).__name__} failed the self-check, two samples by a plain backward pass: {wrong} is "
            f"off by {found[wrong]:.2g}, where rounding gives less than {bounds[wrong]:.2g}; {CURES[wrong]}"
        )
        if getattr(model.config, "quantization_config", None) is None:
            raise ValueError(said)
        logger.warning("%s. Its weights are quantised, so the run goes on", said)
    seconds = round(time.monotonic() - began, 2)
    about = {"tokens": pool.lengths[positions].tolist(), "seconds": seconds}
    return {"differences": found, "tolerance": TOLERANCE[dtype], "positions": positions.tolist(), **about}


def _apart(ours: Any, plain: np.ndarray, counts: Any = None) -> float:
    """The largest difference: of losses in nats or relative, of efforts relative, times what it counts."""
    ours = np.asarray(ours, np.float64)
    off = np.abs(ours - plain)
    if counts is None:
        return float((off / np.maximum(1, plain)).max())
    off = np.divide(off, plain, out=np.where(off == 0, 0, np.inf), where=plain > 0)
    return float((off * counts).max())


def _plain(scorer: Scorer, pool: Pool, position: int) -> tuple[float, float]:
    """Loss and effort of one sample by one backward pass through the model's own logits."""
    squares: list[Tensor] = []
    undo: list[Any] = []
    is_float16 = scorer.head.module.weight.dtype == torch.float16
    try:
        _watch(scorer, squares, undo)
        ids = torch.as_tensor(np.array(pool.ids(position)), dtype=torch.int64, device=scorer.device)[None]
        keep = torch.as_tensor(np.array(pool.response(position)), device=scorer.device)
        labels = torch.where(keep, ids[0], -100)[1:]
        for scale in FLOAT16_SCALES if is_float16 else (1.0,):
            squares.clear()
            with torch.enable_grad():
                logits = scorer.model(input_ids=ids, use_cache=False).logits[0, :-1]
                wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
                loss = nn.functional.cross_entropy(wide, labels, ignore_index=-100)
                if loss.requires_grad:
                    (loss * scale).backward()
            effort = sum(square.item() for square in squares) ** 0.5 / scale
            if np.isfinite(effort):
                break
    finally:
        for step in undo:
            step()
    to_loss = int(keep[1:].sum()) ** (1 - LOSSES[scorer.loss])
    return loss.item() * to_loss, effort * to_loss


def _watch(scorer: Scorer, squares: list[Tensor], undo: list[Any]) -> None:
    """Let autograd have the gradients of the sites' weights: what counts of each is squared and summed as it
    comes, and let go.

    A weight that can have none, a packed one, gets a matrix of zeros beside it that has.
    """
    by_weight: dict[int, tuple[Tensor, list[Any]]] = {}
    for site, (_, weight, counts) in zip(scorer.sites, scopes.counted(scorer.sites), strict=True):
        if weight is None or weight.dtype not in TOLERANCE:
            weight = torch.zeros(anatomy.weight_shape(site.module), device=scorer.device)
            undo.append(site.module.register_forward_hook(partial(_add, weight)).remove)
        by_weight.setdefault(id(weight), (weight, []))[1].append(counts)

    def arrived(parts: list[Any], weight: Tensor) -> None:
        assert weight.grad is not None
        for counts in parts:
            grad = counts(weight.grad)
            grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
            squares.append(grad.square().sum())
        weight.grad = None

    for weight, parts in by_weight.values():
        weight.requires_grad_(True)
        undo.append(partial(weight.requires_grad_, False))
        undo.append(weight.register_post_accumulate_grad_hook(partial(arrived, parts)).remove)


def _add(matrix: Tensor, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + nn.functional.linear(args[0].to(matrix.dtype), matrix).to(output.dtype)
