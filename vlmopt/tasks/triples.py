"""Triples (question, chosen answer, rejected answer), as a task that a model is tuned on by preference.

A folder of triples is a task of kind image-text-to-text like any other, with a column more:

    task.yaml        columns: {question: question, answer: answer, rejected: rejected, split: split, group: group}
    metadata.jsonl   {"file_name": "images/000001.png", "question": "what colour is it ?", "answer": ["red"],
                      "rejected": "blue", "split": "profile", "group": "..."}
    images/

Rows that are not trained on may have null there. The splits are those of the task that the triples come from.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vlmopt.core.errors import OutputExistsError, TaskError
from vlmopt.recipe.yaml_file import write_yaml
from vlmopt.rundir import atomic_write, disk_errors
from vlmopt.tasks.dataset import Task
from vlmopt.tasks.folder import METADATA_FILE, SPLITS
from vlmopt.tasks.images import ImageSource
from vlmopt.tasks.specification import TASK_FILE, Columns, TaskKind, TaskSpecification
from vlmopt.tasks.splits import Sample

CLOSED_KINDS = (
    TaskKind.IMAGE_TEXT_TO_TEXT,
    TaskKind.VISUAL_QUESTION_ANSWERING,
    TaskKind.IMAGE_CLASSIFICATION,
    TaskKind.ZERO_SHOT,
)
_FEWEST = 2


def as_questions(task: Task, question: str | None) -> Task:
    """The task with every item as a question and the answer to it.

    Args:
        question: what is asked where the task has labels and no questions.

    Raises:
        TaskError: the task has no closed answers, or no question, or a question of its own and another one.
    """
    specification, place = task.specification, str(task.path)
    if specification.kind not in CLOSED_KINDS:
        found = f"is of kind {specification.kind.value}, whose answers are not closed"
        raise TaskError(place, found, expected=f"one of {', '.join(kind.value for kind in CLOSED_KINDS)}")
    has_questions = specification.kind in (TaskKind.IMAGE_TEXT_TO_TEXT, TaskKind.VISUAL_QUESTION_ANSWERING)
    if has_questions and question is not None:
        raise TaskError(place, "has questions of its own", remedy="leave --question out")
    if not has_questions and not question:
        raise TaskError(place, "has labels and no questions", remedy="say what is asked with --question")
    columns = Columns(rejected="rejected", split="split", group="group")
    name = f"{specification.name}-triples"
    made = TaskSpecification(kind=TaskKind.IMAGE_TEXT_TO_TEXT, name=name, columns=columns)
    if specification.kind.is_written:
        kept = {field: getattr(specification, field) for field in ("prompt", "metric", "max_new_tokens")}
        made = made.model_copy(update=kept)
    splits = {split: tuple(_asked(s, question) for s in task.all_samples(split)) for split in SPLITS}
    return Task(task.path, made, splits, hashes=task.image_hashes())


def _asked(sample: Sample, question: str | None) -> Sample:
    references = sample.references or (sample.label,)
    return replace(sample, text=question or sample.text, references=references)


def candidates(samples: Sequence[Sample], limit: int) -> list[tuple[str, ...]]:
    """For every sample the answers of others that are none of its own: those to the same question, or where it is asked
    once those to all, the most frequent ones first and at most `limit`.

    Raises:
        TaskError: there is no other answer.
    """
    by_question: dict[str, Counter[str]] = {}
    every: Counter[str] = Counter()
    for sample in samples:
        by_question.setdefault(sample.text, Counter())[sample.label] += 1
        every[sample.label] += 1
    return [_others(sample, by_question[sample.text], every, limit) for sample in samples]


def _others(sample: Sample, same: Counter[str], every: Counter[str], limit: int) -> tuple[str, ...]:
    known = same if len(same) >= _FEWEST else every
    own = {_plain(text) for text in sample.references}
    ordered = sorted(known, key=lambda answer: (-known[answer], answer))
    found = tuple(answer for answer in ordered if _plain(answer) not in own)[:limit]
    if not found:
        raise TaskError(sample.origin, f"{sample.label!r} is the only answer there is", expected="another answer")
    return found


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def write_triples(task: Task, rejected: Mapping[Sample, str], folder: Path) -> None:
    """Writes the task with these rejected answers, null for the others, and copies of its images.

    Raises:
        OutputExistsError: something lies there already.
    """
    if folder.exists():
        raise OutputExistsError(str(folder), "exists already", remedy="choose another path")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with disk_errors(folder):
        (partial / "images").mkdir(parents=True)
        names: dict[str, str] = {}
        rows = [
            _row(sample, split, _copied(sample.image, names, partial), rejected.get(sample))
            for split in SPLITS
            for sample in task.all_samples(split)
        ]
        atomic_write(partial / METADATA_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_yaml(partial / TASK_FILE, _content(task.specification))
        partial.rename(folder)


def _row(sample: Sample, split: str, file_name: str, rejected: str | None) -> dict[str, object]:
    answers = {"answer": list(sample.references), "rejected": rejected, "split": split, "group": sample.group}
    return {"file_name": file_name, "question": sample.text, **answers}


def _copied(image: ImageSource, names: dict[str, str], folder: Path) -> str:
    if image.name not in names:
        suffix = Path(image.name).suffix.lower() or ".png"
        names[image.name] = f"images/{len(names):06d}{suffix}"
        atomic_write(folder / names[image.name], image.read_bytes())
    return names[image.name]


def _content(specification: TaskSpecification) -> dict[str, object]:
    stated = specification.model_dump(mode="json", exclude_defaults=True)
    return {"kind": specification.kind.value, **stated}
