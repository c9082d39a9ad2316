"""What auto chooses in a regime, by try-outs judged by loss; a line in auto.csv beside this file:

    python experiments/regimes/auto.py REGIME SEED [WAY ...]

Its coreset is then the one of the way that it chose, at the same seed: a cell of the regime's comparison.
"""

import csv
import os
import sys
from pathlib import Path
from typing import Any

from staff.config import SelectConfig, from_mapping
from staff.tryout.run import try_ways

DATA = Path("runs/data/regimes")
RATES = {"clean": 0.9, "copies": 0.9, "mixed": 0.9, "clean-98": 0.98}
# a pool of 1,200 rows is small: a try-out of 15 steps is a fifth of a pass, so that a few take more than the
# fine-tuning that they are to save; what they need was given
COST = 2.5
COLUMNS = ("regime", "seed", "tried", "chosen", "best", "margin", "two_errors", "full_margin", "seeds")
COLUMNS += ("predicted", "counted")


def main() -> None:
    regime, seed = sys.argv[1], int(sys.argv[2])
    models = os.environ["STAFF_MODELS"]
    settings = {
        "data": str(DATA / regime.partition("-")[0] / "train.jsonl"),
        "validation": str(DATA / "validation-100.jsonl"),
        "target": f"{models}/base",
        "draft": f"{models}/nano",
        "method": "auto",
        "pruning_rate": RATES[regime],
        "output": f"runs/regimes/auto/{regime}-{seed}",
        "seed": seed,
        "metric": "loss",
        "ways": sys.argv[3:],
        "try_cost": COST,
        "full_epochs": 15 / (15 if RATES[regime] == 0.9 else 3),
        "answer_tokens": 4,
        "max_length": 192,
        "learning_rate": 3e-3,
        "num_regions": 25,
        "verification_budget": 4,
    }
    about = try_ways(from_mapping(SelectConfig, settings, "auto.py"), on_progress=None)
    path = Path(__file__).with_name("auto.csv")
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS] * is_new + [line(regime, seed, about)])


def line(regime: str, seed: int, about: dict[str, Any]) -> list[Any]:
    """The best of the ways that met random to the end, and what was spent."""
    last = max(row["seeds"] for row in about["ways"])
    best = max((row for row in about["ways"][1:] if row["seeds"] == last), key=lambda row: row["margin"])
    tried = [row["way"] for row in about["draft"].get("ways", about["ways"])]
    margins = (f"{value:.4f}" for value in (best["margin"], 2 * best["error"], about["full"]["margin"]))
    passes = (f"{about[when]['passes']:.2f}" for when in ("predicted", "counted"))
    return [regime, seed, " ".join(tried), about["chosen"], best["way"], *margins, last, *passes]


if __name__ == "__main__":
    main()
