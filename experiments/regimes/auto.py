"""What auto chooses in a regime, by try-outs judged by loss:

    python experiments/regimes/auto.py REGIME SEED [WAY ...]

Its coreset is then the one of the way that it chose, at the same seed: a cell of the regime's comparison.
"""

import json
import os
import sys
from pathlib import Path

from staff.config import SelectConfig, from_mapping
from staff.tryout import try_ways

DATA = Path("runs/data/regimes")
RATES = {"clean": 0.9, "copies": 0.9, "mixed": 0.9, "clean-98": 0.98}
# a pool of 1,200 rows is small: a try-out of 20 steps is a quarter of a pass, so that a few take more than
# the fine-tuning that they are to save; what they need was given
COST = 0.8


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
        "full_epochs": 20 / (15 if RATES[regime] == 0.9 else 3),
        "answer_tokens": 4,
        "max_length": 192,
        "learning_rate": 3e-3,
        "num_regions": 25,
        "verification_budget": 4,
    }
    about = try_ways(from_mapping(SelectConfig, settings, "auto.py"), on_progress=None)
    print(json.dumps({"regime": regime, "seed": seed, **about}))


if __name__ == "__main__":
    main()
