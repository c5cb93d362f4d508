"""A workload in parts: what training takes out of a split feeds, scores and searches exactly its own items."""

from __future__ import annotations

import pytest
import torch

from tests.tasks.conftest import SmallPreprocessor, WriteTask, colour_rows, outputs_of
from tests.tasks.test_binding import CLASSES, RETRIEVAL, VQA, ZERO_SHOT, captions, questions
from vlmopt.core.program import Program
from vlmopt.tasks.binding import TaskSource, TaskWorkload, bind
from vlmopt.tasks.dataset import load_task

ITEMS = [7, 2, 9]


@pytest.mark.parametrize("kind", ["classification", "zero-shot"])
def test_a_part_has_the_losses_of_its_items(
    kind: str, dual: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    task = load_task(write_task(CLASSES if kind == "classification" else ZERO_SHOT, colour_rows(90)))
    program = bind(dual, task, preprocessor)
    whole = TaskSource(task, preprocessor).workload(program, "profile")
    part = whole.part(ITEMS)
    outputs, own = outputs_of(program, whole), outputs_of(program, part)
    assert part.n_items == len(ITEMS)
    assert list(part.item_groups) == [whole.item_groups[item] for item in ITEMS]
    for name, value in own.items():
        assert torch.allclose(value, outputs[name][list(whole.rows(name, ITEMS))], atol=1e-6)
    assert torch.allclose(part.losses(own), whole.losses(outputs)[ITEMS], atol=1e-6)
    assert [query.picture for query in part.queries()] == [whole.queries()[item].picture for item in ITEMS]


def test_a_part_of_questions_feeds_their_images_and_texts(
    fused: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    task = load_task(write_task(VQA, questions(90)))
    program = bind(fused, task, preprocessor)
    whole = TaskSource(task, preprocessor).workload(program, "profile")
    (feed,) = whole.part(ITEMS).feeds["model"]
    for name, value in feed.items():
        assert torch.equal(value, torch.cat([batch[name] for batch in whole.feeds["model"]])[ITEMS])


def test_a_part_of_a_search_searches_among_its_own_pairs(
    dual: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    task = load_task(write_task(RETRIEVAL, captions(36)))
    program = bind(dual, task, preprocessor)
    whole: TaskWorkload = TaskSource(task, preprocessor).workload(program, "profile")
    part = whole.part([3, 0, 6, 1])  # 0, 3 and 6 have one caption, 1 another
    outputs = outputs_of(program, part)
    assert {name: len(value) for name, value in outputs.items()} == {"image_encoder": 4, "text_encoder": 2}
    assert list(whole.rows("image_encoder", [3, 0, 6, 1])) == [3, 0, 6, 1]
    assert len(whole.rows("text_encoder", [3, 0, 6, 1])) == 2
    assert part.metrics(outputs)["recall@1"] == 100
    images, texts = torch.eye(3)[[0, 0, 0, 1]], torch.eye(3)[[0, 1]]
    logits = 10.0 * images.double() @ texts.double().T  # the program's scale
    by_image = logits.logsumexp(1) - torch.stack([*logits[:3, 0], logits[3, 1]])
    right = torch.stack([logits[:3, 0].logsumexp(0), logits[3, 1]])
    by_text = logits.logsumexp(0) - right
    wanted = (by_image + by_text[[0, 0, 0, 1]]) / 2
    found = part.losses({"image_encoder": images, "text_encoder": texts})
    assert torch.allclose(found, wanted, atol=1e-9)


def test_a_part_of_a_part_is_a_part_of_the_whole(
    dual: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    task = load_task(write_task(CLASSES, colour_rows(90)))
    program = bind(dual, task, preprocessor)
    whole = TaskSource(task, preprocessor).workload(program, "profile")
    (direct,) = whole.part([2]).feeds["image_encoder"]
    (nested,) = whole.part(ITEMS).part([1]).feeds["image_encoder"]
    assert torch.equal(direct["pixel_values"], nested["pixel_values"])
