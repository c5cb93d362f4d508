"""The questions that are asked of the model, as task folders of `image-text-to-text`.

    what          "What is this?"                   drawings; the answer is the emoji's name
    style         "Which drawing style is this?"    drawings; one of four
    vegetarian    "Is this food vegetarian?"        photographs; yes or no

Images and splits are those of `examples/emoji`: whole families of look-alike concepts or foods, the same for both
questions about drawings, so that no image is taught by one task and tested by another.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import neighbours  # noqa: F401  (makes the modules below importable)
import yaml
from concepts import Row
from folders import Existing, publish
from make_tasks import read_rows


@dataclass(frozen=True)
class Question:
    """One task: its images, what is asked, and how the answer and the split are read from a row of the images."""

    images: str
    text: str
    answer: Callable[[Row], str]
    split: str
    metric: str = "exact-match"


QUESTIONS = {
    "what": Question("images", "What is this?", lambda row: row["name"], "split_concept", metric="token-f1"),
    "style": Question("images", "Which drawing style is this?", lambda row: row["style"], "split_concept"),
    "vegetarian": Question(
        "food",
        "Is this food vegetarian?",
        lambda row: "yes" if row["diet"] == "vegetarian" else "no",
        "split",
    ),
}


def question_rows(question: Question, rows: Sequence[Row], *, images: str) -> list[Row]:
    """The rows of a task's metadata; `images` is the way from the task's folder to the images."""
    return [
        {
            "file_name": f"{images}/{row['file_name']}",
            "question": question.text,
            "answer": question.answer(row),
            "split": row[question.split],
            "group": row["family"],
        }
        for row in rows
    ]


def make_question_tasks(out: Path, *, images: Path) -> list[Path]:
    """Bring the task folders under `out` up to date; `images` holds the image folders of `examples/emoji`."""
    return [_publish_task(out / name, question, images / question.images) for name, question in QUESTIONS.items()]


def _publish_task(target: Path, question: Question, images: Path) -> Path:
    rows = question_rows(question, read_rows(images), images=Path(os.path.relpath(images, target)).as_posix())
    described = {
        "kind": "image-text-to-text",
        "name": target.name,
        "columns": {"split": "split", "group": "group"},
        "metric": question.metric,
    }
    files = {
        "metadata.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "task.yaml": yaml.safe_dump(described, sort_keys=False),
    }

    def write(folder: Path) -> None:
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")

    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
    publish(target, write, fingerprint=hashes, existing=Existing.REFRESH)
    return target
