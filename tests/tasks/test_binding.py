"""Tasks bound to programs: what stays, what the workloads feed, and what they score."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tasks.conftest import COLOURS, SmallPreprocessor, WriteTask, colour_rows, draw, outputs_of
from vlmopt.core.errors import SealedSplitError, TaskError
from vlmopt.core.program import Assembly, Component, Dim, Program, TensorSpec
from vlmopt.tasks.binding import TaskSource, bind
from vlmopt.tasks.dataset import load_task
from vlmopt.tasks.feeding import Feeder
from vlmopt.tasks.images import FileImage

CLASSES = {"kind": "image-classification", "labels": list(COLOURS)}
ZERO_SHOT = {"kind": "zero-shot-image-classification", "labels": list(COLOURS), "prompts": ["a {} dot", "{}"]}
RETRIEVAL = {"kind": "image-text-retrieval"}
VQA = {"kind": "visual-question-answering", "columns": {"answer": "label"}}


def questions(n: int) -> list[dict[str, object]]:
    return [{**row, "question": "what colour" if i % 2 else "what"} for i, row in enumerate(colour_rows(n))]


def test_image_classification_keeps_the_image_encoder_and_replaces_its_projection(
    dual: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    task = load_task(write_task(CLASSES, colour_rows(90)))
    program = bind(dual, task, preprocessor)
    assert (program.assembly, list(program.components), program.similarity) == (Assembly.FUSED, ["image_encoder"], None)
    assert (program.heads, program.labels) == ({"image_encoder": "task_head"}, ("red", "green", "blue"))
    assert program.components["image_encoder"].outputs == (TensorSpec("logits", ("batch", 3), "float32"),)
    assert list(program.dims) == ["batch"]
    head = program.components["image_encoder"].graph.get_submodule("task_head")
    assert (head.in_features, head.out_features) == (3, 3)  # behind the projection there were 4 numbers
    assert dual.heads["image_encoder"] == "visual_projection"
    assert list(dual.components) == ["image_encoder", "text_encoder"]

    workload = TaskSource(task, preprocessor).workload(program, "profile")
    outputs = outputs_of(program, workload)
    assert outputs["image_encoder"].abs().max() == 0  # the head is not fitted yet
    assert torch.allclose(
        workload.losses(outputs), torch.tensor(3.0, dtype=torch.float64).log().expand(workload.n_items)
    )


def test_image_classification_scores_a_fitted_head(
    dual: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    task = load_task(write_task(CLASSES, colour_rows(90)))
    program = bind(dual, task, preprocessor)
    workload = TaskSource(task, preprocessor).workload(program, "validation")
    targets = workload.head_targets("image_encoder", {})
    assert targets is not None
    assert targets.shape == (workload.n_items, 3)
    assert targets.dtype == torch.float64
    assert workload.metrics({"image_encoder": targets}) == {"accuracy": 100}
    half = targets.clone()
    half[0] = targets[0].roll(1)
    half[1] = float("nan")
    scores = workload.item_scores({"image_encoder": half})
    assert scores[:3].tolist() == [0, 0, 1]
    assert 100 * float(scores.mean()) == workload.metrics({"image_encoder": half})["accuracy"]
    assert list(workload.groups("image_encoder")) == list(workload.item_groups)


def test_a_program_without_a_projection_gets_a_head_behind_its_output(
    headless: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    task = load_task(write_task(CLASSES, colour_rows(90)))
    program = bind(headless, task, preprocessor)
    assert program.heads == {"image_encoder": "task_head"}
    workload = TaskSource(task, preprocessor).workload(program, "profile", limit=10)
    assert outputs_of(program, workload)["image_encoder"].shape == (10, 3)


def test_zero_shot_fixes_the_prompts_and_scores_before_and_after_folding(
    dual: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    task = load_task(write_task(ZERO_SHOT, colour_rows(60)))
    program = bind(dual, task, preprocessor)
    assert program.labels == tuple(COLOURS)
    assert {name: tuple(value.shape) for name, value in program.fixed_inputs["text_encoder"].items()} == {
        "input_ids": (6, 5),
        "attention_mask": (6, 5),
    }
    source = TaskSource(task, preprocessor)
    workload = source.workload(program, "profile")
    outputs = outputs_of(program, workload)
    assert outputs["text_encoder"].shape == (6, 4)
    assert workload.metrics(outputs) == {"accuracy": 100}
    assert list(workload.groups("text_encoder")) == ["red", "red", "green", "green", "blue", "blue"]
    targets = workload.head_targets("text_encoder", outputs)
    assert targets is not None
    assert torch.allclose(targets.norm(dim=1), torch.ones(6, dtype=torch.float64))

    pixels = torch.nn.functional.normalize(outputs["image_encoder"].double(), dim=1)
    logits = 10 * pixels @ torch.eye(3, 4, dtype=torch.float64).T
    folded = replace(program, components={"image_encoder": program.components["image_encoder"]}, similarity=None)
    after = source.workload(folded, "profile")
    assert list(after.feeds) == ["image_encoder"]
    assert torch.allclose(after.losses({"image_encoder": logits}), workload.losses(outputs))
    assert after.fingerprint == workload.fingerprint


def test_prompts_are_averaged_label_by_label(
    dual: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    task = load_task(write_task({**ZERO_SHOT, "prompts": ["{}", "big {}"]}, colour_rows(60)))
    program = bind(dual, task, preprocessor)
    workload = TaskSource(task, preprocessor).workload(program, "profile")
    outputs = outputs_of(program, workload)
    plain, big = torch.tensor([1.0, 0, 0, 0]), torch.tensor([1.0, 0, 0, 2]) / 5**0.5
    red = torch.nn.functional.normalize(plain + big, dim=0)
    image = torch.nn.functional.normalize(outputs["image_encoder"][0], dim=0)
    expected = [10 * float(image @ red.roll(0)), 10 * float(image[1] * red[0]), 10 * float(image[2] * red[0])]
    logits = torch.tensor([expected], dtype=torch.float64)
    label = torch.tensor([task.labels.index(task.samples("profile")[0].label)])
    loss = torch.nn.functional.cross_entropy(logits, label)
    assert float(workload.losses(outputs)[0]) == pytest.approx(float(loss), abs=1e-5)


def captions(n: int) -> list[dict[str, object]]:
    rows = [{"file_name": f"{i:03d}.png", "text": colour} for i, colour in enumerate([*COLOURS] * (n // 3))]
    parts = ["train", "val", "test"]
    return [{**row, "split": parts[i // 3 % 3]} for i, row in enumerate(rows)]


def test_retrieval_feeds_unique_images_and_texts_and_hits_count_any_match(
    dual: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    task = load_task(write_task(RETRIEVAL, captions(36)))
    program = bind(dual, task, preprocessor)
    workload = TaskSource(task, preprocessor).workload(program, "profile")
    outputs = outputs_of(program, workload)
    assert {name: len(value) for name, value in outputs.items()} == {"image_encoder": 12, "text_encoder": 3}
    metrics = workload.metrics(outputs)
    assert metrics == {
        **{f"recall@{k}": 100 for k in (1, 5, 10)},
        **{f"{way}_recall@{k}": 100 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)},
    }
    assert workload.n_items == len(workload.losses(outputs)) == len(workload.item_groups) == 12
    assert float(workload.losses(outputs).max()) < 0.01
    assert len(workload.groups("image_encoder")) == 12
    assert len(workload.groups("text_encoder")) == 3


def test_retrieval_scores_each_direction_and_gives_nothing_for_ties_and_numbers_that_are_none(
    dual: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    task = load_task(write_task(RETRIEVAL, captions(36)))
    workload = TaskSource(task, preprocessor).workload(bind(dual, task, preprocessor), "profile")
    colours = torch.eye(3).repeat(4, 1)
    swapped = colours.clone()
    swapped[0] = colours[1]  # one red drawing looks green
    metrics = workload.metrics({"image_encoder": swapped, "text_encoder": torch.eye(3)})
    assert metrics["image_to_text_recall@1"] == pytest.approx(100 * 11 / 12)
    # "green" meets the misleading drawing at the same distance as the true ones: a tie counts as wrong first.
    assert metrics["text_to_image_recall@1"] == pytest.approx(100 * 2 / 3)
    assert metrics["text_to_image_recall@5"] == 100
    scores = workload.item_scores({"image_encoder": swapped, "text_encoder": torch.eye(3)})
    assert scores[:3].tolist() == [0.5, 0.5, 1]
    assert metrics["recall@1"] == pytest.approx(100 * float(scores.mean()))
    for value in (1.0, float("nan")):
        flat = {"image_encoder": torch.full((12, 3), value), "text_encoder": torch.full((3, 3), value)}
        assert workload.metrics(flat)["recall@1"] == 0


def test_retrieval_loss_is_the_symmetric_cross_entropy_over_the_pool(
    dual: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    rows = [{"file_name": f"{i}.png", "text": f"t{i}", "split": ["train", "val", "test"][i % 3]} for i in range(15)]
    task = load_task(write_task(RETRIEVAL, rows))
    workload = TaskSource(task, preprocessor).workload(bind(dual, task, preprocessor), "profile")
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, 5, 4, generator=generator)
    logits = 10 * torch.nn.functional.normalize(image.double()) @ torch.nn.functional.normalize(text.double()).T
    both = [torch.nn.functional.cross_entropy(m, torch.arange(5), reduction="none") for m in (logits, logits.T)]
    losses = workload.losses({"image_encoder": image, "text_encoder": text})
    assert torch.allclose(losses, sum(both) / 2)


def test_chunks_of_a_large_pool_add_up(
    dual: Program, preprocessor: SmallPreprocessor, write_task: WriteTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = load_task(write_task(RETRIEVAL, captions(36)))
    workload = TaskSource(task, preprocessor).workload(bind(dual, task, preprocessor), "profile")
    generator = torch.Generator().manual_seed(1)
    outputs = {"image_encoder": torch.randn(12, 4, generator=generator), "text_encoder": torch.randn(3, 4)}
    whole = workload.losses(outputs), workload.item_scores(outputs)
    monkeypatch.setattr("vlmopt.tasks.scoring._CHUNK", 5)
    assert torch.allclose(workload.losses(outputs), whole[0])
    assert torch.equal(workload.item_scores(outputs), whole[1])


def test_several_captions_of_one_image_and_pairs_listed_twice(
    dual: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    rows = []
    for number, split in enumerate(["train", "train", "train", "val", "test"]):
        colour = list(COLOURS)[number % 3]
        for text in (f"{colour} {number}", f"{colour} dot {number}", f"{colour} dot {number}"):
            rows.append({"file_name": f"{number}.png", "text": text, "split": split})
    task = load_task(write_task(RETRIEVAL, rows))
    workload = TaskSource(task, preprocessor).workload(bind(dual, task, preprocessor), "profile")
    assert workload.n_items == 6
    assert len(workload.groups("image_encoder")) == 3
    assert len(workload.groups("text_encoder")) == 6


def test_questions_are_fed_with_their_images_at_one_length(
    fused: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    rows = [dict(row, file_name=f"{i // 2 * 3 % 90:03d}.png", label="red") for i, row in enumerate(questions(90))]
    rows += [dict(row, file_name=f"g{row['file_name']}") for row in questions(30)]
    task = load_task(write_task(VQA, rows))
    program = bind(fused, task, preprocessor)
    assert program.labels == tuple(COLOURS)
    source = TaskSource(task, preprocessor)
    workload = source.workload(program, "profile")
    feeds = workload.feeds["model"]
    assert [len(feed["pixel_values"]) for feed in feeds] == [32] * (len(feeds) - 1) + [workload.n_items % 32 or 32]
    assert {tuple(feed["input_ids"].shape[1:]) for feed in feeds} == {(4,)}  # [CLS] what colour [SEP]
    outputs = outputs_of(program, workload)
    assert workload.metrics(outputs) == {"accuracy": 100}
    reference = workload.head_targets("model", outputs)
    assert reference is not None
    assert torch.equal(reference, outputs["model"].double())


def test_images_are_preprocessed_once_as_long_as_they_fit_the_memory_given(
    fused: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    task = load_task(write_task(VQA, questions(90)))
    source = TaskSource(task, preprocessor)
    workload = source.workload(bind(fused, task, preprocessor), "profile")
    for _ in range(3):
        outputs_of(fused, workload)
    assert preprocessor.n_images == workload.n_items
    source.workload(fused, "profile", limit=5).feeds["model"][0]
    assert preprocessor.n_images == workload.n_items

    feeder = Feeder(preprocessor, cache_bytes=3 * 8 * 8 * 4 * 10)
    images = [sample.image for sample in task.samples("profile")]
    feeds = feeder.feeds(fused, fused.components["model"], images=images, texts=["what"] * len(images))
    before = preprocessor.n_images
    first = [feed["pixel_values"] for feed in feeds]
    second = [feed["pixel_values"] for feed in feeds]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert preprocessor.n_images - before == 2 * len(images) - 10


def test_the_answers_must_be_the_classes_of_the_model(
    fused: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    def bound(labels: list[str], program: Program = fused, name: str = "task") -> Program:
        specification = {**VQA, "labels": labels} if labels else VQA
        return bind(program, load_task(write_task(specification, questions(30), name=name)), preprocessor)

    unnamed = replace(fused, labels=("LABEL_0", "LABEL_1", "LABEL_2"))
    assert bound(["blue", "red", "green"], unnamed, "a").labels == ("blue", "red", "green")
    with pytest.raises(TaskError, match="answer 0 is 'blue'; expected 'red', as in the model"):
        bound(["blue", "red", "green"], name="b")
    with pytest.raises(TaskError, match="4 answers; expected 3, one for each class"):
        bound(["red", "green", "blue", "pink"], name="c")
    with pytest.raises(TaskError, match="neither the task nor the model's configuration names the answers"):
        bound([], unnamed, "d")
    with pytest.raises(TaskError, match=r"metadata\.jsonl, line 2: answer 'green' is not in the list"):
        bound([], replace(fused, labels=("red", "black", "blue")), "e")


def test_a_kind_that_the_model_cannot_do_is_refused(
    dual: Program, fused: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    for number, (specification, program, found) in enumerate(
        [
            (CLASSES, fused, "image-classification needs an encoder of images alone"),
            (ZERO_SHOT, fused, "zero-shot-image-classification needs two encoders in one space"),
            (VQA, dual, "visual-question-answering needs a fused model"),
        ]
    ):
        task = load_task(write_task(specification, questions(60), name=str(number)))
        with pytest.raises(TaskError, match=found):
            bind(program, task, preprocessor)
    task = load_task(write_task(RETRIEVAL, captions(36)))
    with pytest.raises(TaskError, match="image-text-retrieval needs two encoders in one space"):
        bind(fused, task, preprocessor)


def test_the_source_gives_the_test_split_to_the_final_evaluation_alone(
    dual: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    task = load_task(write_task(RETRIEVAL, captions(36)))
    program = bind(dual, task, preprocessor)
    source = TaskSource(task, preprocessor)
    with pytest.raises(SealedSplitError):
        source.workload(program, "test")
    assert source.workload(program, "validation").n_items == 12
    final = source.open_test(program)
    assert final.metrics(outputs_of(program, final))["recall@1"] == 100
    assert source.open_test(program).fingerprint == final.fingerprint
    with pytest.raises(SealedSplitError):
        source.workload(program, "validation")


def test_an_image_that_breaks_while_it_is_decoded_is_named(
    dual: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    rows = [{**row, "split": ["train", "val", "test"][i % 3]} for i, row in enumerate(colour_rows(9))]
    rows = [{**row, "label": list(COLOURS)[i // 3]} for i, row in enumerate(rows)]
    folder = write_task(CLASSES, rows)
    task = load_task(folder)
    program = bind(dual, task, preprocessor)
    whole = (folder / "003.png").read_bytes()
    (folder / "003.png").write_bytes(whole[: len(whole) // 2])
    workload = TaskSource(task, preprocessor).workload(program, "profile")
    with pytest.raises(TaskError, match=r"003\.png: does not decode as an image"):
        outputs_of(program, workload)


class _NoResize(SmallPreprocessor):
    """Hands on the size that every image has."""

    def images(self, images):  # type: ignore[no-untyped-def]
        self._images.size = {"height": images[0].height, "width": images[0].width}
        self._images.crop_size = self._images.size
        return super().images(images)


def test_images_of_different_sizes_and_inputs_that_nobody_makes_are_named(fused: Program, tmp_path: Path) -> None:
    draw(tmp_path / "a.png", "red")
    draw(tmp_path / "b.png", "red", side=9)
    images = [FileImage(tmp_path / name, name) for name in ("a.png", "b.png")]
    feeder = Feeder(_NoResize())
    part = fused.components["model"]
    for image in images:
        feeder.feeds(fused, part, images=[image], texts=["what"])[0]
    with pytest.raises(TaskError, match=r"images a\.png \.\.\. b\.png: come out in different sizes"):
        feeder.feeds(fused, part, images=images, texts=["what"] * 2)[0]
    more = replace(part, inputs=(*part.inputs, TensorSpec("position_ids", ("batch", "length"), "int64")))
    with pytest.raises(TaskError, match="input 'position_ids' of model: the model's processor does not make it"):
        feeder.feeds(fused, more, images=images[:1], texts=["what"])[0]


def test_texts_get_the_length_that_the_component_takes(fused: Program, preprocessor: SmallPreprocessor) -> None:
    feeder = Feeder(preprocessor)
    part = fused.components["model"]

    def length(program: Program, component: Component, text: str) -> int:
        return feeder.texts(program, component, [text])["input_ids"].shape[1]

    assert length(fused, part, "what colour") == 4
    assert length(fused, part, "what " * 30) == 12
    longer = replace(fused, dims={**fused.dims, "length": Dim("length", 6, 12, 6)})
    assert length(longer, part, "what") == 6
    fixed = replace(part, inputs=(part.inputs[0], TensorSpec("input_ids", ("batch", 9), "int64")))
    assert length(fused, fixed, "what") == 9
