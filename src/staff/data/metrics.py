"""How near answers come to their references: ROUGE, BLEU, chrF and exact match, and how each was tokenised.
No torch."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

PER_EXAMPLE = ("rouge1", "rouge2", "rougeL", "bleu", "chrf", "exact")  # all from 0 to 100, higher is better
# share of ASCII among a reference's letters from which rouge-score's own tokenizer loses nothing to speak of
ENGLISH = 0.995
WORD = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*|[\p{L}\p{M}\p{N}_]+"
OWN_TOKENIZER = "rouge-score's own, without stemming: lower case, all but a-z and 0-9 dropped"
UNICODE_TOKENIZER = (
    "Unicode: case-folded words of letters, marks and digits; a token a character in scripts without blanks"
)


class UnicodeTokenizer:
    """Words of any script, as rouge-score takes a tokenizer. Scripts that write no blanks give a token a
    character."""

    def __init__(self) -> None:
        import regex  # sacrebleu and transformers bring it

        self._words = regex.compile(WORD)

    def tokenize(self, text: str) -> list[str]:
        return self._words.findall(text.casefold())


def is_english(reference: str) -> bool:
    """Would rouge-score's own tokenizer, which knows a to z alone, keep nearly every letter of a
    reference?"""
    letters = [letter for letter in reference if letter.isalpha()]
    return sum(letter.isascii() for letter in letters) >= ENGLISH * len(letters)


def bleu_tokenizer(references: Sequence[str]) -> str:
    """sacrebleu's tokenizer for the references: "zh" for Chinese, "char" for other scripts without blanks,
    else its default."""
    import regex

    text = "".join(references)
    letters = max(1, len(regex.findall(r"\p{L}", text)))
    han = len(regex.findall(r"\p{Han}", text))
    others = len(regex.findall(r"[\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]", text))
    if 2 * (han + others) < letters:
        return "13a"
    return "zh" if han > 4 * others else "char"


def judge_answers(
    predictions: Sequence[str], references: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, float], dict[str, str]]:
    """Compare answers with their references.

    Args:
        predictions, references: (n,) texts, one reference each; n at least 1. They are compared in NFC.

    Returns:
        per example, (n,) each: rouge1, rouge2, rougeL (F1), bleu (BLEU-4 with effective order), chrf, exact;
        0 to 100.
        Of all: the means of rouge and exact, and the corpus BLEU-4 and chrF, which are no means of sentences.
        How: metric -> its tokenisation, in words; what other tools report under the same name may differ by
            it.

    Raises:
        ValueError: rouge-score or sacrebleu is not there.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise ValueError(
            f"metrics need the {error.name} package: pip install 'staff-coreset[evaluate]'"
        ) from None
    predictions, references = (
        [unicodedata.normalize("NFC", text) for text in texts] for texts in (predictions, references)
    )
    tokenize = bleu_tokenizer(references)
    names = ["rouge1", "rouge2", "rougeL"]
    own, other = (RougeScorer(names, tokenizer=tokenizer) for tokenizer in (None, UnicodeTokenizer()))
    english = [is_english(reference) for reference in references]
    bleu, chrf = BLEU(tokenize=tokenize, effective_order=True), CHRF()
    found: dict[str, list[float]] = {name: [] for name in PER_EXAMPLE}
    for prediction, reference, plain in zip(predictions, references, english, strict=True):
        for name, score in (own if plain else other).score(reference, prediction).items():
            found[name].append(100 * score.fmeasure)
        found["bleu"].append(bleu.sentence_score(prediction, [reference]).score)
        found["chrf"].append(chrf.sentence_score(prediction, [reference]).score)
        found["exact"].append(100.0 * (_plain(prediction) == _plain(reference)))
    whole = BLEU(tokenize=tokenize)
    overall = {name: float(np.mean(found[name])) for name in (*names, "exact")}
    overall["bleu"] = float(whole.corpus_score(list(predictions), [list(references)]).score)
    overall["chrf"] = float(chrf.corpus_score(list(predictions), [list(references)]).score)
    ways = [
        way for way, used in ((OWN_TOKENIZER, any(english)), (UNICODE_TOKENIZER, not all(english))) if used
    ]
    how = dict.fromkeys(names, "; where a reference has other letters: ".join(ways))
    how["bleu"] = f"sacrebleu {whole.get_signature()}; per example with effective order"
    how["chrf"] = f"sacrebleu {chrf.get_signature()}"
    how["exact"] = "the texts themselves, case kept; blanks at the ends and in a row count as one"
    return {name: np.array(values) for name, values in found.items()}, overall, how


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Distinct n-grams as a share of all n-grams of some texts (Li et al., 2016), by the Unicode tokenizer;
    nan where there are none."""
    tokenizer = UnicodeTokenizer()
    grams: list[tuple[str, ...]] = []
    for text in texts:
        tokens = tokenizer.tokenize(text)
        grams += zip(*(tokens[start:] for start in range(n)), strict=False)
    return len(set(grams)) / len(grams) if grams else float("nan")


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
