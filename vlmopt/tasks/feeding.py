"""From samples to the inputs of a component: preprocessed once, batched, with one text length for the whole split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np
import torch

from vlmopt.core.errors import TaskError
from vlmopt.core.program import Component, Program
from vlmopt.core.workload import Feed
from vlmopt.tasks.images import ImageSource, open_image

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vlmopt.preprocess import Preprocessor

    Arrays = dict[str, NDArray[np.generic]]

BATCH = 32
CACHE_BYTES = 1 << 30  # about 1,700 images of 224 x 224; beyond it images are preprocessed again at every use
IMAGE_INPUTS = frozenset({"pixel_values", "pixel_mask", "pixel_attention_mask", "spatial_shapes"})


def reads_images(component: Component) -> bool:
    return any(spec.name in IMAGE_INPUTS for spec in component.inputs)


def reads_texts(component: Component) -> bool:
    return any(spec.name not in IMAGE_INPUTS for spec in component.inputs)


@dataclass(frozen=True)
class Batches(Sequence[Feed]):
    """Batches that are put together when they are asked for, so that a split need not fit into memory."""

    n_rows: int
    make: Callable[[Sequence[int]], Feed]  # from the numbers of the rows

    def __len__(self) -> int:
        return -(-self.n_rows // BATCH)

    @overload
    def __getitem__(self, index: int) -> Feed: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Feed]: ...
    def __getitem__(self, index: int | slice) -> Feed | Sequence[Feed]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = range(0, self.n_rows, BATCH)[index]
        return self.make(range(start, min(start + BATCH, self.n_rows)))

    def part(self, rows: Sequence[int]) -> Batches:
        """Batches of these rows alone, in this order."""
        return Batches(len(rows), lambda own: self.make([rows[row] for row in own]))


class Feeder:
    """Makes the feeds of components; one for each preprocessor, so that all workloads share the preprocessed images."""

    def __init__(self, preprocessor: Preprocessor, *, cache_bytes: int = CACHE_BYTES) -> None:
        self.preprocessor = preprocessor
        self._free_bytes = cache_bytes
        self._cache: dict[str, Arrays] = {}

    def feeds(
        self, program: Program, component: Component, *, images: Sequence[ImageSource], texts: Sequence[str]
    ) -> Batches:
        """Batches of all inputs of the component, one row for each image and text; a component that reads only one of
        the two leaves the other aside.

        Raises:
            TaskError: an image does not decode, images come out in different sizes, or an input is not made here.
        """
        has_images, has_texts = reads_images(component), reads_texts(component)
        text_arrays = self.texts(program, component, texts) if has_texts else {}

        def make(rows: Sequence[int]) -> Feed:
            arrays = {name: array[list(rows)] for name, array in text_arrays.items()}
            if has_images:
                arrays.update(self.pixels([images[row] for row in rows]))
            return _feed(component, arrays)

        return Batches(len(images) if has_images else len(texts), make)

    def texts(self, program: Program, component: Component, texts: Sequence[str]) -> Arrays:
        """The texts as token arrays [N, Nt] of a length that the component takes.

        Raises:
            TaskError: the preprocessor makes another length than the component takes.
        """
        arrays: Arrays = self.preprocessor.texts(list(texts))
        found = arrays["input_ids"].shape[1]
        minimum, maximum = text_lengths(program, component)
        length = min(max(found, minimum), maximum)
        if length == found:
            return arrays
        arrays = self.preprocessor.texts(list(texts), length=length)
        if arrays["input_ids"].shape[1] == length:
            return arrays
        found = arrays["input_ids"].shape[1]
        raise TaskError(
            f"texts for {component.name}", f"have {found} tokens", expected=f"{minimum} to {maximum} tokens"
        )

    def pixels(self, images: Sequence[ImageSource]) -> Arrays:
        """What the model's processor makes of these images, each preprocessed once.

        Raises:
            TaskError: an image does not decode, or images come out in different sizes.
        """
        missing = {image.name: image for image in images if image.name not in self._cache}
        made: dict[str, Arrays] = {}
        if missing:
            made = dict(zip(missing, self._preprocessed(list(missing.values())), strict=True))
            for name, arrays in made.items():
                self._keep(name, arrays)
        rows = [made.get(image.name) or self._cache[image.name] for image in images]
        shapes = {row["pixel_values"].shape for row in rows}
        if len(shapes) > 1:
            found = f"come out in different sizes: {', '.join(map(str, sorted(shapes)))}"
            raise TaskError(f"images {images[0].name} ... {images[-1].name}", found, expected="one fixed image size")
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    def _preprocessed(self, images: Sequence[ImageSource]) -> list[Arrays]:
        """The arrays of every image by itself. A processor may write the patches of all images one below the other,
        and then only an image alone shows which are its own."""
        arrays = self.preprocessor.images([open_image(image) for image in images])
        if arrays["pixel_values"].ndim > 2:
            return [{key: array[row] for key, array in arrays.items()} for row in range(len(images))]
        if len(images) > 1:
            return [own for image in images for own in self._preprocessed([image])]
        return [{key: array if key == "pixel_values" else array[0] for key, array in arrays.items()}]

    def _keep(self, name: str, arrays: Arrays) -> None:
        size = sum(array.nbytes for array in arrays.values())
        if size <= self._free_bytes:
            self._free_bytes -= size
            self._cache[name] = {key: array.copy() for key, array in arrays.items()}


def text_lengths(program: Program, component: Component) -> tuple[int, int]:
    """The least and the greatest number of tokens that the component takes."""
    for spec in component.inputs:
        if spec.name in IMAGE_INPUTS or len(spec.shape) < 2:
            continue
        size = spec.shape[1]
        if isinstance(size, int):
            return size, size
        dim = program.dims[size]
        return dim.minimum, dim.maximum
    return 1, 1 << 30


def _feed(component: Component, arrays: Mapping[str, NDArray[np.generic]]) -> Feed:
    feed = {}
    for spec in component.inputs:
        if spec.name not in arrays:
            place = f"input {spec.name!r} of {component.name}"
            raise TaskError(place, "the model's processor does not make it", expected=f"one of {', '.join(arrays)}")
        feed[spec.name] = torch.from_numpy(np.ascontiguousarray(arrays[spec.name])).to(getattr(torch, spec.dtype))
    return feed
