"""Rows to token ids with a mask on the response: templates, truncation, batches."""

from __future__ import annotations

import array
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

# a part handed to the tokenizer in one call, which spreads it over all cores: that many rows, or the row that makes it that many letters
ROWS_AT_ONCE = 2_000
LETTERS_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Pool:
    """A tokenised pool, flat: sample i is input_ids[offsets[i]:offsets[i + 1]].

    Attributes:
        input_ids: (total,) int32.
        is_response: (total,) bool, tokens that the loss is taken on.
        offsets: (n + 1,) int64.
        truncated: samples whose prompt lost tokens at its start.
        cut_responses: samples whose response lost tokens at its end, since it alone is too long.
        spelled: samples whose own text spells control tokens of the model, which are read as such; see `control_tokens`.
    """

    input_ids: np.ndarray
    is_response: np.ndarray
    offsets: np.ndarray
    truncated: int = 0
    cut_responses: int = 0
    spelled: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The pool as named arrays, as `from_arrays` takes them."""
        counts = np.array([self.truncated, self.cut_responses, self.spelled])
        tokens = {"input_ids": self.input_ids, "is_response": self.is_response, "offsets": self.offsets}
        return {**tokens, "counts": counts}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Pool:
        """What `to_arrays` gave."""
        counts = map(int, arrays["counts"])
        return cls(arrays["input_ids"], arrays["is_response"], arrays["offsets"], *counts)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64 tokens of each sample."""
        return np.diff(self.offsets)

    def responses_alone(self) -> Pool:
        """The pool without its prompts: each run of response tokens and the one token before it, which predicts the first.

        That token is the last of the template's opening of an answer, the same for all samples.
        """
        keep = self.is_response.copy()
        keep[:-1] |= self.is_response[1:]
        starts = self.offsets[1:-1]
        crosses = (
            starts[self.is_response[starts] & ~self.is_response[starts - 1]] - 1
        )  # the token before belongs to another sample
        keep[crosses] = False
        offsets = np.concatenate([[0], np.cumsum(keep)])[self.offsets]
        return Pool(self.input_ids[keep], self.is_response[keep], offsets)

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
        input_ids: (B, T) int64, padded on the right: behind a causal model's tokens padding changes nothing, and without
            a mask attention takes its fast path.
        sample_of: (N,) int64, the sample of each response token.
        before: (N,) int64, the position of the token before it, which predicts it.
        labels: (N,) int64.
        counts: (B,) response tokens of each sample.
    """

    input_ids: Any
    sample_of: Any
    before: Any
    labels: Any
    counts: Any


def tokenise(
    examples: Iterable, tokenizer, max_length: int, on_progress: Callable[[int], None] | None = None
) -> Pool:
    """Make a pool of examples with the model's own chat template where it has one.

    The template's text up to a trained turn and that turn's text are tokenised apart, as the model will see them when
    it generates: the mask never splits a token. Without a template: prompt + newline + response + end token.
    A sample of more than max_length tokens loses the start of its prompt; a response that is too long by itself keeps
    its first max_length - 1 tokens. Both are counted, and so is text that spells control tokens.

    Memory: 5 bytes a token and 8 a row, an eighth more while it grows, and two parts at work: of 2,000 rows or 2 million
    letters, some 100 MiB. The tokenizer spreads a part over all cores, while the next one is put through the template.

    Args:
        examples: `formats.Example`s, streamed.
        tokenizer: a transformers tokenizer.
        max_length: tokens at most.
        on_progress: called with the number of rows done.

    Raises:
        ValueError: the template can't be split at the response.
    """
    input_ids, is_response, offsets = array.array("i"), bytearray(), array.array("q", [0])
    truncated = cut_responses = spelled = 0
    control = control_tokens(tokenizer)
    for part, encoded in _encode(iter(examples), _renderer(tokenizer), tokenizer):
        for example, sample in part:
            tokens: list[int] = []
            mask = bytearray()
            for _, trained in sample:
                piece = next(encoded)
                tokens += piece
                mask += (b"\1" if trained else b"\0") * len(piece)
            if len(tokens) > max_length:
                first = mask.index(1)
                if (
                    len(tokens) - first >= max_length
                ):  # the response alone fills it: one token of the prompt to predict from
                    start = max(first - 1, 0)
                    cut_responses += 1
                else:
                    start = len(tokens) - max_length
                    truncated += 1
                tokens, mask = tokens[start : start + max_length], mask[start : start + max_length]
            input_ids.extend(tokens)
            is_response += mask
            offsets.append(len(input_ids))
            spelled += spells(control, example)
        if on_progress:
            on_progress(len(offsets) - 1)
    ids, response = np.frombuffer(input_ids, np.int32), np.frombuffer(is_response, bool)
    return Pool(ids, response, np.frombuffer(offsets, np.int64), truncated, cut_responses, spelled)


def _encode(examples: Iterator, render, tokenizer) -> Iterator[tuple[list, Iterator[list[int]]]]:
    """Parts of [(example, its pieces of text), ...], each with the tokens of all its pieces in order."""

    def encode(texts: list[str]) -> Iterator[list[int]]:
        return iter(
            tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]
        )

    ahead: deque = deque()
    with ThreadPoolExecutor(1) as thread:  # the tokenizer lets go of the interpreter while it works
        while True:
            part, letters = [], 0
            for example in islice(examples, ROWS_AT_ONCE):
                part.append((example, render(example)))
                letters += sum(len(text) for text, _ in part[-1][1])
                if letters >= LETTERS_AT_ONCE:
                    break
            if part:
                ahead.append(
                    (part, thread.submit(encode, [text for _, sample in part for text, _ in sample]))
                )
            if ahead and (len(ahead) == 2 or not part):
                done, encoded = ahead.popleft()
                yield done, encoded.result()
            elif not part:
                return


def control_tokens(tokenizer) -> re.Pattern | None:
    """What finds a model's control tokens in text, such as <|im_end|>; None where it has none.

    Where a row's own text spells one, the tokenizer reads it as the control token, as it does in TRL and (unless
    `split_special_tokens` is set) in LLaMA-Factory. Scores must be of what will be trained on, so it is read so here too,
    but never silently: such rows are counted.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = {
        *getattr(tokenizer, "all_special_tokens", []),
        *(token.content for token in added if token.special),
    }
    tokens = {token for token in tokens if token and not token.isspace()}
    return re.compile("|".join(map(re.escape, sorted(tokens)))) if tokens else None


def spells(control: re.Pattern | None, example) -> bool:
    """Does an example spell one where the template should have the only ones? A bare text column may: it is as the model sees it."""
    return control is not None and any(
        turn.role != "text" and control.search(turn.text) for turn in example.turns
    )


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
                    pieces += [(waiting, False), (turn.text + end, True)]
                    waiting = "\n"
                else:
                    waiting += turn.text + "\n"
            return [piece for piece in pieces if piece[0]]

        return plain

    def apply(messages, tools=None, prompt=False) -> str:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=prompt
        )

    merges_system = _refuses_system(apply)
    # what the template puts behind an answer: an end of turn, which is learnt, and blanks, which are not
    probe = apply([{"role": "user", "content": "question"}, {"role": "assistant", "content": "ANSWER"}])
    behind = probe[probe.rindex("ANSWER") + len("ANSWER") :]
    blanks = len(behind) - len(behind.rstrip())
    closing = "" if behind.strip() else end

    def templated(example) -> list[tuple[str, bool]]:
        messages = [
            {"role": turn.role, "content": turn._replace(fields=None).text, **(turn.fields or {})}
            for turn in example.turns
        ]
        if example.turns[0].role == "text":
            return [(example.turns[0].text + end, True)]
        shift = 0
        if merges_system and messages[0]["role"] == "system" and len(messages) > 1:
            first, second, *rest = messages
            messages = [
                {"role": second["role"], "content": first["content"] + "\n\n" + second["content"]},
                *rest,
            ]
            shift = 1
        tools = example.tools
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
        return "SYSTEM-PROBE" not in apply(
            [{"role": "system", "content": "SYSTEM-PROBE"}, {"role": "user", "content": "question"}]
        )
    except TemplateError:
        return True


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


def collate(
    pool: Pool,
    positions: Sequence[int] | np.ndarray,
    device="cpu",
    skip: int = 0,
) -> Batch:
    """Samples of a pool as one padded batch. Padded tokens are never attended to and never labels.

    Args:
        skip: tokens at each sample's start that are left out; none of them a response, nor the one before it.
    """
    import torch

    samples = [pool.ids(i)[skip:] for i in positions]
    length = max(map(len, samples))
    input_ids = np.zeros((len(samples), length), np.int64)
    sample_of, before, labels = [], [], []
    for row, (i, sample) in enumerate(zip(positions, samples, strict=True)):
        input_ids[row, : len(sample)] = sample
        places = np.flatnonzero(pool.response(i)[skip:])
        sample_of.append(np.full(len(places), row))
        before.append(places - 1)
        labels.append(sample[places])

    def tensor(array, dtype=torch.int64):
        return torch.as_tensor(array, dtype=dtype).to(device, non_blocking=True)

    return Batch(
        tensor(input_ids),
        tensor(np.concatenate(sample_of)),
        tensor(np.concatenate(before)),
        tensor(np.concatenate(labels)),
        tensor([len(part) for part in labels]),
    )
