"""The one table of methods: what to keep, given numbers. numpy alone; nothing here knows a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from staff.methods.ccs import ccs
from staff.methods.d2 import d2
from staff.methods.features import coverage, facility_location, kcenter, ltd, moderate, s2l
from staff.methods.mods import mods
from staff.methods.rds import round_robin
from staff.methods.spread import spread
from staff.methods.staff import staff
from staff.methods.top import ifd, perplexity, random, top
from staff.methods.whisper import whisper
from staff.types import Need, Selection

FIXED = ("budget", "rng", "verify")
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Method:
    """A selection function and what it must be given.

    Attributes:
        function: f(n, *, budget, rng, **needed arrays, **options) -> Selection.
        needs: argument -> what the pipeline computes for it before the call.
        verify: the efforts that the function may ask for by position while it runs; None: it asks nothing.
        asks: argument -> what else it may ask for so, given as a function of arrays of positions.
        columns: options that name a column of the data; the function is given its values, one a sample.
        paper: where it comes from.
        about: what it keeps, in a few words.
        fixed: options that this entry sets for good; they are no options of it any more.
        groups: the needed argument that parts the pool, one label a sample; the user's own groups
            (`--group-by`) take its place. None: it is run inside them as it is.
        optional: needed arrays that it can do without, where there is no draft or no prompt to take them of.

    Raises:
        ValueError: a need that names no numbers.
    """

    function: Callable[..., Selection]
    needs: Mapping[str, Need] = field(default_factory=lambda: NOTHING)
    verify: Need | None = None
    asks: Mapping[str, Need] = field(default_factory=lambda: NOTHING)
    columns: tuple[str, ...] = ()
    paper: str | None = None
    about: str = ""
    fixed: Mapping[str, object] = field(default_factory=lambda: NOTHING)
    groups: str | None = None
    optional: tuple[str, ...] = ()

    def options(self) -> dict[str, object]:
        """The function's own options and their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        taken = (*self.needs, *self.asks, *FIXED, *self.fixed)
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in taken}

    def all_needs(self) -> list[Need]:
        """What it is given, what it verifies, and what else it asks for."""
        return [*self.needs.values(), *([self.verify] if self.verify else []), *self.asks.values()]

    def models(self) -> list[str]:
        """The models that must be looked at, those asked while it runs included, each once."""
        return list(dict.fromkeys(need.model for need in self.all_needs() if need.model != "pool"))

    def select(self, n: int, *, budget: int, rng: np.random.Generator, **arguments: Any) -> Selection:
        """Run the function; see its own docstring for the arguments.

        Args:
            n: the pool's size, in samples.
            budget: m, in samples.
            rng: numpy Generator; equal seeds give equal coresets.
            **arguments: the needed arrays, `verify`, and options.

        Raises:
            ValueError: an unknown option, a missing array, a budget that is not between 0 and n, or whatever
                the function finds wrong with the numbers, nan among them by name.
        """
        name = self.function.__name__
        given = {**self.needs, **self.asks}
        for option in arguments.keys() - given.keys() - {"verify", *self.columns}:
            if option not in self.options():
                known = ", ".join(self.options()) or "none"
                raise ValueError(f"{name} has no option {option!r}; its options: {known}")
        for argument, need in given.items():
            if arguments.get(argument) is None and argument not in self.optional:
                raise ValueError(f"{name} needs {argument} ({need}), and was given none")
        check_budget(budget, n)
        if "verify" not in inspect.signature(self.function).parameters:
            arguments.pop(
                "verify", None
            )  # a method that asks the target nothing may be offered it all the same
        selection = self.function(n, budget=budget, rng=rng, **{**self.fixed, **arguments})
        assert len(selection.indices) == budget, (
            f"{name} returned {len(selection.indices)} of {budget} samples"
        )
        return selection


def check_budget(budget: int, n: int) -> None:
    """Raise ValueError unless 0 <= m <= n."""
    if not 0 <= budget <= n:
        raise ValueError(f"the budget must be between 0 and the pool's {n} samples; found {budget}")


def entry(
    function: Callable[..., Selection],
    needs: Mapping[str, str] = NOTHING,
    verify: str | None = None,
    asks: Mapping[str, str] = NOTHING,
    **about: Any,
) -> Method:
    """An entry of the table, its needs written as text and parsed here: a typo fails as the table is made.

    Raises:
        ValueError: a need that names no numbers.
    """
    parsed, asked = (
        MappingProxyType({argument: Need.parse(need) for argument, need in given.items()})
        for given in (needs, asks)
    )
    return Method(function, parsed, Need.parse(verify) if verify else None, asked, **about)


METHODS: dict[str, Method] = {
    "spread": entry(
        spread,
        needs={
            "scores": "draft/effort",
            "clusters": "draft/features.unit_clusters",
            "loss": "draft/loss",
            "unconditional_loss": "draft/unconditional_loss",
        },
        optional=("clusters", "loss", "unconditional_loss"),
        paper="Madow and Madow 1944",
        about="the default: evenly over clusters and efforts, no rows that look wrong",
    ),
    "random": entry(random, about="drawn uniformly: the one to beat"),
    "direct": entry(
        staff,
        needs={"scores": "target/effort"},
        about="STAFF's regions on the released target's own effort; no draft",
    ),
    "grand": entry(
        top, needs={"scores": "tuned_target/effort"}, paper="arXiv:2107.07075", about="highest gradient norm"
    ),
    "el2n": entry(
        top, needs={"scores": "tuned_target/el2n"}, paper="arXiv:2107.07075", about="highest error norm"
    ),
    "ccs": entry(
        ccs,
        needs={"scores": "tuned_target/el2n"},
        paper="arXiv:2210.15809",
        about="evenly over strata of difficulty, hardest cut",
    ),
    "d2": entry(
        d2,
        needs={
            "scores": "tuned_target/el2n",
            "features": "tuned_target/features",
            "neighbours": "tuned_target/features.neighbours",
        },
        paper="arXiv:2310.07931",
        about="hard and unlike one another, by messages between neighbours",
    ),
    "moderate": entry(
        moderate,
        needs={"features": "draft/features", "clusters": "draft/features.clusters"},
        paper="ICLR 2023, openreview 7D5EECbOaf9",
        about="at a middling distance from the cluster's centre",
    ),
    "loss": entry(top, needs={"scores": "draft/loss"}, about="highest loss"),
    "perplexity": entry(
        perplexity, needs={"scores": "draft/loss"}, paper="arXiv:2309.04564", about="middling perplexity"
    ),
    "entropy": entry(top, needs={"scores": "draft/entropy"}, about="highest entropy of the predictions"),
    "hes": entry(
        top,
        needs={"scores": "draft/hes"},
        paper="openreview heVn5cNfje",
        about="highest sum of the 0.5 % highest entropies",
    ),
    "upd": entry(
        top,
        needs={"scores": "draft/upd"},
        paper="arXiv:2503.11441",
        about="surprised where it was sure of itself",
    ),
    "length": entry(top, needs={"scores": "pool/tokens"}, paper="arXiv:2402.04833", about="longest response"),
    "ifd": entry(
        ifd,
        needs={"scores": "raw_draft/loss", "unconditional_loss": "raw_draft/unconditional_loss"},
        paper="arXiv:2402.00530",
        about="hardest to follow of those whose prompt helps",
    ),
    "kcenter": entry(
        kcenter,
        needs={"features": "draft/features"},
        paper="arXiv:1708.00489",
        about="no sample far from a kept one",
    ),
    "facility_location": entry(
        facility_location,
        needs={"features": "draft/features", "neighbours": "draft/features.neighbours"},
        paper="Nemhauser, Wolsey and Fisher 1978",
        about="near to as many samples as can be",
    ),
    "s2l": entry(
        s2l,
        needs={"clusters": "draft@checkpoints/loss.clusters"},
        paper="arXiv:2403.07384",
        about="evenly over clusters of loss trajectories",
    ),
    "coverage": entry(
        coverage,
        needs={"clusters": "draft/features.unit_clusters"},
        paper="Neyman 1934",
        about="drawn from every cluster of like samples, by its size",
    ),
    "ltd": entry(
        ltd,
        needs={"features": "draft/features", "clusters": "draft/features.unit_clusters"},
        groups="clusters",
        columns=("templates",),
        paper="arXiv:2305.09246",
        about="every cluster's middle, then its far ends",
    ),
    "less": entry(
        top,
        needs={"scores": "draft/similarity"},
        paper="arXiv:2402.04333",
        about="gradient most like some validation rows'",
    ),
    "less_round_robin": entry(
        round_robin,
        needs={"similarities": "draft/similarities"},
        paper="arXiv:2402.04333, 2503.01807",
        about="each validation row in turn takes the gradient most like its own",
    ),
    "rds": entry(
        round_robin,
        needs={"similarities": "draft/rds"},
        paper="arXiv:2503.01807",
        about="each validation row in turn takes what is most like it",
    ),
    "mods": entry(
        mods,
        needs={"features": "draft/prompt_features", "quality": "pool/quality"},
        asks={"rewards": "target/rewards"},
        paper="arXiv:2311.15653",
        about="good, spread, and answered badly by a target tuned on a few",
    ),
    "whisper": entry(
        whisper,
        asks={"whispers": "draft/whispers"},
        paper="arXiv:2505.12212",
        about="demonstrations that a model looks at and then answers others well",
    ),
    "whisper_target": entry(
        whisper,
        asks={"whispers": "target/whispers"},
        paper="arXiv:2505.12212",
        about="the same, asking the target as it comes",
    ),
    "staff": entry(
        staff,
        needs={"scores": "draft/effort"},
        verify="target/effort",
        paper="arXiv:2410.01296",
        about="regions of a draft's effort, shared out by what the target says",
    ),
}

# what a model's numbers cost, in scoring passes of the target over the pool
COSTS = {
    "pool": "",
    "target": "1",
    "raw_draft": "r",
    "draft": "(2·T·f + 1)·r",
    "draft@checkpoints": "(2·T·f + c)·r",
    "tuned_target": "2·E + 1",
}
COST_SYMBOLS = (
    "1: one scoring pass of the target over the pool, about one forward pass; r: the draft's cost per token "
    "relative to the target's; "
    "T, f: the draft's epochs and its share of the pool; E: the target's epochs; v: share of the pool "
    "verified; c: checkpoints; "
    "u: tokens of the responses alone, as a share of all; q: the quality model's pass over the pool; "
    "s: share of the pool that is the seed; a: answers to the pool's prompts, as passes"
)


@dataclass(frozen=True)
class MethodRow:
    """A line of the table that `staff methods` prints.

    Attributes:
        name: key of METHODS.
        about: what it keeps, in a few words.
        needs: the needs by name, those verified by position marked, comma-separated; empty for none.
        cost: what these cost, as a sum in COST_SYMBOLS; "0" for nothing.
        paper: where it comes from; empty where there is none.
        options: its own options with their defaults.
    """

    name: str
    about: str
    needs: str
    cost: str
    paper: str
    options: str


def methods_table(methods: Mapping[str, Method] = METHODS) -> list[MethodRow]:
    """What there is, what each needs and what that costs; one row a method, in the table's order."""
    rows = []
    for name, method in methods.items():
        needs = [*dict.fromkeys(map(str, method.needs.values()))]
        needs += [f"{method.verify} (drawn samples)"] if method.verify else []
        needs += [f"{need} (asked)" for need in method.asks.values()]
        options = ", ".join(f"{option}={default!r}" for option, default in method.options().items())
        rows.append(
            MethodRow(name, method.about, ", ".join(needs), cost(method), method.paper or "", options)
        )
    return rows


def cost(method: Method) -> str:
    """What a method's needs cost in scoring passes of the target over the pool, as a sum in COST_SYMBOLS.

    All quantities of one model come from one pass, except the loss without the prompt, which is a pass over
    the responses alone. Neighbours and clusters cost no pass. A model that a comparison adds is written as
    cost(its name).
    """
    models = dict.fromkeys(need.model + "@checkpoints" * need.checkpoints for need in method.needs.values())
    terms = [COSTS.get(model, f"cost({model})") for model in models]
    if any(need.quantity == "unconditional_loss" for need in method.needs.values()):
        terms.append("u·r")
    terms += ["v"] if method.verify else []
    for need in method.asks.values():  # whispers: 3/5 n prompts of six samples, read to answer and to look
        model = {"raw_draft": "r", "draft": "r", "target": "1"}.get(need.model, f"cost({need.model})")
        terms += ["q + 2·E·s + q + a"] if need.quantity == "rewards" else [f"(4 + a)·{model}"]
    return " + ".join(term for term in terms if term) or "0"
