"""Tasks whose answers are written: one or several references, what is refused, what the fingerprint notices."""

from __future__ import annotations

import pytest

from tests.tasks.conftest import WriteTask
from tests.tasks.written import ASKED, CAPTIONED, caption_rows, question_rows
from vlmopt.core.errors import TaskError
from vlmopt.tasks.dataset import load_task


def test_references_and_the_prompt_are_part_of_the_fingerprint(write_task: WriteTask) -> None:
    rows = question_rows()
    more = [{**row, "answer": [row["answer"], "red"]} for row in rows]
    tasks = [
        load_task(write_task(specification, own, name=name))
        for name, specification, own in (
            ("one", ASKED, rows),
            ("same", ASKED, [{**row, "answer": [row["answer"]]} for row in rows]),
            ("more", ASKED, more),
            ("prompt", {**ASKED, "prompt": "{} ?"}, rows),
            ("tokens", {**ASKED, "max_new_tokens": 9}, rows),
        )
    ]
    one, same, *others = (task.fingerprint for task in tasks)
    assert one == same
    assert len({one, *others}) == 4
    assert tasks[0].fingerprint_of(tasks[0].samples("profile")) != tasks[2].fingerprint_of(tasks[2].samples("profile"))


def test_answers_may_be_one_text_a_number_a_list_or_records(write_task: WriteTask) -> None:
    rows = question_rows()
    rows[0]["answer"], rows[1]["answer"], rows[2]["answer"] = 3, [True, "yes"], [{"answer": "red", "answer_id": 1}]
    found = [sample.references for sample in load_task(write_task(ASKED, rows)).samples("profile")[:3]]
    assert found == [("3",), ("true", "yes"), ("red",)]


@pytest.mark.parametrize(
    ("metric", "answer", "found"),
    [
        ("exact-match", "", "column 'answer' is ''; expected a text or a number, or a list of them"),
        ("exact-match", None, "column 'answer' is None"),
        ("exact-match", [], "column 'answer' is an empty list"),
        ("exact-match", ["red", " "], "column 'answer' holds ' '"),
        ("exact-match", [["red"]], r"column 'answer' holds \['red'\]"),
        ("exact-match", [{"text": "red"}], "column 'answer' holds {'text': 'red'}"),
        (
            "vqa-accuracy",
            ["red"] * 3,
            "3 answers, and by vqa-accuracy none of them would count in full; expected 4 or more",
        ),
    ],
)
def test_an_answer_that_is_none_is_named_with_its_line(
    write_task: WriteTask, metric: str, answer: object, found: str
) -> None:
    rows = [{**row, "answer": [row["answer"]] * 4} for row in question_rows()]
    rows[4]["answer"] = answer
    with pytest.raises(TaskError, match=f"line 5: {found}"):
        load_task(write_task({**ASKED, "metric": metric}, rows))


def test_captions_of_one_image_in_several_rows_are_one_item(write_task: WriteTask) -> None:
    rows = [{**row, "text": text} for row in caption_rows() for text in row["text"]]
    task = load_task(write_task(CAPTIONED, rows, name="rows"))
    listed = load_task(write_task(CAPTIONED, caption_rows(), name="lists"))
    assert task.counts == listed.counts == {"profile": 6, "validation": 6, "test": 6}
    assert task.samples("profile")[0].references == ("a red square", "it is red")
    found, wanted = ([sample.references for sample in one.samples("validation")] for one in (task, listed))
    assert found == wanted


def test_a_caption_that_every_image_has_is_refused(write_task: WriteTask) -> None:
    rows = [{**row, "text": "it is red"} for row in caption_rows()]
    with pytest.raises(TaskError, match="every sample has the caption 'it is red'"):
        load_task(write_task(CAPTIONED, rows))
