"""What a try-out costs: planned before it starts, counted after."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from staff.comparison.evaluate import read_examples
from staff.comparison.grid import Cell, Comparison, select_config
from staff.comparison.run import Figures, selection_cost
from staff.config import SelectConfig
from staff.methods import METHODS
from staff.models.families import self_blocks
from staff.planning import finetuning_passes
from staff.runs.outputs import Run
from staff.tryout.ways import method_of
from staff.types import AGAINST_VALIDATION

PAIR = 2  # seeds that a round adds
FEWEST_STEPS = 10  # of a fine-tuning that says anything


@dataclasses.dataclass(frozen=True)
class Tries:
    """What a try-out does, and what that costs.

    Attributes:
        ways: candidates, random first, in the order in which they are given up where they are too many.
        on_draft: does a first round fine-tune the draft on every way's coreset?
        rounds: how many ways each round on the target has; every one adds PAIR seeds to those before it.
        full: is the model of PAIR seeds of the full data beside them?
        steps: of each fine-tuning.
        predicted: what looking, choosing, training and judging take, in scoring passes of the target over the
            pool (U), all of it as passes, and as a share of one full fine-tuning.
    """

    ways: tuple[str, ...]
    on_draft: bool
    rounds: tuple[int, ...]
    full: bool
    steps: int
    predicted: Mapping[str, float]


def plan_tries(
    config: SelectConfig,
    ways: Sequence[str],
    n: int,
    share: float,
    judges: int,
    found: Mapping[str, Any] | None = None,
    r: float = 0.0,
    on_draft: bool | None = None,
) -> Tries | None:
    """What --try-cost buys: as many of the ways as it bears, at as many steps as the coreset's own training
    has at most, the full data beside them where that leaves the steps their least; None where it is less than
    two seeds of two ways.

    Args:
        on_draft: does the draft take the first round of more than two ways? None: it is not asked whether it
            is faithful; else the untouched draft is judged for that.
    """
    full = finetuning_passes(config.trying.full_epochs)
    fewest, most = _steps(config, n, share)
    judging, step = _judging(config, n, judges, found), 2 * config.training.batch_size / n
    parts = {"looking": r * found["passes"] if found else 0.0}
    for count in range(len(ways), 1, -1):
        some = tuple(ways[:count])
        parts["choosing"] = _selecting(some, r)
        is_first = bool(on_draft) and count > 2
        untouched = 1 + r * (is_first or on_draft is False)
        left = config.trying.try_cost * full - parts["looking"] - parts["choosing"] - judging * untouched
        most_ways = math.ceil(count / 2) if is_first else count
        for rounds, beside in product(dict.fromkeys((rounds_of(most_ways), (most_ways,))), (True, False)):
            cells = PAIR * (sum(rounds) + beside + r * count * is_first)
            steps = min(most, int((left / cells - judging) / step))
            if steps < fewest:
                continue
            # with money left over, the last two meet over more seeds
            more = 2 * PAIR
            while steps == most and len(rounds) < 8 and rounds[-1] == 2:
                if (cells + more) * (judging + steps * step) > left:
                    break
                rounds, cells = (*rounds, 2), cells + more
            parts |= {"training": cells * steps * step, "judging": judging * (cells + untouched)}
            return Tries(some, is_first, rounds, beside, steps, _summed(config, parts))
    return None


def rounds_of(num_ways: int) -> tuple[int, ...]:
    """How many ways each round has, random among them: the worse half goes, till one is left beside it."""
    rounds = [num_ways]
    while rounds[-1] > 2:
        rounds.append(max(2, math.ceil(rounds[-1] / 2)))
    return (*rounds, 2) if len(rounds) == 1 else tuple(rounds)


def relative_cost(config: SelectConfig) -> float:
    """r, the cost of a token in the draft over that in the target, by their configurations; 0 without one."""
    from staff.models import drafts, families, load

    def cost(name: str, blocks: int | None = None) -> float:
        model = load.without_weights(load.resolve(name), config.engine.trust_remote_code)
        size = load.measure(drafts.cut(model, blocks, config.draft_blocks) if blocks else model)
        return size.scoring_flops(2, 1, config.scoring.scope)

    blocks = families.self_blocks(config.draft)
    draft = config.target if blocks else config.draft
    return cost(draft, blocks) / cost(config.target) if draft else 0.0


def no_draft_because(config: SelectConfig, r: float) -> str:
    """Why no round is on the draft; empty where one may be. r as of relative_cost."""
    if self_blocks(config.draft) is not None:
        return f"{config.draft} is no model of its own to fine-tune"
    if not config.draft:
        return "there is none"
    return f"{config.draft} costs as much as the target" if r >= 1 else ""


def _selecting(ways: Iterable[str], r: float) -> float:
    """What choosing costs at most, in U: a pass of the draft for what its needs share, one for each other."""
    methods = [METHODS[method_of(way)] for way in ways]
    needs = {need for method in methods for need in method.needs.values()}
    passes = {(need.model, need.quantity if need.quantity in AGAINST_VALIDATION else "") for need in needs}
    passes |= {("raw_draft", ""), ("raw_draft", "alone")} if "drop-suspects" in ways else set()
    total = 0.0
    for model, quantity in passes:
        # a gradient kept for comparing takes a pass there and two back
        total += (0.0 if model == "pool" else 1.0 if "target" in model else r) * (
            3 if quantity.startswith("simil") else 1
        )
    return total + 0.1 * any(method.verify for method in methods)


def _judging(config: SelectConfig, n: int, judges: int, found: Mapping[str, Any] | None) -> float:
    """What judging one model costs, in U: the references' loss, the prompts, a step for each token said."""
    lengths = (found or {}).get("lengths", {})
    row = sum(lengths[part]["50%"] for part in ("prompt", "response")) if lengths else 200
    return judges / n * (2 + config.trying.answer_tokens / max(row, 1))


def _steps(config: SelectConfig, n: int, share: float) -> tuple[int, int]:
    """Steps of a fine-tuning at least and at most: what says anything, and the coreset's own training."""
    batches = -(-round(share * n) // config.training.batch_size)
    most = max(1, round(config.trying.full_epochs * batches))
    return min(FEWEST_STEPS, most), most


def _summed(config: SelectConfig, parts: Mapping[str, float]) -> dict[str, float]:
    """Parts of the cost in U, their sum, and that as a share of one full fine-tuning."""
    passes = sum(parts.values())
    return {**parts, "passes": passes, "share": passes / finetuning_passes(config.trying.full_epochs)}


def least_share(
    config: SelectConfig,
    ways: Sequence[str],
    n: int,
    share: float,
    judges: int,
    found: Mapping[str, Any] | None,
    r: float,
) -> float:
    """The share of a full fine-tuning that two seeds of two ways take."""
    cells, looking = 2 * PAIR, r * found["passes"] if found else 0.0
    passes = looking + _selecting(ways[:2], r) + _judging(config, n, judges, found) * (cells + 1)
    passes += cells * _steps(config, n, share)[0] * 2 * config.training.batch_size / n
    return passes / finetuning_passes(config.trying.full_epochs)


def counted_cost(
    config: SelectConfig,
    comparison: Comparison,
    found: Mapping[str, Any] | None,
    done: Mapping[Cell, Figures],
    tokens: int,
    coresets: Mapping[Cell, Run],
    tuned: Iterable[Figures],
    judged: Mapping[Path, float],
) -> dict[str, float]:
    """What the try-outs took, in U: the diagnosis, every way's choosing once, each fine-tuning, each judging
    by its tokens.

    Args:
        done: fine-tunings of the target.
        tokens: of the pool.
        coresets: that the draft was fine-tuned on.
        tuned: what that took.
        judged: folders of answers besides, each with the cost of a token in its model, the target's being 1.
    """
    (task,) = comparison.tasks.values()
    one_pass = next(f["finetune_flops"] / f["finetune_passes"] for f in done.values())
    choosing = {cell.method: 0.0 for cell in (*done, *coresets)}
    for cell, run in coresets.items():
        chosen = select_config(comparison, task, cell.method, int(cell.seed or 0), str(run.path))
        took = selection_cost(comparison.variants[cell.method].method, chosen, run)["flops"]
        choosing[cell.method] = max(choosing[cell.method], took)
    for cell, figures in done.items():
        choosing[cell.method] = max(choosing[cell.method], figures["select_flops"])
    judging = 0.0
    for folder, weight in {**judged, **{comparison.output / f["folder"]: 1.0 for f in done.values()}}.items():
        examples = read_examples(folder / "scores.jsonl")
        said = 2 * sum(examples["prompt_tokens"]) + 2 * sum(examples["answer_tokens"])
        judging += weight * said / tokens
    flops = {"looking": found["flops"] if found else 0.0, "choosing": sum(choosing.values())}
    flops["training"] = sum(figures["finetune_flops"] for figures in (*done.values(), *tuned))
    parts = {name: value / one_pass for name, value in flops.items()}
    return _summed(config, {**parts, "judging": judging})
