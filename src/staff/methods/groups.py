"""Select inside groups of the pool: the budget is shared over them by size (`--group-by`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np

from staff.methods import Method, check_budget
from staff.methods.strata import share_by_size
from staff.methods.verification import default_regions, limits_of_groups
from staff.types import Need, Selection


def share_by_wish(sizes: np.ndarray, wanted: Sequence[Fraction], budget: int) -> np.ndarray:
    """Share a budget over groups as asked for; what a group cannot fill flows on to the others.

    It goes to those that have a share, in proportion to it, and where all of them are full to the others, by
    size. Parts of a sample go by largest remainder.

    Args:
        sizes: (g,) samples a group.
        wanted: (g,) shares >= 0.
        budget: m, 0 <= m <= sizes.sum().

    Returns:
        (g,) int64, each at most its size, summing to m.
    """
    sizes = np.asarray(sizes, np.int64)
    budgets, left = np.zeros(len(sizes), np.int64), budget
    active = [group for group in range(len(sizes)) if wanted[group] > 0]
    while active:
        total = sum(wanted[group] for group in active)
        quotas = {group: left * wanted[group] / total for group in active}
        full = [group for group in active if quotas[group] >= sizes[group]]
        if not full:
            budgets[active] = [int(quotas[group]) for group in active]
            remainders = sorted(active, key=lambda group: int(quotas[group]) - quotas[group])
            budgets[remainders[: left - int(budgets[active].sum())]] += 1
            return budgets
        budgets[full] = sizes[full]
        left -= int(sizes[full].sum())
        active = [group for group in active if group not in full]
    return budgets + share_by_size(sizes - budgets, left)


def wanted_shares(
    shares: Mapping[str, Fraction], rest: bool, sizes: Mapping[str, int]
) -> dict[str, Fraction]:
    """The share of every group: those named, and what is left to the others by size, where `rest` says so."""
    others = sum(size for label, size in sizes.items() if label not in shares)
    left = 1 - sum(shares.values())
    return {
        label: shares.get(label, left * Fraction(size, max(others, 1)) if rest else Fraction(0))
        for label, size in sizes.items()
    }


def select_by_group(
    method: Method,
    groups: Sequence[str] | np.ndarray,
    n: int,
    *,
    budget: int,
    rng: np.random.Generator,
    wanted: Mapping[str, Fraction] | None = None,
    held: Mapping[str, int] | None = None,
    **arguments: Any,
) -> Selection:
    """Run a method inside each group, with a budget in proportion to the group's size, or as asked for.

    Every group has a random stream of its own. Neighbours that lie in another group count as none. `verify`
    is called for each group, always with positions in the pool; what adaptive verification may ask is shared
    over the groups by size. Where a method parts the pool itself, as `ltd`
    does, the groups are its parts.

    Args:
        method: an entry of METHODS.
        groups: (n,) labels, strings or numbers.
        n: the pool's size, in samples.
        budget: m, in samples, over all groups.
        rng: the source of all randomness.
        wanted: label -> share, see `share_by_wish`; None: by size.
        held: label -> samples of the group that are kept beside these, and count in its share.
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
    sizes = np.bincount(group_of, minlength=len(labels))
    shares = _shares(list(map(str, labels)), sizes, budget, wanted, held or {})
    if method.groups:
        arguments[method.groups] = np.zeros(n, np.int64)
    limits = None
    if arguments.get("verify") and arguments.get("verification") == "adaptive":
        limits = limits_of_groups(sizes, arguments.get("num_regions"), arguments.get("verification_budget"))
    parts = []
    for group, (share, own_rng) in enumerate(zip(shares, rng.spawn(len(labels)), strict=True)):
        members = np.flatnonzero(group_of == group)
        own = narrowed(method, members, arguments)
        if limits is not None:  # a group that may ask little has no more regions than it asks for
            own["verified_at_most"] = most = int(limits[group])
            own["num_regions"] = min(own.get("num_regions") or default_regions(len(members)), max(most, 1))
        try:
            parts.append((members, method.select(len(members), budget=int(share), rng=own_rng, **own)))
        except ValueError as error:
            where = f"group {str(labels[group])!r} ({len(members)} samples, positions counted inside it)"
            raise ValueError(f"{where}: {error}") from error

    regions = tuple(region for _, part in parts for region in part.regions)
    region_of = np.full(n, -1, np.int64) if regions else None
    weights = np.ones(n)
    first = 0
    for members, part in parts:
        weights[members] = 1.0 if part.weights is None else part.weights
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
        weights,
    )


def _shares(
    labels: list[str],
    sizes: np.ndarray,
    budget: int,
    wanted: Mapping[str, Fraction] | None,
    held: Mapping[str, int],
) -> np.ndarray:
    """The budget of each group: its share of all that is kept, less what is held of it already."""
    has = np.array([held.get(label, 0) for label in labels], np.int64)
    shares, is_open = np.zeros(len(labels), np.int64), np.ones(len(labels), bool)
    while is_open.any():  # a group that holds more than its share gives up what the others then have less
        places = np.flatnonzero(is_open)
        whole, total = (sizes + has)[places], budget + int(has[places].sum())
        if wanted is None:
            shares[places] = share_by_size(whole, total) - has[places]
        else:
            shares[places] = share_by_wish(whole, [wanted[labels[i]] for i in places], total) - has[places]
        if (shares >= 0).all():
            return shares
        is_open &= shares > 0
        shares[~is_open] = 0
    return shares


def narrowed(method: Method, members: np.ndarray, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a method is given of some samples alone, whose positions then count from 0; `verify` is asked for
    positions in the pool."""
    own = {}
    for name, value in arguments.items():
        if value is not None and (name == "verify" or name in method.asks):
            own[name] = partial(_ask, value, members)
        elif value is not None and name in method.columns:
            own[name] = np.asarray(value)[members]
        else:
            own[name] = _take(value, members, method.needs.get(name))
    return own


def _ask(ask: Callable[..., np.ndarray], members: np.ndarray, *arguments: Any) -> np.ndarray:
    """What is asked of some samples' own positions, asked of those in the pool; -1 is no position."""
    place = np.append(members, -1)
    return ask(*(place[given] if isinstance(given, np.ndarray) else given for given in arguments))


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
