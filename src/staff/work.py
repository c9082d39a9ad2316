"""What the stages of a run share: its models, pools and scores, made at first use and kept on disk by fingerprint."""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from staff import formats, plan
from staff.config import SelectConfig
from staff.methods import Method
from staff.store import Ledger, RunDirectory, fingerprint, read_arrays, write_arrays, write_json
from staff.types import Selection

Progress = Callable[[str, int, int], None]  # stage, done, in all
PACKAGES = ("numpy", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")
TRAINING = ("lora_rank", "lora_alpha", "learning_rate", "warmup", "batch_size", "seed", "checkpoint_seconds")
ENGINE = 1  # raised when the same inputs would give other scores than before


class Work:
    """What the stages of one run share: its models, pools and scores, made at first use and kept on disk."""

    def __init__(self, config: SelectConfig, run: RunDirectory, rows: formats.Rows, sources, inputs, tell: Progress):
        self.config, self.run, self.rows, self.sources, self.inputs, self.tell = config, run, rows, sources, inputs, tell
        self._pools: dict[str, Any] = {}
        self._scorer: tuple[str, Any] | None = None
        if sources:
            from staff import models

            self.device = models.pick_device(config.device)
            self.dtype = models.pick_dtype(config.dtype, self.device)

    def _pool_key(self, name: str) -> dict[str, Any]:
        return {
            "data": self.inputs["data"],
            "reading": dataclasses.asdict(self.config.reading),
            "tokenizer": self.inputs[name],
            "max_length": self.config.max_length,
        }

    def _engine_key(self) -> dict[str, Any]:
        return {
            "engine": ENGINE,
            "dtype": str(self.dtype),
            "device": self.device.type,
            "batch_tokens": self.config.batch_tokens,
            "versions": {name: version_of(name) for name in PACKAGES},
        }

    def _adapter_key(self) -> dict[str, Any]:
        """What a tuned draft is made of."""
        config = self.config
        names = ("draft_epochs", "draft_share", *(name for name in TRAINING if name != "checkpoint_seconds"))
        return {"base": self._base_key("draft"), "pool": self._pool_key("draft"), **{name: getattr(config, name) for name in names}}

    def _base_key(self, name: str) -> dict[str, Any]:
        keeps = self.config.draft if name == "draft" and (self.config.draft or "").startswith("self") else None
        blocks = [keeps, self.config.draft_blocks] if keeps else None
        return {"weights": self.inputs[name], "blocks": blocks, "load_in": self.config.load_in}

    def _scores_key(self, name: str) -> dict[str, Any]:
        model = self._adapter_key() if name == "draft" and self.config.draft_epochs else self._base_key(name)
        config = self.config
        # with no adapter of its own a model gets a fresh, seeded one to be scored in scope "lora"; "released" has its own
        fresh = {"lora": [config.lora_rank, config.lora_alpha, config.seed], "released": [config.seed]}.get(config.scope)
        measured = {"scope": config.scope, "lora": fresh, "loss": config.loss, "balance_layers": config.balance_layers}
        return {"model": model, "pool": self._pool_key(name), **measured, **self._engine_key()}

    def pool(self, name: str):
        """The pool in a model's tokens."""
        from staff.pool import Pool, tokenise

        key = self._pool_key(name)
        if fingerprint(key) not in self._pools:
            path = self.run.piece("pool", key) / "tokens.npz"
            arrays = read_arrays(path)
            if arrays is None:
                tokenizer = self._load_tokenizer(name)
                n = len(self.rows)
                began = time.monotonic()
                pool = tokenise(self.rows.examples(), tokenizer, self.config.max_length, lambda done: self.tell("tokenise", done, n))
                arrays = {"input_ids": pool.input_ids, "is_response": pool.is_response, "offsets": pool.offsets}
                arrays["counts"] = np.array([pool.truncated, pool.cut_responses])
                write_arrays(path, arrays)
                self.run.spend(stage="tokenise", seconds=time.monotonic() - began)
            counts = map(int, arrays["counts"])
            self._pools[fingerprint(key)] = Pool(arrays["input_ids"], arrays["is_response"], arrays["offsets"], *counts)
        return self._pools[fingerprint(key)]

    def _source(self, name: str):
        """A model's source; a .gguf file is unpacked once."""
        from staff import models

        source = self.sources[name]
        if source.gguf:
            self.tell(f"unpack {source.gguf}", 0, 1)
            folder = self.run.piece("model", {"gguf": self.inputs[name], "dtype": str(self.dtype)})
            source = models.unpack_gguf(source, folder, self.dtype)
            self.tell(f"unpack {source.gguf or self.sources[name].gguf}", 1, 1)
        return source

    def _load_tokenizer(self, name: str):
        from staff import models

        return models.load_tokenizer(self._source(name), self.config.trust_remote_code)

    def _load(self, name: str):
        """A base model, cut to its blocks where the draft is the target's own; an adapter that it came with is merged,
        save where its matrices are what is scored."""
        from staff import draft, models

        config = self.config
        scored = config.scope == "lora" and not (name == "draft" and config.draft_epochs)
        source = self._source(name)
        model = models.load_model(source, self.dtype, self.device, config.trust_remote_code, config.load_in, merge=not scored)
        keep = models.self_blocks(self.config.draft) if name == "draft" else None
        return draft.cut(model, keep, self.config.draft_blocks) if keep else model

    def adapter(self) -> Path:
        """The folder of the draft's adapter, tuned if it is not there."""
        from staff import models
        from staff.finetune import finetune

        config, pool = self.config, self.pool("draft")
        folder = self.run.piece("draft", self._adapter_key())
        done = folder / "finished.json"
        if not done.exists():
            share = np.random.default_rng([config.seed, 1])
            size = max(1, round(config.draft_share * len(pool)))
            positions = np.sort(share.choice(len(pool), size, replace=False))
            began = time.monotonic()
            model = finetune(
                self._load("draft"),
                pool,
                positions,
                folder,
                epochs=config.draft_epochs,
                on_progress=lambda done, total: self.tell("fine-tune the draft", done, total),
                **{name: getattr(config, name) for name in TRAINING},
            )
            tokens, response = pool.lengths[positions].sum(), pool.response_tokens()[positions].sum()
            flops = models.measure(model).training_flops(int(tokens), int(response)) * config.draft_epochs
            self.run.spend(
                stage="fine-tune the draft",
                seconds=time.monotonic() - began,
                samples=len(positions) * config.draft_epochs,
                tokens=float(tokens) * config.draft_epochs,
                flops=flops,
            )
            write_json(done, {"samples": len(positions), "epochs": config.draft_epochs})
        return folder

    def scorer(self, name: str, calibrate: bool = False):
        """A model ready to score; the one loaded before it is freed.

        Args:
            calibrate: it will score single samples and not the pool. With --balance-layers the mean norm of each weight
                is then taken over `score.CALIBRATION` samples, drawn by the seed and counted as the verification they are for.
        """
        from staff import finetune, models
        from staff.score import CALIBRATION, Scorer

        config = self.config
        if self._scorer and self._scorer[0] == name:
            return self._scorer[1]
        self.free()
        adapter = self.adapter() if name == "draft" and self.config.draft_epochs else None
        began = time.monotonic()
        model = self._load(name)
        size = models.measure(model)
        if adapter:
            model = finetune.load_adapter(model, adapter)
        elif config.scope == "lora" and not hasattr(model, "peft_config"):
            model = finetune.add_lora(model, config.lora_rank, config.lora_alpha, config.seed)
        made = Scorer(model, config.scope, config.batch_tokens, loss=config.loss, balance=config.balance_layers, seed=config.seed)
        self._scorer = (name, made)
        self.run.spend(stage="load models", seconds=time.monotonic() - began)
        folder = self.run.piece("scores", self._scores_key(name))
        write_json(folder / "size.json", dataclasses.asdict(size))
        if calibrate and config.balance_layers:
            kept = read_arrays(folder / "site_means.npz")
            if kept:
                made.site_means = kept["means"]
            else:
                pool, began = self.pool(name), time.monotonic()
                drawn = np.random.default_rng([config.seed, 2]).choice(len(pool), min(CALIBRATION, len(pool)), replace=False)
                write_arrays(folder / "site_means.npz", {"means": made.calibrate(pool, np.sort(drawn))})
                self._spend(f"verify on the {name}", name, np.sort(drawn), time.monotonic() - began)
        return made

    def free(self) -> None:
        """Let go of the model that is loaded."""
        self._scorer = None
        gc.collect()

    def scores(self, name: str) -> np.ndarray:
        """(n,) efforts of the whole pool on a model."""
        return self.quantities(name)["effort"]

    def quantities(self, name: str) -> dict[str, np.ndarray]:
        """All that one pass over the pool gives, (n,) each, by shards."""
        from staff.score import score_shards

        folder = self.run.piece("scores", self._scores_key(name))
        whole = read_arrays(folder / "scores.npz")
        if whole is not None:
            return whole
        pool = self.pool(name)
        if name == "draft" and self.config.draft_epochs:
            self.adapter()  # first, so that its seconds are not counted as scoring
        stage = f"score on the {name}"
        done = 0
        began = time.monotonic()

        def advance(samples: int) -> None:
            nonlocal done
            done += samples
            self.tell(stage, done, len(pool))

        def scorer():
            nonlocal began
            made = self.scorer(name)
            began = time.monotonic()
            return made

        def save(number: int, part: dict[str, np.ndarray]) -> None:
            nonlocal began
            write_arrays(folder / f"shard-{number:05d}.npz", part)
            self._spend(stage, name, np.arange(done - len(part["effort"]), done), time.monotonic() - began)
            began = time.monotonic()

        found = score_shards(scorer, pool, lambda number: read_arrays(folder / f"shard-{number:05d}.npz"), save, advance)
        write_arrays(folder / "scores.npz", found)
        for shard in folder.glob("shard-*.npz"):
            shard.unlink()
        return found

    def ledger(self, name: str) -> Ledger:
        """A model's scores of single samples, asked for by position; the model is loaded at the first call that needs it."""
        pool, stage = self.pool(name), f"verify on the {name}"

        def score(positions: np.ndarray) -> np.ndarray:
            scorer = self.scorer(name, calibrate=True)
            began = time.monotonic()
            found = scorer.scores(pool, positions)["effort"]
            self._spend(stage, name, positions, time.monotonic() - began)
            return found

        return Ledger(
            self.run.piece("scores", self._scores_key(name)), score, on_progress=lambda done, total: self.tell(stage, done, total)
        )

    def _spend(self, stage: str, name: str, positions: np.ndarray, seconds: float) -> None:
        from staff import models

        pool = self.pool(name)
        tokens, response = int(pool.lengths[positions].sum()), int(pool.response_tokens()[positions].sum())
        flops = self.size(name, models.Size).scoring_flops(tokens, response)
        self.run.spend(stage=stage, seconds=seconds, samples=len(positions), tokens=tokens, flops=flops)

    def size(self, name: str, kind):
        """What a token costs in a model that has been loaded in this run."""
        return kind(**json.loads((self.run.piece("scores", self._scores_key(name)) / "size.json").read_text()))

    def cost(self, method: Method, selection: Selection) -> dict[str, Any]:
        """What the run took, stage by stage, beside what scoring the target directly would have taken."""
        stages = self.run.account()
        cost: dict[str, Any] = {"stages": stages, "seconds": sum(stage.get("seconds", 0) for stage in stages.values())}
        if not method.needs:
            return cost
        from staff import models

        def one_pass(name: str) -> float:
            pool = self.pool(name)
            return self.size(name, models.Size).scoring_flops(int(pool.lengths.sum()), int(pool.response_tokens().sum()))

        scored = method.needs["scores"].split("/")[0]
        if "verify on the target" not in stages and scored != "target":
            return cost  # the target was never loaded: regions too small to verify
        whole = one_pass("target")
        for stage in stages.values():
            if "flops" in stage:
                stage["passes"] = stage["flops"] / whole
        cost["passes"] = sum(stage.get("passes", 0) for stage in stages.values())
        on_target = next(stages[name] for name in ("verify on the target", "score on the target") if name in stages)
        cost["direct"] = {"passes": 1.0, "seconds": on_target["seconds"] * whole / on_target["flops"]}
        if scored == "draft":
            relative, verified = one_pass("draft") / whole, len(selection.verified) / len(self.rows)
            settings = {
                "epochs": self.config.draft_epochs,
                "share": self.config.draft_share,
                "relative_cost": relative,
                "verified_share": verified,
            }
            cost["sum"] = {**settings, "passes": plan.staff_passes(**settings)}
            cost["verdict"] = plan.verdict(cost["sum"]["passes"], relative, self.config.draft_epochs, self.config.draft_share, verified)
        return cost


def version_of(package: str) -> str | None:
    """The installed version of a package, None where it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
