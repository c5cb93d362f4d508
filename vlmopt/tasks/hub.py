"""Reading a data set of the hub through the `datasets` package, image bytes on demand."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmopt.core.errors import TaskError
from vlmopt.tasks.folder import SPLIT_NAMES, Row, column
from vlmopt.tasks.specification import HUB_PREFIX, TaskSpecification


@dataclass(frozen=True)
class HubImage:
    """One image of a table whose image column is not decoded: cells hold `bytes`, `path`, or both."""

    name: str
    table: Sequence[Mapping[str, Any]] = field(repr=False, compare=False)
    index: int = field(compare=False)
    column: str = field(compare=False)

    def read_bytes(self) -> bytes:
        cell = self.table[self.index][self.column]
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()


def read_hub(specification: TaskSpecification, place: str) -> list[Row]:
    """All rows of `hub:OWNER/NAME`, or of the splits in `hub:OWNER/NAME@SPLIT`, which are then divided anew.

    Raises:
        TaskError: the package is not installed, the data set cannot be loaded, or a column is missing.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as problem:
        remedy = "pip install 'vlmopt[hub]', or save the data set as a folder"
        raise TaskError(place, "a hub data set needs the package `datasets`", remedy=remedy) from problem
    name, _, split = specification.data.removeprefix(HUB_PREFIX).partition("@")
    try:
        loaded = datasets.load_dataset(name, split=split or None)
    except (OSError, ValueError, RuntimeError, KeyError) as problem:
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise TaskError(place, f"data set {name!r} cannot be loaded ({reason})", remedy="check its name") from problem
    if split:
        return list(_table_rows(specification, datasets, loaded, f"{name}@{split}", ""))
    rows: list[Row] = []
    for part, table in loaded.items():
        rows += _table_rows(specification, datasets, table, f"{name}@{part}", _split_of(part, f"{name}@{part}"))
    return rows


def _split_of(part: str, place: str) -> str:
    known = SPLIT_NAMES.get(part.lower())
    if known is None:
        expected = f"one of {', '.join(SPLIT_NAMES)}"
        raise TaskError(place, f"the split {part!r} is unknown", expected=expected, remedy="name one after an @")
    return known


def _table_rows(specification: TaskSpecification, datasets: Any, table: Any, place: str, split: str) -> Iterable[Row]:
    image_column = specification.columns.image or "image"
    column(dict.fromkeys(table.column_names), image_column, place)
    images = table.cast_column(image_column, datasets.Image(decode=False))
    names = {key: feature.names for key, feature in table.features.items() if hasattr(feature, "names")}
    for index, values in enumerate(table.remove_columns([image_column])):
        named = {key: _named(value, names.get(key)) for key, value in values.items()}
        origin = f"{place}, row {index}"
        yield Row(HubImage(f"{place}/{index}", images, index, image_column), named, origin, split)


def _named(value: Any, names: Sequence[str] | None) -> Any:
    """The name of a class index; an index below zero is how data sets say that there is no label."""
    if names is None or not isinstance(value, int):
        return value
    return names[value] if value >= 0 else None
