"""Texts to token ids with a mask on the trained turns: the pool, what happens to long samples, batches."""

from __future__ import annotations

import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from staff.config import Reading
from staff.data.chat import USUAL, Rendering, chat_of, control_tokens, plain, spells, text_of
from staff.data.layouts import BadRow
from staff.data.rows import Rows
from staff.data.turns import Example, Turn

SHORTENED, CUT, SPELLED, STRIPPED = 1, 2, 4, 8  # what a pool marks samples with
# a part handed to the tokenizer in one call, which spreads it over all cores: that many rows or letters
ROWS_AT_ONCE = 2_000
LETTERS_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Pool:
    """A tokenised pool, flat: sample i is input_ids[offsets[i]:offsets[i + 1]].

    Attributes:
        input_ids: (total,) int32.
        is_response: (total,) bool, tokens that the loss is taken on.
        offsets: (n + 1,) int64.
        marks: (n,) uint8, what was done to a sample, added up: SHORTENED, its prompt lost the start of its
            text; CUT, its response
            lost its end; SPELLED, its own text spells control tokens of the model, which are read as such;
            STRIPPED, the
            template leaves reasoning of a trained turn away.
        dropped: (place, reason) of the rows that make no sample; places count all rows.
    """

    input_ids: np.ndarray
    is_response: np.ndarray
    offsets: np.ndarray
    marks: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    dropped: tuple[tuple[int, str], ...] = ()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The pool as named arrays, as `from_arrays` takes them."""
        places, reasons = [place for place, _ in self.dropped], [reason for _, reason in self.dropped]
        tokens = {"input_ids": self.input_ids, "is_response": self.is_response, "offsets": self.offsets}
        dropped = {"dropped": np.array(places, np.int64), "reasons": np.array(reasons, "U")}
        return {**tokens, "marks": self.marks, **dropped}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Pool:
        """What `to_arrays` gave."""
        dropped = zip(arrays["dropped"].tolist(), arrays["reasons"].tolist(), strict=True)
        names = ("input_ids", "is_response", "offsets", "marks")
        input_ids, is_response, offsets, marks = (arrays[name] for name in names)
        return cls(input_ids, is_response, offsets, marks, tuple(dropped))

    def marked(self, mark: int) -> np.ndarray:
        """Positions of the samples with a mark."""
        return np.flatnonzero(self.marks & mark)

    def remarkable(self) -> dict[str, np.ndarray]:
        """Positions of the samples that something was done to, by what it is called."""
        marks = {"truncated": SHORTENED, "cut_responses": CUT, "stripped": STRIPPED, "spelled": SPELLED}
        return {name: self.marked(mark) for name, mark in marks.items() if self.marked(mark).size}

    @property
    def truncated(self) -> int:
        return len(self.marked(SHORTENED))

    @property
    def cut_responses(self) -> int:
        return len(self.marked(CUT))

    @property
    def spelled(self) -> int:
        return len(self.marked(SPELLED))

    def take(self, positions: Sequence[int] | np.ndarray) -> Pool:
        """The samples at ascending positions."""
        keep = np.zeros(len(self), bool)
        keep[np.asarray(positions, np.int64)] = True
        tokens = np.repeat(keep, self.lengths)
        offsets = np.concatenate([[0], np.cumsum(self.lengths[keep])])
        return Pool(self.input_ids[tokens], self.is_response[tokens], offsets, self.marks[keep])

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64 tokens of each sample."""
        return np.diff(self.offsets)

    def responses_alone(self) -> Pool:
        """The pool without its prompts: each run of response tokens and the one token before it.

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
        input_ids: (B, T) int64, padded on the right: behind a causal model's tokens padding changes nothing,
            and without
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
    examples: Iterable[Example],
    tokenizer: Any,
    max_length: int,
    on_progress: Callable[[int], None] | None = None,
    reading: Reading = USUAL,
    numbers: Sequence[int] | np.ndarray | None = None,
) -> Pool:
    """Make a pool: each text as the model's chat template renders it, tokenised whole, trained turns marked.

    What stands behind the last trained token is left away: it bears on no loss. A sample of more than
        max_length tokens
    loses the start of the text of its prompt (not its begin token, its system turn or what the template
    writes); a response
    that is too long by itself loses its end. Such samples are marked, and so are those whose text spells
    control tokens.

    Memory: 5 bytes a token and 9 a row, an eighth more while it grows, and two parts at work: of 2,000 rows
        or 2 million
    letters, some 100 MiB. The tokenizer spreads a part over all cores, while the next one is put through the
    template.

    Args:
        examples: streamed.
        tokenizer: a transformers tokenizer.
        max_length: tokens at most.
        on_progress: called with the number of rows done.
        reading: its chat_template, template_date, on_long and on_bad_row hold here.
        numbers: the rows' numbers for messages; else their places.

    Returns:
        The pool; rows that can't be used are in its `dropped` where on_bad_row or on_long say so.

    Raises:
        ValueError: a row can't be used; names it.
    """
    input_ids, is_response, offsets, marks = array.array("i"), bytearray(), array.array("q", [0]), bytearray()
    dropped: list[tuple[int, str]] = []
    sampler = Sampler(tokenizer, reading)
    place = 0
    for part in sampler.parts(iter(examples)):
        for example, sample in part:
            try:
                if isinstance(sample, BadRow):
                    raise sample
                _, sample, mark = sampler.fitted(example, sample, max_length)
            except BadRow as error:
                number = place if numbers is None else int(numbers[place])
                if not (
                    reading.on_bad_row == "skip" or (isinstance(error, LongRow) and reading.on_long == "drop")
                ):
                    cure = (
                        ""
                        if isinstance(error, LongRow)
                        else ", or leave such rows out with --on-bad-row skip"
                    )
                    raise ValueError(f"row {number} {error}{cure}") from None
                dropped.append((place, str(error)))
            else:
                input_ids.extend(sample.ids)
                is_response += sample.trained
                offsets.append(len(input_ids))
                marks.append(mark)
            place += 1
        if on_progress:
            on_progress(place)
    ids, response = np.frombuffer(input_ids, np.int32), np.frombuffer(is_response, bool)
    return Pool(
        ids, response, np.frombuffer(offsets, np.int64), np.frombuffer(marks, np.uint8), tuple(dropped)
    )


def in_common(rows: Rows, pools: Mapping[Any, Pool]) -> tuple[Rows, dict[Any, Pool]]:
    """The rows that no pool dropped, and the pools of these alone: a position is the same row in all of
    them."""
    reasons = {place: reason for pool in pools.values() for place, reason in pool.dropped}
    if len(reasons) == len(rows):
        place = min(reasons)
        raise ValueError(
            f"none of {len(rows)} rows can be used; the first one, row {rows.numbers[place]}, "
            f"{reasons[place]}"
        )
    left = {}
    for name, pool in pools.items():
        own = {place for place, _ in pool.dropped}
        places = (place for place in range(len(rows)) if place not in own)
        left[name] = (
            pool.take([i for i, place in enumerate(places) if place not in reasons]) if reasons else pool
        )
    return (rows.without(reasons) if reasons else rows), left


class LongRow(BadRow):
    """A sample is longer than asked for."""


class Sample(NamedTuple):
    """ids and trained: one token each."""

    ids: list[int]
    trained: bytes
    stripped: bool = False


class Sampler:
    """Examples to samples, and the rule for all of them.

    A sample's tokens are those of the template's own rendering, tokenised whole; a token is trained where it
    has a character of a trained turn.
    """

    def __init__(self, tokenizer: Any, reading: Reading):
        self.tokenizer, self.reading = tokenizer, reading
        self.chat = chat_of(tokenizer, reading)
        self.control = control_tokens(tokenizer)
        self.added = set(getattr(tokenizer, "added_tokens_decoder", {}))

    def rendered(self, example: Example) -> Rendering | BadRow:
        if self.chat is None or example.turns[0].role == "text":
            return plain(example, self.tokenizer)
        try:
            return self.chat.render(example)
        except BadRow as error:
            return error

    def parts(self, examples: Iterator[Example]) -> Iterator[list[tuple[Example, Sample | BadRow]]]:
        ahead: deque = deque()
        with ThreadPoolExecutor(1) as thread:  # the tokenizer lets go of the interpreter while it works
            while True:
                part, texts, letters = [], [], 0
                for example in islice(examples, ROWS_AT_ONCE):
                    part.append(example)
                    texts.append(self.rendered(example))
                    letters += len(texts[-1].text) if isinstance(texts[-1], Rendering) else 0
                    if letters >= LETTERS_AT_ONCE:
                        break
                if part:
                    ahead.append((part, thread.submit(self.samples, texts)))
                if ahead and (len(ahead) == 2 or not part):
                    done, samples = ahead.popleft()
                    yield list(zip(done, samples.result(), strict=True))
                elif not part:
                    return

    def samples(self, texts: Sequence[Rendering | BadRow]) -> list[Sample | BadRow]:
        """The samples of some texts, in order."""
        done: dict[int, Sample | BadRow] = {}
        for special in (False, True):
            some = [(i, t) for i, t in enumerate(texts) if isinstance(t, Rendering) and t.special == special]
            if not some:
                continue
            encoded = self.tokenizer(
                [text.text for _, text in some],
                add_special_tokens=special,
                return_attention_mask=False,
                verbose=False,
            )
            for k, (place, text) in enumerate(some):
                try:
                    encoding = encoded.encodings[k] if encoded.encodings else None
                    done[place] = self._sample(text, encoded["input_ids"][k], encoding)
                except BadRow as error:
                    done[place] = error
        return [text if isinstance(text, BadRow) else done[i] for i, text in enumerate(texts)]

    def _sample(self, text: Rendering, ids: list[int], encoding: Any) -> Sample:
        end = self.tokenizer.eos_token_id
        if (
            text.special
            and end is not None
            and ids[-2:] == [end, end]
            and text.text.endswith(self.tokenizer.eos_token)
        ):
            ids = ids[:-1]  # the text's own, and the tokenizer's
        places = [self._places(text, ids, span, encoding) for span in text.spans]
        trained = bytearray(places[-1][1])
        for first, end in places:
            trained[first:end] = b"\1" * (end - first)
        if not any(trained[1:]):
            raise BadRow("has nothing to learn: one token, which nothing predicts, and no end token")
        return Sample(ids[: len(trained)], bytes(trained), text.stripped)

    def _places(
        self, text: Rendering, ids: list[int], span: tuple[int, int], encoding: Any
    ) -> tuple[int, int]:
        """The tokens that have a character of a span: the first, and the one behind the last."""
        start, stop = span
        if encoding is None:
            return self._token_at(text, ids, start), self._token_at(text, ids, stop)
        place = encoding.char_to_token
        first = next((token for at in range(start, stop) if (token := place(at)) is not None), None)
        last = next(
            (token for at in range(stop - 1, start - 1, -1) if (token := place(at)) is not None), None
        )
        if first is None or last is None:
            raise BadRow("has nothing to learn: the tokenizer makes no token of its answer")
        if ids[first] in self.added and encoding.token_to_chars(first)[0] < start:
            first += 1  # a control token that swallows the blanks behind it
        while (
            last + 1 < len(ids)
            and (chars := encoding.token_to_chars(last + 1))
            and chars[0] < stop
            and chars[1] > start
        ):
            last += 1  # a character of several tokens
        return first, (len(ids) if text.special and stop == len(text.text) else last + 1)

    def _token_at(self, text: Rendering, ids: list[int], at: int) -> int:
        """The token at a character, of a tokenizer without offsets: the text before must be the same tokens
        alone."""
        if at == len(text.text):
            return len(ids)
        before = self.tokenizer(text.text[:at], add_special_tokens=text.special, verbose=False)["input_ids"]
        if text.special and before and before[-1] != ids[len(before) - 1]:
            before = before[:-1]  # an end token that the tokenizer sets
        if ids[: len(before)] != before:
            raise BadRow(
                "has an answer that can't be told apart: its tokenizer has no character offsets, and other "
                "tokens for "
                "the text before the answer alone. Use the model's fast tokenizer (tokenizer.json)"
            )
        return len(before)

    def fitted(self, example: Example, sample: Sample, max_length: int) -> tuple[Example, Sample, int]:
        """An example and its sample of at most max_length tokens, and what was done to it."""
        mark = SPELLED * spells(self.control, example) + STRIPPED * sample.stripped
        if len(sample.ids) <= max_length:
            return example, sample, mark
        if self.reading.on_long != "cut-prompt":
            raise LongRow(f"has {len(sample.ids)} tokens, more than --max-length {max_length}")
        texts = [text_of(turn.content) for turn in self._loose(example).values()]
        own = len(sample.ids) - sum(map(len, self._alone(texts)))
        if own < max_length:
            example, sample = self.shortened(example, sample, lambda s: len(s.ids) - max_length)
        else:  # the response alone fills it: the prompt gets half
            example, sample = self.shortened(example, sample, lambda s: s.trained.index(1) - max_length // 2)
        if len(sample.ids) <= max_length:
            return example, sample, mark + SHORTENED
        sample = Sample(sample.ids[:max_length], sample.trained[:max_length])
        if 1 not in sample.trained[1:]:
            raise LongRow(f"has no room for its answer in --max-length {max_length}")
        return example, sample, mark + CUT

    def shortened(
        self, example: Example, sample: Sample, excess: Callable[[Sample], int]
    ) -> tuple[Example, Sample]:
        """The prompt without the start of its text, earliest turn first, until nothing is in excess."""
        for place in self._loose(example):
            while (over := excess(sample)) > 0:
                turn = example.turns[place]
                shorter = self._without(text_of(turn.content), over)
                if shorter == text_of(turn.content):
                    break
                turns = (*example.turns[:place], turn._replace(content=shorter), *example.turns[place + 1 :])
                example = example._replace(turns=turns)
                changed = self.samples([self.rendered(example)])[0]
                if isinstance(changed, BadRow):
                    raise changed
                sample = changed
        return example, sample

    def _loose(self, example: Example) -> dict[int, Turn]:
        """The turns that may lose text, those of the system last: where nothing else is left to make room."""
        turns = [(place, turn) for place, turn in enumerate(example.turns) if not turn.train]
        return dict(sorted(turns, key=lambda pair: pair[1].role == "system"))

    def _alone(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def _without(self, text: str, tokens: int) -> str:
        """A text without so many tokens at its start, of which its last letter stays."""
        if getattr(self.tokenizer, "is_fast", False):
            encoding = self.tokenizer([text], add_special_tokens=False, verbose=False).encodings[0]
            starts = [start for start, _ in encoding.offsets]
            at = max(1, starts[min(tokens, len(starts) - 1)]) if starts else 0
        else:
            at = max(1, len(text) * tokens // max(1, len(self._alone([text])[0])))
        return text[min(at, max(len(text.rstrip()) - 1, 0)) :]


def prompts_of(
    examples: Sequence[Example],
    tokenizer: Any,
    room: int,
    reading: Reading = USUAL,
    numbers: Sequence[int] | np.ndarray | None = None,
) -> tuple[list[np.ndarray], int, int]:
    """What stands before each last answer in at most `room` tokens; the token that answers end with; how many
    were cut."""
    sampler = Sampler(tokenizer, reading)
    made, cut, end = [], 0, 0
    for place, (example, sample) in enumerate(
        pair for part in sampler.parts(iter(examples)) for pair in part
    ):
        try:
            if isinstance(sample, BadRow):
                raise sample
            whole = sample
            if _before(sample) > room:
                cut += 1
                _, sample = sampler.shortened(example, sample, lambda s: _before(s) - room)
            if _before(sample) > room:
                raise BadRow(
                    f"has a prompt of {_before(sample)} tokens where {room} have room, even without its text"
                )
        except BadRow as error:
            raise ValueError(f"row {place if numbers is None else numbers[place]} {error}") from None
        made.append(np.array(sample.ids[: _before(sample)], np.int32))
        end = whole.ids[-1]
    return made, end, cut


def _before(sample: Sample) -> int:
    """Tokens before the last trained turn."""
    return len(sample.trained.rstrip(b"\1"))


def batches(lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Cut samples into batches of like length, longest first, none of more than batch_tokens tokens with
    padding.

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
