"""Make a draft out of a target that has no smaller sibling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from staff.models import anatomy

CHOICES = ("even", "first", "last", "ends")


def chosen_blocks(total: int, keep: int, which: str) -> list[int]:
    """Which blocks a self-made draft keeps.

    even: spread from the first to the last, both kept. first, last: as they say. ends: half from either end,
        the
    odd one from the front.

    Raises:
        ValueError: more blocks than there are, or an unknown choice.
    """
    if keep > total:
        raise ValueError(f"self:{keep}: the target has only {total} blocks")
    if which == "even":
        return np.linspace(0, total - 1, keep).round().astype(int).tolist() if keep > 1 else [total - 1]
    if which == "first":
        return list(range(keep))
    if which == "last":
        return list(range(total - keep, total))
    if which == "ends":
        front = (keep + 1) // 2
        return list(range(front)) + list(range(total - keep + front, total))
    raise ValueError(f"draft blocks must be one of {', '.join(CHOICES)}; found {which!r}")


def cut(model: nn.Module, keep: int | Sequence[int], which: str = "first") -> nn.Module:
    """Keep some of a model's blocks, in place; embeddings, final norm and head stay.

    Args:
        model: a causal language model, changed and returned.
        keep: how many blocks are kept, or which, in order.
        which: see `chosen_blocks`.

    Raises:
        ValueError: more blocks than there are, or blocks that need one another.
    """
    blocks = anatomy.blocks(model)
    chosen = chosen_blocks(len(blocks), keep, which) if isinstance(keep, int) else keep
    if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):
        raise ValueError(
            f"self:{len(chosen)}: {type(model).__name__} shares keys and values between its blocks, so "
            f"none can be left out"
        )
    kept = [blocks[i] for i in chosen]
    config = model.config.get_text_config()
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        if isinstance(getattr(config, name, None), (list, tuple)):
            setattr(config, name, [getattr(config, name)[i] for i in chosen])
    del blocks[:]
    blocks.extend(kept)
    config.num_hidden_layers = len(kept)
    for index, block in enumerate(blocks):  # where a cache would keep this block's keys
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                setattr(module, "layer_idx", index)  # noqa: B010 -- mypy knows no such attribute
    return model
