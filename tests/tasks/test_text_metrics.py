"""Measures of texts against values from the papers, from the code published with them, and worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vlmopt.tasks.caption_metrics import CiderD, caption_words, corpus_bleu, sentence_bleu
from vlmopt.tasks.text_metrics import anls, edit_distance, exact_match, token_f1, vqa_accuracy

# Papineni et al. 2002, examples 1 and 2
MILITARY = (
    "It is a guide to action that ensures that the military will forever heed Party commands.",
    "It is the guiding principle which guarantees the military forces always being under the command of the Party.",
    "It is the practical guide for the army always to heed the directions of the party.",
)
GUIDE = "It is a guide to action which ensures that the military always obeys the commands of the party."
TROOPS = "It is to insure the troops forever hearing the activity guidebook that party direct."
BOOK = "he read the book because he was interested in world history"
TURNED_BOOK = "he was interested in world history because he read the book"


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("A red  Square.", "red square", 1),
        ('"yes"', "Yes", 1),
        ("(B)", "B", 1),
        ("A.", "a", 1),
        ("A", "B", 0),
        ("", "a", 0),
        ("3.5", "35", 0),
        (".5", "5", 0),
        ("-5", "5", 0),
        ("50%", "50", 0),
        ("?", "!", 0),
        ("the", "a", 0),
    ],
)
def test_an_exact_match_looks_past_case_marks_and_articles_and_at_nothing_else(
    answer: str, reference: str, score: float
) -> None:
    assert exact_match(answer, ["other", reference]) == score


def test_vqa_accuracy_is_what_the_other_annotators_say() -> None:
    # n of ten gave the answer: each of the n sees n - 1 others, each of the rest sees n
    for n, score in ((0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)):
        references = ["red"] * n + ["blue"] * (10 - n)
        assert vqa_accuracy("red", references) == pytest.approx(score, abs=1e-12)


def test_vqa_accuracy_of_few_annotators_follows_the_same_formula() -> None:
    assert vqa_accuracy("red", ["red"]) == 0
    assert vqa_accuracy("red", ["red", "red", "red"]) == pytest.approx(2 / 3)
    assert vqa_accuracy("red", ["red", "red", "blue"]) == pytest.approx((1 / 3 + 1 / 3 + 2 / 3) / 3)
    assert vqa_accuracy("red", ["red"] * 4) == 1


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("Two dogs.", "2 dogs"),
        ("none", "0"),
        ("the left-hand side", "left hand side"),
        ("1,000", "1000"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("red/ white", "red white"),
        ("yes\n", "yes"),
        ("3.5", "3.5"),
        ("a.m.", "am"),
    ],
)
def test_vqa_accuracy_takes_different_spellings_for_one_answer(answer: str, reference: str) -> None:
    assert vqa_accuracy(answer, [reference] * 4) == 1


@pytest.mark.parametrize(("answer", "reference"), [("3.5", "35"), ("A", "the"), ("", "a"), ("red white", "redwhite")])
def test_vqa_accuracy_keeps_different_answers_apart(answer: str, reference: str) -> None:
    assert vqa_accuracy(answer, [reference] * 4) == 0


def test_the_edit_distance_counts_characters() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert edit_distance("flaw", "lawn") == 2


def test_anls_is_zero_from_half_of_the_length_on() -> None:
    assert anls("kitten", ["sitting"]) == pytest.approx(1 - 3 / 7)
    assert anls("abcd", ["abxy"]) == 0  # 2 of 4
    assert anls("abcde", ["abcxy"]) == pytest.approx(0.6)
    assert anls("Red  Square", ["red square", "nothing"]) == 1
    assert anls("", ["red"]) == 0


def test_token_f1_is_that_of_squad_and_keeps_single_letters_apart() -> None:
    assert token_f1("The big red dog barked", ["a red dog sat"]) == pytest.approx(
        2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3)
    )
    assert token_f1("red red", ["red"]) == pytest.approx(2 / 3)
    assert token_f1("dog", ["cat", "the dog!"]) == 1
    assert token_f1("A", ["the"]) == token_f1("", ["A"]) == token_f1("!", ["?"]) == 0
    assert token_f1("A", ["a"]) == 1


def test_words_of_captions_are_those_of_the_penn_treebank() -> None:
    text = "A man's black-and-white dog ISN'T here; \"7,000 cats\" at 5:30, etc."
    words = ["a", "man", "'s", "black-and-white", "dog", "is", "n't", "here", "7,000", "cats", "at", "5:30", "etc"]
    assert caption_words(text) == words
    assert caption_words("?! - ...") == []


def test_bleu_has_the_precisions_of_its_paper() -> None:
    cats = ["The cat is on the mat", "There is a cat on the mat"]
    assert corpus_bleu(["the the the the the the the"], [cats])[0] == pytest.approx(2 / 7)
    assert corpus_bleu([GUIDE], [MILITARY])[0] == pytest.approx(17 / 18)
    brevity = math.exp(1 - 16 / 14)  # 14 words; the references have 16, 18 and 16
    one, two, *_ = corpus_bleu([TROOPS], [MILITARY])
    assert one == pytest.approx(brevity * 8 / 14)
    assert two == pytest.approx(brevity * math.sqrt(8 / 14 * 1 / 13))


def test_bleu_of_a_corpus_is_what_nltk_documents() -> None:
    assert corpus_bleu([GUIDE], [MILITARY])[3] == pytest.approx(0.5045666840058485, abs=1e-12)
    assert corpus_bleu([GUIDE, BOOK], [MILITARY, [TURNED_BOOK]])[3] == pytest.approx(0.5920778868801042, abs=1e-12)


def test_bleu_of_one_caption_is_one_for_a_reference_however_short() -> None:
    for text in ("dog", "a red dog", "a red dog runs in the snow"):
        assert sentence_bleu(text, ["something else", text]) == pytest.approx(1)
    assert sentence_bleu("cat", ["dog"]) == sentence_bleu("", ["dog"]) == 0
    # 3 of 4 words, 2 of 3 pairs, 1 of 2 triples, 0 of 1: the longer ones count one extra
    expected = (3 / 4 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert sentence_bleu("a red dog runs", ["a red dog sits"]) == pytest.approx(expected)


def test_corpus_bleu_without_a_common_sequence_is_zero() -> None:
    one, two, three, four = corpus_bleu(["a red dog"], [["a red cat"]])
    assert (one, two) == (pytest.approx(2 / 3), pytest.approx(math.sqrt(2 / 3 * 1 / 2)))
    assert (three, four) == (0, 0)


def test_cider_d_is_ten_times_the_clipped_cosine_with_weights_by_hand() -> None:
    references = [["a dog", "a dog runs"], ["a cat"], ["a cat sleeps", "cat"]]
    measure = CiderD(references)
    # Images that have it, of three: a 3, dog 1, runs 1, cat 2, sleeps 1; a dog 1, dog runs 1, a dog runs 1
    log3, log32 = math.log(3), math.log(3 / 2)
    one_dog = np.array([0, log3, 0])  # a, dog, runs
    one_runs = np.array([0, log3, log3])
    cosine = one_dog @ np.minimum(one_dog, one_runs) / np.linalg.norm(one_dog) / np.linalg.norm(one_runs)
    pairs = 1 / math.sqrt(2)  # "a dog" of "a dog" and "dog runs"
    first = (1 + 1) / 4  # no sequences of three and four words
    second = (cosine + pairs) / 4 * math.exp(-1 / 72)  # one pair of words longer
    assert measure.score("a dog", references[0]) == pytest.approx(10 * (first + second) / 2, abs=1e-12)
    # twice the word is clipped to once, and the norm of the answer keeps both
    doubled = np.array([2 * log3, log32])  # dog, cat
    once = np.array([log3, 0])
    expected = np.minimum(doubled, once) @ once / np.linalg.norm(doubled) / np.linalg.norm(once)
    alone = CiderD([["dog"], ["cat", "bird"], ["a cat"]])
    assert alone.score("dog dog cat", ["dog"]) == pytest.approx(10 * expected / 4 * math.exp(-(2**2) / 72), abs=1e-12)


def test_cider_d_of_a_reference_is_ten_and_of_what_every_image_has_nothing() -> None:
    measure = CiderD([["a big red dog"], ["a small blue cat"]])
    assert measure.score("A big red dog!", ["a big red dog"]) == pytest.approx(10)
    assert measure.score("a", ["a big red dog"]) == 0
    assert measure.score("", ["a big red dog"]) == 0
