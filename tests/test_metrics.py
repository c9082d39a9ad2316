"""Metrics against examples worked by hand."""

import math

import numpy as np
import pytest

from staff.data.metrics import UnicodeTokenizer, bleu_tokenizer, distinct, is_english, judge_answers


def test_rouge_is_f1_over_shared_words_in_any_and_in_the_same_order():
    each, overall, how = judge_answers(["the cat sat on the mat"], ["the cat is on the mat"])
    # shared words: the cat on the mat, 5 of 6 and 6; pairs: the-cat, on-the, the-mat, 3 of 5 and 5; longest
    # common subsequence 5
    assert each["rouge1"][0] == pytest.approx(100 * 5 / 6)
    assert each["rouge2"][0] == pytest.approx(100 * 3 / 5)
    assert each["rougeL"][0] == pytest.approx(100 * 5 / 6)
    assert each["exact"][0] == 0
    assert overall["rouge1"] == pytest.approx(100 * 5 / 6)
    assert "a-z" in how["rougeL"]
    uneven = judge_answers(["b a"], ["a b c d"])[
        0
    ]  # precision 1, recall 1/2; in order one word alone: 1/2 and 1/4
    assert uneven["rouge1"][0] == pytest.approx(100 * 2 / 3)
    assert uneven["rougeL"][0] == pytest.approx(100 / 3)


def test_bleu_is_the_geometric_mean_of_four_precisions_and_the_brevity_penalty():
    prediction, reference = "a b c d e f", "a b c d x f y"
    # n-grams shared: 5 of 6, 3 of 5, 2 of 4, 1 of 3; the reference is 7/6 as long
    expected = 100 * math.exp(1 - 7 / 6) * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    each, overall, how = judge_answers([prediction], [reference])
    assert each["bleu"][0] == pytest.approx(expected)
    assert overall["bleu"] == pytest.approx(expected)
    assert "tok:13a" in how["bleu"]
    # over a corpus counts are summed first: no mean of sentences
    two = judge_answers([prediction, "g h i j"], [reference, "g h i j"])[1]["bleu"]
    assert two == pytest.approx(100 * math.exp(1 - 11 / 10) * (9 / 10 * 6 / 8 * 4 / 6 * 2 / 4) ** 0.25)


def test_chrf_of_an_equal_text_is_100_and_of_another_alphabet_0():
    each = judge_answers(["same text", "абвгд"], ["same text", "qwert"])[0]
    assert each["chrf"].tolist() == pytest.approx([100, 0])


def test_exact_match_forgives_blanks_alone():
    each, overall, _ = judge_answers([" yes  sir\n", "Yes sir", ""], ["yes sir", "yes sir", "x"])
    assert each["exact"].tolist() == [100, 0, 0]
    assert overall["exact"] == pytest.approx(100 / 3)
    assert all(values[2] == 0 for values in each.values())  # nothing said


def test_a_reference_that_is_not_english_gets_a_tokenizer_that_keeps_its_letters():
    each, _, how = judge_answers(["мама мыла раму"], ["мама мыла окно"])
    assert each["rouge1"][0] == pytest.approx(100 * 2 / 3)  # rouge-score's own tokenizer finds no word here
    assert "Unicode" in how["rouge1"]
    assert not is_english("été à la plage")
    assert is_english(
        "It’s 20 °C – José " + "plain text of some length that holds many more letters than the name " * 4
    )
    assert is_english("42")


def test_the_tokenizer_of_a_row_does_not_hang_on_the_others_and_one_letter_has_one_spelling():
    english = ["plain words of one kind"] * 300
    each, _, how = judge_answers([*english, "我爱北京"], [*english, "我爱北京"])
    assert [each[name].min() for name in ("rouge1", "rougeL", "exact")] == [100, 100, 100]
    assert "where a reference has other letters: Unicode" in how["rougeL"]
    each, _, _ = judge_answers(["cafe\u0301 noir"], ["caf\u00e9 noir"])
    assert each["exact"][0] == each["rougeL"][0] == pytest.approx(100)


def test_words_of_other_scripts_stay_whole_and_scripts_without_blanks_come_by_the_character():
    words = UnicodeTokenizer()
    assert words.tokenize("Élan, हिन्दी 42!") == ["élan", "हिन्दी", "42"]
    assert words.tokenize("我爱 AI") == ["我", "爱", "ai"]
    assert [bleu_tokenizer([text]) for text in ("plain", "我爱北京", "ありがとう", "привет", "")] == [
        "13a",
        "zh",
        "char",
        "13a",
        "13a",
    ]


def test_distinct_counts_each_pair_of_words_once():
    assert distinct(["a b a b", "a b"]) == pytest.approx(2 / 4)  # ab ba ab | ab
    assert np.isnan(distinct(["one", ""]))
