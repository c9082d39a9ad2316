"""What each piece of work is made of: pure functions from settings and fingerprints to the keys that pieces
lie under.

A key holds exactly what determines the piece's bytes, so equal keys may share it and a changed one never
takes it up.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from staff.config import Reading, Scoring, SelectConfig, Training
from staff.runs.store import machine

ENGINE = 5  # raised when the same inputs would give other scores than before

LORA = ("lora_rank", "lora_alpha", "lora_targets")

Key = dict[str, Any]


@dataclass(frozen=True)
class ModelSpec:
    """A model of a run: which base, and what was done to it before it scores.

    Attributes:
        base: "draft" or "target", a key of the run's sources.
        epochs: of fine-tuning on the pool; 0 takes it as it comes.
        share: of the pool that it is fine-tuned on.
    """

    base: str
    epochs: float = 0.0
    share: float = 1.0


def model_specs(config: SelectConfig) -> dict[str, ModelSpec]:
    """The models that a method's needs may name."""
    return {
        "raw_draft": ModelSpec("draft"),
        "draft": ModelSpec("draft", config.draft_epochs, config.draft_share),
        "target": ModelSpec("target"),
        "tuned_target": ModelSpec("target", config.target_epochs),
    }


def engine_key(dtype: str, device: str, batch_tokens: int | None, threads: int | None = None) -> Key:
    """What numbers are computed with: other versions or kinds of device round otherwise."""
    versions = machine()["versions"]
    return {
        "engine": ENGINE,
        "dtype": dtype,
        "device": device,
        "batch_tokens": batch_tokens,
        "versions": versions,
    } | ({} if threads is None else {"threads": threads})


def pool_key(data: str, reading: Reading, tokenizer: str) -> Key:
    """The data, how it is read, and the tokenizer's own files: models that share one share the pool."""
    return {"data": data, "reading": dataclasses.asdict(reading), "tokenizer": tokenizer}


def base_key(weights: str, blocks: tuple[str, str] | None, load_in: str | None) -> Key:
    """A model as it comes; `blocks` says which of its own a self-made draft keeps."""
    return {"weights": weights, "blocks": blocks, "load_in": load_in}


def model_key(base: Key, pool: Key, spec: ModelSpec, training: Training, seed: int, engine: Key) -> Key:
    """The base as it comes, or what its tuned adapter is made of."""
    if not spec.epochs:
        return base
    settings = dataclasses.asdict(training)
    del settings["checkpoint_seconds"]
    return {
        "base": base,
        "pool": pool,
        "epochs": spec.epochs,
        "share": spec.share,
        "seed": seed,
        **settings,
        **engine,
    }


def scores_key(model: Key, pool: Key, scoring: Scoring, training: Training, seed: int, engine: Key) -> Key:
    """Scores of a model over a pool; with no adapter of its own it gets a fresh, seeded one in scope
    "lora"."""
    return {
        "model": model,
        "pool": pool,
        "scope": scoring.scope,
        "lora": [getattr(training, name) for name in LORA] if scoring.scope == "lora" else None,
        "seed": seed if scoring.scope in ("lora", "released") else None,
        "loss": scoring.loss,
        "balance_layers": scoring.balance_layers,
        **engine,
    }


def is_seedless(key: Key) -> bool:
    """Is a piece the same for every seed of its run? Neither a seed nor rows that it drew are in the key."""
    parts = [value for value in key.values() if isinstance(value, dict)]
    return all(key.get(name) is None for name in ("seed", "asked")) and all(map(is_seedless, parts))
