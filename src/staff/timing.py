"""What models take on this machine and make of a pool, from a few of its samples; by their sizes alone where
they are not at hand."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from staff.config import PlanConfig
from staff.types import Progress, Stage

if TYPE_CHECKING:
    from staff.data.rows import Rows
    from staff.data.tokens import Pool
    from staff.models.load import Size

NUM_TIMED = 48  # samples scored on the target at most
DRAFTED = 3  # times as many on the draft, which is cheaper
WARMING = 1  # samples before the clock runs
# operations of a pass over the pool, a minute or two of a CPU: of fewer only scoring is timed
SMALL_JOB = 2e13
AN_ANSWER = 10  # times as dear as a token that is read, in a small batch
_ANSWERS, _TOKENS = 8, 8  # answers that are timed, and tokens of each
STEPS_TIMED = 2  # of training, the first of which warms up
CHARACTERS = 4  # of a token, where no tokenizer is at hand
PRODUCT = 1024  # rows and columns of the matrices whose product tells a machine's speed


@dataclass(frozen=True)
class Speed:
    """What a model takes on this machine, in seconds: a token of scoring, one of training, to load; a token
    of a forward pass alone, and one of an answer in a small batch (0: not known)."""

    scoring: float
    training: float
    loading: float = 0.0
    forward: float = 0.0
    answering: float = 0.0


@dataclass(frozen=True)
class Look:
    """What is known of a model.

    Attributes:
        speed: for tokens as the target counts them; of training 0 where nothing is trained.
        size: what a token costs in it, in operations.
        tokens, response: of the pool, in its own tokens.
        positions: of the pool, that were scored; none where it is not at hand.
        scores: what one pass gave of these.
    """

    speed: Speed
    size: Size
    tokens: int
    response: int
    positions: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def is_timed(self) -> bool:
        """It was at hand."""
        return len(self.positions) > 0


def look_at_models(
    config: PlanConfig, rows: Rows, tell: Progress, small: float = 0.0
) -> tuple[Rows, dict[str, Look]]:
    """Load the models, score a few samples on each, train where a method would.

    A model that is not on this machine, and whose size is known, is not fetched for that: then operations are
    counted, and seconds follow from the speed of the other model, or from that of a plain matrix product,
    which no model reaches.

    Args:
        small: operations of a pass over the pool, below which the scoring alone is timed and the rest follows
            by them: else the timing takes a large part of what it foretells.

    Returns:
        the rows that every tokenizer can use; and "target" and, where there is one, "draft" -> its Look.

    Raises:
        ValueError: something that the user can mend.
    """
    from staff.data.tokens import in_common, tokenise
    from staff.models import drafts, families, load
    from staff.models.files import is_at_hand, tokenizer_fingerprint

    engine, how = config.engine, config.reading
    blocks = families.self_blocks(config.draft)
    names = {"target": config.target, **({"draft": config.draft} if config.draft and not blocks else {})}
    away = {
        label: billions
        for label, name in names.items()
        if not is_at_hand(name) and (billions := families.billions_of(name)) is not None
    }
    if blocks and away:
        raise ValueError(f"--draft {config.draft}: {config.target} is not here, so its blocks can't be timed")
    sources = {label: load.resolve(name, f"--{label}") for label, name in names.items() if label not in away}
    which = {label: tokenizer_fingerprint(source, how.chat_template) for label, source in sources.items()}
    made: dict[str, Pool] = {}  # of each tokenizer
    for label, source in sources.items():
        if which[label] not in made:
            tokenizer, n = load.load_tokenizer(source, engine.trust_remote_code), len(rows)
            told = partial(lambda of, done: tell(str(Stage("tokenise")), done, of), n)
            made[which[label]] = tokenise(rows.examples(), tokenizer, how.max_length, told, how, rows.where)
    rows, made = in_common(rows, made) if made else (rows, made)
    pools = {label: made[name] for label, name in which.items()}
    counts = {label: (int(p.lengths.sum()), int(p.response_tokens().sum())) for label, p in pools.items()}
    usual = next(iter(counts.values()), None) or _by_characters(rows)
    looks: dict[str, Look] = {}
    device = load.pick_device(engine.device)
    dtype = load.pick_dtype(engine.dtype, device)
    share = np.random.default_rng(config.seed).permutation(len(rows))
    timed = int(np.clip(len(rows) // 40, 8, NUM_TIMED))
    for label, source in sources.items():  # one is in memory at a time
        load.check_room(source, pools[label], rows.numbers, engine.trust_remote_code)
        tell(str(Stage("load")), 0, 1)
        began = time.monotonic()
        model = load.load_model(source, dtype, device, engine.trust_remote_code, engine.load_in)
        loading = time.monotonic() - began
        parts = {label: model}
        if label == "target" and blocks:  # other modules over the same weights
            weights = {id(part): part for part in (*model.parameters(), *model.buffers())}
            parts = {"draft": drafts.cut(copy.deepcopy(model, weights), blocks, config.draft_blocks), **parts}
        del model
        for name in list(parts):
            tell(str(Stage("time", name)), 0, 1)
            some = np.sort(share[: timed * (1 if name == "target" else DRAFTED)])
            trains = name == "target" or config.draft_epochs > 0
            size, part = load.measure(parts[name]), pools[label].take(some)
            is_small = size.scoring_flops(*counts[label], config.scoring.scope) < small
            about = size if is_small else None
            speed, scores = time_model(parts.pop(name), part, config, len(rows), trains, about)
            speed = dataclasses.replace(speed, loading=loading)
            looks[name] = Look(speed, size, *counts[label], some, scores)
            tell(str(Stage("time", name)), 1, 1)
    scope = config.scoring.scope
    rates = [one_pass(seen, scope) / (seen.speed.scoring * seen.tokens) for seen in looks.values()]
    for label, billions in away.items():
        rate = rates[0] if rates else product_speed(device, dtype)
        size = load.Size(round(billions * 1e9), 0, 0)
        each = size.scoring_flops(*usual, scope), size.training_flops(*usual)
        looks[label] = Look(Speed(*(flops / usual[0] / rate for flops in each)), size, *usual)
    if "draft" in looks:  # a tokenizer of its own may make more or fewer tokens of the same text
        seen, scale = looks["draft"], looks["draft"].tokens / looks["target"].tokens
        a_token = ("scoring", "training", "forward", "answering")
        speed = dataclasses.replace(
            seen.speed, **{name: getattr(seen.speed, name) * scale for name in a_token}
        )
        looks["draft"] = dataclasses.replace(seen, speed=speed)
    return rows, looks


def one_pass(seen: Look, scope: str) -> float:
    """Operations of one scoring pass over the pool."""
    return seen.size.scoring_flops(seen.tokens, seen.response, scope)


def _by_characters(rows: Rows) -> tuple[int, int]:
    """Tokens of a pool and of its responses, about."""
    texts = [[len(turn.text) for turn in example.turns] for example in rows.examples()]
    return tuple(sum(parts) // CHARACTERS + 1 for parts in (map(sum, texts), (t[-1] for t in texts)))  # type: ignore[return-value]


def product_speed(device: Any, dtype: Any) -> float:
    """Operations a second of a plain matrix product here."""
    import torch

    matrix = torch.ones(PRODUCT, PRODUCT, device=device, dtype=dtype)
    seconds = []
    for _ in range(4):  # the first warms up
        began = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for a device that is asked from afar
        seconds.append(time.perf_counter() - began)
    return 2 * PRODUCT**3 / min(seconds[1:])


def time_model(
    model: Any, pool: Pool, config: PlanConfig, n: int, trains: bool, size: Size | None
) -> tuple[Speed, dict[str, np.ndarray]]:
    """Seconds a token of scoring and of LoRA training, and the scores of some samples; the model is changed.

    Args:
        pool: these samples alone.
        n: samples of the whole pool: steps are small where there is little to train on.
        size: of the model, where all but scoring is to follow from it.
    """
    from staff.models import adapters
    from staff.scoring.scorer import Scorer

    scoring, training = config.scoring, config.training
    adapted: Any = None
    if scoring.scope == "lora":
        rank, targets = training.lora_rank, training.lora_targets
        adapted = adapters.add_lora(model, rank, rank, config.seed, targets)
    scorer = Scorer(adapted or model, scoring.scope, loss=scoring.loss)
    scorer.scores(pool, np.arange(min(WARMING, len(pool))), scoring.batch_tokens)
    began = time.perf_counter()
    scores = scorer.scores(pool, np.arange(len(pool)), scoring.batch_tokens)
    a_token = float((time.perf_counter() - began) / pool.lengths.sum())
    if size:
        tokens, response = int(pool.lengths.sum()), int(pool.response_tokens().sum())
        an_operation = a_token / size.scoring_flops(tokens, response, scoring.scope)
        a_step = an_operation * size.training_flops(tokens, response) * trains
        forward = an_operation * size.answering_flops(0, tokens, 0)
        return Speed(a_token, a_step, forward=forward, answering=AN_ANSWER * forward), scores
    from staff.models.finetune import sample_order, train_lora
    from staff.scoring.rds import embed

    began = time.perf_counter()
    embed(scorer, pool, np.arange(len(pool)), scoring.batch_tokens or scorer.tokens_borne)
    forward = float((time.perf_counter() - began) / pool.lengths.sum())
    speed = Speed(a_token, 0.0, forward=forward, answering=_an_answer(model, pool))
    if not trains:
        return speed, scores
    if adapted:
        model = adapted.unload()  # training puts on one of its own
    steps: list[float] = []
    batch_size = min(training.batch_size, max(1, n // 200))
    trained = np.resize(np.arange(len(pool)), STEPS_TIMED * batch_size)
    names = ("lora_rank", "lora_targets")
    settings = {"batch_size": batch_size, **{name: getattr(training, name) for name in names}}
    with tempfile.TemporaryDirectory(prefix="staff-") as folder:
        train_lora(
            model,
            pool,
            trained,
            Path(folder),
            epochs=1,
            seed=config.seed,
            on_progress=lambda *_: steps.append(time.perf_counter()),
            **settings,
        )
    # without the first step, which warms up
    order = sample_order(len(trained), config.seed, 0)[batch_size:]
    a_step = float((steps[-1] - steps[0]) / pool.lengths[trained[order]].sum())
    return dataclasses.replace(speed, training=a_step), scores


def _an_answer(model: Any, pool: Pool) -> float:
    """Seconds of a token of an answer, in a small batch behind starts of samples."""
    import torch

    every = min(len(pool), _ANSWERS)
    length = max(1, int(pool.lengths[:every].min()) // 2)
    ids = torch.tensor(np.stack([pool.ids(i)[:length] for i in range(every)]).astype(np.int64))
    device = next(model.parameters()).device
    began = time.perf_counter()
    given = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    told = {"max_new_tokens": _TOKENS, "min_new_tokens": _TOKENS, "do_sample": False}
    with torch.inference_mode():
        model.generate(**given, **told, pad_token_id=0)
    return (time.perf_counter() - began) / (every * _TOKENS)
