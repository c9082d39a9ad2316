"""What the stages of a run share: its models, pools and scores, made at first use and kept on disk by fingerprint."""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from staff import plan
from staff.data import rows as formats
from staff.config import SelectConfig
from staff.scoring.shards import Budgets, Fitting, score_within
from staff.methods import Method
from staff.files import SEAL, fingerprint, read_arrays, read_checked, sealed, write_arrays, write_checked
from staff.runs.store import Ledger, RunDirectory
from staff.types import Selection

Progress = Callable[[str, int, int], None]  # stage, done, in all
PACKAGES = ("numpy", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")
TRAINING = ("lora_rank", "lora_alpha", "learning_rate", "warmup", "batch_size", "seed", "checkpoint_seconds")
SNAPSHOTS = 4  # checkpoints of the draft's tuning that loss trajectories are taken over
RUNNING_SCOPES = ("last-value", "last-block", "linear")  # in the others the gradients do not pass by as a draft is tuned
ENGINE = 3  # raised when the same inputs would give other scores than before


@dataclass(frozen=True)
class Model:
    """A model of a run: which base, and what was done to it before it scores.

    Attributes:
        base: "draft" or "target", a key of the run's sources.
        epochs: of fine-tuning on the pool; 0 takes it as it comes.
        share: of the pool that it is fine-tuned on.
    """

    base: str
    epochs: float = 0.0
    share: float = 1.0


def models_of(config: SelectConfig) -> dict[str, Model]:
    """The models that a method's needs may name."""
    return {
        "raw_draft": Model("draft"),
        "draft": Model("draft", config.draft_epochs, config.draft_share),
        "target": Model("target"),
        "tuned_target": Model("target", config.target_epochs),
    }


def check_running(config: SelectConfig) -> None:
    """Can "draft/effort_running" be had? Every sample must be met once in the last epoch, by weights whose gradients pass by.

    Raises:
        ValueError: it can't.
    """
    if config.scope not in RUNNING_SCOPES:
        raise ValueError(f"effort_running is taken in --scope {', '.join(RUNNING_SCOPES)}; found {config.scope}")
    if config.draft_epochs < 1 or config.draft_epochs != int(config.draft_epochs) or config.draft_share != 1:
        raise ValueError(
            "effort_running meets every sample in the last epoch: --draft-epochs must be a whole number, 1 or more, and --draft-share 1; "
            f"found {config.draft_epochs:g} and {config.draft_share:g}"
        )
    if config.loss != "mean" or config.balance_layers:
        raise ValueError("effort_running is of --loss mean, without --balance-layers")


class Work:
    """What the stages of one run share: its models, pools and scores, made at first use and kept on disk.

    Args:
        sources: "draft" and "target" -> models.Source, those that the run needs.
        inputs: name -> fingerprint, of the data and of each source.
        tell: called with (stage, done, in all).
        unchanged: called with names of inputs before anything that was made of them is written; raises where one changed.
        running: a method asks for "draft/effort_running": it is taken as the draft is tuned.
    """

    def __init__(
        self,
        config: SelectConfig,
        run: RunDirectory,
        rows: formats.Rows,
        sources,
        inputs,
        tell: Progress,
        unchanged: Callable[..., None] = lambda *names: None,
        running: bool = False,
    ):
        self.config, self.run, self.rows, self.sources, self.inputs, self.tell = config, run, rows, sources, inputs, tell
        self.unchanged, self.running = unchanged, running
        self._unpacked: dict[str, Any] = {}
        self._whole: set[Path] = set()  # adapters whose checksums were looked at
        self.models = models_of(config)
        self._pools: dict[str, Any] = {}
        self._scorer: tuple[tuple[str, Path | None], Any] | None = None
        if sources:
            from staff.models import load as models

            self.device = models.pick_device(config.device)
            self.dtype = models.pick_dtype(config.dtype, self.device)

    def device_name(self) -> str:
        """The device, and which GPU it is."""
        import torch

        return f"{self.device} ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else str(self.device)

    # ---- what each piece is made of ----

    def _pool_key(self, base: str) -> dict[str, Any]:
        return {
            "data": self.inputs["data"],
            "reading": dataclasses.asdict(self.config.reading),
            "tokenizer": self.inputs[base],
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

    def _base_key(self, base: str) -> dict[str, Any]:
        keeps = self.config.draft if base == "draft" and (self.config.draft or "").startswith("self") else None
        blocks = [keeps, self.config.draft_blocks] if keeps else None
        return {"weights": self.inputs[base], "blocks": blocks, "load_in": self.config.load_in}

    def _model_key(self, name: str) -> dict[str, Any]:
        """The base as it comes, or what its tuned adapter is made of."""
        model = self.models[name]
        key = self._base_key(model.base)
        if not model.epochs:
            return key
        settings = {setting: getattr(self.config, setting) for setting in TRAINING if setting != "checkpoint_seconds"}
        return {
            "base": key,
            "pool": self._pool_key(model.base),
            "epochs": model.epochs,
            "share": model.share,
            **settings,
            **({"running": self.config.scope} if self._takes_running(name) else {}),
            **self._engine_key(),
        }

    def _takes_running(self, name: str) -> bool:
        return self.running and name == "draft"

    def _scores_key(self, name: str) -> dict[str, Any]:
        # with no adapter of its own a model gets a fresh, seeded one to be scored in scope "lora"
        config = self.config
        fresh = [config.lora_rank, config.lora_alpha] if config.scope == "lora" else None
        return {
            "model": self._model_key(name),
            "pool": self._pool_key(self.models[name].base),
            "scope": config.scope,
            "lora": fresh,
            "seed": config.seed if config.scope in ("lora", "released") else None,
            "loss": config.loss,
            "balance_layers": config.balance_layers,
            **self._engine_key(),
        }

    # ---- pools and models ----

    def pool(self, name: str):
        """The pool in a model's tokens."""
        from staff.data.tokens import Pool, tokenise

        base = self.models[name].base
        key = self._pool_key(base)
        if fingerprint(key) not in self._pools:
            path = self.run.piece("pool", key) / "tokens.npz"
            arrays = read_arrays(path)
            if arrays is None:
                tokenizer = self._load_tokenizer(base)
                n = len(self.rows)
                began = time.monotonic()
                pool = tokenise(self.rows.examples(), tokenizer, self.config.max_length, lambda done: self.tell("tokenise", done, n))
                arrays = {"input_ids": pool.input_ids, "is_response": pool.is_response, "offsets": pool.offsets}
                arrays["counts"] = np.array([pool.truncated, pool.cut_responses, pool.spelled])
                self.unchanged("data", base)
                write_arrays(path, arrays)
                self.run.spend(stage="tokenise", seconds=time.monotonic() - began)
            counts = map(int, arrays["counts"])
            self._pools[fingerprint(key)] = Pool(arrays["input_ids"], arrays["is_response"], arrays["offsets"], *counts)
        return self._pools[fingerprint(key)]

    def _source(self, base: str):
        """A model's source; a .gguf file is unpacked once."""
        from staff.models import load as models

        source = self.sources[base]
        if source.gguf and base not in self._unpacked:
            folder = self.run.piece("model", {"gguf": self.inputs[base], "dtype": str(self.dtype)})
            if not (folder / SEAL).exists():
                self.tell(f"unpack {source.gguf}", 0, 1)
            self._unpacked[base] = models.unpack_gguf(source, folder, self.dtype)
        return self._unpacked.get(base, source)

    def _load_tokenizer(self, base: str):
        from staff.models import load as models

        return models.load_tokenizer(self._source(base), self.config.trust_remote_code)

    def _load(self, base: str, merge: bool = True):
        """A base model, cut to its blocks where the draft is the target's own; an adapter that it came with is folded in."""
        from staff.models import drafts as draft
        from staff.models import load as models

        config = self.config
        model = models.load_model(self._source(base), self.dtype, self.device, config.trust_remote_code, config.load_in, merge)
        self.unchanged(base)
        keep = models.self_blocks(self.config.draft) if base == "draft" else None
        return draft.cut(model, keep, self.config.draft_blocks) if keep else model

    def adapter(self, name: str) -> Path:
        """The folder of a tuned model's adapter, tuned if it is not there."""
        from staff.models import load as models
        from staff.models.finetune import finetune

        config, model, pool = self.config, self.models[name], self.pool(name)
        folder = self.run.piece(model.base, self._model_key(name))
        if folder not in self._whole and sealed(folder) is None:
            stage = f"fine-tune the {model.base}"
            draws = np.random.default_rng([config.seed, 1])
            size = max(1, round(model.share * len(pool)))
            positions = np.sort(draws.choice(len(pool), size, replace=False))
            began = time.monotonic()
            tuned = finetune(
                self._load(model.base),
                pool,
                positions,
                folder,
                epochs=model.epochs,
                snapshots=SNAPSHOTS,
                running=config.scope if self._takes_running(name) else None,
                on_progress=lambda done, total: self.tell(stage, done, total),
                **{setting: getattr(config, setting) for setting in TRAINING},
            )
            tokens, response = pool.lengths[positions].sum(), pool.response_tokens()[positions].sum()
            self.run.spend(
                stage=stage,
                seconds=time.monotonic() - began,
                samples=len(positions) * model.epochs,
                tokens=float(tokens) * model.epochs,
                flops=models.measure(tuned).training_flops(int(tokens), int(response)) * model.epochs,
            )
        self._whole.add(folder)
        return folder

    def scorer(self, name: str, snapshot: Path | None = None):
        """A model ready to score, perhaps as it was halfway through its tuning; the one loaded before it is freed."""
        from staff.models import adapters
        from staff.models import load as models
        from staff.scoring.scorer import Scorer

        if self._scorer and self._scorer[0] == (name, snapshot):
            return self._scorer[1]
        self.free()
        config, spec = self.config, self.models[name]
        adapter = self.adapter(name) if spec.epochs else None
        began = time.monotonic()
        model = self._load(spec.base, merge=bool(adapter) or config.scope != "lora")
        size = models.measure(model)
        if adapter:
            model = adapters.load_adapter(model, snapshot or adapter)
        elif config.scope == "lora" and not hasattr(model, "peft_config"):
            model = adapters.add_lora(model, config.lora_rank, config.lora_alpha, config.seed)
        options: dict[str, Any] = {"loss": config.loss, "balance": config.balance_layers, "seed": config.seed}
        self._scorer = ((name, snapshot), Scorer(model, config.scope, config.batch_tokens, **options))
        self.run.spend(stage="load models", seconds=time.monotonic() - began)
        write_checked(self.run.piece("size", self._base_key(spec.base)) / "size.json", dataclasses.asdict(size))
        return self._scorer[1]

    def free(self) -> None:
        """Let go of the model that is loaded."""
        self._scorer = None
        gc.collect()

    # ---- numbers ----

    def array(self, need: str, wanted: Iterable[str] = ()) -> np.ndarray:
        """(n,) or (n, k) numbers that a method needs.

        Args:
            need: "model[@checkpoints]/quantity[.made]", as METHODS has them.
            wanted: all needs of the run, so that one pass over a model gives what all of its methods ask for.
        """
        model, _, quantity = need.partition("/")
        base, _, made = quantity.partition(".")
        if made:
            from staff import graph

            return graph.derive(quantity, self.array(f"{model}/{base}", wanted), self.config.seed)
        if model == "pool":
            return self.pool("target" if "target" in self.sources else "draft").response_tokens()
        if model == "draft@checkpoints":
            return self._trajectories(base)
        if quantity == "effort_running":
            from staff.scoring.running import FILE

            kept = read_arrays(self.adapter(model) / FILE)
            assert kept is not None, "the adapter's seal said that it was whole"
            return kept["effort"]
        if quantity == "unconditional_loss":
            return self.quantities(model, responses_alone=True)["loss"]
        if quantity == "similarity":
            return self._similarity(model)
        with_features = any(other.startswith(f"{model}/features") for other in (need, *wanted))
        return self.quantities(model, with_features)[quantity]

    def quantities(
        self, name: str, with_features: bool = False, responses_alone: bool = False, snapshot: int | None = None
    ) -> dict[str, np.ndarray]:
        """All that one pass over the pool gives, (n,) each, by shards.

        Args:
            name: a key of `models_of`.
            with_features: (n, H) mean last hidden states besides.
            responses_alone: score the responses without their prompts.
            snapshot: 1 to SNAPSHOTS, score the model as it was after that part of its tuning.
        """
        key = self._scores_key(name)
        if responses_alone:
            key |= {"pool": {**key["pool"], "part": "responses alone"}}
        if snapshot is not None:
            key |= {"snapshot": [snapshot, SNAPSHOTS]}
        folder = self.run.piece("scores", key)
        whole = self._kept(folder / "scores.npz", *(["features"] if with_features else []))
        if whole is not None:
            return whole
        pool = self.pool(name).responses_alone() if responses_alone else self.pool(name)
        adapter = self.adapter(name) if self.models[name].epochs else None  # first, so that its seconds are not counted as scoring
        at = adapter / "snapshots" / str(snapshot) if adapter and snapshot is not None else None
        stage = f"score on the {name.replace('_', ' ')}" + (" without prompts" if responses_alone else "")
        stage += "" if snapshot is None else f" at {snapshot}/{SNAPSHOTS}"
        prefix = "features-shard" if with_features else "shard"

        def make():
            scorer = self.scorer(name, at)
            scorer.with_features = with_features
            return scorer

        return self._by_shards(stage, name, pool, folder / "scores.npz", make, prefix)

    def _kept(self, path: Path, *names: str) -> dict[str, np.ndarray] | None:
        """What `_by_shards` left in a file; None where it is not there whole, or lacks one of the names."""
        kept = read_arrays(path)
        if kept is None or not kept.keys() >= set(names):
            return None
        for shard in path.parent.glob("*shard-*.npz"):  # of a run that was killed right behind the last one
            shard.unlink()
        return kept

    def _by_shards(self, stage: str, name: str, pool, path: Path, make: Callable[[], Any], prefix: str = "shard") -> dict[str, np.ndarray]:
        """What a pass over a pool gives, (n,) each: shard by shard, in batches that fit, kept in one file at the end.

        Args:
            stage: what it is called in the progress and the account.
            name: of the model, a key of `models_of`.
            path: the file; the shards lie beside it, named by the prefix, until they are all there.
            make: a `score.Scorer` or what scores like one; called at the first shard that is missing.
        """
        from staff.scoring.scorer import score_shards

        folder = path.parent
        budgets = Budgets(folder / f"{prefix}-budgets.json", self.config.batch_tokens)
        done = 0
        began = time.monotonic()

        def advance(samples: int) -> None:
            nonlocal done
            done += samples
            self.tell(stage, done, len(pool))

        def scorer():
            nonlocal began
            made = make()
            budgets.settle(made.first_tokens)
            began = time.monotonic()
            return Fitting(made, budgets, self._name_of)

        def shard(number: int) -> Path:
            return folder / f"{prefix}-{number:05d}.npz"

        def save(number: int, part: dict[str, np.ndarray]) -> None:
            nonlocal began
            self.unchanged(self.models[name].base)
            write_arrays(shard(number), part)
            scored = len(next(iter(part.values())))
            self._spend(stage, name, pool, np.arange(done - scored, done), time.monotonic() - began)
            began = time.monotonic()

        found = score_shards(scorer, pool, lambda number: read_arrays(shard(number)), save, advance)
        write_arrays(path, found)
        for left in folder.glob(f"{prefix}-*.npz"):
            left.unlink()
        return found

    def ledger(self, name: str) -> Ledger:
        """A model's scores of single samples, asked for by position; the model is loaded at the first call that needs it."""
        pool, stage = self.pool(name), f"verify on the {name}"

        def score(positions: np.ndarray) -> np.ndarray:
            scorer = self.scorer(name)
            began = time.monotonic()
            if self.config.balance_layers and scorer.site_means is None:
                self._calibrate(scorer, name, folder)
            budgets.settle(scorer.first_tokens)
            found = score_within(scorer, pool, positions, budgets, ledger.next, self._name_of)["effort"]
            self.unchanged(self.models[name].base)
            self._spend(stage, name, pool, positions, time.monotonic() - began)
            return found

        folder = self.run.piece("scores", self._scores_key(name))
        budgets = Budgets(folder / "ledger-budgets.json", self.config.batch_tokens)
        ledger = Ledger(folder, score, on_progress=lambda done, total: self.tell(stage, done, total))
        return ledger

    def _name_of(self, position: int) -> str:
        return f"row {self.rows.numbers[position]} of the data"

    def _calibrate(self, scorer, name: str, folder: Path) -> None:
        """The mean norm of each weight, over samples drawn for it alone: in verification the model never sees the pool."""
        from staff.scoring.scorer import CALIBRATION

        kept = read_arrays(folder / "site_means.npz")
        if kept is not None:
            scorer.site_means = kept["site_means"]
            return
        pool, began = self.pool(name), time.monotonic()
        positions = np.sort(np.random.default_rng([self.config.seed, 2]).choice(len(pool), min(CALIBRATION, len(pool)), replace=False))
        budgets = Budgets(folder / "site_means-budgets.json", self.config.batch_tokens)
        budgets.settle(scorer.first_tokens)
        norms = score_within(scorer, pool, positions, budgets, 0, self._name_of)["site_norms"]
        scorer.site_means = norms.mean(0, dtype=np.float64)
        write_arrays(folder / "site_means.npz", {"site_means": scorer.site_means})
        self._spend(f"calibrate the {name}", name, pool, positions, time.monotonic() - began)

    def _trajectories(self, quantity: str) -> np.ndarray:
        """(n, SNAPSHOTS) a quantity of the draft at even steps through its tuning."""
        if not self.models["draft"].epochs:
            raise ValueError("a trajectory needs a draft that is tuned: --draft-epochs must be above 0")
        return np.stack([self.quantities("draft", snapshot=number)[quantity] for number in range(1, SNAPSHOTS + 1)], 1)

    def _similarity(self, name: str) -> np.ndarray:
        """(n,) how like each sample's gradient is to those of the validation rows (LESS)."""
        from staff.data.tokens import tokenise
        from staff.scoring.less import Likeness, mean_direction

        assert self.config.validation
        key = {**self._scores_key(name), "validation": self.inputs["validation"]}
        path = self.run.piece("similarity", key) / "similarity.npz"
        kept = self._kept(path)
        if kept is None:
            rows = formats.read(self.config.validation, **self.config.reading.keywords())
            wanted = tokenise(rows.examples(), self._load_tokenizer(self.models[name].base), self.config.max_length)

            def make():
                scorer, began = self.scorer(name), time.monotonic()
                directions = mean_direction(scorer, wanted)
                self._spend("gradients of the validation rows", name, wanted, np.arange(len(wanted)), time.monotonic() - began)
                return Likeness(scorer, directions)

            kept = self._by_shards(f"gradients of the {name.replace('_', ' ')}", name, self.pool(name), path, make)
        return kept["similarity"]

    def _spend(self, stage: str, name: str, pool, positions: np.ndarray, seconds: float) -> None:
        from staff.models import load as models

        tokens, response = int(pool.lengths[positions].sum()), int(pool.response_tokens()[positions].sum())
        flops = self.size(name, models.Size).scoring_flops(tokens, response, self.config.scope)
        self.run.spend(stage=stage, seconds=seconds, samples=len(positions), tokens=tokens, flops=flops)

    def size(self, name: str, kind):
        """What a token costs in a model that has been loaded in this run."""
        path = self.run.piece("size", self._base_key(self.models[name].base)) / "size.json"
        known = read_checked(path)
        if known is None:  # damaged, or lost
            self.free()
            self.scorer(name)
            known = read_checked(path)
            assert known is not None
        return kind(**known)

    def cost(self, method: Method, selection: Selection) -> dict[str, Any]:
        """What the run took, stage by stage, beside what scoring the target directly would have taken."""
        stages = self.run.account()
        cost: dict[str, Any] = {"stages": stages, "seconds": sum(stage.get("seconds", 0) for stage in stages.values())}
        on_target = next((stages[name] for name in ("verify on the target", "score on the target") if name in stages), None)
        if on_target is None or not on_target.get("flops") or "target" not in self.sources:
            return cost  # the target was never loaded (or by an earlier command alone), and what a pass of it takes is not known
        from staff.models import load as models

        def one_pass(name: str) -> float:
            pool = self.pool(name)
            return self.size(name, models.Size).scoring_flops(int(pool.lengths.sum()), int(pool.response_tokens().sum()), self.config.scope)

        whole = one_pass("target")
        for stage in stages.values():
            if "flops" in stage:
                stage["passes"] = stage["flops"] / whole
        cost["passes"] = sum(stage.get("passes", 0) for stage in stages.values())
        cost["direct"] = {"passes": 1.0, "seconds": on_target["seconds"] * whole / on_target["flops"]}
        if method.needs.get("scores") == "draft/effort" and "score on the draft" in stages:
            terms = {
                "epochs": self.config.draft_epochs,
                "share": self.config.draft_share,
                "relative_cost": one_pass("draft") / whole,
                "verified_share": len(selection.verified) / len(self.rows),
            }
            cost["sum"] = {**terms, "passes": plan.staff_passes(**terms)}
            cost["verdict"] = plan.verdict(cost["sum"]["passes"], **terms)
        return cost


def commit() -> str | None:
    """The git commit of the checkout that this package is run from, "+changed" where files differ from it; None elsewhere."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists() or Path(__file__).parents[2].name != "src":
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+changed"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def version_of(package: str) -> str | None:
    """The installed version of a package, None where it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
