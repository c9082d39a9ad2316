"""The one table of methods: what to keep, given numbers. numpy alone; nothing here knows a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from staff.methods.staff import staff
from staff.methods.top import random
from staff.types import Selection

FIXED = ("budget", "rng", "verify")


@dataclass(frozen=True)
class Method:
    """A selection function and what it must be given.

    Attributes:
        function: f(scores, *, budget, rng, **needed arrays, **options) -> Selection.
        needs: argument -> "model[@checkpoints]/quantity", computed by the pipeline before the call.
        verify: "model/quantity" that the function may ask for by position while it runs; None: it asks nothing.
        paper: where it comes from.
    """

    function: Callable[..., Selection]
    needs: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    verify: str | None = None
    paper: str | None = None

    def options(self) -> dict[str, object]:
        """The function's own options and their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        taken = (*self.needs, "scores", *FIXED)
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in taken}

    def check_options(self, options: Mapping[str, object]) -> None:
        """Raise ValueError for an option that the function does not have. Called before any model loads."""
        for name in options:
            if name not in self.options():
                known = ", ".join(self.options()) or "none"
                raise ValueError(f"{self.function.__name__} has no option {name!r}; its options: {known}")

    def select(self, scores: np.ndarray, *, budget: int, rng: np.random.Generator, **arguments) -> Selection:
        """Run the function; see its own docstring for the arguments.

        Args:
            scores: (n,) scores, higher is harder; methods without a need for them use their length alone.
            budget: m, in samples.
            rng: numpy Generator; equal seeds give equal coresets.
            **arguments: `verify`, the needed arrays, and options.
        """
        self.check_options({k: v for k, v in arguments.items() if k not in (*self.needs, "verify")})
        if not 0 <= budget <= len(scores):
            raise ValueError(f"the budget must be between 0 and the pool's {len(scores)} samples; found {budget}")
        selection = self.function(scores, budget=budget, rng=rng, **arguments)
        assert len(selection.indices) == budget, f"{self.function.__name__} returned {len(selection.indices)} of {budget} samples"
        return selection


METHODS: dict[str, Method] = {
    "random": Method(random),
    "direct": Method(staff, needs={"scores": "target/effort"}),  # no draft at all: cost 1
    "staff": Method(staff, needs={"scores": "draft/effort"}, verify="target/effort", paper="arXiv:2410.01296"),
}
