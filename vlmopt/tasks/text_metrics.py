"""How well a written answer agrees with its references: one number an item, 1 for the best.

Every measure takes an answer and at least one reference. Words are those between spaces, so a language without spaces
is compared sentence by sentence.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

ANLS_THRESHOLD = 0.5
ENOUGH_ANNOTATORS = 4  # with fewer no answer has a VQA accuracy of 1, since three others must have given it

_ARTICLES = frozenset({"a", "an", "the"})
_OPENING, _CLOSING = "\"'“”‘’([{", "\"'“”‘’)]}.,;:!?"  # a leading point or sign may belong to a number
_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_VQA_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())}
_VQA_NUMBERS["none"] = "0"
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_POINT = re.compile(r"\.(?!\d)")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _misspelled(words: Sequence[str]) -> dict[str, str]:
    """The words by every spelling that leaves one of their apostrophes out."""
    return {
        word[:place] + word[place + 1 :]: word
        for word in words
        for place, character in enumerate(word)
        if character == "'"
    }


_CONTRACTIONS: Mapping[str, str] = _misspelled(_CONTRACTED.split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 where the answer is a reference but for case, spaces, a leading article and marks around it, else 0."""
    return float(_plain(answer) in {_plain(reference) for reference in references})


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """The mean over annotators of min(others that gave the answer / 3, 1).

    Fewer references than ten go through the same formula: of a single one nothing is left to agree with.

    Source: Antol et al. 2015 (VQA), section 3, and the code published with it. What differs: answers and references are
    always normalised alike (there references are so in part, and only where they disagree), and a text of which
    nothing remains, such as the choice "A", is compared as it is.
    """
    given, known = _vqa_normalised(answer), [_vqa_normalised(reference) for reference in references]
    n_same = known.count(given)
    others = (n_same - (reference == given) for reference in known)
    return sum(min(n_others / 3, 1.0) for n_others in others) / len(known)


def anls(answer: str, references: Sequence[str]) -> float:
    """1 less the edits that the nearest reference is away, over the longer length; 0 from half of it on.

    Source: Biten et al. 2019 (Scene Text VQA), equation 1. Case and repeated spaces do not count.
    """
    return max(_similarity(_folded(answer), _folded(reference)) for reference in references)


def token_f1(answer: str, references: Sequence[str]) -> float:
    """The harmonic mean of precision and recall over words, for the best of the references.

    Source: Rajpurkar et al. 2016 (SQuAD), section 6.1. What differs: texts of articles and marks alone are compared
    by `exact_match`, for there all of them agree with each other.
    """
    return max(_word_f1(answer, reference) for reference in references)


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _plain(text: str) -> str:
    folded = _folded(text)
    bare = folded.lstrip(_OPENING + " ").rstrip(_CLOSING + " ")
    first, _, rest = bare.partition(" ")
    return (rest if first in _ARTICLES and rest else bare) or folded


def _vqa_normalised(text: str) -> str:
    stripped = text.replace("\n", " ").replace("\t", " ").strip()
    made = stripped
    has_grouped_digits = _COMMA_IN_NUMBER.search(stripped) is not None
    for mark in _VQA_PUNCTUATION:
        is_beside_space = f"{mark} " in stripped or f" {mark}" in stripped
        made = made.replace(mark, "" if is_beside_space or has_grouped_digits else " ")
    words = (_VQA_NUMBERS.get(word, word) for word in _POINT.sub("", made).lower().split())
    kept = " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
    return kept or _folded(text)


def _similarity(first: str, second: str) -> float:
    distance = edit_distance(first, second) / max(len(first), len(second), 1)
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def edit_distance(first: str, second: str) -> int:
    """Characters to insert, drop or replace until one text is the other (Levenshtein)."""
    above = list(range(len(second) + 1))
    for row, character in enumerate(first, start=1):
        line = [row]
        for column, other in enumerate(second, start=1):
            line.append(min(above[column] + 1, line[-1] + 1, above[column - 1] + (character != other)))
        above = line
    return above[-1]


def _word_f1(answer: str, reference: str) -> float:
    given, known = _squad_words(answer), _squad_words(reference)
    if not given or not known:
        return exact_match(answer, [reference])
    n_same = (Counter(given) & Counter(known)).total()
    return 2 * n_same / (len(given) + len(known))


def _squad_words(text: str) -> list[str]:
    return [word for word in text.lower().translate(_ASCII_PUNCTUATION).split() if word not in _ARTICLES]
