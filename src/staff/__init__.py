"""STAFF: the part of a fine-tuning data set that a large language model really needs, at a small model's
price.

    import staff
    run = staff.select("train.jsonl", target="Qwen/Qwen2.5-7B", draft="Qwen/Qwen2.5-0.5B", pruning_rate=0.8)
    run.indices, run.selection.regions, run.scores, run.coreset

Importing it loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, Unpack

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

    import datasets
    import pandas

    from staff.methods import METHODS
    from staff.runs.outputs import Run
    from staff.types import Progress, Selection

    Data: TypeAlias = (
        str
        | os.PathLike[str]
        | Sequence[str | os.PathLike[str]]
        | Iterable[Mapping[str, Any]]
        | datasets.Dataset
        | pandas.DataFrame
    )

__version__ = "0.1.0"
__all__ = ["METHODS", "Run", "Selection", "load_run", "select", "select_grid"]


class Settings(TypedDict, total=False):
    """What `staff select` takes as flags, under the same names; `staff select --help` explains each."""

    target: str
    draft: str | None
    scores: str | None
    validation: str | None
    budget: int | None
    budget_tokens: int | None
    format: str
    push_to_hub: str | None
    public: bool
    license: str
    option: tuple[str, ...]
    dedup: str | None
    keep: str | None
    drop_suspects: bool
    suspect_ratio: float
    group_by: str | None
    shares: str | None
    ways: Sequence[str]
    try_cost: float
    full_epochs: float
    metric: str
    metric_command: str | None
    answer_tokens: int
    preset: str
    draft_epochs: float
    draft_share: float
    target_epochs: float
    draft_blocks: str
    num_regions: int | None
    verification_budget: int | None
    verification: str
    verification_error: float
    hard_cutoff: float
    allocation: str
    pick: str
    seed: int
    columns: str | None
    train_on: str
    on_bad_row: str
    max_length: int
    dataset_info: str | None
    split: str | None
    dataset_config: str | None
    revision: str | None
    max_unpacked: int
    scope: str
    loss: str
    balance_layers: bool
    batch_tokens: int | None
    lora_rank: int
    lora_alpha: int
    lora_targets: Sequence[str]
    learning_rate: float
    warmup: float
    batch_size: int
    checkpoint_seconds: float
    device: str
    dtype: str
    load_in: str | None
    trust_remote_code: bool
    workers: int | None
    threads: int | None
    engine: str
    ray_address: str | None
    worker_timeout: float
    device_map: str | None
    max_memory: str | None
    processes: int
    accelerate_config: str | None


def select(
    data: Data,
    *,
    method: str | None = None,
    pruning_rate: float | None = None,
    output: str | os.PathLike[str] | None = None,
    update: bool = False,
    on_progress: Progress | None = None,
    **settings: Unpack[Settings],
) -> Run:
    """Choose the coreset of a pool, as `staff select` does.

    Args:
        data: a path, several paths, a list of dicts, a `datasets.Dataset` or a pandas DataFrame.
        method: a key of METHODS; None: that of the preset, or the default.
        pruning_rate: the fraction of the pool removed, in [0, 1); or give `budget`, the samples kept.
        output: the run's folder; None: a new temporary one.
        update: go on in a folder that was begun with other settings, keeping what still fits.
        on_progress: called with (stage, done, in all).
        **settings: see `Settings`.

    Returns:
        Run: path, rows, indices (row numbers kept), coreset, selection, scores, cost, manifest.

    Raises:
        ValueError: something that the caller can mend: a bad row, an unknown model, a setting out of range.
    """
    rates = () if pruning_rate is None else (pruning_rate,)
    (run,) = select_grid(
        data,
        methods=() if method is None else (method,),
        pruning_rates=rates,
        output=output,
        update=update,
        on_progress=on_progress,
        **settings,
    )
    return run


def select_grid(
    data: Data,
    *,
    methods: Sequence[str] = (),
    pruning_rates: Sequence[float] = (),
    output: str | os.PathLike[str] | None = None,
    update: bool = False,
    on_progress: Progress | None = None,
    **settings: Unpack[Settings],
) -> list[Run]:
    """A coreset for each method and pruning rate, from the same passes over the models.

    Args:
        methods: keys of METHODS; none: that of the preset, or the default.
        pruning_rates: fractions of the pool removed, in [0, 1).

    Returns:
        a Run for each, methods outside, rates inside. The other arguments are those of `select`.
    """
    import os

    from staff import config, pipeline

    values: dict[str, Any] = {**settings, "pruning_rate": tuple(pruning_rates)}
    values |= {"method": tuple(methods)} if methods else {}
    rows: Any = data
    paths = (
        [data] if isinstance(data, (str, os.PathLike)) else data if isinstance(data, (list, tuple)) else []
    )
    if paths and all(isinstance(path, (str, os.PathLike)) for path in paths):
        values["data"], rows = tuple(map(str, paths)), None
    if output is not None:
        values["output"] = str(output)
    made = config.from_mapping(config.SelectConfig, values, "staff.select")
    if "auto" in made.method:
        if rows is not None:
            raise ValueError("method auto reads the data again and again: write it to a file first")
        from staff import tryout

        made = tryout.settled(made, tryout.try_ways(made, update=update, on_progress=on_progress))
    return pipeline.select(made, rows, update=update, on_progress=on_progress)


def load_run(path: str | os.PathLike[str]) -> Run:
    """A finished run from its folder; the pool is read again from where it was.

    Raises:
        ValueError: the folder holds no finished run.
    """
    from staff.runs import outputs

    return outputs.load_run(str(path))


def __getattr__(name: str) -> Any:
    import importlib

    homes = {"METHODS": "staff.methods", "Selection": "staff.types", "Run": "staff.runs.outputs"}
    if name not in homes:
        raise AttributeError(f"module 'staff' has no attribute {name!r}")
    return getattr(importlib.import_module(homes[name]), name)
