"""Small pictures of items, to be shown in a report that carries them inside."""

from __future__ import annotations

import base64
import io

from PIL import Image

from vlmopt.preprocess import open_picture
from vlmopt.tasks.images import ImageSource, open_image

LONGEST_SIDE = 128
MAX_URI_CHARACTERS = 6000
_QUALITIES = (85, 70, 50, 30)


def picture_uri(image: ImageSource) -> str:
    """A picture of at most 128 pixels a side as a `data:` URI of at most 6000 characters.

    It shows what the model saw: upright, the first frame, transparency on white. Nothing else of the file is kept, no
    place and no date. Drawings stay as sharp as they are (PNG) where that fits, photographs become JPEG.

    Raises:
        TaskError: the file is gone or does not decode.
    """
    picture = open_picture(open_image(image), image.name)
    picture.info.clear()  # PIL would write comments and colour profiles of the original into the copy
    side = LONGEST_SIDE
    while True:
        small = _within(picture, side)
        for encoded in (_png(small), *(_jpeg(small, quality) for quality in _QUALITIES)):
            if len(encoded) <= MAX_URI_CHARACTERS:
                return encoded
        side = side * 3 // 4  # noise, which hardly compresses


def _within(picture: Image.Image, side: int) -> Image.Image:
    """The picture with its longer side at most `side`, and no side gone; small pictures stay as they are."""
    longest = max(picture.size)
    if longest <= side:
        return picture
    width, height = (max(1, round(length * side / longest)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)


def _png(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return _uri("png", stream.getvalue())


def _jpeg(picture: Image.Image, quality: int) -> str:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality, optimize=True)
    return _uri("jpeg", stream.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
