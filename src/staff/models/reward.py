"""Reward models: a sequence-classification model of one logit says how good an answer is."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from staff.config import Reading
from staff.data.turns import Example
from staff.models.files import Source, resolve

CLASSIFIER = "AutoModelForSequenceClassification"


def find_judge(name: str) -> Source:
    """A reward model's files.

    Raises:
        ValueError: there is no such model, or it is none of one logit; by its config.json, before any work.
    """
    flag = "--quality-model"
    source = resolve(name, flag)
    if source.gguf or source.adapter:
        raise ValueError(f"{flag} {name}: give a folder or hub id of whole weights, no .gguf or adapter")
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    kinds = ", ".join(config.get("architectures") or ["of no kind"])
    logits = config.get("num_labels") or len(config.get("id2label") or "two")
    if not kinds.endswith("ForSequenceClassification") or logits != 1:
        raise ValueError(
            f"{flag} {name}: needs a sequence-classification model of one logit; found {kinds}, {logits}"
        )
    return source


def encoded(examples: Sequence[Example], tokenizer: Any, reading: Reading) -> list[dict[str, list[int]]]:
    """What a reward model is given of each example: the whole conversation by its own chat template; without
    one prompt and answer as a pair where its tokenizer has a mark between texts, else one behind the other.
    """
    if tokenizer.chat_template is None and tokenizer.sep_token_id is not None:
        asked = ["\n".join(turn.text for turn in example.turns[:-1]) for example in examples]
        answers = [example.turns[-1].text for example in examples]
        length = min(reading.max_length, tokenizer.model_max_length)
        pairs = tokenizer(asked, answers, truncation=True, max_length=length)
        return [{name: values[i] for name, values in pairs.items()} for i in range(len(examples))]
    from staff.data.tokens import tokenise

    own = Reading(max_length=reading.max_length, template_date=reading.template_date)
    pool = tokenise(examples, tokenizer, own.max_length, None, own)
    return [{"input_ids": pool.ids(i).tolist()} for i in range(len(pool))]


def rewards_of(
    model: Any,
    tokenizer: Any,
    inputs: Sequence[dict[str, list[int]]],
    positions: np.ndarray,
    batch_tokens: int,
    on_samples: Callable[[int], None] | None = None,
) -> dict[str, np.ndarray]:
    """ "rewards" (k,) float32 of some inputs.

    Args:
        positions: (k,) places in the inputs.
        batch_tokens: padded tokens of a batch at most; a model without a padding token takes one at a time.
        on_samples: called after each batch with the number of its samples.

    Raises:
        ValueError: a reward is nan or infinite.
    """
    import torch

    from staff.data.tokens import batches

    lengths = np.array([len(inputs[i]["input_ids"]) for i in positions])
    pad, found = model.config.get_text_config().pad_token_id, np.empty(len(positions), np.float32)
    for places in batches(lengths, 1 if pad is None else batch_tokens):
        longest, batch = int(lengths[places].max()), [inputs[positions[place]] for place in places]
        ends = {"input_ids": pad or 0}  # other arrays, as of segments, end in zeros
        padded = {
            name: [one[name] + [ends.get(name, 0)] * (longest - len(one[name])) for one in batch]
            for name in batch[0]
        }
        padded["attention_mask"] = [[1] * n + [0] * (longest - n) for n in lengths[places].tolist()]
        with torch.inference_mode():
            given = {name: torch.tensor(rows, device=model.device) for name, rows in padded.items()}
            found[places] = model(**given).logits[:, 0].float().cpu().numpy()
        if on_samples:
            on_samples(len(places))
    bad = np.flatnonzero(~np.isfinite(found))
    if len(bad):
        raise ValueError(
            f"{len(bad)} samples have a reward that is nan or infinite (positions "
            f"{positions[bad[:5]].tolist()}): the quality model overflows on them; try --dtype float32"
        )
    return {"rewards": found}


def weights_met(model: Any) -> int:
    """Weights that a token meets in a reward model: its matrices but for the embeddings."""
    known = {id(weight) for weight in model.get_input_embeddings().parameters()}
    return sum(w.numel() for w in model.parameters() if w.ndim >= 2 and id(w) not in known)
