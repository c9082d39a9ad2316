"""The pieces of a run: models, pools and scores, each made at first use and kept on disk under its key
(runs/keys.py)."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from staff import files, graph
from staff.config import SelectConfig, flat, from_mapping, memory_limits
from staff.data import rows as reading
from staff.data.tokens import Pool, in_common, tokenise
from staff.data.turns import Example
from staff.methods.top import loss_ratios
from staff.models import adapters, apart, drafts, families, load
from staff.models.files import Source, resolve, tokenizer_fingerprint
from staff.planning import SNAPSHOTS
from staff.runs import account, answers, asked, keys
from staff.runs.aside import Aside
from staff.runs.crew import Crew, has_workers, threads_of
from staff.runs.store import Inputs, Ledger, RunFolder, content_of
from staff.runs.worker import Opened, check_engine, check_files, driver_left, local_rank
from staff.scoring import less, rds, selfcheck
from staff.scoring.scorer import CALIBRATION, Scorer
from staff.scoring.shards import (
    SUMS,
    Score,
    Shards,
    level,
    make_shards,
    read_shards,
    remove_shards,
    score_by_shards,
    shards_of,
)
from staff.types import AGAINST_VALIDATION, Need, Stage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pass:
    """What is taken of the samples of a pool, in words that another process understands.

    Attributes:
        model: a key of `keys.model_specs`.
        quantity: "scores", what one pass gives; one of AGAINST_VALIDATION; "prompt_features"; "efforts", as a
            ledger keeps them; "site_norms", the norm of each weight.
        features: mean last hidden states besides.
        without_prompts: of the responses alone.
        snapshot: 1 to SNAPSHOTS, the model as it was after that part of its tuning.
    """

    model: str
    quantity: str = "scores"
    features: bool = False
    without_prompts: bool = False
    snapshot: int | None = None


def _efforts(
    score: Score, means: np.ndarray | None, positions: np.ndarray, *batches: Any
) -> dict[str, np.ndarray]:
    """As a ledger keeps them."""
    scores = score(positions, *batches)
    efforts = scores["effort"] if means is None else level(scores["site_norms"], means)
    return {"positions": positions, "scores": np.asarray(efforts, np.float32)}


def _site_norms(score: Score, positions: np.ndarray, *batches: Any) -> dict[str, np.ndarray]:
    return {"site_norms": score(positions, *batches)["site_norms"]}


@dataclass(frozen=True, eq=False)
class Numbered:
    """What a worker knows of the rows: (n,) their numbers."""

    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)


def open_offer(run: RunFolder, offer: Mapping[str, Any]) -> Opened:
    """A pass that a driver offers, for its workers."""
    global _joined
    key = files.fingerprint([str(run.path), *(offer[name] for name in ("config", "inputs", "rows"))])
    if _joined is None or _joined[0] != key:  # a model that is loaded serves the next pass
        _joined = key, Pieces.of_offer(run, offer)
    return _joined[1].offered(offer)


_joined: tuple[str, Pieces] | None = None
OPENERS = {"pass": open_offer, "answers": answers.open_answers}  # what workers take up, by an offer's kind


class Pieces:
    """What one run's methods look at; one model is loaded at a time.

    Args:
        config: what to do; which settings a piece hangs on is said in runs/keys.py alone.
        run: the run's folder.
        rows: the pool's rows (`reading.Rows`); of a worker their numbers.
        sources: "draft" and "target" -> files, those that the run needs.
        inputs: fingerprints of the data and of each source.
        wanted: all needs of the run, so that one pass over a model gives what all of its methods ask for.

    Attributes:
        facts: what the manifest says of the models: device, dtype, the self-check of each.
    """

    def __init__(
        self,
        config: SelectConfig,
        run: RunFolder,
        rows: Any,
        sources: dict[str, Source],
        inputs: Inputs,
        wanted: Iterable[Need] = (),
    ):
        self.config, self.run, self.rows, self.sources, self.inputs = config, run, rows, sources, inputs
        is_here = config.spread.engine == "local"
        self.device = load.pick_device(config.engine.device, is_here)
        self.dtype = load.pick_dtype(config.engine.dtype, self.device, is_here)
        self.specs = keys.model_specs(config)
        self.facts: dict[str, Any] = load.facts(self.device, self.dtype)
        self._wanted = list(wanted)
        engine = str(self.dtype), self.device.type, config.scoring.batch_tokens, config.spread.threads
        self._engine = keys.engine_key(*engine)
        self._numbers = rows.numbers  # of the rows that are tokenised
        self._crew: Crew | None = None
        self._unpacked: dict[str, Source] = {}
        self._whole: set[Path] = set()  # adapters whose checksums were looked at
        self._pools: dict[str, Pool] = {}
        self._dropped: dict[str, list[int]] = {}  # places of the rows that are not in the tokens on disk
        self._aside: str | None = None  # which rows were set aside, once they are
        self._made: dict[Need, np.ndarray] = {}  # the same for every pruning rate
        self.answered: dict[str, np.ndarray] = {}  # and so is what methods asked while they ran
        template = config.reading.chat_template
        self._tokenizers = {base: tokenizer_fingerprint(source, template) for base, source in sources.items()}
        self._scorer: tuple[tuple[str, Path | None], Scorer] | None = None

    # ---- keys ----

    def _tokens_key(self, name: str) -> keys.Key:
        tokenizer = self._tokenizers[self.specs[name].base]
        return keys.pool_key(self.inputs["data"], self.config.reading, tokenizer)

    def _pool_key(self, name: str) -> keys.Key:
        """The tokens that there are, without the rows that were set aside."""
        return self._tokens_key(name) | ({"set_aside": self._aside} if self._aside else {})

    def _pool_id(self, name: str) -> str:
        return files.fingerprint(self._tokens_key(name))

    def _base_key(self, name: str) -> keys.Key:
        base, draft = self.specs[name].base, self.config.draft or ""
        blocks = (draft, self.config.draft_blocks) if base == "draft" and draft.startswith("self") else None
        return keys.base_key(self.inputs[base], blocks, self.config.engine.load_in)

    def _model_key(self, name: str) -> keys.Key:
        spec, config = self.specs[name], self.config
        pool = self._pool_key(name)
        processes = config.launch.processes if spec.epochs else 1
        key = keys.model_key(self._base_key(name), pool, spec, config.training, config.seed, self._engine)
        return key | ({"processes": processes} if processes > 1 else {})

    def _scores_key(self, name: str) -> keys.Key:
        config = self.config
        model, pool = self._model_key(name), self._pool_key(name)
        return keys.scores_key(model, pool, config.scoring, config.training, config.seed, self._engine)

    # ---- pools and models ----

    def pool(self, name: str) -> Pool:
        """The pool in a model's tokens."""
        key = self._tokens_key(name)
        if self._pool_id(name) not in self._pools:
            path = self.run.piece("pool", key) / "tokens.npz"
            arrays = files.read_arrays(path)
            if arrays is None:
                base = self.specs[name].base
                tokenizer, began = self._tokenizer(base), time.monotonic()  # a .gguf file is unpacked for it
                tell = self.run.counter(Stage("tokenise"), len(self.rows))
                examples, how = self.rows.examples(), self.config.reading
                pool = tokenise(examples, tokenizer, how.max_length, tell, how, self.rows.where)
                arrays = pool.to_arrays()
                self.inputs.check("data", base)
                self._spend(Stage("tokenise"), time.monotonic() - began)
                files.write_arrays(path, arrays)
                if has_workers(self.config.spread):  # a driver looks at lengths alone
                    arrays = files.map_arrays(path) or arrays
            pool = self._pools[self._pool_id(name)] = Pool.from_arrays(arrays)
            self._dropped[self._pool_id(name)] = [place for place, _ in pool.dropped]
        return self._pools[self._pool_id(name)]

    def usable_rows(self) -> reading.Rows:
        """The rows that every tokenizer of the run can use; pools are of these alone from here on."""
        names = {"draft": "raw_draft", "target": "target"}
        pools = {self._pool_id(names[base]): self.pool(names[base]) for base in self.sources}
        self.rows, self._pools = in_common(self.rows, pools)
        for base in {id(source): base for base, source in self.sources.items()}.values():
            self._check_room(base, self.pool(names[base]), self.rows.numbers)
            files.let_go(self.pool(names[base]).input_ids)  # the workers' to look at
        return self.rows

    def set_aside(self, aside: Aside) -> None:
        """Go on with the rows that are left."""
        if aside.same_as:
            self.rows, self._aside = aside.left(), files.fingerprint(sorted(aside.same_as))
            self._pools = {name: pool.take(aside.kept) for name, pool in self._pools.items()}

    def _check_room(self, base: str, pool: Pool, numbers: np.ndarray) -> None:
        load.check_room(self._files(base), pool, numbers, self.config.engine.trust_remote_code)

    def _files(self, base: str) -> Source:
        """A model's files; a .gguf file is unpacked once."""
        source = self.sources[base]
        if source.gguf and base not in self._unpacked:
            folder = self.run.piece("model", {"gguf": self.inputs[base], "dtype": str(self.dtype)})
            is_new, began, stage = not (folder / files.SEAL).exists(), time.monotonic(), Stage("unpack", base)
            if is_new:
                self.run.tell(stage, 0, 1)
            self._unpacked[base] = load.unpack_gguf(source, folder, self.dtype)
            if is_new:
                self.run.tell(stage, 1, 1)
                self._spend(stage, time.monotonic() - began)
        return self._unpacked.get(base, source)

    def _tokenizer(self, base: str) -> Any:
        return load.load_tokenizer(self._files(base), self.config.engine.trust_remote_code)

    def target(self) -> tuple[Any, Pool, Path]:
        """The target's tokenizer, the pool in it, and the folder that it loads from."""
        return self._tokenizer("target"), self.pool("target"), self._files("target").folder

    def _load(self, base: str, merge: bool = True, limits: dict[int | str, int] | None = None) -> Any:
        """A base model, cut to its blocks where the draft is the target's own; its own adapter is folded
        in."""
        engine = self.config.engine
        source = self._files(base)
        how = self.dtype, self.device, engine.trust_remote_code, engine.load_in, merge
        model = load.load_model(source, *how, limits)
        self.inputs.check(base)
        num_blocks = families.self_blocks(self.config.draft) if base == "draft" else None
        return drafts.cut(model, num_blocks, self.config.draft_blocks) if num_blocks else model

    def adapter(self, name: str) -> Path:
        """The folder of a tuned model's adapter, tuned if it is not there."""
        spec, n, draws = self.specs[name], len(self.pool(name)), np.random.default_rng([self.config.seed, 1])
        positions = np.sort(draws.choice(n, max(1, round(spec.share * n)), replace=False))
        return self._tuned(name, positions, self._model_key(name), Stage("tune", spec.base))

    def _tuned(self, name: str, positions: np.ndarray, key: keys.Key, stage: Stage) -> Path:
        """The folder of an adapter tuned on some positions, for as long as the model of that name is."""
        config, spec, pool = self.config, self.specs[name], self.pool(name)
        folder = self.run.piece(spec.base, key)
        if folder not in self._whole and files.sealed(folder) is None:
            num_samples = len(positions)
            engine, source, blocks = config.engine, self._files(spec.base), families.self_blocks(config.draft)
            cut = (blocks, config.draft_blocks) if blocks and spec.base == "draft" else None
            is_apart = config.launch.processes > 1
            model = (
                load.without_weights(source, engine.trust_remote_code) if is_apart else self._load(spec.base)
            )
            model = drafts.cut(model, *cut) if is_apart and cut else model
            tokens, response = pool.lengths[positions].sum(), pool.response_tokens(positions).sum()
            flops = load.measure(model).training_flops(int(tokens), int(response)) * spec.epochs
            numbers = {
                "samples": num_samples * spec.epochs,
                "tokens": float(tokens) * spec.epochs,
                "flops": flops,
            }
            account.spend(self.run.work, stage, once=folder.name, **numbers)
            how = source, self.dtype, self.device, engine.trust_remote_code, engine.load_in, cut
            tune: Any
            if is_apart:
                tune = partial(apart.train_apart, launch=config.launch)
            else:
                from staff.models.finetune import train_lora as tune  # and 250 MB of libraries
            tune(
                apart.loaded_as(*how) if is_apart else model,
                pool,
                positions,
                folder,
                epochs=spec.epochs,
                snapshots=SNAPSHOTS,
                seed=config.seed,
                on_progress=self.run.clock(stage),
                **dataclasses.asdict(config.training),
            )
        files.remove(folder / "checkpoints")  # a kill right behind the seal leaves some
        self._whole.add(folder)
        return folder

    def scorer(self, name: str, snapshot: Path | None = None) -> Scorer:
        """A model ready to score, perhaps as it was halfway through its tuning; the one loaded before is
        freed."""
        if self._scorer and self._scorer[0] == (name, snapshot):
            return self._scorer[1]
        self.free()
        config, spec = self.config, self.specs[name]
        scope, training = config.scoring.scope, config.training
        adapter = self.adapter(name) if spec.epochs else None
        began = time.monotonic()
        spread, limits = config.spread, None
        if spread.device_map and spec == keys.ModelSpec("target"):  # one that is tuned is loaded as ever
            limits = memory_limits(spread.max_memory) if spread.max_memory else {}
        model = self._load(spec.base, bool(adapter) or scope != "lora", limits)
        weights = load.measure(model)
        if adapter:
            model = adapters.load_adapter(model, snapshot or adapter)
        elif scope == "lora" and not hasattr(model, "peft_config"):
            rank, alpha = training.lora_rank, training.lora_alpha
            model = adapters.add_lora(model, rank, alpha, config.seed, training.lora_targets)
        loss, balance = config.scoring.loss, config.scoring.balance_layers
        try:
            scorer = Scorer(model, scope, loss=loss, balance=balance, seed=config.seed)
            if not files.read_checked(self._checked_at(name)):
                told = selfcheck.check(scorer, self.pool(name), config.scoring.batch_tokens)
                files.write_checked(self._checked_at(name), told)
        except ValueError as error:
            if not adapter:
                raise
            cure = f"a lower --learning-rate than {training.learning_rate:g} and --update, where it diverged"
            raise ValueError(f"the {spec.base} after fine-tuning: {error}; or {cure}") from error
        self._scorer = ((name, snapshot), scorer)
        self._spend(Stage("load"), time.monotonic() - began)
        folder = self.run.piece("size", self._base_key(name))
        files.write_checked(folder / "size.json", dataclasses.asdict(weights))
        return scorer

    def _checked_at(self, name: str) -> Path:
        return self.run.piece("scores", self._scores_key(name)) / "self_check.json"

    def self_checks(self, names: Iterable[str]) -> dict[str, Any]:
        """What the self-checks of some models found, whenever in this run they were made."""
        there = [name for name in names if self.specs[name].base in self.sources]
        told = {name: files.read_checked(self._checked_at(name)) for name in there}
        return (
            {"self_check": known} if (known := {name: found for name, found in told.items() if found}) else {}
        )

    def free(self) -> None:
        """Let go of the model that is loaded."""
        self._scorer = None
        gc.collect()

    # ---- numbers ----

    def array(self, need: Need) -> np.ndarray:
        """(n,) or (n, k) numbers that a method needs: speculative scores, features, and what is made of
        them."""
        if need.made:
            if need not in self._made:
                quantity = self.array(dataclasses.replace(need, made=None))
                self._made[need] = graph.derive(need.made, quantity, self.config.seed)
            return self._made[need]
        if need.quantity == "quality":
            return asked.quality(self)
        if need.model == "pool":
            return self.pool("target" if "target" in self.sources else "raw_draft").response_tokens()
        if need.checkpoints:
            steps = [self.scores(need.model, snapshot=number) for number in range(1, SNAPSHOTS + 1)]
            return np.stack([scores[need.quantity] for scores in steps], 1)
        if need.quantity == "unconditional_loss":
            return self.scores(need.model, without_prompts=True)["loss"]
        if need.quantity in AGAINST_VALIDATION:
            return self._against_validation(need.model, need.quantity)
        if need.quantity == "prompt_features":
            return self._prompt_features(need.model)
        features = dataclasses.replace(need, quantity="features")
        with_features = any(
            dataclasses.replace(other, made=None) == features for other in (need, *self._wanted)
        )
        return self.scores(need.model, with_features=with_features)[need.quantity]

    def asked(self, need: Need) -> Callable[..., np.ndarray]:
        """What a method may ask by position at any time; every answer is kept on disk."""
        return asked.asker(self, need)

    def loss_ratios(self) -> np.ndarray:
        """(n,) the raw draft's loss on each answer after its prompt, as a multiple of that on the answer
        alone."""
        loss, alone = (self.array(Need("raw_draft", name)) for name in ("loss", "unconditional_loss"))
        return loss_ratios(loss, alone)

    def of_others(self, examples: Iterable[Example], key: str, ratios: bool = False) -> dict[str, np.ndarray]:
        """The raw draft's features of rows that are not the pool's, and with `ratios` their loss ratios.

        Args:
            key: what names these rows, as a fingerprint does.

        Returns:
            places (k,) of the rows that can be used; features (k, H); ratios (k,).
        """
        name = "raw_draft"
        path = self.run.piece("others", {**self._scores_key(name), "others": key, "ratios": ratios})
        arrays = files.read_arrays(path / "others.npz")
        if arrays is None:
            how = dataclasses.replace(self.config.reading, on_bad_row="skip", on_long="cut-prompt")
            pool = tokenise(examples, self._tokenizer("draft"), how.max_length, None, how)
            dropped = [place for place, _ in pool.dropped]
            scorer, every, began = self.scorer(name), np.arange(len(pool)), time.monotonic()
            most = self.config.scoring.batch_tokens
            whole = scorer.scores(pool, every, most, features=True)
            arrays = {"places": np.delete(np.arange(len(pool) + len(dropped)), dropped)}
            arrays["features"] = whole["features"]
            if ratios:
                arrays["ratios"] = loss_ratios(
                    whole["loss"], scorer.scores(pool.responses_alone(), every, most)["loss"]
                )
            self.inputs.check("draft")
            stage = Stage("query", part="for the diagnosis")
            self._spend_pass(stage, name, pool, every, time.monotonic() - began, path.name)
            files.write_arrays(path / "others.npz", arrays)
        return arrays

    def scores(
        self,
        name: str,
        *,
        with_features: bool = False,
        without_prompts: bool = False,
        snapshot: int | None = None,
    ) -> dict[str, np.ndarray]:
        """All that one pass over the pool gives, (n,) each.

        Args:
            name: of the model, a key of `keys.model_specs`.
            with_features: (n, H) mean last hidden states besides.
            without_prompts: score the responses alone.
            snapshot: 1 to SNAPSHOTS, score the model as it was after that part of its tuning.
        """
        key = self._scores_key(name)
        if without_prompts:
            key["pool"] = {**key["pool"], "part": "responses alone"}
        if snapshot is not None:
            key["snapshot"] = [snapshot, SNAPSHOTS]
        path = self.run.piece("scores", key) / "scores.npz"
        known = self._whole_pass(path, ("features",) * with_features)
        if known is not None:
            return known
        self._tune_first(name)
        of = Pass(name, features=with_features, without_prompts=without_prompts, snapshot=snapshot)
        part, prefix = "without prompts" * without_prompts, "features-shard" if with_features else "shard"
        stage = Stage("score", name, part, f"{snapshot}/{SNAPSHOTS}" if snapshot is not None else "")
        return self._pass(of, path, stage, prefix)

    @staticmethod
    def _whole_pass(path: Path, names: Iterable[str] = ()) -> dict[str, np.ndarray] | None:
        """What a pass left that was made before, with these arrays in it; its shards go."""
        arrays = files.read_arrays(path)
        if arrays is None or not arrays.keys() >= set(names):
            return None
        remove_shards(path)
        return arrays

    def _tune_first(self, name: str) -> None:
        """Have a model's adapter before the clock of scoring starts: its seconds don't count as that."""
        if self.specs[name].epochs:
            self.adapter(name)

    def _pass(self, of: Pass, path: Path, stage: Stage, prefix: str = "shard") -> dict[str, np.ndarray]:
        """A pass over the whole pool, in one file."""
        pool = self._pool_of(of)
        shards = shards_of(pool.lengths, path, prefix, self.config.scoring.batch_tokens)
        on_samples = self._counter(stage, len(pool))
        run = self._runner(of, shards, stage, on_samples, f"{path.parent.name} {prefix}")
        return score_by_shards(shards, path, run, on_samples)

    def _pool_of(self, of: Pass) -> Pool:
        pool = self.pool(of.model)
        if of.quantity == "prompt_features":
            return pool.prompts_alone()
        return pool.responses_alone() if of.without_prompts else pool

    def _counter(self, stage: Stage, total: int, done: int = 0) -> Callable[[int], None]:
        """Tells the progress, called with the samples just done."""

        def on_samples(samples: int) -> None:
            nonlocal done
            done += samples
            self.run.tell(stage, done, total)

        return on_samples

    def _runner(
        self, of: Pass, shards: Shards, stage: Stage, on_samples: Callable[[int], None], part: str
    ) -> Callable[[list[int]], None]:
        """What makes shards of a pass; inputs are looked at before one is kept, and its cost is written down.

        Args:
            part: what the account calls the pass.
        """

        spread, source = self.config.spread, self.sources[self.specs[of.model].base]
        threads = shards.budgets.agree("threads", threads_of(spread, source, self.device.type))
        if not has_workers(spread):
            on_shard = self._on_shard(of, stage, part)
            watch = partial(make_shards, name_of=self._name_of, on_samples=on_samples, on_shard=on_shard)
            run = partial(watch, partial(self.opened, of, shards), shards)
            return partial(load.with_threads, threads, run)
        self.free()
        self._crew = self._crew or Crew(self.run, spread)
        offer = self._offer(of, shards) | {
            "part": part,
            "stage": dataclasses.asdict(stage),
            "threads": threads,
        }
        return partial(self._crew.make, offer, shards, on_samples=on_samples)

    def _on_shard(self, of: Pass, stage: Stage, part: str) -> Callable[[np.ndarray, float], None]:
        pool = self._pool_of(of)

        def on_shard(positions: np.ndarray, seconds: float) -> None:
            self.inputs.check(self.specs[of.model].base)
            self._spend_pass(stage, of.model, pool, positions, seconds, f"{part} {positions[0]}")

        return on_shard

    # ---- what workers are told, and what they make of it ----

    def _offer(self, of: Pass, shards: Shards) -> dict[str, Any]:
        """A pass in words that another process understands, with what it must find the same."""
        tokens = self.run.piece("pool", self._tokens_key(of.model))
        numbers = self.rows.numbers
        rows = tokens / f"rows-{hashlib.sha256(numbers.tobytes()).hexdigest()[:12]}.npz"
        if files.read_arrays(rows) is None:
            stored = np.delete(self._numbers, self._dropped[self._pool_id(of.model)])
            files.write_arrays(rows, {"numbers": numbers, "kept": np.flatnonzero(np.isin(stored, numbers))})
        return {
            "kind": "pass",
            "of": dataclasses.asdict(of),
            "config": flat(self.config),
            "sources": {base: source.name for base, source in self.sources.items()},
            "inputs": dict(self.inputs),
            "engine": self._engine,
            "set_aside": self._aside,
            "rows": str(rows.relative_to(self.run.work)),
            "folder": shards.folder.name,
            "prefix": shards.prefix,
            "size": shards.size,
            "positions": {} if shards.size else {n: at.tolist() for n, at in shards.positions.items()},
        }

    @classmethod
    def of_offer(cls, run: RunFolder, offer: Mapping[str, Any]) -> Pieces:
        """What a worker scores with: the same settings, tokens, weights and versions as its driver's.

        Raises:
            ValueError: something is not the same here; named.
        """
        config = from_mapping(SelectConfig, offer["config"], "the driver's settings")
        base = keys.model_specs(config)[offer["of"]["model"]].base
        sources = {base: resolve(name, f"--{base}") for base, name in offer["sources"].items()}
        inputs = Inputs({base: partial(content_of, run, sources[base])}, {base: offer["sources"][base]})
        check_files(run, sources[base], offer["sources"][base], offer["inputs"][base])
        inputs.update(offer["inputs"])
        rows = driver_left(run.work / offer["rows"], files.map_arrays)
        pieces = cls(config, run, Numbered(rows["numbers"]), sources, inputs)
        check_engine(offer["engine"], pieces._engine)
        pieces._aside, name = offer["set_aside"], offer["of"]["model"]
        tokens = (run.work / offer["rows"]).with_name("tokens.npz")
        pool = Pool.from_arrays(driver_left(tokens, files.map_arrays))
        kept = rows["kept"]
        pieces._pools[pieces._pool_id(name)] = pool if len(kept) == len(pool) else pool.take(kept)
        return pieces

    def offered(self, offer: Mapping[str, Any]) -> Opened:
        """A pass as a worker goes about it."""
        of, folder = Pass(**offer["of"]), self.run.work / offer["folder"]
        lengths = self._pool_of(of).lengths
        shards = shards_of(
            lengths, folder / "any", offer["prefix"], offer["config"]["batch_tokens"], offer["size"]
        )
        if not offer["size"]:
            chosen = {int(n): np.array(at, np.int64) for n, at in offer["positions"].items()}
            shards = dataclasses.replace(shards, positions=chosen, size=0)
        on_shard = self._on_shard(of, Stage(**offer["stage"]), offer["part"])

        def loaded() -> tuple[Score, int]:
            load.take_gpu(local_rank(os.environ), offer["threads"])
            return self.opened(of, shards)

        return Opened(shards, loaded, self._name_of, on_shard)

    def opened(self, of: Pass, shards: Shards) -> tuple[Score, int]:
        """What scores the samples of a pass, its model loaded; and the padded tokens that its device
        bears."""
        adapter = self.adapter(of.model) if self.specs[of.model].epochs else None
        at = adapter / "snapshots" / str(of.snapshot) if adapter and of.snapshot is not None else None
        scorer, pool = self.scorer(of.model, at), self._pool_of(of)
        scores = partial(scorer.scores, pool, features=of.features)
        if of.quantity in AGAINST_VALIDATION:
            return self._against(of, scorer, shards.folder.name), scorer.tokens_borne
        if of.quantity == "prompt_features":
            return partial(rds.embed_prompts, scorer, pool), scorer.tokens_borne
        if of.quantity == "efforts":
            known = files.read_arrays(shards.folder / "site_means.npz") or {}
            return partial(_efforts, scores, known.get("site_means")), scorer.tokens_borne
        if of.quantity == "site_norms":
            return partial(_site_norms, scores), scorer.tokens_borne
        return scores, scorer.tokens_borne

    def ledger(self, name: str) -> Ledger:
        """A model's efforts of single samples, asked for by position; it is loaded at the first call that
        needs it."""
        stage, lengths = Stage("verify", name), self.pool(name).lengths
        folder = self.run.piece("scores", self._scores_key(name))
        batch_tokens = self.config.scoring.batch_tokens

        def make(parts: dict[int, np.ndarray], asked: int) -> dict[int, dict[str, np.ndarray]]:
            if self.config.scoring.balance_layers:
                self._calibrate(name, folder)
            done = asked - sum(map(len, parts.values()))
            shards = Shards(folder, "ledger", parts, lengths, batch_tokens)
            on_samples = self._counter(stage, asked, done)
            run = self._runner(Pass(name, "efforts"), shards, stage, on_samples, folder.name)
            return read_shards(shards, run, on_samples)

        return Ledger(folder, make)

    def _calibrate(self, name: str, folder: Path) -> None:
        """The mean norm of each weight, over samples drawn for it alone: verification never sees the whole
        pool."""
        pool, stage = self.pool(name), Stage("calibrate", name)
        draws = np.random.default_rng([self.config.seed, 2])
        positions = np.sort(draws.choice(len(pool), min(CALIBRATION, len(pool)), replace=False))
        shards = Shards(folder, "site_means", {0: positions}, pool.lengths, self.config.scoring.batch_tokens)
        if files.read_arrays(folder / "site_means.npz") is not None:
            shards.file(0).unlink(missing_ok=True)  # a kill right behind the means leaves it
            return
        on_samples = self._counter(stage, len(positions))
        run = self._runner(Pass(name, "site_norms"), shards, stage, on_samples, folder.name)
        means = read_shards(shards, run, on_samples)[0][SUMS] / len(positions)
        files.write_arrays(folder / "site_means.npz", {"site_means": means})
        shards.file(0).unlink(missing_ok=True)

    def _against_validation(self, name: str, quantity: str) -> np.ndarray:
        """How like each sample is to the validation rows: (n,) by its gradient (LESS), (n, q) by its gradient
        or its states (RDS+)."""
        key = {**self._scores_key(name), "validation": self.inputs["validation"]}
        path = self.run.piece(quantity, key) / f"{quantity}.npz"
        if (known := self._whole_pass(path)) is not None:
            return known[quantity]
        query, numbers = self._query(name)
        self._check_room(self.specs[name].base, query, numbers)
        there = {self.pool(name).ids(i).tobytes() for i in range(len(self.pool(name)))}
        twice = sum(query.ids(i).tobytes() in there for i in range(len(query)))
        if twice:
            what = "validation rows stand in the data too: they are most like themselves"
            logger.warning(
                "%d of %d %s, and a model trained on them is not judged by them", twice, len(query), what
            )
        self._tune_first(name)
        return self._pass(Pass(name, quantity), path, Stage(AGAINST_VALIDATION[quantity], name))[quantity]

    def _prompt_features(self, name: str) -> np.ndarray:
        """(n, H) mean last hidden states of the prompts, at unit length."""
        key = {**self._scores_key(name), "part": "prompts"}
        path = self.run.piece("prompts", key) / "prompt_features.npz"
        if (known := self._whole_pass(path)) is not None:
            return known["prompt_features"]
        self._tune_first(name)
        stage = Stage("states", name, "over prompts")
        return self._pass(Pass(name, "prompt_features"), path, stage)["prompt_features"]

    def _query(self, name: str) -> tuple[Pool, np.ndarray]:
        """The validation rows in a model's tokens, and their numbers."""
        assert self.config.validation
        how = self.config.reading
        validation = reading.read(self.config.validation, **how.keywords())
        tokenizer = self._tokenizer(self.specs[name].base)
        query = tokenise(validation.examples(), tokenizer, how.max_length, None, how, validation.where)
        return query, validation.numbers

    def _against(self, of: Pass, scorer: Scorer, once: str) -> Score:
        began, (query, _), pool = time.monotonic(), self._query(of.model), self._pool_of(of)
        every = np.arange(len(query))
        score: Score
        if of.quantity == "rds":
            score = partial(rds.cosines, scorer, pool, rds.embed(scorer, query, every, scorer.tokens_borne))
        elif of.quantity == "similarities":
            score = partial(less.similarities, scorer, pool, less.directions(scorer, query))
        else:
            score = partial(less.similarity, scorer, pool, less.mean_direction(scorer, query))
        stage, seconds = Stage("query", part=f"for {of.quantity}"), time.monotonic() - began
        self._spend_pass(stage, of.model, query, every, seconds, once)
        return score

    def _name_of(self, position: int) -> str:
        return f"row {self.rows.numbers[position]} of the data"

    # ---- cost ----

    def _spend(self, stage: Stage, seconds: float) -> None:
        account.spend(self.run.work, stage, seconds=seconds)

    def _spend_pass(
        self, stage: Stage, name: str, pool: Pool, positions: np.ndarray, seconds: float, once: str
    ) -> None:
        tokens = int(pool.lengths[positions].sum())
        response = int(pool.response_tokens(positions).sum())
        size = self._size(name)
        flops = size.scoring_flops(tokens, response, self.config.scoring.scope)
        if stage.kind == "states":  # forward alone, and not through the head
            flops = size.answering_flops(0, tokens, 0)
        numbers = {"samples": len(positions), "tokens": tokens, "flops": flops}
        account.spend(self.run.work, stage, once=once, seconds=seconds, **numbers)

    def _size(self, name: str) -> load.Size:
        """What a token costs in a model."""
        path = self.run.piece("size", self._base_key(name)) / "size.json"
        known = files.read_checked(path)
        if known is None and self.specs[name].base == "target":  # by its configuration: it need not be loaded
            return load.measure(
                load.without_weights(self._files("target"), self.config.engine.trust_remote_code)
            )
        if known is None:  # damaged, or lost
            self.free()
            self.scorer(name)
            known = files.read_checked(path)
            assert known is not None
        return load.Size(**known)

    def one_pass(self, name: str) -> float:
        """Floating-point operations of one scoring pass of a model over the pool."""
        pool, scope = self.pool(name), self.config.scoring.scope
        return self._size(name).scoring_flops(
            int(pool.lengths.sum()), int(pool.response_tokens().sum()), scope
        )
