"""Select inside groups of the pool: the budget is shared over them by size (`--group-by`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from staff.methods import Method, check_budget
from staff.methods.strata import share_by_size
from staff.types import Need, Selection


def select_by_group(
    method: Method,
    groups: Sequence[str] | np.ndarray,
    n: int,
    *,
    budget: int,
    rng: np.random.Generator,
    **arguments: Any,
) -> Selection:
    """Run a method inside each group, with a budget in proportion to the group's size.

    Every group has a random stream of its own. Neighbours that lie in another group count as none. `verify`
    is called once a group, always with positions in the pool.

    Args:
        method: an entry of METHODS.
        groups: (n,) labels, strings or numbers.
        n: the pool's size, in samples.
        budget: m, in samples, over all groups.
        rng: the source of all randomness.
        **arguments: `verify`, the needed arrays, and options, as for `Method.select`.

    Returns:
        Selection of exactly m samples. Regions are those of all groups, one group after another in the order
        of their labels; `region_of` counts through.

    Raises:
        ValueError: not one label a sample, or what the method raises, with the group's name before it.
    """
    labels, group_of = np.unique(np.asarray(groups), return_inverse=True)
    if np.ndim(groups) != 1 or len(group_of) != n:
        raise ValueError(f"groups must be one label a sample, ({n},); found shape {np.shape(groups)}")
    check_budget(budget, n)
    shares = share_by_size(np.bincount(group_of, minlength=len(labels)), budget)
    parts = []
    for group, (share, own_rng) in enumerate(zip(shares, rng.spawn(len(labels)), strict=True)):
        members = np.flatnonzero(group_of == group)
        own = narrowed(method, members, arguments)
        try:
            parts.append((members, method.select(len(members), budget=int(share), rng=own_rng, **own)))
        except ValueError as error:
            where = f"group {str(labels[group])!r} ({len(members)} samples, positions counted inside it)"
            raise ValueError(f"{where}: {error}") from error

    regions = tuple(region for _, part in parts for region in part.regions)
    region_of = np.full(n, -1, np.int64) if regions else None
    first = 0
    for members, part in parts:
        if region_of is not None and part.region_of is not None:
            region_of[members] = np.where(part.region_of >= 0, part.region_of + first, -1)
        first += len(part.regions)
    return Selection(
        _join([members[part.indices] for members, part in parts]),
        regions,
        region_of,
        _join([members[part.verified] for members, part in parts]),
        sum(part.filled for _, part in parts),
        sum(part.filled_from_cut for _, part in parts),
    )


def narrowed(method: Method, members: np.ndarray, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a method is given of some samples alone, whose positions then count from 0; `verify` is asked for
    positions in the pool."""
    own = {name: _take(array, members, method.needs.get(name)) for name, array in arguments.items()}
    if verify := arguments.get("verify"):
        own["verify"] = lambda positions: verify(members[positions])
    return own


def _take(values: Any, members: np.ndarray, need: Need | None) -> Any:
    """A needed array's rows of one group; options are no needs and pass through."""
    if need is None:
        return values
    rows = np.asarray(values)[members]
    if need.made != "neighbours":
        return rows
    place = np.full(len(values) + 1, -1, np.int64)  # the last, for -1: no neighbour is no neighbour
    place[members] = np.arange(len(members))
    return place[rows]


def _join(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.sort(np.concatenate([np.empty(0, np.int64), *parts]))
