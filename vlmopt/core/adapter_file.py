"""A trained adapter as a small file, apart from the model: safetensors, with what it belongs to in its metadata.

The tensors are those that passes inserted, by `COMPONENT/PATH`, each once, and heads that were trained beside them.
`steps` are the passes that make the adapter's place, so that it can be attached to the model again: a skip adapter
needs the skip. `base` is the fingerprint of the model it was trained on, `data` that of the task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pydantic
from pydantic import BaseModel, ConfigDict

from vlmopt.core.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIX = ".safetensors"
NONE = "none"  # in place of an adapter's name: the model without one
_KEY = "vlmopt_adapter"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StepEntry(_Entry):
    """A pass with its options, and the sites that it was applied to, by name."""

    name: str
    options: dict[str, Any] = {}
    sites: tuple[str, ...]


class AdapterHeader(_Entry):
    """What an adapter belongs to.

    `aliases`: a tensor that several places share is stored once, under the first; the other places name that one.
    `seed` is that of the passes, which name their modules alike with any.
    """

    version: Literal[1] = 1
    vlmopt: str
    base: str
    data: str | None = None
    steps: tuple[StepEntry, ...]
    aliases: dict[str, str] = {}
    seed: int = 0

    def as_metadata(self) -> dict[str, str]:
        return {_KEY: self.model_dump_json()}

    def places(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors by all places that hold them, `COMPONENT/PATH`."""
        return {**tensors, **{place: tensors[first] for place, first in self.aliases.items()}}


def is_adapter_file(path: str | Path) -> bool:
    """Whether the path names an adapter of ours; peft's are folders."""
    return str(path).endswith(SUFFIX) and not Path(path).is_dir()


def read_header(path: Path, place: str) -> AdapterHeader:
    """What the file says of itself.

    Raises:
        ModelError: there is no such file, it is no safetensors file, or no adapter of this version.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ModelError(place, "no such file", expected="an adapter file that `vlmopt optimize` wrote")
    try:
        with safe_open(path, framework="np") as opened:
            metadata = opened.metadata() or {}
            names = set(opened.keys())
    except (SafetensorError, OSError) as error:
        found = f"is truncated, a pickle, or no safetensors file ({path.stat().st_size} bytes)"
        raise ModelError(place, found, expected="an adapter file that `vlmopt optimize` wrote") from error
    if _KEY not in metadata:
        expected, remedy = f"{_KEY} in its metadata", "give the folder that peft wrote, where it is one of peft's"
        raise ModelError(place, "is no adapter file of vlmopt", expected=expected, remedy=remedy)
    try:
        header = AdapterHeader.model_validate_json(metadata[_KEY])
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ModelError(place, f"its {_KEY} is not readable: {where}: {first['msg']}", expected="version 1") from error
    if not names:
        raise ModelError(place, "holds no tensors", expected="the weights of an adapter")
    if lost := sorted(set(header.aliases.values()) - names):
        raise ModelError(place, f"has lost the tensor {lost[0]}", remedy="write the file again")
    return header


def read_arrays(path: Path, header: AdapterHeader, place: str) -> dict[str, NDArray[Any]]:
    """The tensors by all places that hold them.

    Raises:
        ModelError: a number format that NumPy does not know, or numbers that are not finite.
    """
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
    except (TypeError, AttributeError, KeyError) as error:
        raise ModelError(place, f"holds numbers that NumPy does not know ({error})", expected="float32") from error
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ModelError(place, f"{name} holds numbers that are not finite", remedy="train the adapter again")
    return header.places(arrays)


def steps_text(header: AdapterHeader) -> str:
    """The steps in one line of JSON, to compare two adapters by."""
    return json.dumps([step.model_dump(mode="json") for step in header.steps], sort_keys=True)
