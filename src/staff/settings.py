"""What the functions of `staff` take by name: the settings of `staff.config`, for type checkers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict


class ReadingSettings(TypedDict, total=False):
    """`staff.config.Reading` explains each."""

    columns: str | None
    train_on: str
    on_bad_row: str
    max_length: int
    on_long: str
    chat_template: str | None
    template_date: str | None
    dataset_info: str | None
    split: str | None
    dataset_config: str | None
    revision: str | None
    max_unpacked: int


class ScoringSettings(TypedDict, total=False):
    """`staff.config.Scoring` explains each."""

    scope: str
    loss: str
    balance_layers: bool
    batch_tokens: int | None


class TrainingSettings(TypedDict, total=False):
    """`staff.config.Training` explains each."""

    lora_rank: int
    lora_alpha: int
    lora_targets: Sequence[str]
    learning_rate: float
    warmup: float
    batch_size: int
    checkpoint_seconds: float


class EngineSettings(TypedDict, total=False):
    """`staff.config.Engine` explains each."""

    device: str
    dtype: str
    load_in: str | None
    trust_remote_code: bool


class SpreadSettings(TypedDict, total=False):
    """`staff.config.Spread` explains each."""

    workers: int | None
    threads: int | None
    engine: str
    ray_address: str | None
    worker_timeout: float
    device_map: str | None
    max_memory: str | None


class LaunchSettings(TypedDict, total=False):
    """Over how many processes a fine-tuning goes; `staff.config` explains each."""

    processes: int
    accelerate_config: str | None


class VerifyingSettings(TypedDict, total=False):
    """How a draft scores and what of it the target verifies; `staff select --help` explains each."""

    draft_epochs: float
    draft_share: float
    draft_blocks: str
    num_regions: int | None
    verification_budget: int | None
    verification: str
    verification_error: float
    hard_cutoff: float


class SelectSettings(
    ReadingSettings,
    ScoringSettings,
    TrainingSettings,
    EngineSettings,
    SpreadSettings,
    LaunchSettings,
    VerifyingSettings,
    total=False,
):
    """What `staff select` takes as flags, under the same names; `staff select --help` explains each."""

    target: str
    draft: str | None
    scores: str | None
    validation: str | None
    quality_model: str | None
    quality_column: str | None
    likeness: str
    max_new_tokens: int
    budget: int | None
    budget_tokens: int | None
    format: str
    push_to_hub: str | None
    public: bool
    license: str
    option: Sequence[str]
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
    target_epochs: float
    allocation: str
    pick: str
    seed: int


class ScoreSettings(ReadingSettings, ScoringSettings, EngineSettings, SpreadSettings, total=False):
    """What `staff score` takes as flags."""

    lora_rank: int
    lora_alpha: int
    lora_targets: Sequence[str]
    seed: int


class FinetuneSettings(ReadingSettings, TrainingSettings, EngineSettings, LaunchSettings, total=False):
    """What `staff finetune` takes as flags."""

    weights: str | None
    epochs: float
    max_steps: int | None
    eval_data: str | Sequence[str]
    merge: bool
    report_to: str | None
    seed: int


class EvaluateSettings(ReadingSettings, EngineSettings, SpreadSettings, total=False):
    """What `staff evaluate` takes as flags."""

    max_new_tokens: int
    batch_tokens: int


class InspectSettings(ReadingSettings, total=False):
    """What `staff inspect` takes as flags."""

    trust_remote_code: bool


class PlanSettings(
    ReadingSettings, ScoringSettings, TrainingSettings, EngineSettings, VerifyingSettings, total=False
):
    """What `staff plan` takes as flags."""

    draft: str | None
    pruning_rate: float | Sequence[float]
    epochs: float
    group_by: str | None
    seed: int
