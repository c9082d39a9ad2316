"""Causal attention our way: by plain products for short samples on a CPU, where in bfloat16 the library's
kernel takes up to four
times as long; and for samples that stand behind one another, without padding."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from staff.models import anatomy

SHORT = 256  # tokens; above, (T, T) matrices no longer stay in cache and the library's tiled kernel wins
CHANGES = ("position_bias", "cache", "softcap")  # arguments that make it another function
WINDOWS = (
    "sliding_window",
    "attention_chunk_size",
)  # settings of models in which a token does not see all before it
CHOOSERS = (
    "index_topk",
    "indexer_budget",
)  # of those that choose a few by the mask, of all that stand in a batch


@contextlib.contextmanager
def short_samples(lengths: Sequence[int] | None = None) -> Iterator[None]:
    """Within the block, models on SDPA take `attend` where it computes the same and pays: short samples in
    bfloat16 on a CPU.

    Args:
        lengths: tokens of samples that stand behind one another in a batch of one: each attends to itself
            alone, and the mask that the model was given does not count.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    library = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def choose(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> Any:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        plain = not dropout and all(others.get(name) is None for name in CHANGES)
        pays = query.device.type == "cpu" and query.dtype == key.dtype == value.dtype == torch.bfloat16
        if plain and pays and query.shape[2] > 1 and key.shape[2] <= SHORT:
            hidden = _hidden(attention_mask, causal, query, key)
            if hidden is not None:
                return attend(
                    query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling, hidden
                ).transpose(1, 2), None
        return library(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **others,
        )

    if lengths is not None:
        place, groups = _groups(np.asarray(lengths))
        rows, ends = torch.as_tensor(place), [size * longest for size, longest in groups]

    def choose_for_each(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **settings: Any
    ) -> Any:
        nonlocal rows
        rows = rows.to(query.device)  # copied by the first block alone
        parts = []
        for states in (query, key, value):
            spread = _Spread.apply(states[0].transpose(0, 1), rows, sum(ends)).split(ends)
            parts.append(
                [
                    p.view(*group, *p.shape[1:]).transpose(1, 2)
                    for p, group in zip(spread, groups, strict=True)
                ]
            )
        found = [
            choose(module, q, k, v, None, **settings)[0].flatten(0, 1) for q, k, v in zip(*parts, strict=True)
        ]
        return _Collect.apply(torch.cat(found), rows)[None], None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = choose if lengths is None else choose_for_each
    try:
        yield
    finally:
        if ALL_ATTENTION_FUNCTIONS._global_mapping["sdpa"] is library:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]
        else:  # somebody's own
            ALL_ATTENTION_FUNCTIONS["sdpa"] = library


def _groups(lengths: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Samples of like length padded together, none to more than twice its own; for attention alone, where it
    costs little.

    Returns:
        (N,) the row of each token among those of all groups, and (samples, longest) of each group.
    """
    order = np.argsort(-lengths, kind="stable")
    first_row = np.zeros(len(lengths), np.int64)
    groups: list[tuple[int, int]] = []
    row = start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        members = order[start : start + int((2 * lengths[order[start:]] >= longest).sum())]
        first_row[members] = row + longest * np.arange(len(members))
        groups.append((len(members), longest))
        row, start = row + longest * len(members), start + len(members)
    return np.concatenate(
        [first + np.arange(length) for first, length in zip(first_row, lengths, strict=True)]
    ), groups


class _Spread(torch.autograd.Function):
    """(N, ...) laid into (rows, ...) of zeros, each at a row of its own."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, place: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(place)
        return states.new_zeros(rows, *states.shape[1:]).index_copy_(0, place, states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


class _Collect(torch.autograd.Function):
    """The other way: of (rows, ...) those at (N,) places that differ."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.rows = len(states)
        return states.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (place,), (grad,) = ctx.saved_tensors, grads
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, place, grad), None


def packed(samples: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """Samples behind one another, as a model takes them within `short_samples` of their lengths; N tokens in
    all.

    Returns:
        input_ids and position_ids (1, N), and a mask that is only there so that the library makes none of N x
        N.
    """
    return {
        "input_ids": torch.as_tensor(np.concatenate(samples), dtype=torch.int64)[None],
        "position_ids": torch.cat([torch.arange(len(sample)) for sample in samples])[None],
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
    }


@torch.no_grad()
def can_pack(model: torch.nn.Module, samples: Sequence[np.ndarray], longest: int) -> bool:
    """Do samples of up to `longest` tokens come out of a model packed as they do alone? Seen on some of them,
    two or more.

    False where tokens see each other by other ways than the library's attention, where that has a window
    within `longest`, or where positions are not told.
    """
    config = anatomy.text_config(model)
    windows = [getattr(config, name, None) for name in WINDOWS]
    if (
        "position_ids" not in inspect.signature(anatomy.inner(model).forward).parameters
        or getattr(config, "_attn_implementation", None) != "sdpa"
    ):
        return False
    if any(window and window < longest for window in windows):
        return False
    if any(getattr(config, name, None) for name in CHOOSERS):
        return False
    parameter, was_training = next(model.parameters()), model.training
    model.eval()
    try:
        with short_samples([len(sample) for sample in samples]):
            inputs = {name: part.to(parameter.device) for name, part in packed(samples).items()}
            found = anatomy.final_states(model, **inputs, use_cache=False)[0].float()
        alone = [
            anatomy.final_states(
                model, input_ids=inputs["input_ids"].new_tensor(sample)[None], use_cache=False
            )[0]
            for sample in samples
        ]
    except (
        RuntimeError,
        ValueError,
        TypeError,
        IndexError,
        AttributeError,
    ):  # a model that makes more of its mask
        return False
    finally:
        model.train(was_training)
    wanted = torch.cat(alone).float()
    off = torch.linalg.vector_norm(found - wanted, dim=-1) / torch.linalg.vector_norm(wanted, dim=-1)
    return bool(off.max() < torch.finfo(parameter.dtype).eps ** 0.5)


def _hidden(mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """(T, K) -inf where a query does not see a key, the same for all samples and heads; None where it is
    not."""
    tokens, keys = query.shape[2], key.shape[2]
    if mask is None and causal and tokens == keys:
        return query.new_full((tokens, keys), -torch.inf).triu_(1)
    if (
        mask is None
        or mask.dtype != torch.bool
        or any(mask.shape[axis] > 1 and mask.stride(axis) for axis in (0, 1))
    ):
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
