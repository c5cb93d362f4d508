"""What models answer, as a person reads it: every kind of task, ties, and numbers that are none."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tasks.conftest import COLOURS, SmallPreprocessor, WriteTask, colour_rows
from vlmopt.core.program import Program
from vlmopt.tasks import scoring
from vlmopt.tasks.answers import NO_ANSWER, question_slices
from vlmopt.tasks.binding import TaskSource, TaskWorkload, bind
from vlmopt.tasks.dataset import load_task
from vlmopt.tasks.images import FileImage
from vlmopt.tasks.splits import Sample

CLASSES = {"kind": "image-classification", "labels": list(COLOURS)}
ZERO_SHOT = {"kind": "zero-shot-image-classification", "labels": list(COLOURS), "prompts": ["a {} dot", "{}"]}
RETRIEVAL = {"kind": "image-text-retrieval"}
VQA = {"kind": "visual-question-answering", "columns": {"answer": "label"}}
TEST = {"split": "test"}
NAMES = list(COLOURS)


def opened(program: Program, preprocessor: Any, write_task: WriteTask, task: Any, rows: list[Any]) -> TaskWorkload:
    """The test split that these rows make up, beside a sample of each colour in the other splits."""
    others = [
        {**rows[i % len(rows)], "file_name": f"{split}{i}.png", "label": NAMES[i], "split": split}
        for split in ("train", "validation")
        for i in range(3)
    ]
    loaded = load_task(write_task(task, [*({**row, **TEST} for row in rows), *others]))
    return TaskSource(loaded, preprocessor).open_test(bind(program, loaded, preprocessor))


def one_hot(labels: list[str]) -> Tensor:
    return torch.eye(3)[[NAMES.index(label) for label in labels]]


def test_a_classifier_answers_with_labels_and_a_tie_goes_to_the_first(
    dual: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    workload = opened(dual, preprocessor, write_task, CLASSES, colour_rows(6))
    logits = one_hot(["red", "green", "green", "red", "red", "red"])
    logits[3] = 0.0  # a tie of all three
    logits[4, 1] = float("nan")
    outputs = {"image_encoder": logits}
    answers = workload.answers(outputs)
    assert [answer.text for answer in answers] == ["red", "green", "green", "red", NO_ANSWER, "red"]
    assert [answer.is_right for answer in answers] == [True, True, False, True, False, False]
    assert [float(answer.is_right) for answer in answers] == workload.item_scores(outputs).tolist()
    queries = workload.queries()
    assert [(query.name, query.question, query.expected) for query in queries[:2]] == [
        ("000.png", "", "red"),
        ("001.png", "", "green"),
    ]
    assert queries[1].picture.read_bytes()[:4] == b"\x89PNG"


def test_a_classifier_is_sliced_by_label(dual: Program, preprocessor: SmallPreprocessor, write_task: WriteTask) -> None:
    workload = opened(dual, preprocessor, write_task, CLASSES, colour_rows(7))
    outputs = {"image_encoder": one_hot(["red"] * 4 + ["green"] * 3)}  # truth: red green blue red green blue red
    slices = {piece.name: (list(piece.rows), piece.scores.tolist()) for piece in workload.slices(outputs)}
    assert slices == {"red": ([0, 3, 6], [1, 1, 0]), "green": ([1, 4], [0, 1]), "blue": ([2, 5], [0, 0])}


def test_zero_shot_answers_are_the_same_from_embeddings_and_from_logits(
    dual: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    workload = opened(dual, preprocessor, write_task, ZERO_SHOT, colour_rows(5))
    images = torch.tensor([[9, 1, 0, 0], [1, 0, 9, 0], [0, 0, 2, 0], [0, 5, 0, 1], [0, 1, 0, 0]]).float()
    texts = torch.eye(3, 4).repeat_interleave(2, dim=0)
    answers = workload.answers({"image_encoder": images, "text_encoder": texts})
    assert [answer.text for answer in answers] == ["red", "blue", "blue", "green", "green"]
    assert [answer.is_right for answer in answers] == [True, False, True, False, True]
    assert answers == workload.answers({"image_encoder": images[:, :3]})  # the text encoder is folded away
    assert [query.expected for query in workload.queries()] == ["red", "green", "blue", "red", "green"]


def test_questions_are_shown_and_sliced_by_their_words_and_the_type_of_their_answer(
    fused: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    texts = ["What colour?", "what colour, big", "what big dot", "what big a"]
    rows = [{**row, "question": texts[i % 4]} for i, row in enumerate(colour_rows(8))]
    workload = opened(fused, preprocessor, write_task, VQA, rows)
    outputs = {"model": one_hot(["red"] * 8)}  # right for 0, 3 and 6
    slices = {piece.name: (list(piece.rows), piece.scores.tolist()) for piece in workload.slices(outputs)}
    assert slices == {
        "what colour …": ([0, 1, 4, 5], [1, 0, 0, 0]),
        "what big …": ([2, 3, 6, 7], [0, 1, 1, 0]),
    }  # all answers are colours, so their types tell nothing
    assert workload.queries()[0].question == "What colour?"
    assert [answer.is_right for answer in workload.answers(outputs)] == [i in (0, 3, 6) for i in range(8)]


def asked(answer: str, question: str) -> Sample:
    return Sample(FileImage(Path("a.png"), "a.png"), answer, question, "a", "x")


def test_answers_are_of_three_types() -> None:
    answers = ["yes", "No", "two", "3", "1,5", "left", "none", "no way"]
    found = question_slices([asked(answer, "?!") for answer in answers], torch.arange(8.0))
    assert {piece.name: piece.scores.tolist() for piece in found} == {
        "answered by yes or no": [0, 1],
        "answered by a number": [2, 3, 4],
        "answered otherwise": [5, 6, 7],
    }
    same = [asked(answer, "Is it left?") for answer in answers[:2] * 3]
    same += [asked("left", f"where {word} it?") for word in ("is", "is", "was", "was")]
    found = question_slices(same, torch.arange(10.0))
    assert {piece.name: list(piece.rows) for piece in found} == {
        "is it …": [0, 1, 2, 3, 4, 5],  # and so are the answers by yes or no
        "where is …": [6, 7],
        "where was …": [8, 9],
        "answered otherwise": [6, 7, 8, 9],
    }
    unlike = question_slices([asked("left", f"word{i} x") for i in range(8)], torch.arange(8.0))
    assert unlike == []  # as many divisions as items


@pytest.fixture
def searched(dual: Program, preprocessor: SmallPreprocessor, write_task: WriteTask) -> TaskWorkload:
    """Images a, b, c, d of the texts red, green, blue, red, and of a the text big as well."""
    names = {"a": ["red dot", "big red"], "b": ["green dot"], "c": ["blue dot"], "d": ["red dot"]}
    rows = [{"file_name": f"{image}.png", "text": text} for image, texts in names.items() for text in texts]
    return opened(dual, preprocessor, write_task, RETRIEVAL, rows)


# Texts in order: red dot, big red, green dot, blue dot.
TEXTS = torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]])


def test_every_image_and_every_text_of_a_search_is_asked_once(searched: TaskWorkload) -> None:
    queries = searched.queries()
    assert [query.name for query in queries[:4]] == ["a.png", "b.png", "c.png", "d.png"]
    assert [query.expected for query in queries[:4]] == [
        "red dot (or one of 1 more)",
        "green dot",
        "blue dot",
        "red dot",
    ]
    assert [query.question for query in queries[4:]] == ["red dot", "big red", "green dot", "blue dot"]
    assert [query.expected for query in queries[4:]] == ["a.png (or one of 1 more)", "a.png", "b.png", "c.png"]
    assert Counter(query.kind for query in queries) == {"image to text": 4, "text to image": 4}
    assert [query.picture.name for query in queries] == [
        *["a.png", "b.png", "c.png", "d.png"],
        *["a.png", "a.png", "b.png", "c.png"],
    ]


def test_a_search_answers_with_its_first_match_and_a_tie_counts_as_wrong(searched: TaskWorkload) -> None:
    # a is nearest to red dot, b lies between red and green, c nearest to green, d is no number.
    images = torch.tensor([[2.0, 0, 0, 0], [1, 1, 0, 0], [0, 3, 1, 0], [float("nan"), 0, 0, 0]])
    outputs = {"image_encoder": images, "text_encoder": TEXTS}
    answers = searched.answers(outputs)
    assert [answer.text for answer in answers[:4]] == ["red dot", "red dot", "green dot", NO_ANSWER]
    assert [answer.is_right for answer in answers[:4]] == [True, False, False, False]
    assert [answer.text for answer in answers[4:]] == ["a.png", "a.png", "c.png", "c.png"]
    assert [answer.is_right for answer in answers[4:]] == [True, True, False, True]
    assert {answer.note for answer in answers} == {""}
    slices = {piece.name: piece.scores for piece in searched.slices(outputs)}
    assert slices["image to text"].tolist() == [1, 1, 0, 0, 0]  # a pair each: a twice
    assert slices["text to image"].tolist() == [1, 1, 0, 1, 1]
    joint = (slices["image to text"] + slices["text to image"]) / 2
    assert joint.tolist() == searched.item_scores(outputs).tolist()


def test_a_model_that_embeds_everything_alike_answers_wrongly_everywhere(searched: TaskWorkload) -> None:
    outputs = {"image_encoder": torch.ones(4, 4), "text_encoder": torch.ones(4, 4)}
    answers = searched.answers(outputs)
    assert not any(answer.is_right for answer in answers)
    for query, answer in zip(searched.queries(), answers, strict=True):
        assert answer.text != query.expected.removesuffix(" (or one of 1 more)")
        assert answer.text != "big red" or query.name != "a.png"


def test_recall_at_five_is_right_when_the_right_one_is_among_five_and_says_where(
    dual: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    rows = [{"file_name": f"{i}.png", "text": f"{'big ' * i}dot"} for i in range(8)]
    workload = opened(dual, preprocessor, write_task, {**RETRIEVAL, "metric": "recall@5"}, rows)
    everyone = torch.arange(8.0, 0, -1).expand(8, 8)  # nearest to the first text, then to the second, ...
    answers = workload.answers({"image_encoder": everyone, "text_encoder": torch.eye(8)})[:8]
    assert {answer.text for answer in answers} == {"dot"}
    assert [answer.is_right for answer in answers] == [True] * 5 + [False] * 3
    assert [answer.note for answer in answers] == [f"the first right one comes at place {i + 1}" for i in range(8)]


def test_first_matches_do_not_depend_on_how_the_search_is_cut_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(-1, 2, (13, 3), generator=generator).float() + 0.5
    texts = torch.randint(-1, 2, (9, 3), generator=generator).float() + 0.5  # many ties
    pairs = scoring.Pairs.of([(str(i), str(i % 9)) for i in range(13)])
    whole = scoring.nearest(images, texts, pairs)
    similarity = scoring.unit(images) @ scoring.unit(texts).T
    belongs = torch.zeros(13, 9, dtype=torch.bool)
    belongs[pairs.image, pairs.text] = True
    ranks = scoring.ranks(images, texts, pairs)
    for i, row in enumerate(whole[0].tolist()):
        assert similarity[i, row] == similarity[i].max()
        assert bool(belongs[i, row]) == (ranks[0][i] == 0)
    for j, row in enumerate(whole[1].tolist()):
        assert similarity[row, j] == similarity[:, j].max()
        assert bool(belongs[row, j]) == (ranks[1][j] == 0)
    monkeypatch.setattr(scoring, "_CHUNK", 4)
    assert [rows.tolist() for rows in scoring.nearest(images, texts, pairs)] == [rows.tolist() for rows in whole]
