"""What a model answers to the items of a split, as a person reads it, and which items belong together when they do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.tasks.images import ImageSource
from vlmopt.tasks.scoring import is_right
from vlmopt.tasks.splits import Sample

NO_ANSWER = "none (the scores are not finite)"
_N_LEADING_WORDS = 2
_WORD = re.compile(r"\w[\w'’-]*")
_YES_NO = frozenset({"yes", "no"})
_SMALL_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve"
_NUMBERS = frozenset(_SMALL_NUMBERS.split())
_DIGITS = re.compile(r"[+-]?\d+([.,]\d+)*")


@dataclass(frozen=True)
class Query:
    """One thing that a split asks a model. `picture` shows it; `kind` and `group` hold like ones together."""

    name: str
    question: str
    expected: str
    picture: ImageSource
    kind: str
    group: str


@dataclass(frozen=True)
class Answer:
    """What a model answers to a query. `note` says more than the answer itself does."""

    text: str
    is_right: bool
    note: str = ""


@dataclass(frozen=True)
class Slice:
    """The scores of some of the items: those of one label, of one type of question, of one direction of a search."""

    name: str
    rows: Sequence[int]
    scores: Tensor  # one a row, float64 in [0, 1]


def label_queries(samples: Sequence[Sample]) -> list[Query]:
    """A query an image or question; its kind is its label."""
    return [
        Query(sample.image.name, sample.text, sample.label, sample.image, sample.label, sample.group)
        for sample in samples
    ]


def label_answers(logits: Tensor, targets: Tensor, labels: Sequence[str]) -> list[Answer]:
    """The label of the greatest logit for every row [n, K]; none where a logit is no number."""
    hits = is_right(logits, targets).tolist()
    is_finite = torch.isfinite(logits).all(-1).tolist()
    found = logits.argmax(-1).tolist()
    return [
        Answer(labels[index] if is_known else NO_ANSWER, bool(hit))
        for index, is_known, hit in zip(found, is_finite, hits, strict=True)
    ]


def label_slices(samples: Sequence[Sample], scores: Tensor) -> list[Slice]:
    """The items of every label."""
    return named_slices([sample.label for sample in samples], scores)


def named_slices(names: Sequence[str], scores: Tensor) -> list[Slice]:
    """The items of every name, one name an item."""
    return _slices(_rows((name, i) for i, name in enumerate(names)), scores)


def question_slices(samples: Sequence[Sample], scores: Tensor) -> list[Slice]:
    """The items by the first words of their question, and again by the type of their answer.

    A division is left out that has a single part, or hardly more items than parts; so is the second of two slices
    of the same items.
    """
    divisions = [
        _rows((_leading_words(sample.text), i) for i, sample in enumerate(samples)),
        _rows((_answer_type(sample.label), i) for i, sample in enumerate(samples)),
    ]
    telling = [rows for rows in divisions if 1 < len(rows) <= len(samples) / 2]
    pieces = [piece for rows in telling for piece in _slices(rows, scores)]
    return [piece for i, piece in enumerate(pieces) if all(piece.rows != other.rows for other in pieces[:i])]


def _answer_type(answer: str) -> str:
    """The three types of Antol et al. 2015 (VQA), table 1."""
    word = answer.strip().lower()
    if word in _YES_NO:
        return "answered by yes or no"
    is_number = word in _NUMBERS or _DIGITS.fullmatch(word) is not None
    return "answered by a number" if is_number else "answered otherwise"


def _leading_words(question: str) -> str:
    words = _WORD.findall(question.lower())
    return f"{' '.join(words[:_N_LEADING_WORDS])} …" if words else "without words"


def _rows(named: Iterable[tuple[str, int]]) -> Mapping[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for name, row in named:
        rows.setdefault(name, []).append(row)
    return rows


def _slices(rows: Mapping[str, list[int]], scores: Tensor) -> list[Slice]:
    return [Slice(name, members, scores[members]) for name, members in rows.items()]
