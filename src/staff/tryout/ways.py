"""Ways of choosing that a try-out sets side by side, random first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from staff.config import DEFAULT_METHOD, SelectConfig, meant
from staff.methods import METHODS
from staff.pipeline import given_options

AUTO, RANDOM = "auto", "random"
# ways of choosing that are a method with a setting; every other is a method's own name
WAYS: dict[str, dict[str, Any]] = {
    "dedup": {"method": RANDOM, "dedup": "near"},
    "drop-suspects": {"method": RANDOM, "drop_suspects": True},
}


def method_of(way: str) -> str:
    return str(WAYS.get(way, {"method": way})["method"])


def candidates(config: SelectConfig, signs: Iterable[str]) -> tuple[str, ...]:
    """Ways to try, random first: those named, else what fits what was found in the pool."""
    for way in config.trying.ways:
        if way not in METHODS and way not in WAYS:
            raise ValueError(f"--ways: there is no {way!r}; {meant(way, [*WAYS, *METHODS])}")
    if config.trying.ways:
        return tuple(dict.fromkeys((RANDOM, *config.trying.ways)))
    likely = ["less", "rds"] if "mixed" in signs else []
    likely += ["drop-suspects"] if "suspects" in signs else []
    likely += ["dedup"] if "copies" in signs else []
    others = ["dedup", *(["coverage", DEFAULT_METHOD, "staff"] if config.draft else [])]
    return tuple(dict.fromkeys((RANDOM, *likely, *others)))


def options_of(config: SelectConfig, ways: Iterable[str]) -> dict[str, Any]:
    """Those given with --option; each is one of some way's method."""
    return given_options(config.option, {name: METHODS[name] for name in map(method_of, ways)})


def rate_of(config: SelectConfig) -> float | None:
    """The pruning rate to try: the highest, where what is chosen matters most; None where it is a budget."""
    return max(config.pruning_rate, default=None)
