"""Rows that make a model answer others well when it has them before it (Data Whisperer, arXiv 2505.12212)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from staff.methods.strata import check_scores, highest
from staff.types import Selection

Whispers = Callable[[np.ndarray, int | None], np.ndarray]


def whisper(
    n: int,
    *,
    budget: int,
    rng: np.random.Generator,
    whispers: Whispers,
    demonstrations: int = 5,
    questions: int = 3,
    layer: int | None = None,
) -> Selection:
    """Keep the samples that, shown to a model as demonstrations, get good answers to other samples' prompts,
    as far as it looks at them (Data Whisperer, Wang et al. 2025, arXiv 2505.12212).

    The pool is split in two at random, and each half asks the other: every sample is a demonstration once,
    with four others, before each of three questions of the other half. A sample's score is the mean over the
    three of (how like the answer is to the question's own, `--likeness`) times (its share of the attention).
    The attention is summed over the heads of one layer, from the tokens of the question to those of the
    demonstration, and divided by the numbers of both; shares are of all demonstrations in the prompt. So a
    score hangs on the draw of halves and neighbours too: the one exception to "on the sample and the model
    alone". No model is tuned.

    Where ours departs from the released code: each question is asked in a conversation of its own behind
    the same demonstrations, since three answers in one text have to be told apart by words that a model may
    not write (there such prompts are dropped); so it reads the demonstrations three times. The last prompt of
    a half, with fewer demonstrations, would give each a larger share: shares count times the demonstrations
    there are. The layer is two fifths of the way up where none is given (there 13 of 32 for Llama-3-8B).

    Costs 3/5 n prompts of six samples each, read once to answer and up to the layer again for its attention,
    and the answers: about four passes of the model that is asked and the answers' tokens, and by the clock
    many times that.

    Args:
        n: the pool's size, in samples.
        budget: m, in samples, 0 <= m <= n.
        rng: draws the halves and their order; the same for every m.
        whispers: (conversations, layer) -> numbers; conversations (c, 1 + d) are positions, the question
            first and its demonstrations behind it, -1 for none; the numbers (c, 1 + d) how like the answer
            is, and the attention to each demonstration, 0 for none.
        demonstrations: d, of a prompt.
        questions: prompts behind the same demonstrations.
        layer: whose attention counts, from 0; None: two fifths of the way up.

    Raises:
        ValueError: no whole number of demonstrations or questions, or nan among the numbers.
    """
    if min(demonstrations, questions) < 1 or demonstrations % 1 or questions % 1 or (layer or 0) % 1:
        found = f"found {demonstrations}, {questions} and {layer}"
        raise ValueError(f"demonstrations, questions and layer are whole numbers, from 1, 1 and 0; {found}")
    halves = np.split(rng.permutation(n), [n // 2])
    conversations: list[list[int]] = []
    for own, others in (halves, halves[::-1]):
        for turn, start in enumerate(range(0, len(own), demonstrations) if len(others) else ()):
            shown = own[start : start + demonstrations].tolist()
            shown += [-1] * (demonstrations - len(shown))
            for k in range(min(questions, len(others))):
                conversations.append([int(others[(turn * questions + k) % len(others)]), *shown])
    if budget in (0, n) or not conversations:
        return Selection(np.arange(budget))
    asked = np.array(conversations, np.int64)
    numbers = np.asarray(whispers(asked, layer), np.float64)
    bad = np.flatnonzero(~np.isfinite(numbers).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(asked)} answers or attentions are nan (the question at {asked[bad[0], 0]})"
        )
    shown, attention = asked[:, 1:], numbers[:, 1:]
    there = shown >= 0
    total, count = attention.sum(axis=1, keepdims=True), there.sum(axis=1, keepdims=True)
    shares = np.divide(attention * count, total, out=np.ones_like(attention), where=total > 0)
    sums = np.bincount(shown[there], (numbers[:, :1] * shares)[there], minlength=n)
    times = np.bincount(shown[there], minlength=n)
    return Selection(highest(check_scores(sums / np.maximum(times, 1), n), budget))
