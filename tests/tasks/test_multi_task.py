"""Several tasks by one program: each answers with outputs of its own, and is held to the bound by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tasks.conftest import COLOURS, SmallPreprocessor, WriteTask, colour_rows, draw, outputs_of
from tests.tasks.test_binding import CLASSES, RETRIEVAL, captions
from vlmopt.core.errors import TaskError
from vlmopt.core.program import Program
from vlmopt.core.workload import head_blocks_of, parts_of
from vlmopt.graph.refit import fit_head
from vlmopt.tasks.binding import TaskSource, bind
from vlmopt.tasks.dataset import load_task

COLOUR = ["colour: red", "colour: green", "colour: blue"]


def members(write_task: WriteTask, n: int = 90) -> Path:
    """Folders of two tasks on the same images; returns the folder that holds them."""
    rows = [{**row, "parity": "even" if i % 2 == 0 else "odd"} for i, row in enumerate(colour_rows(n))]
    first = write_task({**CLASSES, "name": "colour"}, rows, name="one")
    second = write_task("", [], name="two")
    (second / "task.yaml").write_text(
        "kind: image-classification\nname: parity\ndata: ../one\ncolumns: {label: parity}\n", encoding="utf-8"
    )
    return first.parent


def both(write_task: WriteTask, **fields: Any) -> Path:
    root = members(write_task)
    lines = [f"{name}: {value}" for name, value in {"kind": "multi-task", "tasks": "[one, two]", **fields}.items()]
    path = root / "both.yaml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_its_samples_and_labels_are_those_of_its_members(write_task: WriteTask) -> None:
    task = load_task(both(write_task))
    assert task.labels == (*COLOUR, "parity: even", "parity: odd")
    assert task.counts["profile"] == 2 * load_task(task.path.parent / "one").counts["profile"]
    few = task.samples("profile", limit=10)
    assert len(few) == 10
    assert {sample.label for sample in few} == set(task.labels)  # classes in proportion
    changed = load_task(task.path.parent / "both.yaml")
    assert changed.fingerprint == task.fingerprint
    task.path.write_text(task.path.read_text() + "\ncombine: weighted\n")
    assert load_task(task.path).fingerprint != task.fingerprint


def test_only_outputs_of_its_own_task_answer_an_item(
    dual: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    task = load_task(both(write_task))
    program = bind(dual, task, preprocessor)
    assert program.components["image_encoder"].outputs[0].shape == ("batch", 5)
    workload = TaskSource(task, preprocessor).workload(program, "profile")
    n = workload.n_items
    targets = workload.head_targets("image_encoder", {})
    assert targets is not None
    assert workload.metrics({"image_encoder": targets}) == {
        "accuracy": 100, "accuracy of colour": 100, "accuracy of parity": 100,
    }  # fmt: skip
    loud = targets.clone()  # outputs of the other task shout, and change nothing
    for block in head_blocks_of(workload):
        others = [column for column in range(5) if column not in block.columns]
        loud[torch.tensor(block.rows)[:, None], torch.tensor(others)] = 100.0
    assert torch.equal(workload.item_scores({"image_encoder": loud}), torch.ones(n, dtype=torch.float64))
    assert torch.equal(workload.losses({"image_encoder": loud}), workload.losses({"image_encoder": targets}))
    even = torch.zeros(n, 5)
    chance = {"colour": 3, "parity": 2}
    wanted = torch.tensor([chance[name] for name in parts_of(workload)]).double().log()
    assert torch.allclose(workload.losses({"image_encoder": even}), wanted)
    spoilt = targets.clone()
    spoilt[0, 3] = float("nan")  # of the other task
    spoilt[1, 1] = float("nan")
    assert workload.item_scores({"image_encoder": spoilt})[:3].tolist() == [1, 0, 1]
    answers = workload.answers({"image_encoder": loud})
    assert [answer.text for answer in answers] == [query.expected for query in workload.queries()]
    assert all(answer.is_right for answer in answers)


def test_each_block_of_the_head_is_fitted_on_its_own_rows(
    dual: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    path = both(write_task)
    task, alone = load_task(path), load_task(path.parent / "one")
    generator = torch.Generator().manual_seed(0)
    program, workload = bind(dual, task, preprocessor), None
    workload = TaskSource(task, preprocessor).workload(program, "profile")
    first = TaskSource(alone, preprocessor).workload(bind(dual, alone, preprocessor), "profile")
    rows = list(head_blocks_of(workload)[0].rows)
    assert [workload.queries()[row].name for row in rows] == [query.name for query in first.queries()]
    features = torch.randn(workload.n_items, 6, generator=generator, dtype=torch.float64)
    targets = first.head_targets("image_encoder", {})
    assert targets is not None
    features[rows, :3] += 3 * targets
    found = fit_head("image_encoder", features, workload, {})
    single = fit_head("image_encoder", features[rows], first, {})
    assert found is not None
    assert single is not None
    assert torch.allclose(found.weight[:3], single.weight, atol=1e-9)
    assert torch.allclose(found.held_out[rows][:, :3], single.held_out, atol=1e-9)
    assert workload.metrics({"image_encoder": found.held_out})["accuracy of colour"] > 90


def test_a_task_whose_rows_cannot_be_held_out_keeps_outputs_of_zero(
    dual: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    task = load_task(both(write_task))
    workload = TaskSource(task, preprocessor).workload(bind(dual, task, preprocessor), "profile")
    rows = [list(block.rows) for block in head_blocks_of(workload)]
    part = workload.part([*rows[0], rows[1][0]])  # as in the batch where one task ends
    features = torch.randn(part.n_items, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fit = fit_head("image_encoder", features, part, {})
    assert fit is not None
    assert bool(torch.isfinite(part.losses({"image_encoder": fit.held_out})).all())
    assert not bool(fit.held_out[:, 3:].any())
    assert bool(fit.held_out[:, :3].any())


def test_weights_make_the_metric_a_mean_over_tasks(
    dual: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    task = load_task(both(write_task, combine="weighted", weights="[3, 1]"))
    program = bind(dual, task, preprocessor)
    workload = TaskSource(task, preprocessor).workload(program, "validation")
    outputs = workload.head_targets("image_encoder", {})
    assert outputs is not None
    wrong = torch.tensor([sample.startswith("parity") for sample in (q.expected for q in workload.queries())])
    outputs = torch.where(wrong[:, None], -outputs, outputs)
    assert workload.metrics({"image_encoder": outputs})["accuracy"] == pytest.approx(75)
    assert float(workload.item_scores({"image_encoder": outputs}).mean()) == pytest.approx(0.75)
    assert set(parts_of(workload)) == {""}
    task.path.write_text(task.path.read_text().replace("[3, 1]", "[1, 3]"))  # other losses: no profile fits both
    assert TaskSource(load_task(task.path), preprocessor).workload(program, "validation").fingerprint not in (
        workload.fingerprint, load_task(task.path).fingerprint,
    )  # fmt: skip


def test_a_part_is_the_same_items_again(dual: Program, preprocessor: SmallPreprocessor, write_task: WriteTask) -> None:
    task = load_task(both(write_task))
    program = bind(dual, task, preprocessor)
    whole = TaskSource(task, preprocessor).workload(program, "profile")
    items = [1, whole.n_items - 1, 4]
    part, outputs = whole.part(items), torch.randn(whole.n_items, 5, dtype=torch.float64)
    assert torch.equal(part.losses({"image_encoder": outputs[items]}), whole.losses({"image_encoder": outputs})[items])
    assert len(outputs_of(program, part)["image_encoder"]) == 3
    mislabelled = whole.with_wrong_labels(0.5, seed=0)
    assert int((mislabelled.targets != whole.targets).sum()) >= whole.n_items // 2
    assert [label.partition(":")[0] for label in map(whole.labels.__getitem__, mislabelled.targets.tolist())] == list(
        parts_of(whole)
    )


def with_other_pictures(folder: Path, first: Path) -> None:
    """Gives the task in `folder` three pictures under names that stand for others in `first`."""
    for number in range(3):
        (folder / f"{number:03d}.png").write_bytes((first / f"{number + 60:03d}.png").read_bytes())
    lines = [f'{{"file_name": "{n:03d}.png", "label": "{name}"}}' for n, name in enumerate(sorted(COLOURS))]
    with (folder / "metadata.jsonl").open("a") as stream:
        stream.write("\n".join(lines) + "\n")


def test_images_of_one_name_in_two_data_sets_stay_apart(
    dual: Program, preprocessor: SmallPreprocessor, write_task: WriteTask
) -> None:
    first = write_task({**CLASSES, "name": "here"}, colour_rows(60), name="one")
    other = write_task({**CLASSES, "name": "there"}, colour_rows(200)[70:], name="two")
    for number in range(3):
        draw(first / f"{number + 60:03d}.png", "red", shade=500 + number)
    with_other_pictures(other, first)
    path = first.parent / "both.yaml"
    path.write_text("kind: multi-task\ntasks: [one, two]\n")
    task = load_task(path)
    program = bind(dual, task, preprocessor)
    names = [sample.image.name for split in ("profile", "validation", "test") for sample in task.all_samples(split)]
    assert {name for name in names if ": " in name} == {
        f"{task}: {number:03d}.png" for task in ("here", "there") for number in range(3)
    }
    assert len(set(names)) == len(names)
    assert TaskSource(task, preprocessor).workload(program, "profile").n_items == task.counts["profile"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": "[one]"}, "tasks names 1 folders, expected two or more"),
        ({"labels": "[a, b]"}, "labels belongs to the members of a multi-task"),
        ({"weights": "[1, 2]"}, "weights need `combine: weighted`"),
        ({"combine": "weighted", "weights": "[1]"}, "1 weights for 2 tasks"),
        ({"combine": "weighted", "weights": "[1, 0]"}, "greater than 0"),
        ({"combine": "best"}, "'best'"),
        ({"tasks": "[one, one]"}, "two members are called 'colour'"),
        ({"tasks": "[one, three]"}, "three: does not exist"),
        ({"tasks": "[one, pairs]"}, "is a task of kind image-text-retrieval"),
    ],
)
def test_what_makes_no_multi_task_is_refused(fields: dict[str, str], message: str, write_task: WriteTask) -> None:
    path = both(write_task, **fields)
    write_task({**RETRIEVAL, "name": "pairs"}, captions(36), name="pairs")
    with pytest.raises(TaskError) as error:
        load_task(path)
    assert message in error.value.one_line()


def test_keys_of_a_multi_task_belong_to_nothing_else(write_task: WriteTask) -> None:
    with pytest.raises(TaskError, match="combine belongs to multi-task only"):
        load_task(write_task({**CLASSES, "combine": "worst"}, colour_rows(9)))


@pytest.mark.parametrize("has_third", [False, True])
def test_what_one_member_profiles_and_another_tests_is_a_leak(write_task: WriteTask, *, has_third: bool) -> None:
    root = members(write_task)
    (root / "two" / "task.yaml").write_text(
        "kind: image-classification\nname: parity\ndata: ../one\ncolumns: {label: parity}\nsplits: {seed: 1}\n"
    )
    if has_third:  # whose images of other content under the same names must not hide the leak
        third = write_task({**CLASSES, "name": "third"}, colour_rows(60), name="three")
        for number in range(60):
            draw(third / f"{number:03d}.png", "red", shade=300 + number)
    (root / "both.yaml").write_text(f"kind: multi-task\ntasks: [one, two{', three' if has_third else ''}]\n")
    with pytest.raises(TaskError, match=r"is in .* of colour and in .* of parity"):
        load_task(root / "both.yaml")
