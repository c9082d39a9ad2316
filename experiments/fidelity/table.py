"""The fidelity study as tables: python experiments/fidelity/table.py > experiments/fidelity/RESULTS.md"""

import csv
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SHOWN = ("spearman_raw", "partial_raw", "regions_raw", "overlap_raw", "spearman_tuned", "partial_tuned", "overlap_tuned")
ABOUT = """# How little fine-tuning does a draft need?

600 rows of each task, target `base`; means over seeds, ± half of what lies between the lowest and the highest.
`regions`: adjusted Rand index of the regions; `coreset`: share of the coreset (p = 80 %) that STAFF's with this draft
and the target's own have in common, 0.2 by chance; U: passes of the target, v included; s: seconds on a busy machine.
docs/drafts.md says what it means."""
NAMES = ("ρ raw", "ρ raw, length out", "regions", "coreset", "ρ tuned", "ρ tuned, length out", "coreset, tuned")


def main() -> None:
    with open(HERE / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    print(ABOUT)
    for task in dict.fromkeys(row["task"] for row in rows):
        for scope in dict.fromkeys(row["scope"] for row in rows):
            own = [row for row in rows if (row["task"], row["scope"]) == (task, scope)]
            length = np.mean([float(row["length"]) for row in own])
            print(f"\n### {task}, {scope} (response length alone: {length:.2f})\n")
            print(f"| draft | T | f | rate | seeds | {' | '.join(NAMES)} | U | s |\n|{' --- |' * (7 + len(NAMES))}")
            keys = {(row["draft"], float(row["epochs"]), float(row["share"]), float(row["learning_rate"])) for row in own}
            for key in sorted(keys):
                cells = [row for row in own if (row["draft"], *(float(row[n]) for n in ("epochs", "share", "learning_rate"))) == key]
                values = []
                for name in SHOWN:
                    found = [float(row[name]) for row in cells]
                    spread = f" ±{(max(found) - min(found)) / 2:.2f}" if len(found) > 1 else ""
                    values.append(f"{np.mean(found):.2f}{spread}")
                passes = np.mean([float(row["passes"]) for row in cells])
                seconds = np.mean([float(row["tune_seconds"]) + float(row["score_seconds"]) for row in cells])
                draft, epochs, share, rate = key
                values += [f"{passes:.2f}", f"{seconds:.0f}"]
                print(f"| {draft} | {epochs:g} | {share:g} | {rate:g} | {len(cells)} | {' | '.join(values)} |")


if __name__ == "__main__":
    main()
