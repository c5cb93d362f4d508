"""Triples: read from a column, refused where a pair says nothing, and made of any task with closed answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import toys
from tests.tasks.conftest import WriteTask
from tests.tasks.written import question_rows
from vlmopt.core.errors import OutputExistsError, TaskError
from vlmopt.tasks.dataset import load_task
from vlmopt.tasks.triples import as_questions, candidates, write_triples

TRIPLES: dict[str, Any] = {"kind": "image-text-to-text", "columns": {"rejected": "rejected"}}


def rows(**first: object) -> list[dict[str, Any]]:
    """Rows with a wrong answer each, the first one changed."""
    made = [{**row, "rejected": "a big word"} for row in question_rows()]
    return [{**made[0], **first}, *made[1:]]


def test_the_rejected_answer_is_a_column_and_may_be_left_open(write_task: WriteTask) -> None:
    task = load_task(write_task(TRIPLES, rows(rejected=None)))
    samples = task.samples("profile")
    assert [sample.rejected for sample in samples] == ["", *["a big word"] * (len(samples) - 1)]


def test_another_rejected_answer_is_another_task(write_task: WriteTask) -> None:
    first, second = (load_task(write_task(TRIPLES, rows(rejected=word), name=word)) for word in ("one", "two"))
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ({"rejected": ""}, r"line 1: column 'rejected' is ''; expected a wrong answer"),
        ({"rejected": " "}, r"line 1: column 'rejected' is ' '"),
        ({"rejected": ["a"]}, r"line 1: column 'rejected' is \['a'\]"),
        ({"rejected": "red"}, r"line 1: the rejected answer 'red' is the right one"),
        ({"rejected": " RED "}, r"the rejected answer ' RED ' is the right one"),
        ({"answer": ["blue", "a  Big word"]}, r"the rejected answer 'a big word' is the right one"),
        ({"answer": ""}, r"line 1: column 'answer' is ''"),
    ],
)
def test_a_pair_that_says_nothing_is_named(write_task: WriteTask, first: dict[str, object], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        load_task(write_task(TRIPLES, rows(**first)))


def test_a_missing_column_a_missing_image_and_another_kind_are_named(write_task: WriteTask) -> None:
    with pytest.raises(TaskError, match="has no column 'rejected'"):
        load_task(write_task(TRIPLES, question_rows(), name="column"))
    folder = write_task(TRIPLES, rows(), name="image")
    (folder / "00.png").unlink()
    with pytest.raises(TaskError, match=r"line 1: image file .*00.png does not exist"):
        load_task(folder)
    kind = {"kind": "image-captioning", "columns": {"rejected": "rejected"}}
    with pytest.raises(TaskError, match="columns.rejected belongs to image-text-to-text only"):
        load_task(write_task(kind, rows(), name="kind"))


@pytest.mark.parametrize("kind", ["image-classification", "visual-question-answering", "image-text-to-text"])
def test_every_task_with_closed_answers_becomes_triples(tmp_path: Path, kind: str) -> None:
    source = load_task(toys.write_task(tmp_path / "task", kind, n=6))
    asked = as_questions(source, "which colour?" if kind == "image-classification" else None)
    samples = asked.samples("profile")
    others = candidates(samples, 8)
    assert [set(found) for found in others] == [set(toys.COLOURS) - {sample.label} for sample in samples]
    write_triples(asked, dict(zip(samples, (found[0] for found in others), strict=True)), tmp_path / "made")
    made = load_task(tmp_path / "made")
    assert made.counts == source.counts
    assert [s.rejected for s in made.samples("profile")] == [found[0] for found in others]
    assert [s.label for s in made.samples("profile")] == [s.label for s in source.samples("profile")]
    assert {s.rejected for s in made.samples("validation")} == {""}
    with pytest.raises(OutputExistsError, match="exists already"):
        write_triples(asked, {}, tmp_path / "made")


def test_answers_to_the_same_question_come_before_all_others(write_task: WriteTask) -> None:
    samples = load_task(write_task({"kind": "image-text-to-text"}, question_rows())).samples("profile")
    found = candidates(samples, 8)
    by_question = {s.text: {other.label for other in samples if other.text == s.text} for s in samples}
    assert [set(own) for own in found] == [by_question[s.text] - {s.label} for s in samples]
    assert {len(own) for own in candidates(samples, 1)} == {1}


def test_tasks_that_have_no_closed_answers_or_no_question_are_refused(tmp_path: Path) -> None:
    captions = load_task(toys.write_task(tmp_path / "captions", "image-captioning", n=6))
    with pytest.raises(TaskError, match="whose answers are not closed"):
        as_questions(captions, None)
    labels = load_task(toys.write_task(tmp_path / "labels", "image-classification", n=6))
    with pytest.raises(TaskError, match="say what is asked with --question"):
        as_questions(labels, None)
    questions = load_task(toys.write_task(tmp_path / "questions", "image-text-to-text", n=6))
    with pytest.raises(TaskError, match="leave --question out"):
        as_questions(questions, "what?")
