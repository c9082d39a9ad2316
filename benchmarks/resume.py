"""How soon a finished run of a million scores is recognised: python benchmarks/resume.py [rows] [folder]

Makes a pool and scores of one's own, selects from them once, then types the same command again and takes the
least of five. Besides, it looks up the fingerprint of 14 GB of (empty) weights as a resumed run does.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from staff.runs.store import open_run


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp(prefix="resume-"))
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "pool.jsonl"
    with open(data, "w") as file:
        for i in range(n):
            file.write(
                json.dumps(
                    {
                        "id": f"r{i}",
                        "prompt": f"What is {i} times {i % 7}? " + "Explain. " * 20,
                        "response": f"It is {i * (i % 7)}.",
                    }
                )
                + "\n"
            )
    np.save(folder / "scores.npy", np.random.default_rng(0).lognormal(size=n).astype(np.float32))
    code = "import sys; from staff import cli\ntry: cli.main()\n"
    code += "finally: print(len({'torch', 'transformers'} & {*sys.modules}))"
    command = [
        sys.executable,
        "-c",
        code,
        "select",
        "--data",
        data,
        "--scores",
        folder / "scores.npy",
        "--method",
        "staff",
    ]
    command = [*map(str, command), "--pruning-rate", "0.8", "--output", str(folder / "run"), "--quiet"]

    def timed() -> float:
        began = time.monotonic()
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert said == "0\n", "torch was imported"
        return time.monotonic() - began

    print(f"{n:,} rows, {data.stat().st_size / 1e6:.0f} MB; select: {timed():.1f} s")
    print(f"again, nothing to do: {min(timed() for _ in range(5)):.2f} s")
    weights = folder / "weights.bin"
    with open(weights, "wb") as file:
        file.truncate(14 * 10**9)
    with open_run(folder / "run", "run") as run:
        for word in ("first", "remembered"):
            began = time.monotonic()
            run.hash_file(weights)
            print(f"hash of 14 GB, {word}: {time.monotonic() - began:.3f} s")
    weights.unlink()


if __name__ == "__main__":
    main()
