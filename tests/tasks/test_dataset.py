"""Task folders: every layout, every mistake, the splits, and the seal on the test split."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.tasks.conftest import COLOURS, WriteTask, colour_rows, draw
from vlmopt.core.errors import SealedSplitError, TaskError
from vlmopt.tasks.dataset import load_task
from vlmopt.tasks.images import open_image

SPECIFICATION = {"kind": "image-classification", "name": "colours"}
VQA = {"kind": "visual-question-answering", "labels": ["red", "green", "blue"]}
RETRIEVAL = {"kind": "image-text-retrieval"}


def rewritten(folder: Path, line: int, text: str) -> Path:
    file = folder / "metadata.jsonl"
    lines = file.read_text().splitlines()
    lines[line - 1] = text
    file.write_text("\n".join(lines) + "\n")
    return folder


def test_a_folder_is_divided_by_hash_and_the_same_way_every_time(write_task: WriteTask) -> None:
    folder = write_task(SPECIFICATION, colour_rows(120))
    task = load_task(folder)
    assert task.labels == ("blue", "green", "red")
    assert sum(task.counts.values()) == 120
    assert abs(task.counts["profile"] - 60) < 15
    assert abs(task.counts["test"] - 36) < 15
    again = load_task(folder / "task.yaml")
    assert again.fingerprint == task.fingerprint
    assert again.samples("profile") == task.samples("profile")


def test_another_seed_divides_otherwise(write_task: WriteTask) -> None:
    first = load_task(write_task(SPECIFICATION, colour_rows(60), name="a"))
    second = load_task(write_task({**SPECIFICATION, "splits": {"seed": 1}}, colour_rows(60), name="b"))
    names = [{sample.image.name for sample in task.samples("profile")} for task in (first, second)]
    assert names[0] != names[1]
    assert first.fingerprint != second.fingerprint


def test_added_images_move_no_other_image(write_task: WriteTask) -> None:
    small = load_task(write_task(SPECIFICATION, colour_rows(60), name="a"))
    large = load_task(write_task(SPECIFICATION, colour_rows(90), name="b"))
    for split in ("profile", "validation"):
        of_small = {sample.image.name for sample in small.samples(split)}
        of_large = {sample.image.name for sample in large.samples(split)}
        assert of_small == {name for name in of_large if int(name[:3]) < 60}


def test_groups_and_copies_of_one_image_stay_together(write_task: WriteTask) -> None:
    rows = [{**row, "concept": f"c{i // 3}"} for i, row in enumerate(colour_rows(90))]
    task = load_task(write_task({**SPECIFICATION, "columns": {"group": "concept"}}, rows))
    profile = {sample.group for sample in task.samples("profile")}
    validation = {sample.group for sample in task.samples("validation")}
    assert not profile & validation
    assert len(task.samples("profile")) == 3 * len(profile)

    folder = write_task(SPECIFICATION, colour_rows(60), name="copies")
    for number in range(0, 60, 2):
        (folder / f"{number + 1:03d}.png").write_bytes((folder / f"{number:03d}.png").read_bytes())
    homes: dict[str, set[int]] = {}
    copies = load_task(folder)
    for split in ("profile", "validation"):
        homes[split] = {int(sample.image.name[:3]) // 2 for sample in copies.samples(split)}
        assert len(copies.samples(split)) == 2 * len(homes[split])


def test_a_split_column_is_followed_by_any_of_the_usual_names(write_task: WriteTask) -> None:
    names = ["train", "Validation", "test", "dev", "eval", "profile"]
    rows = [{**row, "split": names[i % 6]} for i, row in enumerate(colour_rows(36))]
    assert load_task(write_task(SPECIFICATION, rows, name="a")).counts == {"profile": 12, "validation": 12, "test": 12}
    renamed = [{**row, "part": row.pop("split")} for row in rows]
    task = load_task(write_task({**SPECIFICATION, "columns": {"split": "part"}}, renamed, name="b"))
    assert task.counts == {"profile": 12, "validation": 12, "test": 12}


def test_sub_folders_are_splits_and_class_folders_are_labels(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("kind: image-classification\n")
    for part, count in (("train", 4), ("val", 2), ("test", 3)):
        for colour in COLOURS:
            for number in range(count):
                draw(tmp_path / part / colour / f"{number}.png", colour, shade=number)
    task = load_task(tmp_path)
    assert task.counts == {"profile": 12, "validation": 6, "test": 9}
    assert task.samples("validation")[0].image.name == "val/blue/0.png"
    assert Counter(sample.label for sample in task.samples("profile")) == dict.fromkeys(COLOURS, 4)


def test_sub_folders_may_have_their_own_metadata_and_leave_validation_out(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("kind: image-text-retrieval\ndata: pictures\n")
    for part, count in (("train", 40), ("test", 10)):
        rows = [{"file_name": f"{i}.png", "text": f"red dot {part} {i}"} for i in range(count)]
        for number, row in enumerate(rows):
            draw(tmp_path / "pictures" / part / str(row["file_name"]), "red", shade=number)
        (tmp_path / "pictures" / part / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    counts = load_task(tmp_path).counts
    assert counts["test"] == 10
    assert counts["profile"] + counts["validation"] == 40
    assert counts["profile"] > counts["validation"] > 0


def test_class_folders_alone_are_divided_by_hash(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("kind: zero-shot-image-classification\n")
    for colour in COLOURS:
        for number in range(20):
            draw(tmp_path / colour / f"{number}.png", colour, shade=number)
    task = load_task(tmp_path)
    assert sum(task.counts.values()) == 60
    assert task.labels == ("blue", "green", "red")


def test_the_test_split_is_sealed_and_opening_it_seals_the_others(write_task: WriteTask) -> None:
    task = load_task(write_task(SPECIFICATION, colour_rows(60)))
    with pytest.raises(SealedSplitError, match="the test split is sealed"):
        task.samples("test")
    assert task.samples("profile")
    opened = task.open_test()
    assert len(opened) == task.counts["test"]
    for split in ("profile", "validation"):
        with pytest.raises(SealedSplitError, match=f"the {split} split is sealed, since the test split was opened"):
            task.samples(split)
    with pytest.raises(SealedSplitError):
        task.samples("test")
    assert task.open_test() == opened


def test_unknown_splits_and_limits_below_one_are_refused(write_task: WriteTask) -> None:
    task = load_task(write_task(SPECIFICATION, colour_rows(60)))
    with pytest.raises(TaskError, match="there is no split 'train'; expected profile or validation"):
        task.samples("train")
    with pytest.raises(TaskError, match="a limit of 0 samples"):
        task.samples("profile", limit=0)


def test_a_limit_keeps_classes_in_proportion_and_rare_classes_at_all(write_task: WriteTask) -> None:
    rows = [{"file_name": f"{i}.png", "split": "train", "label": "red"} for i in range(90)]
    rows += [{"file_name": f"{i}.png", "split": "train", "label": "green"} for i in range(90, 119)]
    rows += [{"file_name": "119.png", "split": "train", "label": "blue"}]
    rows += [{"file_name": f"{i}.png", "split": s, "label": "red"} for i, s in ((120, "val"), (121, "test"))]
    task = load_task(write_task(SPECIFICATION, rows))
    few = task.samples("profile", limit=20)
    counts = Counter(sample.label for sample in few)
    assert len(few) == 20
    assert counts["blue"] == 1
    assert 13 <= counts["red"] <= 15
    assert list(few) == [sample for sample in task.samples("profile") if sample in few]
    assert task.samples("profile", limit=20) == few
    assert task.samples("profile", limit=20, seed=1) != few
    assert len(task.samples("profile", limit=1000)) == 120


def test_a_limit_keeps_groups_whole(write_task: WriteTask) -> None:
    rows = [{**row, "concept": f"c{i // 3}"} for i, row in enumerate(colour_rows(90))]
    task = load_task(write_task({**SPECIFICATION, "columns": {"group": "concept"}}, rows))
    few = task.samples("profile", limit=13)
    assert len(few) == 12
    assert set(Counter(sample.group for sample in few).values()) == {3}
    assert len(task.samples("profile", limit=1)) == 3  # a group is never cut, not even by the limit


def test_the_fingerprint_notices_a_pixel_a_label_and_a_record(write_task: WriteTask) -> None:
    folder = write_task(SPECIFICATION, colour_rows(60))
    before = load_task(folder).fingerprint
    draw(folder / "000.png", "red", shade=999)
    pixel = load_task(folder).fingerprint
    rewritten(folder, 2, json.dumps({"file_name": "001.png", "label": "red"}))
    label = load_task(folder).fingerprint
    with (folder / "metadata.jsonl").open("a") as stream:
        draw(folder / "new.png", "red")
        stream.write(json.dumps({"file_name": "new.png", "label": "red"}))
    assert len({before, pixel, label, load_task(folder).fingerprint}) == 4


def test_six_thousand_small_images_load_in_seconds(write_task: WriteTask, tmp_path: Path) -> None:
    rows = colour_rows(6000)
    images = tmp_path / "images"
    images.mkdir()
    generator = np.random.default_rng(0)
    for row in rows:
        pixels = generator.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / row["file_name"])
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text("kind: image-classification\ndata: images\n")
    start = time.perf_counter()
    load_task(tmp_path)
    assert time.perf_counter() - start < 4  # about 0.7 s on a quiet machine


def line_error(write_task: WriteTask, specification: dict[str, Any], line: str) -> str:
    rows = [
        {"file_name": f"{i}.png", "label": "red", "text": f"t{i}", "question": "what", "answer": "red"}
        for i in range(9)
    ]
    rows[0] |= {"label": "blue", "answer": "blue"}
    folder = rewritten(write_task(specification, rows), 4, line)
    with pytest.raises(TaskError) as caught:
        load_task(folder)
    message = str(caught.value)
    assert "metadata.jsonl, line 4" in message
    assert "\n" not in message
    return message


def test_bad_lines_are_named_with_file_and_line(write_task: WriteTask) -> None:
    assert "is no JSON (Expecting property name" in line_error(write_task, SPECIFICATION, '{"file_name": "3.png",')


CLOSED = {**SPECIFICATION, "labels": ["red", "blue"]}
BAD_RECORDS: list[tuple[dict[str, Any], str, str]] = [
    (SPECIFICATION, "[1, 2]", "holds a list; expected one JSON object a line"),
    (SPECIFICATION, '{"file": "3.png", "label": "red"}', "has no column 'file_name'"),
    (
        SPECIFICATION,
        '{"file_name": "3.png", "lable": "red"}',
        "has no column 'label'; expected one of file_name, lable",
    ),
    (SPECIFICATION, '{"file_name": "3.png", "lable": "red"}', "did you mean 'lable'?"),
    (SPECIFICATION, '{"file_name": 3, "label": "red"}', "'file_name' is 3"),
    (SPECIFICATION, '{"file_name": "3.png", "label": null}', "column 'label' is None; expected text or a number"),
    (SPECIFICATION, '{"file_name": "3.png", "label": " "}', "column 'label' is ' '"),
    (SPECIFICATION, '{"file_name": "gone.png", "label": "red"}', "gone.png does not exist"),
    (CLOSED, '{"file_name": "3.png", "label": "rde"}', "label 'rde' is not in the list; expected one of red, blue"),
    (CLOSED, '{"file_name": "3.png", "label": "rde"}', "did you mean 'red'?"),
    (VQA, '{"file_name": "3.png", "question": "what", "answer": "grean"}', "answer 'grean' is not in the list"),
    (VQA, '{"file_name": "3.png", "question": "what", "answer": "grean"}', "did you mean 'green'?"),
    (VQA, '{"file_name": "3.png", "answer": "red"}', "has no column 'question'"),
    (RETRIEVAL, '{"file_name": "3.png"}', "has no column 'text'"),
]


@pytest.mark.parametrize(("specification", "line", "found"), BAD_RECORDS)
def test_bad_records_are_named_with_file_and_line(
    write_task: WriteTask, specification: dict[str, Any], line: str, found: str
) -> None:
    assert found in line_error(write_task, specification, line)


def test_a_missing_group_column_is_named(write_task: WriteTask) -> None:
    folder = write_task({**SPECIFICATION, "columns": {"group": "concept"}}, colour_rows(9))
    with pytest.raises(TaskError, match="line 1: has no column 'concept'"):
        load_task(folder)


def test_an_unknown_split_name_is_named_with_its_line(write_task: WriteTask) -> None:
    rows = [{**row, "split": "tset" if i == 4 else "train"} for i, row in enumerate(colour_rows(9))]
    with pytest.raises(TaskError, match=r"line 5: 'split' is 'tset'; expected one of .*; did you mean 'test'\?"):
        load_task(write_task(SPECIFICATION, rows))


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="nowhere: does not exist; expected a task folder"):
        load_task(tmp_path / "nowhere")
    with pytest.raises(TaskError, match=r"task\.yaml: does not exist"):
        load_task(tmp_path)
    (tmp_path / "task.yaml").write_text("kind: visual-question-answering\n")
    with pytest.raises(TaskError, match=r"metadata\.jsonl: does not exist"):
        load_task(tmp_path)
    (tmp_path / "task.yaml").write_text("kind: image-classification\n")
    with pytest.raises(TaskError, match="holds no images"):
        load_task(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n\n")
    with pytest.raises(TaskError, match="the task is empty"):
        load_task(tmp_path)
    (tmp_path / "task.yaml").write_text("kind: image-classification\ndata: pictures\n")
    with pytest.raises(TaskError, match="pictures: is no folder"):
        load_task(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n" + b"\x00" * 40])
def test_a_file_that_is_no_image_is_found_when_the_task_is_loaded(write_task: WriteTask, content: bytes) -> None:
    folder = write_task(SPECIFICATION, colour_rows(9))
    (folder / "003.png").write_bytes(content)
    with pytest.raises(TaskError, match=r"003\.png: does not decode as an image"):
        load_task(folder)


def test_a_png_that_was_cut_off_is_found_when_the_task_is_loaded(write_task: WriteTask) -> None:
    folder = write_task(SPECIFICATION, colour_rows(9))
    whole = (folder / "003.png").read_bytes()
    (folder / "003.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TaskError, match=r"003\.png: does not decode as an image"):
        load_task(folder)


def test_an_empty_split_and_a_single_class_are_refused(write_task: WriteTask) -> None:
    rows = [{**row, "split": "train" if i else "val"} for i, row in enumerate(colour_rows(9))]
    expected = "the test split is empty (profile 8, validation 1, test 0)"
    with pytest.raises(TaskError, match=re.escape(expected)):
        load_task(write_task(SPECIFICATION, rows, name="a"))
    with pytest.raises(TaskError, match="every sample has the label 'red'; expected two or more classes"):
        load_task(write_task(SPECIFICATION, [{**row, "label": "red"} for row in colour_rows(30)], name="b"))
    same = [{"file_name": f"{i}.png", "text": "red"} for i in range(30)]
    with pytest.raises(TaskError, match="every sample has the text 'red'"):
        load_task(write_task(RETRIEVAL, same, name="c"))


def test_an_image_or_a_group_in_two_splits_is_a_leak(write_task: WriteTask) -> None:
    rows = [{**row, "split": ["train", "val", "test"][i % 3]} for i, row in enumerate(colour_rows(9))]
    twice = [*rows, {"file_name": "000.png", "label": "red", "split": "test"}]
    with pytest.raises(TaskError, match=r"image '000\.png' is in the profile split and in the test split"):
        load_task(write_task(SPECIFICATION, twice, name="a"))
    grouped = [{**row, "concept": f"c{i // 2}"} for i, row in enumerate(rows)]
    with pytest.raises(TaskError, match="concept 'c0' is in the profile split and in the validation split"):
        load_task(write_task({**SPECIFICATION, "columns": {"group": "concept"}}, grouped, name="b"))


def test_a_hub_data_set_without_its_package_names_the_extra(
    write_task: WriteTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    folder = write_task({**SPECIFICATION, "data": "hub:owner/name"}, colour_rows(3))
    with pytest.raises(TaskError, match=r"needs the package `datasets`; pip install 'vlmopt\[hub\]'"):
        load_task(folder)


def test_a_hub_data_set_is_read_by_its_splits_and_class_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="comes with the extra vlmopt[hub]")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for part, count in (("train", 4), ("validation", 2), ("test", 3)):
        for colour in COLOURS:
            for number in range(count):
                draw(tmp_path / "set" / part / colour / f"{number}.png", colour, shade=number)
    (tmp_path / "task.yaml").write_text(f"kind: image-classification\ndata: hub:{tmp_path / 'set'}\n")
    task = load_task(tmp_path)
    assert task.counts == {"profile": 12, "validation": 6, "test": 9}
    assert task.labels == ("blue", "green", "red")
    assert open_image(task.samples("profile")[0].image).size == (8, 8)
