"""An example -> its sample: the token ids of the whole text, trained turns marked, long ones shortened."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from staff.config import Reading
from staff.data.chat import USUAL, Rendering, chat_of, control_tokens, plain, spells
from staff.data.layouts import BadRow
from staff.data.turns import Example, Turn, text_of

SHORTENED, CUT, SPELLED, STRIPPED = 1, 2, 4, 8  # what was done to a sample
# a part handed to the tokenizer in one call, which spreads it over all cores: that many rows or letters
ROWS_AT_ONCE = 2_000
LETTERS_AT_ONCE = 2_000_000


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
            how = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
            encoded = self.tokenizer([text.text for _, text in some], **how)
            for k, (place, text) in enumerate(some):
                try:
                    encoding = encoded.encodings[k] if encoded.encodings else None
                    done[place] = self._sample(text, encoded["input_ids"][k], encoding)
                except BadRow as error:
                    done[place] = error
        return [text if isinstance(text, BadRow) else done[i] for i, text in enumerate(texts)]

    def _sample(self, text: Rendering, ids: list[int], encoding: Any) -> Sample:
        end = self.tokenizer.eos_token_id
        ends_twice = text.special and end is not None and ids[-2:] == [end, end]
        if ends_twice and text.text.endswith(self.tokenizer.eos_token):
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
        ends = range(start, stop), range(stop - 1, start - 1, -1)
        first, last = (next((t for at in end if (t := place(at)) is not None), None) for end in ends)
        if first is None or last is None:
            raise BadRow("has nothing to learn: the tokenizer makes no token of its answer")
        chars = encoding.token_to_chars
        if ids[first] in self.added and chars(first)[0] < start:
            first += 1  # a control token that swallows the blanks behind it
        while last + 1 < len(ids) and (at := chars(last + 1)) and at[0] < stop and at[1] > start:
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
                "tokens for the text before the answer alone. Use the model's fast tokenizer (tokenizer.json)"
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
    made, end, cut = openings_of(examples, tokenizer, room, reading, numbers)
    return [np.array(opening.ids, np.int32) for opening in made], end, cut


def openings_of(
    examples: Sequence[Example],
    tokenizer: Any,
    room: int,
    reading: Reading = USUAL,
    numbers: Sequence[int] | np.ndarray | None = None,
) -> tuple[list[Sample], int, int]:
    """`prompts_of` with the marks of the trained turns before the last."""
    sampler = Sampler(tokenizer, reading)
    made, cut, end = [], 0, 0
    for place, (example, sample) in enumerate(chain.from_iterable(sampler.parts(iter(examples)))):
        try:
            if isinstance(sample, BadRow):
                raise sample
            whole = sample
            if _before(sample) > room:
                cut += 1
                _, sample = sampler.shortened(example, sample, lambda s: _before(s) - room)
            if (left := _before(sample)) > room:
                raise BadRow(f"has a prompt of {left} tokens where {room} have room, even without its text")
        except BadRow as error:
            raise ValueError(f"row {place if numbers is None else numbers[place]} {error}") from None
        made.append(Sample(sample.ids[: _before(sample)], sample.trained[: _before(sample)]))
        end = whole.ids[-1]
    return made, end, cut


def _before(sample: Sample) -> int:
    """Tokens before the last trained turn."""
    return len(sample.trained.rstrip(b"\1"))
