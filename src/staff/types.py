"""The words that the parts speak to each other: Need, Stage, Region, Selection. numpy alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Progress = Callable[[str, int, int], None]  # stage, done, in all

# what one pass of a model, or the pool itself, can give of each sample, and what can be made of it
OF_ONE_PASS = ("effort", "loss", "el2n", "entropy", "hes", "upd")
# what is taken with --validation, and the kind of its Stage
AGAINST_VALIDATION = {"similarity": "gradients", "similarities": "gradients_apart", "rds": "states"}
# what a method may ask a model for by position while it runs: `Method.asks`
ASKED_BY_POSITION = ("rewards", "whispers")
QUANTITIES = (*OF_ONE_PASS, "features", "prompt_features", "unconditional_loss", *AGAINST_VALIDATION)
QUANTITIES += ("tokens", "quality", *ASKED_BY_POSITION)
MADE = ("neighbours", "clusters", "unit_clusters")


@dataclass(frozen=True)
class Need:
    """Numbers of the whole pool that a method must be given.

    Written "model[@checkpoints]/quantity[.made]", as "draft/effort" or "draft@checkpoints/loss.clusters".

    Attributes:
        model: a key of the run's models, or "pool" for what needs none.
        quantity: one of QUANTITIES.
        checkpoints: the quantity along the model's tuning, (n, checkpoints).
        made: one of MADE, computed from the quantity; None for the quantity itself.
    """

    model: str
    quantity: str
    checkpoints: bool = False
    made: str | None = None

    @classmethod
    def parse(cls, text: str) -> Need:
        """The need that a text names.

        Raises:
            ValueError: the text is not of that form, or names a quantity that nothing gives.
        """
        match = re.fullmatch(r"(\w+)(@checkpoints)?/(\w+)(?:\.(\w+))?", text)
        if not match or match[3] not in QUANTITIES or match[4] not in (None, *MADE):
            raise ValueError(
                f"{text!r} names no numbers: write model/quantity, with a quantity of "
                f"{', '.join(QUANTITIES)}; "
                f"or model@checkpoints/quantity; and behind it, with a dot, {', '.join(MADE)}"
            )
        return cls(match[1], match[3], bool(match[2]), match[4])

    def __str__(self) -> str:
        return (
            f"{self.model}{'@checkpoints' * self.checkpoints}/{self.quantity}"
            f"{f'.{self.made}' if self.made else ''}"
        )

    @property
    def base(self) -> str:
        """The model that must be there for it, "draft" or "target" or one of a comparison's own; "pool" for
        none."""
        return {"raw_draft": "draft", "tuned_target": "target"}.get(self.model, self.model)


@dataclass(frozen=True)
class Stage:
    """A piece of work that takes time: what the progress shows and the account counts. Its `str` is for
    people.

    Attributes:
        kind: a key of SENTENCES.
        model: a key of the run's models; "" where none takes part.
        part: what of the pool, where it is not all of it.
        snapshot: "2/4", at which checkpoint of the model's tuning.
    """

    kind: str
    model: str = ""
    part: str = ""
    snapshot: str = ""

    def __post_init__(self) -> None:
        assert self.kind in SENTENCES, self.kind

    def __str__(self) -> str:
        words = SENTENCES[self.kind].format(model=self.model.replace("_", " "))
        return words + f" {self.part}" * bool(self.part) + f" at {self.snapshot}" * bool(self.snapshot)


SENTENCES = {
    "read": "read",
    "tokenise": "tokenise",
    "dedup": "look for duplicates",
    "unpack": "unpack the {model}",
    "load": "load models",
    "time": "time the {model}",
    "tune": "fine-tune the {model}",
    "merge": "merge the adapter into the {model}",
    "score": "score on the {model}",
    "verify": "verify on the {model}",
    "calibrate": "calibrate the {model}",
    "gradients": "gradients of the {model}",
    "gradients_apart": "gradients of the {model} kept apart",
    "states": "hidden states of the {model}",
    "query": "look at the validation rows",
    "converse": "answer on the {model}",
    "rate": "rate the answers",
    "answer": "answer",
    "judge": "metrics",
}


@dataclass(frozen=True)
class Region:
    """One interval of the scores: what it holds and what became of it (STAFF, B_i).

    Attributes:
        lower, upper: the interval's edges, in units of the score. A score on an edge belongs to the lower
            region.
        size: |B_i|, in samples.
        verified: how many of them the target scored.
        ratio: V_i; nan where the region was not verified.
        budget: m_i, the selection budget granted, in samples.
        selected: samples of it in the coreset, those that filled up a budget left over included.
        ratio_low, ratio_high: V_i's interval of 95 %; nan where nothing is known of it.
        even_budget: what m_i would be were all V_i alike; None where nothing was verified.
    """

    lower: float
    upper: float
    size: int
    verified: int
    ratio: float
    budget: int
    selected: int
    ratio_low: float = np.nan
    ratio_high: float = np.nan
    even_budget: int | None = None


@dataclass(frozen=True)
class Selection:
    """What a method returns.

    Attributes:
        indices: (m,) int64 pool positions kept, sorted, unique.
        regions: the regions, lowest scores first; empty for methods that have none.
        region_of: (n,) int64, the region of every sample, -1 for those set aside as hardest; None without
            regions.
        verified: (v,) int64 pool positions that the target scored, sorted.
        filled: samples drawn at random from the uncut ones, because the regions' budgets left some of m over.
        filled_from_cut: samples taken back from the hardest ones for the same reason.
        weights: (n,) 1 / the probability with which a sample is drawn, 1 for those that are not drawn
            so; None where all are such.
    """

    indices: np.ndarray
    regions: tuple[Region, ...] = ()
    region_of: np.ndarray | None = None
    verified: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    filled: int = 0
    filled_from_cut: int = 0
    weights: np.ndarray | None = None
