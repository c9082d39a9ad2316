"""The pool: the token ids of all samples with a mask on the trained turns, and batches of them."""

from __future__ import annotations

import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from staff.config import Reading
from staff.data.chat import USUAL
from staff.data.layouts import BadRow
from staff.data.rows import Rows
from staff.data.samples import CUT, SHORTENED, SPELLED, STRIPPED, LongRow, Sampler
from staff.data.turns import Example

COUNTED_AT_ONCE = 10_000  # samples


@dataclass(frozen=True)
class Pool:
    """A tokenised pool, flat: sample i is input_ids[offsets[i]:offsets[i + 1]].

    Attributes:
        input_ids: (total,) int32.
        is_response: (total,) bool, tokens that the loss is taken on.
        offsets: (n + 1,) int64.
        marks: (n,) uint8, what was done to a sample, added up: SHORTENED, its prompt lost the start of its
            text; CUT, its response lost its end; SPELLED, its own text spells control tokens of the model,
            which are read as such; STRIPPED, the template leaves reasoning of a trained turn away.
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
        # the token before belongs to another sample
        keep[starts[self.is_response[starts] & ~self.is_response[starts - 1]] - 1] = False
        offsets = np.concatenate([[0], np.cumsum(_counted(keep, self.offsets))])
        return Pool(self.input_ids[keep], self.is_response[keep], offsets)

    def prompts_alone(self) -> Pool:
        """What stands before each sample's last run of response tokens, at least one token."""
        keep = np.zeros(len(self.input_ids), bool)
        for start, stop in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True):
            before = np.flatnonzero(~self.is_response[start:stop])
            keep[start : start + (int(before[-1]) + 1 if len(before) else 1)] = True
        offsets = np.concatenate([[0], np.cumsum(_counted(keep, self.offsets))])
        return Pool(self.input_ids[keep], np.zeros(int(keep.sum()), bool), offsets)

    def ids(self, i: int) -> np.ndarray:
        return self.input_ids[self.offsets[i] : self.offsets[i + 1]]

    def response(self, i: int) -> np.ndarray:
        """(length,) bool mask of sample i; its first token is never predicted and so never counts."""
        mask = self.is_response[self.offsets[i] : self.offsets[i + 1]].copy()
        mask[0] = False
        return mask

    def response_tokens(self, positions: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """(n,) int64 tokens of each sample that the loss is taken on; or (k,) of those at some positions,
        without a look at the others."""
        if positions is not None:
            return np.array([np.count_nonzero(self.response(i)) for i in positions], np.int64)
        counted = _counted(self.is_response, self.offsets)
        filled = np.flatnonzero(self.lengths)
        counted[filled] -= self.is_response[self.offsets[filled]]
        return counted


def _counted(flags: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(n,) int64 flags that are set in each sample; some samples at a time, a sum takes 8 bytes a flag."""
    counted = np.zeros(len(offsets) - 1, np.int64)
    filled = np.flatnonzero(np.diff(offsets))
    for at in range(0, len(filled), COUNTED_AT_ONCE):
        some = filled[at : at + COUNTED_AT_ONCE]
        first, end = offsets[some[0]], offsets[some[-1] + 1]
        counted[some] = np.add.reduceat(flags[first:end], offsets[some] - first, dtype=np.int64)
    return counted


@dataclass(frozen=True)
class Batch:
    """Some samples as tensors. Axes: B batch, T tokens, N response tokens.

    Attributes:
        input_ids: (B, T) int64, padded on the right: behind a causal model's tokens padding changes nothing,
            and without a mask attention takes its fast path.
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
    name_of: Callable[[int], str] = "row {}".format,
) -> Pool:
    """Make a pool: each text as the model's chat template renders it, tokenised whole, trained turns marked.

    What stands behind the last trained token is left away: it bears on no loss. A sample of more than
    max_length tokens loses the start of the text of its prompt (not its begin token, its system turn or what
    the template writes); a response that is too long by itself loses its end. Such samples are marked, and so
    are those whose text spells control tokens.

    Memory: 5 bytes a token and 9 a row, an eighth more while it grows, and two parts at work: of 2,000 rows
    or 2 million letters, some 100 MiB. The tokenizer spreads a part over all cores, while the next one is put
    through the template.

    Args:
        examples: streamed.
        tokenizer: a transformers tokenizer.
        max_length: tokens at most.
        on_progress: called with the number of rows done.
        reading: its chat_template, template_date, on_long and on_bad_row hold here.
        name_of: place -> what messages call the row.

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
                is_long = isinstance(error, LongRow)
                if not (reading.on_bad_row == "skip" or (is_long and reading.on_long == "drop")):
                    cure = "" if is_long else ", or leave such rows out with --on-bad-row skip"
                    raise ValueError(f"{name_of(place)} {error}{cure}") from None
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
    ends, done = np.frombuffer(offsets, np.int64), np.frombuffer(marks, np.uint8)
    return Pool(ids, response, ends, done, tuple(dropped))


def in_common(rows: Rows, pools: Mapping[Any, Pool]) -> tuple[Rows, dict[Any, Pool]]:
    """The rows that no pool dropped, and the pools of these alone: a position is the same row in all of
    them."""
    reasons = {place: reason for pool in pools.values() for place, reason in pool.dropped}
    if len(reasons) == len(rows):
        first = f"row {rows.numbers[min(reasons)]}, {reasons[min(reasons)]}"
        raise ValueError(f"none of {len(rows)} rows can be used; the first one, {first}")
    if not reasons:
        return rows, dict(pools)
    left = {}
    for name, pool in pools.items():
        places = np.delete(np.arange(len(rows)), [place for place, _ in pool.dropped])
        left[name] = pool.take(np.flatnonzero(~np.isin(places, list(reasons))))
    return rows.without(reasons), left


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


def collate(pool: Pool, positions: Sequence[int] | np.ndarray, device: Any = "cpu", skip: int = 0) -> Batch:
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

    def tensor(array: Any) -> Any:
        return torch.as_tensor(array, dtype=torch.int64).to(device, non_blocking=True)

    of_tokens = map(np.concatenate, (sample_of, before, labels))
    return Batch(*map(tensor, (input_ids, *of_tokens, [len(part) for part in labels])))
