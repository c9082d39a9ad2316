"""How much a question looks at each demonstration before it, at one layer (Data Whisperer, arXiv 2505.12212).
torch alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from staff.models import anatomy


class _Seen(Exception):
    """The layer's attention is there: what comes behind it is not computed."""


def layer_of(model: torch.nn.Module, layer: int | None) -> int:
    """The layer asked for, or two fifths of the way up.

    Raises:
        ValueError: the model has no such layer.
    """
    layers = len(anatomy.blocks(model))
    if layer is None:
        return min(round(0.4 * layers), layers - 1)
    if not 0 <= layer < layers:
        raise ValueError(f"layer={layer}: the model has {layers}, from 0 to {layers - 1}")
    return layer


def attention_to(model: torch.nn.Module, ids: Sequence[int], ends: Sequence[int], layer: int) -> np.ndarray:
    """The attention of a question to each demonstration: summed over heads, meaned over the tokens of both.

    Args:
        ids: a conversation, up to where the answer begins.
        ends: (d,) tokens up to the end of each demonstration; the question is what stands behind the last.
        layer: whose attention, from 0.

    Returns:
        (d,) float64.

    Raises:
        ValueError: the model's attention can't be looked at.
    """
    device = anatomy.device_of(model)
    given = torch.as_tensor(np.asarray(ids, np.int64)[None], device=device)
    with torch.inference_mode(), _watched(model, anatomy.blocks(model)[layer], len(ids)) as seen:
        anatomy.inner(model)(input_ids=given, use_cache=False)
    if not seen:
        kind = type(anatomy.inner(model)).__name__
        raise ValueError(f"{kind} shows no attention of layer {layer}: whisper can't be had with it")
    by_token = seen[0][0].float().sum(0)[ends[-1] :].mean(0)  # (T,), of the question's tokens
    starts = [0, *ends[:-1]]
    return np.array([by_token[start:end].mean().item() for start, end in zip(starts, ends, strict=True)])


@contextlib.contextmanager
def _watched(model: torch.nn.Module, block: torch.nn.Module, tokens: int) -> Iterator[list[torch.Tensor]]:
    """Within the block the first (1, heads, T, T) that comes out of a layer's parts is kept, and ends the
    pass. Only the plain way of attention gives its weights, so the model takes that one meanwhile."""
    causal: Any = anatomy.inner(model)
    before, seen = causal.config._attn_implementation, list[torch.Tensor]()

    def look(module: Any, inputs: Any, outputs: Any) -> None:
        for part in outputs if isinstance(outputs, tuple) else ():
            if torch.is_tensor(part) and part.ndim == 4 and part.shape[2:] == (tokens, tokens):
                seen.append(part)
                raise _Seen

    hooks = [part.register_forward_hook(look) for part in block.modules()]
    try:
        causal.set_attn_implementation("eager")
        with contextlib.suppress(_Seen):
            yield seen
    finally:
        causal.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
