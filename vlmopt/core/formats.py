"""The formats that graphs are written in, and what has to be installed for them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from vlmopt.core.errors import RecipeError

Format = Literal["onnx", "torchscript", "pt2", "openvino", "executorch"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt", "pt2": ".pt2", "openvino": ".xml", "executorch": ".pte"}
EXTRAS = ("openvino", "executorch")  # formats of packages of the same name, which an extra of that name installs
OPENVINO_WEIGHTS = ".bin"
ROUNDS_INPUTS = frozenset({"onnx", "openvino", "executorch"})  # their integer products round inputs by themselves
# A method of an ExecuTorch file: the axis of the batch of every input, then of every output; or none.
BATCH_AXES, NO_BATCH = "batch_axes", -1


def refuse_missing(formats: Iterable[str]) -> None:
    """Looks whether what these formats need is installed.

    Raises:
        RecipeError: a package is missing.
    """
    for name in formats:
        if not is_installed(name):
            raise RecipeError(f"emit: {name}", "is not installed", remedy=remedy_for(name))


def is_installed(name: str) -> bool:
    return name not in EXTRAS or importlib.util.find_spec(name) is not None


def remedy_for(name: str) -> str:
    return f"pip install 'vlmopt[{name}]'"


def parts_of(file: Path) -> list[Path]:
    """A graph file and those beside it that hold its weights."""
    beside = file.with_name(f"{file.name}_data")
    if file.suffix == SUFFIXES["openvino"]:
        beside = file.with_suffix(OPENVINO_WEIGHTS)
    return [path for path in (file, beside) if path.is_file()]
