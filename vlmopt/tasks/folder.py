"""Reading a task's folder: metadata.jsonl beside images, folders of splits, or one folder for each class."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmopt.core.errors import TaskError
from vlmopt.tasks.images import IMAGE_SUFFIXES, FileImage, ImageSource
from vlmopt.tasks.specification import TaskKind, TaskSpecification, closest

METADATA_FILE = "metadata.jsonl"
SPLITS = ("profile", "validation", "test")
SPLIT_NAMES: Mapping[
    str, str
] = {  # what data sets call them; source: split keywords of the Hugging Face datasets library
    **dict.fromkeys(("profile", "train", "training"), "profile"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


@dataclass(frozen=True)
class Row:
    """One record as the data holds it; `split` is empty where the data does not say, `origin` is for messages."""

    image: ImageSource
    values: Mapping[str, Any]
    origin: str
    split: str = ""


def read_folder(specification: TaskSpecification, root: Path) -> list[Row]:
    """All rows of a folder, in the order of its files.

    Raises:
        TaskError: the folder or its metadata is missing, a line is malformed, a column or an image file is missing.
    """
    if not root.is_dir():
        raise TaskError(str(root), "is no folder", expected=f"images with {METADATA_FILE}", remedy="correct `data:`")
    if (root / METADATA_FILE).is_file():
        return _metadata_rows(specification, root, root)
    split_folders = [child for child in _folders(root) if child.name.lower() in SPLIT_NAMES]
    if not split_folders:
        return _class_rows(specification, root, root)
    rows: list[Row] = []
    for folder in split_folders:
        has_metadata = (folder / METADATA_FILE).is_file()
        found = (
            _metadata_rows(specification, root, folder) if has_metadata else _class_rows(specification, root, folder)
        )
        rows += [replace(row, split=SPLIT_NAMES[folder.name.lower()]) for row in found]
    return rows


def column(values: Mapping[str, Any], name: str, origin: str) -> Any:
    """The value of a column.

    Raises:
        TaskError: the row has no such column.
    """
    if name not in values:
        expected = f"one of {', '.join(map(str, values))}"
        raise TaskError(origin, f"has no column {name!r}", expected=expected, remedy=closest(name, map(str, values)))
    return values[name]


def _folders(root: Path) -> list[Path]:
    return sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))


def _metadata_rows(specification: TaskSpecification, root: Path, folder: Path) -> list[Row]:
    path = folder / METADATA_FILE
    image_column = specification.columns.image or "file_name"
    rows: list[Row] = []
    known: dict[str, FileImage] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        origin = f"{path}, line {number}"
        values = _parsed(line, origin)
        file_name = column(values, image_column, origin)
        if not isinstance(file_name, str) or not file_name:
            raise TaskError(origin, f"{image_column!r} is {file_name!r}", expected="the name of an image file")
        if file_name not in known:
            known[file_name] = _image(folder / file_name, root, origin)
        rows.append(Row(known[file_name], values, origin))
    return rows


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as problem:
        raise TaskError(str(path), f"cannot be read ({problem})", expected="JSON lines in UTF-8") from problem


def _parsed(line: str, origin: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as problem:
        raise TaskError(
            origin, f"is no JSON ({problem.msg} at column {problem.colno})", expected="one object a line"
        ) from problem
    if not isinstance(values, dict):
        raise TaskError(origin, f"holds a {type(values).__name__}", expected="one JSON object a line")
    return values


def _image(path: Path, root: Path, origin: str) -> FileImage:
    if not path.is_file():
        raise TaskError(origin, f"image file {path} does not exist", remedy="add the file or remove the line")
    is_inside = path.is_relative_to(root)
    return FileImage(path, path.relative_to(root).as_posix() if is_inside else path.as_posix())


def _class_rows(specification: TaskSpecification, root: Path, folder: Path) -> list[Row]:
    if specification.kind not in (TaskKind.IMAGE_CLASSIFICATION, TaskKind.ZERO_SHOT):
        expected = f"{METADATA_FILE}, one JSON object an image"
        raise TaskError(str(folder / METADATA_FILE), "does not exist", expected=expected)
    rows = [
        Row(FileImage(path, path.relative_to(root).as_posix()), {specification.columns.label: child.name}, str(path))
        for child in _folders(folder)
        for path in sorted(child.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    ]
    if not rows:
        raise TaskError(str(folder), "holds no images", expected=f"{METADATA_FILE}, or one folder of images a class")
    return rows
