"""Answers to the prompts of a test file and the loss on its references, in shards: this process's or
workers'."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from staff import files
from staff.config import EvaluateConfig, flat, from_mapping
from staff.data.chat import template_of
from staff.data.tokens import Pool
from staff.models import load
from staff.models.answering import Answerer
from staff.models.files import Source, resolve
from staff.runs import account
from staff.runs.crew import Crew, has_workers, threads_of
from staff.runs.store import RunFolder, version_of
from staff.runs.worker import Opened, check_engine, check_files, driver_left, local_rank
from staff.scoring.shards import Arrays, Score, Shards, make_shards, read_shards
from staff.types import Stage

# examples whose answers are written together: a resumed run begins at the first missing shard
ROWS_A_SHARD = 128
ANSWERING = 3  # raised when the same inputs would give other answers than before
WHAT_IS_ASKED = "asked.npz"


@dataclass(frozen=True, eq=False)
class Asked:
    """What a model is asked, in its tokens.

    Attributes:
        prompts: n arrays of token ids.
        pool: the same with their references.
        numbers: (n,) of the rows.
        end: the token that ends an answer in the model's template.
    """

    prompts: list[np.ndarray]
    pool: Pool
    numbers: np.ndarray
    end: int

    def to_arrays(self) -> Arrays:
        ends = np.cumsum([len(prompt) for prompt in self.prompts])
        asked = {"prompts": np.concatenate(self.prompts), "ends": ends, "numbers": self.numbers}
        return {**asked, "end": np.array([self.end]), **self.pool.to_arrays()}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Asked:
        prompts = np.split(arrays["prompts"], arrays["ends"][:-1])
        return cls(prompts, Pool.from_arrays(arrays), arrays["numbers"], int(arrays["end"][0]))


def engine_of(config: EvaluateConfig) -> tuple[torch.device, torch.dtype, dict[str, Any]]:
    """Where a model answers and in what, and that in words, with the versions that answers hang on."""
    is_here = config.spread.engine == "local"
    device = load.pick_device(config.engine.device, is_here)
    dtype = load.pick_dtype(config.engine.dtype, device, is_here)
    versions = {name: version_of(name) for name in ("torch", "transformers")}
    told = {"engine": ANSWERING, "dtype": str(dtype), "device": device.type, "versions": versions}
    return device, dtype, told


def unpacked(config: EvaluateConfig, run: RunFolder, source: Source, content: str) -> Source:
    """A model's files; a .gguf file is unpacked once."""
    if not source.gguf:
        return source
    _, dtype, _ = engine_of(config)
    return load.unpack_gguf(source, run.piece("model", {"gguf": content, "dtype": str(dtype)}), dtype)


def make_answers(
    config: EvaluateConfig, run: RunFolder, folder: Path, source: Source, content: str, asked: Asked
) -> dict[str, list[Any]]:
    """n values each, in the examples' order: prediction, answer_tokens, cut, loss.

    Args:
        folder: where shards are kept; of these inputs and settings alone.
        source: the model's files, unpacked.
        content: their fingerprint, as they came.
    """
    spread, n, done = config.spread, len(asked.prompts), 0
    opened = _opened(config, run, folder, source, asked)
    shards = opened.shards

    def on_samples(samples: int) -> None:
        nonlocal done
        done += samples
        run.tell(Stage("answer"), done, n)

    threads = shards.budgets.agree("threads", threads_of(spread, source, engine_of(config)[0].type))
    make: Callable[[list[int]], None]
    if has_workers(spread):
        files.write_arrays(folder / WHAT_IS_ASKED, asked.to_arrays())
        offer = {"kind": "answers", "config": flat(config), "content": content, "threads": threads}
        offer |= {"engine": engine_of(config)[2], "folder": folder.name}
        make = partial(Crew(run, spread).make, offer, shards, on_samples=on_samples)
    else:
        told: Any = {"name_of": opened.name_of, "on_samples": on_samples, "on_shard": opened.on_shard}
        make = partial(load.with_threads, threads, partial(make_shards, opened.load, shards, **told))
    parts = read_shards(shards, make, on_samples)
    made: dict[str, list[Any]] = {"prediction": [], "answer_tokens": [], "cut": [], "loss": []}
    for number in sorted(parts):
        made["prediction"] += json.loads(parts[number]["prediction"].tobytes())
        for name in ("answer_tokens", "cut", "loss"):
            made[name] += parts[number][name].tolist()
    back = np.argsort(_order(asked))
    return {name: [values[i] for i in back] for name, values in made.items()}


def open_answers(run: RunFolder, offer: Mapping[str, Any]) -> Opened:
    """Answers that a driver offers, for its workers."""
    config = from_mapping(EvaluateConfig, offer["config"], "the driver's settings")
    source = resolve(config.model, "--model")
    check_files(run, source, config.model, offer["content"])
    check_engine(offer["engine"], engine_of(config)[2])
    folder = run.work / offer["folder"]
    arrays = driver_left(folder / WHAT_IS_ASKED, files.read_arrays)
    source = unpacked(config, run, source, offer["content"])
    return _opened(config, run, folder, source, Asked.from_arrays(arrays), offer["threads"])


def _order(asked: Asked) -> np.ndarray:
    """Like lengths together: little padding."""
    return np.argsort([-len(prompt) for prompt in asked.prompts], kind="stable")


def _opened(
    config: EvaluateConfig,
    run: RunFolder,
    folder: Path,
    source: Source,
    asked: Asked,
    threads: int | None = None,
) -> Opened:
    """The shards, and what makes one.

    Args:
        threads: of a worker.
    """
    order = _order(asked)
    positions = dict(enumerate(order[at : at + ROWS_A_SHARD] for at in range(0, len(order), ROWS_A_SHARD)))
    shards = Shards(folder, "shard", positions, asked.pool.lengths, config.batch_tokens)

    def ready() -> tuple[Score, int]:
        if threads:
            load.take_gpu(local_rank(os.environ), threads)
        run.tell(Stage("load"), 0, 1)
        (device, dtype, _), trusts = engine_of(config), config.engine.trust_remote_code
        tokenizer = load.load_tokenizer(source, trusts)
        tokenizer.chat_template = template_of(tokenizer, config.reading)
        model = load.load_model(source, dtype, device, trusts, config.engine.load_in)
        limits = config.max_new_tokens, config.batch_tokens
        return partial(_answer, Answerer(model, tokenizer, asked.end, *limits), asked), config.batch_tokens

    def on_shard(places: np.ndarray, seconds: float) -> None:
        # before the shard: a kill between the two counts the work twice, as it is then done twice
        once = f"{folder.name} {places[0]}"
        account.spend(run.work, Stage("answer"), once=once, seconds=seconds, samples=len(places))

    return Opened(shards, ready, lambda position: f"row {asked.numbers[position]}", on_shard)


def _answer(
    answerer: Answerer,
    asked: Asked,
    positions: np.ndarray,
    batch_tokens: int,
    on_samples: Callable[[int], None] | None = None,
) -> Arrays:
    answerer.batch_tokens = batch_tokens  # what ran out of memory before says nothing here
    answerer.on_batch = partial(on_samples, 0) if on_samples else None
    found = answerer.answer([asked.prompts[i] for i in positions])
    losses = answerer.losses(asked.pool, positions)
    if on_samples:
        on_samples(len(positions))
    said = np.frombuffer(json.dumps(found["prediction"]).encode(), np.uint8)  # numpy's text ends at a nul
    numbers = {
        "answer_tokens": np.array(found["answer_tokens"], np.int64),
        "cut": np.array(found["cut"], bool),
    }
    return {"prediction": said, **numbers, "loss": losses}
