"""A model that is larger than its device: which blocks lie where, so that all but the last run forward alone.

An effort of the last block needs a backward pass through that block and the head, and none below. So those
stay on the device, with the embeddings and all that is no block; the blocks below lie on it as far as there
is room, then on other GPUs, in CPU memory, on disk, and come to a device one after the other as they run
(accelerate's hooks).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from staff.models import anatomy

FOR_BATCHES = 0.2  # of a GPU's free memory, left to what a batch takes


def place_blocks(
    model: torch.nn.Module, dtype: torch.dtype, device: torch.device, limits: Mapping[int | str, int]
) -> dict[str, Any]:
    """A device map: module name -> a GPU's number, "cpu" or "disk".

    Args:
        model: as its configuration has it, without weights.
        device: where the last block, the head and all that is no block lie.
        limits: bytes at most, by device; of the others what is free.

    Raises:
        ValueError: the part that must be on the device does not fit.
    """
    from accelerate.utils import get_max_memory

    def size(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters()) * dtype.itemsize

    main: int | str = "cpu" if device.type == "cpu" else device.index or 0
    free = get_max_memory()
    room = {where: limits.get(where, int(free[where] * (1 - FOR_BATCHES))) for where in free}
    blocks = anatomy.blocks(model)
    names = {id(module): name for name, module in model.named_modules()}
    stays = size(model) - sum(size(block) for block in blocks[:-1])
    if stays > room[main]:
        raise ValueError(
            f"last block, embeddings and head take {stays / 1e9:.3g} GB and {room[main] / 1e9:.3g} "
            f"are free on {device}: take --load-in 8bit, another --device, or more --max-memory"
        )
    room[main] -= stays
    placed: dict[str, Any] = dict.fromkeys(_beside(model, names[id(blocks)]), main)
    order = [main, *(where for where in room if where not in (main, "cpu")), *({"cpu"} - {main})]
    for block in blocks[:-1]:
        while order and size(block) > room[order[0]]:
            order.pop(0)
        placed[names[id(block)]] = order[0] if order else "disk"
        if order:
            room[order[0]] -= size(block)
    return placed | {names[id(blocks[-1])]: main}


def _beside(model: torch.nn.Module, path: str) -> list[str]:
    """Names of what stands beside the list of blocks, at every level down to it."""
    names, at, prefix = list[str](), model, ""
    for step in path.split("."):
        own = [name for name, _ in at.named_parameters(recurse=False)]
        own += [name for name, _ in at.named_buffers(recurse=False)]
        names += [prefix + name for name in (*own, *(n for n, _ in at.named_children() if n != step))]
        at, prefix = at.get_submodule(step), f"{prefix}{step}."
    return names


def is_split(model: torch.nn.Module) -> bool:
    """Do blocks lie on several GPUs?"""
    places = set(getattr(model, "hf_device_map", {}).values()) - {"cpu", "disk"}
    return len(places) > 1


def is_offloaded(model: torch.nn.Module) -> bool:
    """Do blocks lie where they don't run?"""
    on_cpu = anatomy.device_of(model).type == "cpu"
    return bool(
        set(getattr(model, "hf_device_map", {}).values()) & {"disk", *({"cpu"} if not on_cpu else ())}
    )
