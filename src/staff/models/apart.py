"""Fine-tuning by several processes that share each step: `accelerate launch` starts them, each runs this.

What they are given lies in files, so that they need nothing of the process that started them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from staff import files
from staff.config import Launch
from staff.data.tokens import Pool

if TYPE_CHECKING:
    import torch

    from staff.models.files import Source

TOLD = "told.json"
PROGRESS = "progress.json"
WATCH_SECONDS = 0.2


def train_apart(
    loaded: Mapping[str, Any],
    pool: Pool,
    positions: np.ndarray,
    output: Path,
    *,
    launch: Launch,
    weights: np.ndarray | None = None,
    held_out: Pool | None = None,
    log: Path | None = None,
    on_progress: Any = None,
    **settings: Any,
) -> None:
    """`finetune.train_lora` in processes of its own.

    Args:
        loaded: of `loaded_as`.
        launch: how many processes, and accelerate's own configuration.

    Raises:
        ValueError: it ended; says how.
    """
    folder = output / "launch"
    folder.mkdir(parents=True, exist_ok=True)
    files.write_arrays(folder / "pool.npz", pool.to_arrays())
    files.write_arrays(
        folder / "rest.npz", {"positions": positions} | ({} if weights is None else {"weights": weights})
    )
    if held_out is not None:
        files.write_arrays(folder / "held_out.npz", held_out.to_arrays())
    told = {
        "loaded": dict(loaded),
        "settings": settings,
        "output": str(output),
        "log": str(log) if log else None,
    }
    files.write_json(folder / TOLD, told)
    (folder / PROGRESS).unlink(missing_ok=True)
    how = ["--config_file", launch.accelerate_config] if launch.accelerate_config else ["--multi_gpu"]
    how += ["--num_processes", str(launch.processes), "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *how, "-m", __name__, str(folder)]
    is_on_cpu = loaded["device"] == "cpu"
    environment = os.environ | ({"ACCELERATE_USE_CPU": "true"} if is_on_cpu else {})
    environment.setdefault("OMP_NUM_THREADS", "1")
    with open(folder / "output.txt", "wb") as said:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            shown = None
            while process.poll() is None:
                time.sleep(WATCH_SECONDS)
                at = files.read_checked(folder / PROGRESS)
                if at and at != shown and on_progress:
                    shown = at
                    on_progress(*at["step"])
        finally:
            if process.poll() is None:  # with all that it started
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    failed = files.read_checked(folder / "failed.json")
    if process.returncode or failed:
        last = (folder / "output.txt").read_text(errors="replace").strip().splitlines()[-1:]
        why = failed["cause"] if failed else f"{''.join(last)} (all of it is in {folder / 'output.txt'})"
        raise ValueError(f"fine-tuning in {launch.processes} processes ended: {why}")
    files.remove(folder)


def loaded_as(
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    load_in: str | None = None,
    cut: tuple[int, str] | None = None,
) -> dict[str, Any]:
    """How a model is loaded, in words that another process understands.

    Args:
        cut: blocks of its own that a draft keeps, and which.
    """
    paths = {
        "folder": str(source.folder.resolve()),
        "adapter": source.adapter and str(source.adapter.resolve()),
    }
    return {
        "source": {"name": source.name, "gguf": source.gguf, **paths},
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "trust_remote_code": trust_remote_code,
        "load_in": load_in,
        "cut": cut,
    }


def _model(loaded: Mapping[str, Any]) -> Any:
    """The model as its driver would load it, on this process's device."""
    import torch

    from staff.models import drafts, load
    from staff.models.files import Source

    paths = {name: Path(at) for name, at in loaded["source"].items() if name in ("folder", "adapter") and at}
    source = Source(loaded["source"]["name"], gguf=loaded["source"]["gguf"], **paths)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(f"cuda:{rank}" if loaded["device"] == "cuda" else loaded["device"])
    dtype = getattr(torch, loaded["dtype"])
    model = load.load_model(source, dtype, device, loaded["trust_remote_code"], loaded["load_in"])
    return drafts.cut(model, *loaded["cut"]) if loaded["cut"] else model


def main(folder: Path) -> None:
    """One of the processes."""
    from staff.models.finetune import train_lora

    told = json.loads((folder / TOLD).read_text(encoding="utf-8"))
    is_first = os.environ.get("RANK", "0") == "0"
    (folder / "failed.json").unlink(missing_ok=True)
    rest = files.read_arrays(folder / "rest.npz")
    pools = {
        name: Pool.from_arrays(arrays)
        for name in ("pool", "held_out")
        if (arrays := files.read_arrays(folder / f"{name}.npz"))
    }
    assert rest is not None

    def tell(*step: Any) -> None:
        files.write_checked(folder / PROGRESS, {"step": list(step)})

    try:
        train_lora(
            _model(told["loaded"]),
            pools["pool"],
            rest["positions"],
            Path(told["output"]),
            weights=rest.get("weights"),
            held_out=pools.get("held_out"),
            log=Path(told["log"]) if told["log"] else None,
            on_progress=tell if is_first else None,
            **told["settings"],
        )
    except ValueError as error:
        files.write_checked(folder / "failed.json", {"cause": str(error)})
        raise


if __name__ == "__main__":
    main(Path(sys.argv[1]))
