"""The texts that count as right where a model writes its own answer: read from a row, and gathered by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vlmopt.core.errors import TaskError
from vlmopt.tasks.folder import Row, column
from vlmopt.tasks.specification import VQA_ACCURACY, TaskKind, TaskSpecification, as_text
from vlmopt.tasks.splits import Sample
from vlmopt.tasks.text_metrics import ENOUGH_ANNOTATORS


def references_of(specification: TaskSpecification, row: Row) -> tuple[str, ...]:
    """The answers or captions of a row: one text, a list of them, or a list of records that hold one each.

    Raises:
        TaskError: the column is missing, there are none, one is empty, or there are too few for the metric.
    """
    is_caption = specification.kind is TaskKind.IMAGE_CAPTIONING
    name = specification.columns.text if is_caption else specification.columns.answer
    value = column(row.values, name, row.origin)
    found = value if isinstance(value, list | tuple) else [value]
    if not found:
        raise TaskError(row.origin, f"column {name!r} is an empty list", expected="a text or a list of texts")
    texts = [as_text(one.get("answer")) if isinstance(one, dict) else as_text(one) for one in found]
    for text, one in zip(texts, found, strict=True):
        if not isinstance(text, str) or not text.strip():
            verb = "holds" if isinstance(value, list | tuple) else "is"
            expected = "a text or a number, or a list of them"
            raise TaskError(row.origin, f"column {name!r} {verb} {one!r}", expected=expected)
    if specification.headline == VQA_ACCURACY and len(texts) < ENOUGH_ANNOTATORS:
        raise TaskError(
            row.origin,
            f"{len(texts)} answers, and by {VQA_ACCURACY} none of them would count in full",
            expected=f"{ENOUGH_ANNOTATORS} or more",
            remedy="choose `metric: exact-match`",
        )
    return tuple(map(str, texts))


def rejected_of(specification: TaskSpecification, row: Row, references: Sequence[str]) -> str:
    """The rejected answer of a row; empty where the task has no column for it, or the row has null there.

    Raises:
        TaskError: the column is missing, the answer is no text or empty, or it is one of the right ones.
    """
    name = specification.columns.rejected
    if name is None:
        return ""
    value = as_text(column(row.values, name, row.origin))
    if value is None:
        return ""
    if not isinstance(value, str) or not value.strip():
        expected = "a wrong answer, or null where there is none"
        raise TaskError(row.origin, f"column {name!r} is {value!r}", expected=expected)
    same = next((text for text in references if _plain(text) == _plain(value)), None)
    if same is not None:
        found = f"the rejected answer {value!r} is the right one"
        raise TaskError(row.origin, found, expected="an answer that is wrong", remedy="correct the pair or remove it")
    return value


def _plain(text: str) -> str:
    """A text as two are compared: neither case nor space make a difference."""
    return " ".join(text.casefold().split())


def merged_captions(samples: Sequence[Sample]) -> list[Sample]:
    """A sample an image, with the captions of all its rows: the others would count against a model that writes one."""
    merged: dict[str, Sample] = {}
    for sample in samples:
        known = merged.setdefault(sample.image.name, sample)
        if known is not sample:
            merged[sample.image.name] = replace(known, references=known.references + sample.references)
    return list(merged.values())
