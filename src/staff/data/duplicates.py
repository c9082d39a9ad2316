"""Rows that say what an earlier one says, to the letter or nearly: MinHash over word triples."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Iterable

import numpy as np

from staff.data.rows import Rows
from staff.data.turns import Example

SHINGLE = 3  # words
PERMUTATIONS = 64
# a script without spaces: each letter is a word
WORDS = re.compile("[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[^\\s\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]+")
MISSING = "--dedup near needs datasketch: pip install 'staff-coreset[inspect]'"


def find_duplicates(
    examples: Iterable[Example], similarity: float | None, on_row: Callable[[int], object] = lambda done: None
) -> dict[int, int]:
    """The rows that repeat an earlier one which is itself none of them, so the first of each cluster stays.

    Equal: the same turns and tools, whatever the id. Nearly equal: the word triples of all turns, upper case
    or lower, have this Jaccard similarity or more to those of the earlier row. MinHash brings rows together,
    their triples decide; a pair right at the limit may be missed, none is made up.

    Args:
        similarity: in (0, 1]; None: equal rows alone.
        on_row: called with how many were looked at.

    Returns:
        position -> position of the row that it repeats, the first such; in order.
    """
    first_of: dict[bytes, int] = {}
    same: dict[int, int] = {}
    near = NearIndex(similarity) if similarity is not None else None
    for place, example in enumerate(examples):
        digest = digest_of(example)
        if digest not in first_of:
            text = "\n".join(turn.text for turn in example.turns)
            like = near.find_or_add(place, text) if near is not None else None
            first_of[digest] = place if like is None else like
        if first_of[digest] != place:
            same[place] = first_of[digest]
        if place % 1_000 == 999:
            on_row(place + 1)
    return same


def digest_of(example: Example) -> bytes:
    """Equal for rows of the same turns and tools, whatever their id."""
    turns = [(turn.role, turn.content, turn.fields) for turn in example.turns]
    text = repr((turns, example.tools)).encode(errors="replace")
    return hashlib.blake2b(text, digest_size=16).digest()


def places_of(wanted: Rows, rows: Rows) -> list[int]:
    """Where some rows stand among others: by id and text, else by id, else by text; the first that fits.

    Raises:
        ValueError: names the row that is not there.
    """
    asked = [(example.id, digest_of(example)) for example in wanted.examples()]
    first_of: dict[str | bytes | tuple[str, bytes], int] = {}
    for place, example in enumerate(rows.examples()):
        digest = digest_of(example)
        first_of.setdefault(digest, place)
        if example.id is not None:
            first_of.setdefault(example.id, place)
            first_of.setdefault((example.id, digest), place)  # ids may stand twice
    places = []
    for position, (label, digest) in enumerate(asked):
        known = [] if label is None else [(label, digest), label]
        found = [first_of[name] for name in (*known, digest) if name in first_of]
        if not found:
            raise ValueError(f"{wanted.where(position)} is not in the data, neither its id nor its text")
        places.append(found[0])
    return places


def words_of(text: str) -> list[str]:
    """The words of a text, without case, that texts are told alike by."""
    return WORDS.findall(text.casefold())


class NearIndex:
    """The rows seen so far that are unlike one another; 4 bytes a word, and a sketch each."""

    def __init__(self, similarity: float):
        from datasketch import MinHash, MinHashLSH

        self._similarity, self._shingles = similarity, dict[int, np.ndarray]()
        # what is missed stays in the pool, what is brought together wrongly costs a comparison
        self._index = MinHashLSH(min(similarity, 0.99), PERMUTATIONS, weights=(0.2, 0.8))
        # copied: making the permutations is most of a sketch's cost
        self._empty = MinHash(PERMUTATIONS, seed=1, hashfunc=int)

    def find_or_add(self, number: int, text: str) -> int | None:
        """The first row that a text is like; None where there is none, and the text is now one of them."""
        words = words_of(text) or [text]
        triples = {" ".join(words[i : i + SHINGLE]) for i in range(max(len(words) - SHINGLE + 1, 1))}
        own = np.array(sorted({zlib.crc32(t.encode(errors="replace")) for t in triples}), np.uint32)
        sketch = self._empty.copy()
        sketch.update_batch(own.tolist())
        for other in sorted(self._index.query(sketch)):
            theirs = self._shingles[other]
            fewer, more = sorted((len(own), len(theirs)))
            if fewer < self._similarity * more:
                continue
            shared = len(np.intersect1d(own, theirs, assume_unique=True))
            if shared >= self._similarity * (fewer + more - shared):
                return other
        self._index.insert(number, sketch, check_duplication=False)
        self._shingles[number] = own
        return None
