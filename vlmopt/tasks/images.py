"""Images of a task: where their bytes lie, whether they decode, and what they hash to."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from vlmopt.core.errors import TaskError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})
# What PIL raises on files that are no image, are cut off, or claim absurd sizes.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class ImageSource(Protocol):
    """One image of a data set. `name` is unique within its data set."""

    @property
    def name(self) -> str: ...

    def read_bytes(self) -> bytes:
        """The encoded file."""
        ...


@dataclass(frozen=True)
class FileImage:
    """An image file; `name` is its path as the data set writes it."""

    path: Path
    name: str

    def read_bytes(self) -> bytes:
        return self.path.read_bytes()


def open_image(image: ImageSource) -> Image.Image:
    """The decoded image, in the mode it was saved in.

    Raises:
        TaskError: the file is gone or does not decode.
    """
    try:
        opened = Image.open(io.BytesIO(image.read_bytes()))
        opened.load()
    except _UNREADABLE as problem:
        raise _not_decoded(image, problem) from problem
    return opened


def content_hashes(images: Iterable[ImageSource]) -> dict[str, str]:
    """sha256 of every image's bytes by name, each read once and its header and checksums looked at.

    Why: a file that is no image is better found now than an hour into a run. Pixels are decoded when they are used.

    Raises:
        TaskError: a file cannot be read or is no image.
    """
    hashes: dict[str, str] = {}
    for image in images:
        if image.name in hashes:
            continue
        try:
            content = image.read_bytes()
            Image.open(io.BytesIO(content)).verify()
        except _UNREADABLE as problem:
            raise _not_decoded(image, problem) from problem
        hashes[image.name] = hashlib.sha256(content).hexdigest()
    return hashes


def _not_decoded(image: ImageSource, problem: BaseException) -> TaskError:
    place = str(image.path) if isinstance(image, FileImage) else image.name
    reason = str(problem) if "BytesIO" not in str(problem) else "no known image format"
    return TaskError(
        place, f"does not decode as an image ({reason})", expected="an image file", remedy="repair or remove it"
    )
