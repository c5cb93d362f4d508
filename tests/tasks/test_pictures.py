"""Small pictures: what they show, how large they are, and what they leave behind."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw

from vlmopt.core.errors import TaskError
from vlmopt.tasks.images import FileImage
from vlmopt.tasks.pictures import LONGEST_SIDE, MAX_URI_CHARACTERS, picture_uri


@dataclass(frozen=True)
class Encoded:
    """An image in memory, as a data set from the hub gives it."""

    content: bytes
    name: str = "picture"

    def read_bytes(self) -> bytes:
        return self.content


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> Encoded:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return Encoded(stream.getvalue())


def shown(image: Encoded) -> Image.Image:
    """What a browser would decode; the size limit holds for all."""
    uri = picture_uri(image)
    assert len(uri) <= MAX_URI_CHARACTERS
    head, _, content = uri.partition(";base64,")
    found = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
    assert head == f"data:image/{(found.format or '').lower()}"
    found.load()
    assert max(found.size) <= LONGEST_SIDE
    return found


def drawing(size: tuple[int, int] = (300, 150)) -> Image.Image:
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).ellipse((10, 10, size[0] // 2, size[1] - 10), fill=(220, 30, 30))
    return picture


def near(found: Any, wanted: tuple[int, int, int]) -> bool:
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= 12


def test_a_drawing_stays_sharp_and_keeps_its_shape() -> None:
    found = shown(encoded(drawing()))
    assert (found.format, found.size) == ("PNG", (128, 64))
    assert near(found.convert("RGB").getpixel((30, 32)), (220, 30, 30))
    assert near(found.convert("RGB").getpixel((120, 5)), (255, 255, 255))


def test_a_small_picture_is_not_blown_up() -> None:
    assert shown(encoded(Image.new("RGB", (20, 9), "red"))).size == (20, 9)


@pytest.mark.parametrize(("size", "expected"), [((4000, 1), (128, 1)), ((3, 900), (1, 128))])
def test_a_thin_picture_keeps_at_least_one_pixel(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert shown(encoded(Image.new("RGB", size, "red"))).size == expected


def test_a_photograph_and_even_noise_stay_small() -> None:
    generator = np.random.default_rng(0)
    smooth = Image.fromarray(generator.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((900, 700))
    assert shown(encoded(smooth, "JPEG")).format == "JPEG"
    noise = Image.fromarray(generator.integers(0, 256, (600, 600, 3), dtype=np.uint8))
    assert min(shown(encoded(noise)).size) >= 32


def test_every_mode_is_shown_in_its_colours() -> None:
    red = (220, 30, 30)
    transparent = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    assert near(shown(encoded(transparent)).convert("RGB").getpixel((5, 5)), (255, 255, 255))
    half = Image.new("LA", (40, 40), (0, 128))
    assert near(shown(encoded(half)).convert("RGB").getpixel((5, 5)), (127, 127, 127))
    palette = Image.new("RGB", (40, 40), red).quantize(4)
    assert near(shown(encoded(palette)).convert("RGB").getpixel((5, 5)), red)
    assert near(shown(encoded(palette, "GIF")).convert("RGB").getpixel((5, 5)), red)
    assert near(shown(encoded(Image.new("L", (40, 40), 99))).convert("RGB").getpixel((5, 5)), (99, 99, 99))
    deep = Image.fromarray(np.full((40, 40), 99 * 257, dtype=np.uint16))
    assert near(shown(encoded(deep)).convert("RGB").getpixel((5, 5)), (99, 99, 99))
    assert near(shown(encoded(Image.new("1", (40, 40), 1))).convert("RGB").getpixel((5, 5)), (255, 255, 255))
    cmyk = Image.new("CMYK", (40, 40), (0, 255, 255, 0))
    assert near(shown(encoded(cmyk, "JPEG", quality=95)).convert("RGB").getpixel((5, 5)), (255, 0, 0))


@pytest.mark.parametrize("is_noisy", [False, True])
def test_nothing_but_the_picture_is_kept_and_it_stands_upright(is_noisy: bool) -> None:
    picture = drawing((200, 100))
    if is_noisy:  # then it becomes JPEG
        noise = np.random.default_rng(0).integers(0, 80, (100, 200, 3), dtype=np.uint8)
        picture = Image.fromarray(np.asarray(picture) // 2 + noise)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    exif[0x010E] = "SECRET PLACE"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = encoded(picture, "JPEG", exif=exif, comment=b"SECRET NAME", icc_profile=profile, quality=95)
    assert image.content.count(b"SECRET") == 2
    found = shown(image)
    assert found.format == ("JPEG" if is_noisy else "PNG")
    assert found.size == (64, 128)
    content = base64.b64decode(picture_uri(image).partition(",")[2])
    assert b"SECRET" not in content
    assert not {"exif", "icc_profile", "comment"} & set(found.info)


def test_the_same_image_gives_the_same_text() -> None:
    assert picture_uri(encoded(drawing())) == picture_uri(encoded(drawing()))


def test_a_file_that_is_gone_or_no_image_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    for content in (None, b"no image"):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(TaskError, match=r"a\.png: does not decode"):
            picture_uri(FileImage(file, "a.png"))
