"""Causal attention over short samples on a CPU by plain products: in bfloat16 the library's tiled kernel takes up to four times as long."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

SHORT = 256  # tokens; above, (T, T) matrices no longer stay in cache and the tiled kernel wins
CHANGES = ("position_bias", "cache", "softcap")  # arguments that make it another function


@contextlib.contextmanager
def short_samples() -> Iterator[None]:
    """Within the block, models on SDPA take `attend` where it computes the same and pays: short samples in bfloat16 on a CPU."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    library = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def choose(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **others):
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        plain = not dropout and all(others.get(name) is None for name in CHANGES)
        pays = query.device.type == "cpu" and query.dtype == key.dtype == value.dtype == torch.bfloat16
        if plain and pays and query.shape[2] > 1 and key.shape[2] <= SHORT:
            hidden = _hidden(attention_mask, causal, query, key)
            if hidden is not None:
                return attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling, hidden).transpose(1, 2), None
        return library(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = choose
    try:
        yield
    finally:
        if ALL_ATTENTION_FUNCTIONS._global_mapping["sdpa"] is library:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]
        else:  # somebody's own
            ALL_ATTENTION_FUNCTIONS["sdpa"] = library


def _hidden(mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """(T, K) -inf where a query does not see a key, the same for all samples and heads; None where it is not."""
    tokens, keys = query.shape[2], key.shape[2]
    if mask is None and causal and tokens == keys:
        return query.new_full((tokens, keys), -torch.inf).triu_(1)
    if mask is None or mask.dtype != torch.bool or any(mask.shape[axis] > 1 and mask.stride(axis) for axis in (0, 1)):
        return None
    return query.new_zeros(tokens, keys).masked_fill_(~mask[0, 0], -torch.inf)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, hidden: Tensor) -> Tensor:
    """softmax(scale * Q K^T + hidden) V.

    Args:
        query: (B, heads, T, D).
        key, value: (B, groups, K, D); heads / groups queries share a key.
        hidden: (T, K), -inf where a query does not see a key, else 0.

    Returns:
        (B, heads, T, width of value).
    """
    batch, heads, tokens, width = query.shape
    groups, keys = key.shape[1:3]
    with torch.autocast("cpu", enabled=False):
        # queries that share a key stand below one another: one product for all of them
        scores = torch.baddbmm(
            hidden.repeat(heads // groups, 1),
            query.reshape(batch * groups, -1, width),
            key.reshape(batch * groups, keys, width).mT,
            alpha=scale,
        )
        found = torch.bmm(torch.softmax(scores, -1), value.reshape(batch * groups, keys, -1))
    return found.view(batch, heads, tokens, -1)
