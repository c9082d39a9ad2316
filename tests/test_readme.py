"""What the README shows in Python runs as it stands, with models in folders in place of the hub's."""

import re
import subprocess
import sys
from pathlib import Path

from family import write_pool

README = Path(__file__).parents[1] / "README.md"


def test_the_python_of_the_readme_runs(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pool(tmp_path / "train.jsonl")
    (block,) = re.findall(
        r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    for name in ("target", "draft"):
        block, replaced = re.subn(rf'{name}="[^"]+"', f"{name}={str(family / name)!r}", block)
        assert replaced == 1
    names: dict = {}
    exec(compile(block, str(README), "exec"), names)
    run = names["run"]
    assert len(run.indices) == len(run.coreset) == 12
    assert run.scores.num_rows == 60
    assert (tmp_path / "runs" / "x" / "coreset.jsonl").exists()


def test_importing_staff_is_timed_beside_numpy():
    code = "import time; began = time.monotonic(); import {}; print(time.monotonic() - began)"
    for name in ("numpy", "staff"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(name)], capture_output=True, text=True, check=True
        )
        sys.stdout.write(f"import {name}: {float(done.stdout):.3f} s\n")
