"""What auto chooses in a regime, by try-outs judged by loss: a line in auto.csv beside this file.

    python experiments/regimes/auto.py REGIME SEED [WAY ...]

Its coreset is then the one of the way that it chose, at the same seed: a cell of the regime's comparison.
"""

import csv
import os
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock

from staff.config import SelectConfig, from_mapping
from staff.files import write_csv
from staff.tryout.run import try_ways

DATA = Path("runs/data/regimes")
SMOL = "examples/SmolLM2-135M-Instruct.gguf"
# as the cells of the regime's YAML have it; full_epochs: those in which the coreset takes as many steps
COMMON = {"max_length": 192, "metric": "loss", "answer_tokens": 4, "method": "auto"}
FAMILY = {**COMMON, "learning_rate": 3e-3, "num_regions": 25, "verification_budget": 4}
REGIMES = {
    "clean": {**FAMILY, "pruning_rate": 0.9, "full_epochs": 15 / 15},
    "copies": {**FAMILY, "pruning_rate": 0.9, "full_epochs": 15 / 15},
    "mixed": {**FAMILY, "pruning_rate": 0.9, "full_epochs": 15 / 15},
    "clean-98": {**FAMILY, "pruning_rate": 0.98, "full_epochs": 15 / 3, "try_cost": 0.5},
    "noisy": {**COMMON, "pruning_rate": 0.8, "full_epochs": 12 / 8, "learning_rate": 1e-3}
    | {"num_regions": 12, "verification_budget": 5, "target": SMOL, "draft": SMOL, "try_cost": 6.0},
}
# a pool of 1,200 rows is small: a try-out of 15 steps is a fifth of a pass, so that a few take more than the
# fine-tuning that they are to save; what they need was given
COST = 2.5
COLUMNS = ("regime", "seed", "tried", "chosen", "best", "margin", "two_errors", "full_margin", "seeds")
COLUMNS += ("predicted", "counted")


def main() -> None:
    regime, seed = sys.argv[1], int(sys.argv[2])
    family = Path(os.environ["STAFF_MODELS"])
    settings = {
        "target": str(family / "base"),
        "draft": str(family / "nano"),
        "try_cost": COST,
        **REGIMES[regime],
        "data": str(DATA / regime.partition("-")[0] / "train.jsonl"),
        "validation": str(DATA / "validation-100.jsonl"),
        "output": f"runs/regimes/auto/{regime}-{seed}",
        "seed": seed,
        "ways": sys.argv[3:],
    }
    about = try_ways(from_mapping(SelectConfig, settings, "auto.py"), on_progress=None)
    if not about["ways"]:
        sys.exit(" ".join(about["reasons"]))
    path = Path(__file__).with_name("auto.csv")
    with FileLock("runs/regimes/auto/lock"):
        lines = list(csv.reader(path.open(newline=""))) if path.exists() else [list(COLUMNS)]
        others = [line for line in lines[1:] if line[:2] != [regime, str(seed)]]
        write_csv(path, COLUMNS, sorted([*others, line(regime, seed, about)]))


def line(regime: str, seed: int, about: dict[str, Any]) -> list[str]:
    """The best of the ways that met random to the end, and what was spent."""
    last = max(row["seeds"] for row in about["ways"])
    best = max((row for row in about["ways"][1:] if row["seeds"] == last), key=lambda row: row["margin"])
    tried = [row["way"] for row in (about["draft"] or about)["ways"] or about["ways"]]
    margins = [f"{value:.4f}" for value in (best["margin"], 2 * best["error"])]
    margins.append(f"{about['full']['margin']:.4f}" if about["full"] else "")
    passes = [f"{about[when]['passes']:.2f}" for when in ("predicted", "counted")]
    return [regime, str(seed), " ".join(tried), about["chosen"], best["way"], *margins, str(last), *passes]


if __name__ == "__main__":
    main()
