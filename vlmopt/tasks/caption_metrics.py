"""How well captions agree with people's: BLEU and CIDEr-D.

Words are those of the Penn Treebank in lower case without its marks: a clitic is a word of its own, a hyphen is not.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

N = 4  # the longest sequence of words that is compared
CIDER_SIGMA = 6.0
CIDER_SCALE = 10.0

_WORD = re.compile(r"\d+(?:[.,:/]\d+)+|\w+(?:[-'’]\w+)*")
_CLITIC = re.compile(r"(n['’]t|['’](?:s|m|d|re|ve|ll))$")

Grams = Counter[tuple[str, ...]]


def caption_words(text: str) -> list[str]:
    """The words of a caption: "A man's black-and-white dog isn't here." has a, man, 's, black-and-white, dog, is, n't,
    here."""
    words: list[str] = []
    for word in _WORD.findall(text.lower()):
        ending = _CLITIC.search(word)
        parts = (word[: ending.start()], ending.group()) if ending else (word,)
        words += [part for part in parts if part]
    return words


def _grams(words: Sequence[str], n: int) -> Grams:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def corpus_bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, ...]:
    """BLEU-1 to BLEU-4 of all captions together; 0 where not a single sequence of that length agrees.

    Source: Papineni et al. 2002, section 2.3; the length that counts is that of the reference nearest in length.
    """
    n_same, n_all, length, wanted = [0] * N, [0] * N, 0, 0
    for answer, known in zip(answers, references, strict=True):
        same, total, own, nearest = _matches(caption_words(answer), [caption_words(text) for text in known])
        n_same = [a + b for a, b in zip(n_same, same, strict=True)]
        n_all = [a + b for a, b in zip(n_all, total, strict=True)]
        length, wanted = length + own, wanted + nearest
    precisions = [same / total if total else 0.0 for same, total in zip(n_same, n_all, strict=True)]
    brevity = _brevity(length, wanted)
    return tuple(brevity * _geometric_mean(precisions[:n]) for n in range(1, N + 1))


def sentence_bleu(answer: str, references: Sequence[str]) -> float:
    """BLEU-4 of one caption, in [0, 1].

    Source: Lin and Och 2004 (ORANGE), section 4: matches and sequences of two words and more count one extra, since
    most captions share no four words with a reference.
    """
    same, total, length, wanted = _matches(caption_words(answer), [caption_words(text) for text in references])
    if not same[0]:
        return 0.0
    precisions = [same[0] / total[0]] + [(a + 1) / (b + 1) for a, b in zip(same[1:], total[1:], strict=True)]
    return _brevity(length, wanted) * _geometric_mean(precisions)


def _matches(words: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[int], list[int], int, int]:
    """Sequences that a reference has too, and all, by length; own length, and that of the nearest reference."""
    same, total = [], []
    for n in range(1, N + 1):
        own, known = _grams(words, n), Grams()
        for reference in references:
            known |= _grams(reference, n)
        same.append((own & known).total())
        total.append(own.total())
    lengths = (len(reference) for reference in references)
    return same, total, len(words), min(lengths, key=lambda length: (abs(length - len(words)), length))


def _brevity(length: int, wanted: int) -> float:
    return 1.0 if length >= wanted else math.exp(1 - wanted / length) if length else 0.0


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if min(values) > 0 else 0.0


class CiderD:
    """CIDEr-D with the document frequencies of these references, an entry an image.

    Source: Vedantam et al. 2015 (CIDEr), equations 1 to 5, with what the code published with it does: raw counts, and
    a length in pairs of words. A sequence that the references of every image hold weighs nothing.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self._frequencies: Grams = Counter()
        for known in references:
            words = [caption_words(text) for text in known]
            self._frequencies.update({gram for one in words for n in range(1, N + 1) for gram in _grams(one, n)})
        self._log_images = math.log(max(len(references), 1))

    def score(self, answer: str, references: Sequence[str]) -> float:
        """From 0 to 10; the mean over the references of an image and over sequences of one to four words."""
        own = caption_words(answer)
        total = sum(self._similarity(own, caption_words(text)) for text in references)
        return CIDER_SCALE * total / (N * len(references))

    def _similarity(self, answer: Sequence[str], reference: Sequence[str]) -> float:
        """The sum over lengths of the clipped cosines, less for another length."""
        apart = max(len(answer) - 1, 0) - max(len(reference) - 1, 0)
        cosines = (self._cosine(_grams(answer, n), _grams(reference, n)) for n in range(1, N + 1))
        return sum(cosines) * math.exp(-(apart**2) / (2 * CIDER_SIGMA**2))

    def _cosine(self, answer: Grams, reference: Grams) -> float:
        own, known = self._weighted(answer), self._weighted(reference)
        shared = sum(min(weight, known[gram]) * known[gram] for gram, weight in own.items() if gram in known)
        norms = math.hypot(*own.values()) * math.hypot(*known.values())
        return shared / norms if norms else 0.0

    def _weighted(self, grams: Grams) -> dict[tuple[str, ...], float]:
        return {
            gram: count * (self._log_images - math.log(max(self._frequencies[gram], 1)))
            for gram, count in grams.items()
        }
