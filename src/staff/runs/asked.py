"""What a method asks a model for by position while it runs, and what that needs beforehand: answers, rewards,
attention. Kept on disk like all other pieces."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from staff import files
from staff.data import metrics
from staff.data.chat import template_of
from staff.data.samples import Sample, openings_of
from staff.data.turns import Example
from staff.models import adapters, anatomy, load, reward
from staff.models.answering import Answerer
from staff.runs import account, keys
from staff.runs.scorefile import column_qualities
from staff.scoring.scorer import settled_tokens
from staff.scoring.shards import (
    Arrays,
    Score,
    Shards,
    make_shards,
    remove_shards,
    score_by_shards,
    shards_of,
)
from staff.scoring.whisper import attention_to, layer_of
from staff.types import Need, Stage

if TYPE_CHECKING:
    from staff.runs.pieces import Pieces

logger = logging.getLogger(__name__)

ANSWER_TOKENS = 16384  # padded tokens of a batch of answers at most, those of the answers included
ANSWERS_A_SHARD = 128


def asker(pieces: Pieces, need: Need) -> Callable[..., np.ndarray]:
    """What a method is given to ask with, for one of its needs."""
    return partial(rewards, pieces) if need.quantity == "rewards" else partial(whispers, pieces, need.model)


def quality(pieces: Pieces) -> np.ndarray:
    """(n,) how good the rows' own answers are, by the column or the quality model."""
    if pieces.config.quality_column:
        return column_qualities(pieces.rows, pieces.config.quality_column)
    return _judged(pieces, list(pieces.rows.examples()), Stage("rate", part="of the data"), {})


def rewards(pieces: Pieces, seed: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """(k,) how good the answers to some rows' prompts are, of the target tuned on the seed (MoDS)."""
    key = {**pieces._model_key("tuned_target"), "on": seed.tolist()}
    of = {"of": key, "asked": positions.tolist()}
    known = pieces.answered.get(files.fingerprint(of))
    if known is not None:
        return known
    every = list(pieces.rows.examples())
    examples, numbers = [every[i] for i in positions], pieces.rows.numbers[positions]

    def make() -> Any:
        adapter = pieces._tuned("tuned_target", seed, key, Stage("tune", "target", "on the seed"))
        return adapters.load_adapter(pieces._load("target"), adapter)

    stage, room = Stage("converse", "target", "tuned on the seed"), pieces.config.reading.max_length
    how: Any = {"stage": stage, "room": room}
    said = _answers(pieces, "tuned_target", make, examples, numbers, of, **how)["prediction"].tolist()
    if pieces.config.quality_model:
        said = [_with_answer(example, words) for example, words in zip(examples, said, strict=True)]
        found = _judged(pieces, said, Stage("rate", part="of the target"), of)
    else:
        found = quality(pieces)[positions] * _likeness(pieces, said, examples) / 100
    pieces.answered[files.fingerprint(of)] = found
    return found


def whispers(pieces: Pieces, name: str, conversations: np.ndarray, layer: int | None) -> np.ndarray:
    """(c, 1 + d) how like the answers to some rows' prompts are, and how much each prompt looks at the
    demonstrations before it (Data Whisperer).

    Args:
        name: of the model, a key of `keys.model_specs`.
        conversations: (c, 1 + d) positions: the question and the demonstrations before it, -1 for none.
        layer: whose attention.
    """
    of = {"of": pieces._model_key(name), "layer": layer, "asked": conversations.tolist()}
    known = pieces.answered.get(files.fingerprint(of))
    if known is not None:
        return known
    every = list(pieces.rows.examples())
    questions, numbers = [every[i] for i in conversations[:, 0]], pieces.rows.numbers[conversations[:, 0]]
    examples = [
        _behind(question, [every[i] for i in shown if i >= 0])
        for question, shown in zip(questions, conversations[:, 1:], strict=True)
    ]

    def make() -> Any:
        spec = pieces.specs[name]
        adapter = pieces.adapter(name) if spec.epochs else None
        model = pieces._load(spec.base)
        return adapters.load_adapter(model, adapter) if adapter else model

    room = conversations.shape[1] * pieces.config.reading.max_length
    how: Any = {
        "stage": Stage("converse", name),
        "room": room,
        "shown": conversations[:, 1:] >= 0,
        "layer": layer,
    }
    found = _answers(pieces, name, make, examples, numbers, of, **how)
    like = _likeness(pieces, found["prediction"].tolist(), questions)
    pieces.answered[files.fingerprint(of)] = np.column_stack([like, found["attention"]])
    return pieces.answered[files.fingerprint(of)]


def _behind(question: Example, shown: Sequence[Example]) -> Example:
    """A question behind demonstrations, each with its last answer marked; the system turn is its own."""
    turns = [turn for turn in question.turns if turn.role == "system"]
    for example in (*shown, question):
        *before, last = (turn for turn in example.turns if turn.role != "system")
        turns += [*(turn._replace(train=False) for turn in before), last]
    return question._replace(turns=tuple(turns))


def _ends(opening: Sample) -> list[int]:
    """Tokens up to the end of each demonstration in a conversation."""
    return (np.flatnonzero(np.diff([*opening.trained, 0]) == -1) + 1).tolist()


def _with_answer(example: Example, words: str) -> Example:
    """A row with other words for its last answer."""
    return example._replace(
        turns=(*example.turns[:-1], example.turns[-1]._replace(content=words, fields=None))
    )


def _likeness(pieces: Pieces, answers: Sequence[str], examples: Sequence[Example]) -> np.ndarray:
    """(k,) how like answers are to the rows' own, by --likeness, 0 to 100."""
    references = [example.turns[-1].text for example in examples]
    return metrics.judge_answers(answers, references)[0][pieces.config.likeness]


def _kept(path: Path, make: Callable[[], Arrays]) -> Arrays:
    """The arrays of a file, made where they are not there."""
    arrays = files.read_arrays(path)
    if arrays is None:
        return make()
    remove_shards(path)
    return arrays


def _by_shards(
    pieces: Pieces,
    make: Callable[[], tuple[Score, int]],
    shards: Shards,
    path: Path,
    stage: Stage,
    on_shard: Callable[[np.ndarray, float], None],
) -> Arrays:
    """The shards of a pass made in this process, with its progress."""
    tell = pieces._counter(stage, len(shards.lengths))
    run = partial(make_shards, make, shards, on_samples=tell, on_shard=on_shard)
    threads = shards.budgets.agree("threads", pieces.config.spread.threads or torch.get_num_threads())
    return score_by_shards(shards, path, partial(load.with_threads, threads, run), tell)


def _answers(
    pieces: Pieces,
    name: str,
    make_model: Callable[[], Any],
    examples: Sequence[Example],
    numbers: np.ndarray,
    of: keys.Key,
    *,
    stage: Stage,
    room: int,
    shown: np.ndarray | None = None,
    layer: int | None = None,
) -> Arrays:
    """Greedy answers to the last prompts of some conversations: prediction, answer_tokens; and the attention
    to each demonstration where some are shown, (k, d), 0 for none.

    Args:
        name: whose pool the conversations are of.
        numbers: the rows that messages name.
        of: what the answers are, for the key.
        room: tokens of a conversation at most, its answer included; the model may have fewer positions.
        shown: (k, d) which demonstrations each conversation has; at this layer it is looked at them.

    Raises:
        ValueError: a prompt has no room, or a conversation's demonstrations can't be told apart.
    """
    config, base = pieces.config, pieces.specs[name].base
    key = {"answers": of, "pool": pieces._pool_key(name), "max_new_tokens": config.max_new_tokens}
    path = pieces.run.piece("answers", {**key, **pieces._engine}) / "answers.npz"

    def compute() -> Arrays:
        tokenizer = pieces._tokenizer(base)
        tokenizer.chat_template = template_of(tokenizer, config.reading)
        limit = load.most_positions(pieces._files(base), config.engine.trust_remote_code) or room
        least = min(room, limit) - config.max_new_tokens
        if least < 1:
            raise ValueError(
                f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt in {room}"
            )
        openings, end, cut = openings_of(examples, tokenizer, least, config.reading, numbers)
        if cut:
            what = "prompts lost the start of their text: no room for an answer in"
            logger.warning("%d of %d %s %d tokens", cut, len(openings), what, min(room, limit))
        prompts = [np.array(opening.ids, np.int32) for opening in openings]
        lengths = np.array([len(prompt) for prompt in prompts])
        ends = [_ends(opening) for opening in openings]
        for number, own, there in zip(
            numbers, ends, [] if shown is None else shown.sum(axis=1), strict=False
        ):
            if len(own) != there:
                what = f"its chat template shows {len(own)} of the {there} demonstrations before it"
                raise ValueError(f"row {number} can't be asked as whisper does: {what}")
        size, share, prefilled, generated = load.Size(0, 0, 0), 0.0, 0, 0

        def make() -> tuple[Score, int]:
            nonlocal size, share
            pieces.free()
            model = make_model()
            size = load.measure(model)
            folder = pieces.run.piece("size", pieces._base_key(name))
            files.write_checked(folder / "size.json", dataclasses.asdict(size))
            at = 0 if shown is None else layer_of(model, layer)
            share = 0.0 if shown is None else (at + 1) / len(anatomy.blocks(model))
            answerer = Answerer(model, tokenizer, end, config.max_new_tokens, ANSWER_TOKENS)

            def score(
                positions: np.ndarray, batch_tokens: int, on_samples: Callable[[int], None] | None = None
            ) -> Arrays:
                nonlocal prefilled, generated
                answerer.batch_tokens = batch_tokens  # what ran out of memory before says nothing here
                found = answerer.answer([prompts[i] for i in positions])
                made = {part: np.array(found[part]) for part in ("prediction", "answer_tokens")}
                prefilled, generated = int(lengths[positions].sum()), int(made["answer_tokens"].sum())
                if shown is not None:
                    made["attention"] = np.zeros((len(positions), shown.shape[1]))
                    for row, i in zip(made["attention"], positions, strict=True):
                        row[shown[i]] = attention_to(model, openings[i].ids, ends[i], at)
                if on_samples:
                    on_samples(len(positions))
                return made

            return score, ANSWER_TOKENS

        def on_shard(places: np.ndarray, seconds: float) -> None:
            pieces.inputs.check(base)
            flops = size.answering_flops(len(places), prefilled, generated)
            flops += share * size.answering_flops(0, prefilled, 0)  # once more, up to the layer looked at
            tokens = {"tokens": prefilled + generated, "prefilled": prefilled, "generated": generated}
            once = f"{path.parent.name} {places[0]}"
            numbers = {"seconds": seconds, "samples": len(places), **tokens, "flops": flops}
            account.spend(pieces.run.work, stage, once=once, **numbers)

        shards = shards_of(lengths, path, size=ANSWERS_A_SHARD)
        return _by_shards(pieces, make, shards, path, stage, on_shard)

    return _kept(path, compute)


def _judged(pieces: Pieces, examples: Sequence[Example], stage: Stage, of: keys.Key) -> np.ndarray:
    """(k,) rewards of some rows' last answers by the quality model; -inf for one without a word.

    Args:
        of: what the answers are, for the key; nothing for the data's own.
    """
    config = pieces.config
    assert config.quality_model
    key = {"judge": pieces.inputs["quality_model"], "pool": pieces._pool_key("target"), "of": of}
    path = pieces.run.piece("rewards", {**key, **pieces._engine}) / "rewards.npz"

    said = np.flatnonzero([bool(example.turns[-1].text.strip()) for example in examples])

    def compute() -> Arrays:
        source, engine = reward.find_judge(str(config.quality_model)), config.engine
        tokenizer = load.load_tokenizer(source, engine.trust_remote_code)
        inputs = reward.encoded([examples[i] for i in said.tolist()], tokenizer, config.reading)
        lengths, met = np.array([len(one["input_ids"]) for one in inputs], np.int64), 0

        def make() -> tuple[Score, int]:
            nonlocal met
            pieces.free()
            how = (engine.trust_remote_code, engine.load_in)
            model = load.load_model(source, pieces.dtype, pieces.device, *how, kind=reward.CLASSIFIER)
            met = reward.weights_met(model)
            return partial(reward.rewards_of, model, tokenizer, inputs), settled_tokens(model, "last-value")

        def on_shard(places: np.ndarray, seconds: float) -> None:
            pieces.inputs.check("quality_model")
            tokens = int(lengths[places].sum())
            numbers = {"samples": len(places), "tokens": tokens, "flops": 2 * met * tokens}
            once = f"{path.parent.name} {places[0]}"
            account.spend(pieces.run.work, stage, once=once, seconds=seconds, **numbers)

        shards = shards_of(lengths, path, batch_tokens=config.scoring.batch_tokens)
        return _by_shards(pieces, make, shards, path, stage, on_shard)

    found = np.full(len(examples), -np.inf, np.float32)
    if len(said):
        found[said] = _kept(path, compute)["rewards"]
    return found
