"""Answers that a model writes: what is taught, what greedy decoding would say, what generated ids score as texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests import toys
from tests.tasks.conftest import WriteTask
from tests.tasks.written import (
    ASKED,
    CAPTIONED,
    END,
    N_FEATURES,
    PAD,
    QUESTIONS,
    SIDE,
    START,
    Toy,
    caption_rows,
    half_trained,
    ids_of,
    lone_losses,
    question_rows,
)
from vlmopt.core.errors import TaskError
from vlmopt.core.program import Assembly, Program, TensorSpec
from vlmopt.preprocess import Arrays, Preprocessor
from vlmopt.tasks.binding import TaskSource, bind
from vlmopt.tasks.dataset import Task, load_task
from vlmopt.tasks.images import open_image
from vlmopt.tasks.kinds.text_generation import TextGeneration
from vlmopt.tasks.taught_rows import NO_LABEL


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return half_trained(tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("images"))


@torch.no_grad()
def taught_outputs(toy: Toy, workload: TextGeneration) -> dict[str, Tensor]:
    """What the component `model` is to give, by the model of transformers: per token log-probability and margin."""
    rows = []
    for feed in workload.feeds["model"]:
        mask, labels = feed["attention_mask"], feed["labels"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        inputs = {name: feed[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        logits = toy.model(**inputs, position_ids=positions).logits
        scores = torch.zeros(*labels.shape, 2)
        for row, place in (labels != NO_LABEL).nonzero().tolist():
            before, label = logits[row, place - 1], labels[row, place]
            others = before.clone()
            others[label] = float("-inf")
            scores[row, place] = torch.stack([before.log_softmax(0)[label], before[label] - others.max()])
        rows.append(scores)
    return {"model": torch.cat(rows)}


@torch.no_grad()
def generated(toy: Toy, workload: TextGeneration) -> Tensor:
    """Greedy answers of the model of transformers to the prompts alone, one at a time; [n, T], -1 behind the end."""
    rows = []
    for prompt in workload.prompts:
        images = toy.preprocessor.images([open_image(image) for image in prompt.images])
        ids = torch.tensor([prompt.token_ids])
        found = toy.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.from_numpy(images["pixel_values"]),
            max_new_tokens=workload.max_new_tokens,
            do_sample=False,
        )
        rows.append(found[0, ids.shape[1] :])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def opened(toy: Toy, folder: Path, split: str = "profile") -> tuple[Task, TextGeneration]:
    task = load_task(folder)
    workload = TaskSource(task, toy.preprocessor).workload(bind(toy.program, task, toy.preprocessor), split)
    assert isinstance(workload, TextGeneration)
    return task, workload


def test_rows_hold_prompt_and_answer_on_the_right_and_labels_at_their_own_places(
    toy: Toy, write_task: WriteTask
) -> None:
    task, workload = opened(toy, write_task(ASKED, question_rows()))
    (feed,) = workload.feeds["model"]
    length = 1 + N_FEATURES + 5 + 2  # start, image, the longer question, "red" and its end
    assert feed["input_ids"].shape == feed["attention_mask"].shape == feed["labels"].shape == (9, length)
    assert feed["pixel_values"].shape == (9, 3, SIDE, SIDE)
    assert feed["pixel_values"].dtype == torch.float32
    for sample, prompt, ids, mask, labels in zip(
        task.samples("profile"),
        workload.prompts,
        feed["input_ids"],
        feed["attention_mask"],
        feed["labels"],
        strict=True,
    ):
        answer = [*ids_of(sample.label), END]
        asked = [START, *[toys.IMAGE_TOKEN] * N_FEATURES, *ids_of(sample.text)]
        n_padding = length - len(asked) - len(answer)
        assert list(prompt.token_ids) == asked
        assert prompt.images == (sample.image,)
        assert ids.tolist() == [*[PAD] * n_padding, *asked, *answer]
        assert mask.tolist() == [0] * n_padding + [1] * (length - n_padding)
        assert labels.tolist() == [NO_LABEL] * (length - len(answer)) + answer
    assert workload.n_answer_tokens.tolist() == [len(ids_of(s.label)) + 1 for s in task.samples("profile")]


def test_losses_are_those_of_the_model_of_transformers_without_padding(toy: Toy, write_task: WriteTask) -> None:
    _, workload = opened(toy, write_task(ASKED, question_rows()))
    losses = workload.losses(taught_outputs(toy, workload))
    assert losses.dtype == torch.float64
    with torch.no_grad():
        for item, prompt in enumerate(workload.prompts):
            pixels = workload.feeds["model"][0]["pixel_values"][item : item + 1]
            answer = [*ids_of(workload.samples[item].label), END]
            wanted = lone_losses(toy.model, list(prompt.token_ids), answer, pixels).mean()
            assert float(losses[item]) == pytest.approx(float(wanted), abs=1e-5)


def test_a_score_of_one_means_that_generate_gives_exactly_the_expected_answer(toy: Toy, write_task: WriteTask) -> None:
    _, workload = opened(toy, write_task(ASKED, question_rows()))
    taught, written = taught_outputs(toy, workload), generated(toy, workload)
    scores = workload.item_scores(taught)
    assert 0 < float(scores.mean()) < 1  # else the comparison would say nothing
    for score, row, sample in zip(scores.tolist(), written.tolist(), workload.samples, strict=True):
        answer = [*ids_of(sample.label), END]
        assert score == (row[: len(answer)] == answer)
    assert workload.item_scores({"answers": written}).tolist() == scores.tolist()
    share = float(scores.mean())
    assert workload.metrics(taught)["exact-match"] == pytest.approx(100 * share)
    assert workload.metrics({"answers": written})["exact-match"] == pytest.approx(100 * share)


def test_a_token_that_does_not_lead_or_is_no_number_makes_an_answer_wrong(toy: Toy, write_task: WriteTask) -> None:
    _, workload = opened(toy, write_task(ASKED, question_rows()))
    (feed,) = workload.feeds["model"]
    scores = torch.zeros(*feed["labels"].shape, 2)
    scores[feed["labels"] != NO_LABEL] = torch.tensor([-0.5, 1.0])
    assert workload.item_scores({"model": scores}).tolist() == [1] * 9
    assert workload.losses({"model": scores}).tolist() == pytest.approx([0.5] * 9)
    scores[0, -1, 1] = 0.0  # a tie
    scores[1, -2, 1] = -1.0
    scores[2, -1] = float("nan")
    scores[3, 0] = float("nan")  # in front of the answer, where nothing is read
    assert workload.item_scores({"model": scores}).tolist() == [0, 0, 0, *[1] * 6]
    assert workload.losses({"model": scores})[3] == pytest.approx(0.5)
    n_tokens = int(workload.n_answer_tokens.sum())
    assert workload.metrics({"model": scores}) == {
        "exact-match": pytest.approx(100 * 6 / 9),
        "token_accuracy": pytest.approx(100 * (n_tokens - 3) / n_tokens),
    }
    answers = workload.answers({"model": scores})
    assert [answer.is_right for answer in answers] == [False] * 3 + [True] * 6
    first, second = (int(n) for n in workload.n_answer_tokens[:2])
    assert answers[0].note == f"it departs at token {first} of {first}"
    assert answers[1].note == f"it departs at token {second - 1} of {second}"
    assert answers[3].text == workload.samples[3].label


def answer_ids(texts: list[str]) -> Tensor:
    rows = [torch.tensor([*ids_of(text), END]) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def test_generated_ids_are_decoded_and_judged_by_the_metric_of_the_task(toy: Toy, write_task: WriteTask) -> None:
    rows = [{**row, "answer": [row["answer"], "a square"]} for row in question_rows()]
    _, workload = opened(toy, write_task({**ASKED, "metric": "token-f1"}, rows))
    texts = [sample.label for sample in workload.samples]
    texts[0], texts[1] = "a square", "big green shape"
    outputs = {"answers": answer_ids(texts)}
    assert workload.decode(answer_ids(["a red square"])[0].tolist()) == "a red square"
    assert workload.samples[1].references == ("a green square", "a square")
    f1 = 2 * 1 / (3 + 2)  # one word of three is among the two that are no article
    assert workload.item_scores(outputs).tolist() == pytest.approx([1, f1, *[1] * 7])
    assert workload.metric == "token-f1"
    assert set(workload.metrics(outputs)) == {"exact-match", "anls", "token-f1"}  # two references are too few for VQA
    answers = workload.answers(outputs)
    assert (answers[0].text, answers[0].is_right, answers[0].note) == ("a square", True, "token-f1 100 %")
    assert (answers[1].text, answers[1].is_right) == ("big green shape", False)
    query = workload.queries()[0]
    assert (query.question, query.expected) == (QUESTIONS[0], "red (or one of 1 more)")
    assert [piece.name for piece in workload.slices(outputs)] == ["what colour …", "shape …"]


def test_several_annotators_are_judged_as_in_the_vqa_challenge(toy: Toy, write_task: WriteTask) -> None:
    rows = [{**row, "answer": ["red"] * 2 + ["blue"] * 8} for row in question_rows()]
    rows[-1]["answer"] = ["green"] * 10  # a task of one answer is refused
    _, workload = opened(toy, write_task({**ASKED, "metric": "vqa-accuracy"}, rows))
    outputs = {"answers": answer_ids(["red", "blue", *["green"] * 7])}
    assert workload.item_scores(outputs)[:3].tolist() == pytest.approx([0.6, 1, 0])
    assert [answer.is_right for answer in workload.answers(outputs)[:3]] == [True, True, False]
    assert workload.metrics(outputs)["vqa-accuracy"] == pytest.approx(100 * 1.6 / 9)
    assert workload.n_answer_tokens.tolist() == [2] * 9  # the first answer is the one that is taught


def test_captions_are_judged_by_consensus_and_a_part_keeps_the_frequencies_of_the_split(
    toy: Toy, write_task: WriteTask
) -> None:
    _, workload = opened(toy, write_task(CAPTIONED, caption_rows()))
    texts = [sample.label for sample in workload.samples]
    outputs = {"answers": answer_ids(texts)}
    scores = workload.item_scores(outputs)
    assert workload.metric == "cider-d"
    assert float(scores.min()) > 0.4  # one of two references is met word for word
    assert float(scores.max()) <= 1
    metrics = workload.metrics(outputs)
    assert metrics["cider-d"] == pytest.approx(100 * float(scores.mean()))
    assert metrics["corpus_bleu-3"] == pytest.approx(100)
    assert metrics["corpus_bleu-4"] == 0  # no caption has four words
    assert metrics["bleu-4"] == pytest.approx(100)
    part = workload.part([2])
    assert part.item_scores({"answers": outputs["answers"][[2]]}).tolist() == [scores[2]]
    (piece,) = workload.slices(outputs)
    assert (piece.name, list(piece.rows)) == ("all captions", list(range(6)))
    assert workload.queries()[0].kind == "image-captioning"


def test_a_caption_is_asked_for_with_the_prompt_of_the_task_or_with_none(toy: Toy, write_task: WriteTask) -> None:
    _, bare = opened(toy, write_task(CAPTIONED, caption_rows(), name="bare"))
    _, asked = opened(toy, write_task({**CAPTIONED, "prompt": "what is it ?"}, caption_rows(), name="asked"))
    assert list(bare.prompts[0].token_ids) == [START, *[toys.IMAGE_TOKEN] * N_FEATURES]
    assert list(asked.prompts[0].token_ids) == [*bare.prompts[0].token_ids, *ids_of("what is it ?")]


def test_a_question_stands_in_its_place_of_the_prompt(toy: Toy, write_task: WriteTask) -> None:
    _, workload = opened(toy, write_task({**ASKED, "prompt": "<image> big {} small"}, question_rows()))
    asked = ids_of(f"big {QUESTIONS[0]} small")
    assert list(workload.prompts[0].token_ids) == [START, *[toys.IMAGE_TOKEN] * N_FEATURES, *asked]


def test_an_answer_may_be_four_tokens_longer_than_any_reference_or_as_long_as_said(
    toy: Toy, write_task: WriteTask
) -> None:
    rows = question_rows()
    rows[-1]["answer"] = ["red", "a big red square is it"]  # in another split, and not the first
    assert opened(toy, write_task(ASKED, rows, name="a"))[1].max_new_tokens == 6 + 4
    assert opened(toy, write_task({**ASKED, "max_new_tokens": 3}, rows, name="b"))[1].max_new_tokens == 3


def test_a_part_feeds_its_items_at_the_length_of_the_split(toy: Toy, write_task: WriteTask) -> None:
    _, workload = opened(toy, write_task(ASKED, question_rows()))
    items = [7, 1, 4]
    part = workload.part(items)
    (whole,), (own,) = workload.feeds["model"], part.feeds["model"]
    for name, value in whole.items():
        assert torch.equal(own[name], value[items])
    outputs = taught_outputs(toy, workload)
    assert torch.equal(part.losses({"model": outputs["model"][items]}), workload.losses(outputs)[items])
    assert list(part.item_groups) == [workload.item_groups[item] for item in items]
    assert list(part.prompts) == [workload.prompts[item] for item in items]
    assert workload.head_targets("model", outputs) is None
    assert list(workload.rows("model", items)) == items
    assert list(workload.groups("model")) == list(workload.item_groups)


def test_a_row_that_is_longer_than_the_model_reads_is_named(toy: Toy, write_task: WriteTask) -> None:
    rows = question_rows()
    rows[0]["question"] = " ".join(["what"] * 200)
    with pytest.raises(TaskError, match=r"line 1: prompt and answer have 219 tokens; expected at most 128"):
        opened(toy, write_task(ASKED, rows))


@pytest.mark.parametrize("task", [ASKED, CAPTIONED])
def test_a_model_that_writes_nothing_is_refused(
    toy: Toy, dual: Program, fused: Program, task: dict[str, Any], write_task: WriteTask
) -> None:
    loaded = load_task(write_task(task, question_rows() if task is ASKED else caption_rows()))
    for program in (dual, fused):
        with pytest.raises(TaskError, match=f"{task['kind']} needs a model that writes text, and this small model"):
            bind(program, loaded, toy.preprocessor)
    assert bind(toy.program, loaded, toy.preprocessor).assembly is Assembly.GENERATIVE


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("image-classification", "image-classification chooses among labels, and this llava model writes text"),
        ("zero-shot-image-classification", "needs two encoders in one space"),
        ("image-text-retrieval", "needs two encoders in one space"),
        ("visual-question-answering", "visual-question-answering needs a fused model"),
    ],
)
def test_the_kinds_that_choose_among_answers_refuse_a_model_that_writes(
    toy: Toy, kind: str, found: str, write_task: WriteTask
) -> None:
    rows = [{**row, "label": row["answer"], "text": row["answer"]} for row in question_rows()]
    with pytest.raises(TaskError, match=found):
        bind(toy.program, load_task(write_task({"kind": kind}, rows)), toy.preprocessor)


def test_a_program_joined_to_one_component_is_fed_the_same(toy: Toy, write_task: WriteTask) -> None:
    """Whatever joins the components keeps `generation`; the inputs of `model` are then those of one component."""
    task, workload = opened(toy, write_task(ASKED, question_rows()))
    embedding, vision = toy.program.components["embed_tokens"], toy.program.components["vision_encoder"]
    joined = replace(embedding, name="model", inputs=(*embedding.inputs, *vision.inputs))
    program = replace(toy.program, assembly=Assembly.FUSED, components={"model": joined})
    (first,), (second,) = (
        workload.feeds["model"],
        TaskSource(task, toy.preprocessor).workload(program, "profile").feeds["model"],
    )
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


class _Shaped(Preprocessor):
    """The processor of the toy, its pixels laid out as another family's processor lays them out."""

    layout: ClassVar[str]

    def images(self, images: Sequence[Image.Image | str | Path]) -> Arrays:
        pixels = super().images(images)["pixel_values"]
        if self.layout == "patches":  # those of all images one below the other, as Qwen2-VL has them
            return {"pixel_values": pixels.reshape(len(pixels) * 4, -1), "image_grid_thw": np.ones((len(pixels), 3))}
        return {"pixel_values": np.stack([pixels] * int(self.layout), axis=1)}


def shaped(toy: Toy, layout: str) -> Preprocessor:
    made = _Shaped.load(toy.preprocessor.folder)
    assert isinstance(made, _Shaped)
    type(made).layout = layout
    return made


def test_pixels_come_in_the_shape_that_the_model_reads(toy: Toy, write_task: WriteTask) -> None:
    task, workload = opened(toy, write_task(ASKED, question_rows()))
    wanted = workload.feeds["model"][0]["pixel_values"]
    (feed,) = TaskSource(task, shaped(toy, "1")).workload(toy.program, "profile").feeds["model"]
    assert torch.equal(feed["pixel_values"], wanted)
    with pytest.raises(TaskError, match="cuts an image into 2; expected one picture an image"):
        TaskSource(task, shaped(toy, "2")).workload(toy.program, "profile").feeds["model"][0]

    vision = toy.program.components["vision_encoder"]
    flat = replace(vision, inputs=(TensorSpec("pixel_values", ("patches", 768), "float32"),))
    program = toy.program.with_components({**toy.program.components, "vision_encoder": flat})
    (feed,) = TaskSource(task, shaped(toy, "patches")).workload(program, "profile").part([4, 0]).feeds["model"]
    assert torch.equal(feed["pixel_values"], wanted[[4, 0]].reshape(8, 768))
