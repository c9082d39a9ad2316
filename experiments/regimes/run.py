"""The fixed arms of every regime, every regime's first seed before the second:

    python experiments/regimes/pools.py && python experiments/regimes/run.py [--minutes 8] [REGIME ...]

Type it again and it goes on; `staff compare --config experiments/regimes/REGIME.yaml --tables` makes tables.
"""

import argparse
import dataclasses
import time
from functools import partial
from pathlib import Path

from staff.comparison.grid import read_comparison
from staff.comparison.run import compare

REGIMES = ("copies", "mixed", "clean", "noisy")


class Over(Exception):
    """The minutes are over; what is finished is kept."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("regimes", nargs="*", default=REGIMES)
    parser.add_argument("--minutes", type=float, default=8.0)
    given = parser.parse_args()
    end = time.monotonic() + 60 * given.minutes

    def tell(regime: str, stage: str, done: int, total: int) -> None:
        if stage == "cells" and done < total:
            print(f"{time.strftime('%H:%M:%S')} {regime}: {done} of {total} cells", flush=True)
            if time.monotonic() > end:
                raise Over

    comparisons = {name: read_comparison(Path(__file__).with_name(f"{name}.yaml")) for name in given.regimes}
    for number in range(max(len(c.seeds) for c in comparisons.values())):
        for regime, whole in comparisons.items():
            if number < len(whole.seeds):
                some = dataclasses.replace(whole, seeds=whole.seeds[: number + 1])
                compare(some, on_progress=partial(tell, regime))
    print("all done")


if __name__ == "__main__":
    try:
        main()
    except Over:
        print("to be continued")
