"""STAFF: pick the part of a fine-tuning data set that a large language model really needs, at a small model's price.

    import staff
    run = staff.select("train.jsonl", target="Qwen/Qwen2.5-7B", draft="Qwen/Qwen2.5-0.5B", pruning_rate=0.8, output="runs/x")
    run.indices, run.selection.regions, run.scores

Importing it loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from staff.runs.outputs import Run
    from staff.runs.pieces import Progress

__version__ = "0.1.0"
__all__ = ["METHODS", "Run", "Selection", "load_run", "select"]


def select(
    data: Any,
    *,
    output: str | None = None,
    update: bool = False,
    on_progress: Progress | None = None,
    **settings: Any,
) -> Run | list[Run]:
    """Choose the coreset of a pool, as `staff select` does.

    Args:
        data: a path, several paths, a list of dicts, a `datasets.Dataset` or a pandas DataFrame.
        output: the run's folder; None: a new temporary one.
        update: go on in a folder that was begun with other settings, keeping what still fits.
        on_progress: called with (stage, done, in all).
        **settings: fields of `staff.config.SelectConfig`: target, draft, pruning_rate or budget, method, ...

    Returns:
        Run: path, rows, indices (row numbers kept), selection, scores, cost, manifest. A list of them for several methods
        or pruning rates.

    Raises:
        ValueError: something that the caller can mend: a bad row, an unknown model, a setting out of range.
    """
    import os

    from staff import config, pipeline

    is_path = isinstance(data, (str, os.PathLike))
    is_paths = (
        isinstance(data, (list, tuple))
        and bool(data)
        and all(isinstance(part, (str, os.PathLike)) for part in data)
    )
    if is_path or is_paths:
        settings["data"] = (str(data),) if is_path else tuple(map(str, data))
        data = None
    if output is not None:
        settings["output"] = str(output)
    made = config.from_mapping(config.SelectConfig, settings, "staff.select")
    runs = pipeline.select(made, data, update=update, on_progress=on_progress)
    return runs[0] if len(runs) == 1 else runs


def load_run(path: str) -> Run:
    """A finished run from its folder; the pool is read again from where it was.

    Raises:
        ValueError: the folder holds no finished run.
    """
    from staff.runs import outputs

    return outputs.load_run(path)


def __getattr__(name: str) -> Any:
    if name == "METHODS":
        from staff.methods import METHODS

        return METHODS
    if name == "Selection":
        from staff.types import Selection

        return Selection
    if name == "Run":
        from staff.runs.outputs import Run

        return Run
    raise AttributeError(f"module 'staff' has no attribute {name!r}")
