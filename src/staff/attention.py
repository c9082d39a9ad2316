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
    """Within the block, models on SDPA take `attend` where it computes the same and pays: short causal samples in bfloat16 on a CPU."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    library = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def choose(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **others):
        tokens = query.shape[2]
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        plain = causal and attention_mask is None and not dropout and all(others.get(name) is None for name in CHANGES)
        pays = query.device.type == "cpu" and query.dtype == key.dtype == value.dtype == torch.bfloat16
        if plain and pays and 1 < tokens <= SHORT and tokens == key.shape[2]:
            return attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling).transpose(1, 2), None
        return library(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = choose
    try:
        yield
    finally:
        if ALL_ATTENTION_FUNCTIONS._global_mapping["sdpa"] is library:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]
        else:  # somebody's own
            ALL_ATTENTION_FUNCTIONS["sdpa"] = library


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale * Q K^T) V, each token over itself and those before it.

    Args:
        query: (B, heads, T, D).
        key, value: (B, groups, T, D); heads / groups queries share a key.

    Returns:
        (B, heads, T, width of value).
    """
    batch, heads, tokens, width = query.shape
    groups = key.shape[1]
    later = torch.full((tokens, tokens), -torch.inf, dtype=query.dtype).triu_(1).repeat(heads // groups, 1)
    with torch.autocast("cpu", enabled=False):
        # queries that share a key stand below one another: one product for all of them
        scores = torch.baddbmm(
            later,
            query.reshape(batch * groups, -1, width),
            key.reshape(batch * groups, tokens, width).mT,
            alpha=scale,
        )
        found = torch.bmm(torch.softmax(scores, -1), value.reshape(batch * groups, tokens, -1))
    return found.view(batch, heads, tokens, -1)
