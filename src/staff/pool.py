"""Rows to token ids with a mask on the response: templates, truncation, batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

TOKENISED_AT_ONCE = 2_000  # rows handed to the tokenizer in one call: it spreads them over all cores


@dataclass(frozen=True)
class Pool:
    """A tokenised pool, flat: sample i is input_ids[offsets[i]:offsets[i + 1]].

    Attributes:
        input_ids: (total,) int32.
        is_response: (total,) bool, tokens that the loss is taken on.
        offsets: (n + 1,) int64.
        truncated: samples whose prompt lost tokens at its start.
        cut_responses: samples whose response lost tokens at its end, since it alone is too long.
    """

    input_ids: np.ndarray
    is_response: np.ndarray
    offsets: np.ndarray
    truncated: int = 0
    cut_responses: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64 tokens of each sample."""
        return np.diff(self.offsets)

    def ids(self, i: int) -> np.ndarray:
        return self.input_ids[self.offsets[i] : self.offsets[i + 1]]

    def response(self, i: int) -> np.ndarray:
        """(length,) bool mask of sample i; its first token is never predicted and so never counts."""
        mask = self.is_response[self.offsets[i] : self.offsets[i + 1]].copy()
        mask[0] = False
        return mask

    def response_tokens(self) -> np.ndarray:
        """(n,) int64 tokens of each sample that the loss is taken on."""
        counted = np.concatenate([[0], np.cumsum(self.is_response)])
        return counted[self.offsets[1:]] - counted[self.offsets[:-1]] - self.is_response[self.offsets[:-1]]


@dataclass(frozen=True)
class Batch:
    """Some samples as tensors. Axes: B batch, T tokens, N response tokens.

    Attributes:
        input_ids: (B, T) int64.
        attention_mask, position_ids: (B, T) where samples are padded on the left, else None: to the right of a causal
            model's tokens padding changes nothing, and without a mask attention takes its fast path.
        sample_of: (N,) int64, the sample of each response token.
        before: (N,) int64, the position of the token before it, which predicts it.
        labels: (N,) int64.
        counts: (B,) response tokens of each sample.
    """

    input_ids: Any
    attention_mask: Any
    position_ids: Any
    sample_of: Any
    before: Any
    labels: Any
    counts: Any


def tokenise(examples: Sequence | Iterator, tokenizer, max_length: int, on_progress: Callable[[int], None] | None = None) -> Pool:
    """Make a pool of examples with the model's own chat template where it has one.

    The template's text up to a trained turn and that turn's text are tokenised apart, as the model will see them when
    it generates: the mask never splits a token. Without a template: prompt + newline + response + end token.
    A sample of more than max_length tokens loses the start of its prompt; a response that is too long by itself keeps
    its first max_length - 1 tokens. Both are counted.

    Args:
        examples: `formats.Example`s, streamed.
        tokenizer: a transformers tokenizer.
        max_length: tokens at most.
        on_progress: called with the number of rows done.

    Raises:
        ValueError: the template can't be split at the response.
    """
    render = _renderer(tokenizer)
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    truncated = cut_responses = 0
    examples = iter(examples)
    while part := list(islice(examples, TOKENISED_AT_ONCE)):
        pieces = [render(example) for example in part]
        texts = [text for sample in pieces for text, _ in sample]
        encoded = iter(tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"])
        for sample in pieces:
            tokens: list[int] = []
            mask: list[bool] = []
            for _, trained in sample:
                piece = next(encoded)
                tokens += piece
                mask += [trained] * len(piece)
            if len(tokens) > max_length:
                first = mask.index(True)
                if len(tokens) - first >= max_length:  # the response alone fills it: one token of the prompt to predict from
                    tokens, mask = tokens[max(first - 1, 0) :][:max_length], mask[max(first - 1, 0) :][:max_length]
                    cut_responses += 1
                else:
                    tokens, mask = tokens[-max_length:], mask[-max_length:]
                    truncated += 1
            ids.append(np.array(tokens, np.int32))
            masks.append(np.array(mask, bool))
        if on_progress:
            on_progress(len(ids))
    offsets = np.concatenate([[0], np.cumsum([len(sample) for sample in ids])]).astype(np.int64)
    if not ids:
        return Pool(np.empty(0, np.int32), np.empty(0, bool), offsets)
    return Pool(np.concatenate(ids), np.concatenate(masks), offsets, truncated, cut_responses)


def _renderer(tokenizer) -> Callable[[Any], list[tuple[str, bool]]]:
    """A function from an example to [(text, the loss is taken on it), ...]."""
    end = tokenizer.eos_token or ""
    if not getattr(tokenizer, "chat_template", None):
        begins = tokenizer.bos_token and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
        start = tokenizer.bos_token if begins else ""

        def plain(example) -> list[tuple[str, bool]]:
            pieces, waiting = [], start
            for turn in example.turns:
                if turn.train:
                    pieces += [(waiting, False), (turn.content + end, True)]
                    waiting = "\n"
                else:
                    waiting += turn.content + "\n"
            return [piece for piece in pieces if piece[0]]

        return plain

    def apply(messages, tools=None, prompt=False) -> str:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)

    merges_system = _refuses_system(apply)
    # what the template puts behind an answer: an end of turn, which is learnt, and blanks, which are not
    probe = apply([{"role": "user", "content": "question"}, {"role": "assistant", "content": "ANSWER"}])
    behind = probe[probe.rindex("ANSWER") + len("ANSWER") :]
    blanks = len(behind) - len(behind.rstrip())
    closing = "" if behind.strip() else end

    def templated(example) -> list[tuple[str, bool]]:
        messages = [{"role": turn.role, "content": turn.content} for turn in example.turns]
        if example.turns[0].role == "text":
            return [(example.turns[0].content + end, True)]
        shift = 0
        if merges_system and messages[0]["role"] == "system" and len(messages) > 1:
            first, second, *rest = messages
            messages = [{"role": second["role"], "content": first["content"] + "\n\n" + second["content"]}, *rest]
            shift = 1
        tools = _tools(example)
        pieces, done = [], 0
        for place, turn in enumerate(example.turns):
            if not turn.train:
                continue
            prompt = apply(messages[: place - shift], tools, prompt=True)
            whole = apply(messages[: place - shift + 1], tools)
            if not whole.startswith(prompt) or len(prompt) < done:
                raise ValueError(
                    f"the model's chat template renders the prompt differently once the answer follows (example {example.id or ''}): "
                    "the response can't be told apart. Use a tokenizer with a template that keeps the prompt as it is"
                )
            whole = whole[: len(whole) - blanks] if blanks else whole
            pieces += [(prompt[done:], False), (whole[len(prompt) :] + closing, True)]
            done = len(whole)
        return [piece for piece in pieces if piece[0]]

    return templated


def _refuses_system(apply) -> bool:
    from jinja2 import TemplateError

    try:
        return "SYSTEM-PROBE" not in apply([{"role": "system", "content": "SYSTEM-PROBE"}, {"role": "user", "content": "question"}])
    except TemplateError:
        return True


def _tools(example):
    if not example.tools:
        return None
    import json

    return json.loads(example.tools)


def batches(lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Cut samples into batches of like length, longest first, none of more than batch_tokens tokens with padding.

    Args:
        lengths: (k,) tokens of each sample.
        batch_tokens: padded tokens at most; a longer sample is a batch of its own.

    Returns:
        arrays of places in `lengths`, each place once.
    """
    order = np.argsort(-lengths, kind="stable")
    cut, start = [], 0
    while start < len(order):
        size = max(1, batch_tokens // int(lengths[order[start]]))
        cut.append(order[start : start + size])
        start += size
    return cut


def collate(pool: Pool, positions: Sequence[int] | np.ndarray, device="cpu", pad_token_id: int = 0, padding_side: str = "right") -> Batch:
    """Samples of a pool as one padded batch. Padded tokens are never attended to and never labels."""
    import torch

    samples = [pool.ids(i) for i in positions]
    length = max(map(len, samples))
    input_ids = np.full((len(samples), length), pad_token_id, np.int64)
    attends = np.zeros((len(samples), length), bool)
    sample_of, before, labels = [], [], []
    for row, (i, sample) in enumerate(zip(positions, samples, strict=True)):
        start = length - len(sample) if padding_side == "left" else 0
        input_ids[row, start : start + len(sample)] = sample
        attends[row, start : start + len(sample)] = True
        places = np.flatnonzero(pool.response(i))
        sample_of.append(np.full(len(places), row))
        before.append(places - 1 + start)
        labels.append(sample[places])

    def tensor(array, dtype=torch.int64):
        return torch.as_tensor(array, dtype=dtype).to(device, non_blocking=True)

    left = padding_side == "left"
    return Batch(
        tensor(input_ids),
        tensor(attends) if left else None,
        tensor(np.maximum(attends.cumsum(1) - 1, 0)) if left else None,
        tensor(np.concatenate(sample_of)),
        tensor(np.concatenate(before)),
        tensor(np.concatenate(labels)),
        tensor([len(part) for part in labels]),
    )
