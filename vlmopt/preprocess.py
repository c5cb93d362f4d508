"""Images and texts as arrays, the way the model's own processor makes them, without torchvision.

The processors are those of transformers (with their PIL backend) and are built on first use: reading the folder costs
milliseconds, importing transformers seconds.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from vlmopt.core.errors import ModelError, TaskError

Arrays = dict[str, NDArray[Any]]

IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
TEXT_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt"),
    *("vocab.json", "merges.txt", "bpe.codes", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
)
PROMPT_FILES = ("chat_template.jinja", "chat_template.json", "generation_config.json")
VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)
UNLIMITED = 1_000_000  # tokenizers without a limit state a huge number
PADDED_TO_MAXIMUM = frozenset({"siglip", "siglip2"})  # trained on texts of one length, and without a mask
POSITIONS_AFTER_PADDING = frozenset({"roberta", "xlm-roberta", "camembert", "xlm-roberta-xl"})
USUAL_EDGE = 448  # of a picture, for a processor that takes any
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


@dataclass(frozen=True, eq=False)
class Preprocessor:
    """The processor of one model folder. Where the folder holds only part of one, only the other part raises an error.

    `text_length` is the number of tokens that texts are padded to when a call does not say.
    """

    folder: Path
    text_length: int | None = None
    configuration: Mapping[str, Any] = field(default_factory=dict, repr=False)  # config.json

    @classmethod
    def load(cls, folder: str | Path, *, text_length: int | None = None) -> Preprocessor:
        """The processor of a Hugging Face folder.

        Raises:
            ModelError: the folder is not there, or its config.json is no JSON.
        """
        place = Path(folder)
        if not place.is_dir():
            raise ModelError(str(place), "is no folder", expected="a Hugging Face model folder")
        return cls(place, text_length, read_json(place / "config.json"))

    @property
    def has_text(self) -> bool:
        return any((self.folder / name).is_file() for name in VOCABULARIES)

    @property
    def has_images(self) -> bool:
        return bool(self._image_configuration)

    @property
    def files(self) -> list[Path]:
        """The files that an artifact must carry so that it preprocesses alike."""
        names = ("config.json", *IMAGE_FILES, *TEXT_FILES, *PROMPT_FILES)
        return [self.folder / name for name in names if (self.folder / name).is_file()]

    @cached_property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) of every image after preprocessing; None when the folder holds no image processor."""
        if not self.has_images:
            return None
        edge = self._edge_of_square
        if edge is not None:
            return edge, edge
        processor = self._image_processor
        crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
        size = _sizes(crop or processor.size)
        return (size["height"], size["width"]) if "height" in size and "width" in size else None

    def warm_up(self) -> None:
        """Builds what the folder holds of a processor, which the first call would otherwise do."""
        if self.has_text:
            _ = self.processor or self.tokenizer
        if self.has_images:
            _ = self._image_processor

    def images(self, images: Sequence[Image.Image | str | Path]) -> Arrays:
        """`pixel_values` [B, 3, H, W] float32, and whatever else the model's processor makes of images.

        A picture is turned upright as its EXIF data say; transparency lies on white; of an animation one frame counts.
        A processor that would keep the aspect ratio and pad gets squares, since a compiled graph has one image size.

        Raises:
            TaskError: an image does not decode, or there are none.
            ModelError: the folder holds no image processor.
        """
        if not images:
            raise TaskError("images", "there are none", expected="at least one image")
        pictures = [open_picture(image, f"image {index}") for index, image in enumerate(images)]
        edge = self._edge_of_square
        if edge is not None:
            pictures = [picture.resize((edge, edge), Image.Resampling.BICUBIC) for picture in pictures]
        # one that may cut a picture into tiles takes a list for the pictures of one text
        grouped = [[one] for one in pictures] if hasattr(self._image_processor, "do_image_splitting") else pictures
        made = self._image_processor(images=grouped, return_tensors="np", input_data_format="channels_last")
        return {name: np.ascontiguousarray(array) for name, array in made.items()}

    def texts(self, texts: Sequence[str], length: int | None = None) -> Arrays:
        """`input_ids` [B, Nt] and whatever else the model's tokenizer makes, int64.

        Padded to the longest text, to `length` tokens, or to the length the model was trained with, and cut at the
        longest that it takes.

        Raises:
            TaskError: there are no texts.
            ModelError: the folder holds no tokenizer.
        """
        if not texts:
            raise TaskError("texts", "there are none", expected="at least one text")
        wanted = length or self.text_length
        limit = self.longest_text if wanted is None else min(wanted, self.longest_text)
        is_fixed = wanted is not None or self.configuration.get("model_type") in PADDED_TO_MAXIMUM
        if limit >= UNLIMITED:
            made = self.tokenizer(list(texts), padding="longest", return_tensors="np")
        else:
            padding = "max_length" if is_fixed else "longest"
            made = self.tokenizer(list(texts), padding=padding, truncation=True, max_length=limit, return_tensors="np")
        return {name: np.ascontiguousarray(array, dtype=np.int64) for name, array in made.items()}

    @cached_property
    def longest_text(self) -> int:
        """Tokens that the model takes at most."""
        stated = int(min(self.tokenizer.model_max_length, UNLIMITED))
        text = self.configuration.get("text_config") or self.configuration
        positions = text.get("max_position_embeddings")
        if not isinstance(positions, int) or positions <= 0:
            return stated
        if text.get("model_type") in POSITIONS_AFTER_PADDING:
            positions -= int(text.get("pad_token_id") or 1) + 1
        return min(stated, positions)

    @cached_property
    def _image_configuration(self) -> Mapping[str, Any]:
        for name in reversed(IMAGE_FILES):
            found = read_json(self.folder / name)
            found = found.get("image_processor", {}) if name == "processor_config.json" else found
            if found:
                return found
        return {}

    @property
    def _edge_of_square(self) -> int | None:
        """The edge that pictures are brought to where the processor would let their size, or the number of tiles or
        patches, depend on their shape."""
        if not self.has_images:
            return None
        processor = self._image_processor
        size = _sizes(processor.size)
        if hasattr(processor, "merge_size"):  # its sizes are numbers of pixels
            return _edge_of_patches(processor.patch_size * processor.merge_size, size)
        if hasattr(processor, "do_image_splitting"):
            return _sizes(processor.max_image_size).get("longest_edge")
        if getattr(processor, "image_grid_pinpoints", None):
            return size.get("height") or size.get("shortest_edge")
        if getattr(processor, "do_center_crop", False):
            return None
        if "shortest_edge" not in size:
            return None
        divisor = int(getattr(self._image_processor, "size_divisor", None) or 1)
        return max(size["shortest_edge"] // divisor, 1) * divisor

    @cached_property
    def _image_processor(self) -> Any:
        if not self.has_images:
            raise ModelError(
                str(self.folder), "has no image processor", expected="preprocessor_config.json or processor_config.json"
            )
        from transformers import AutoImageProcessor

        made = self._built("image processor", AutoImageProcessor, backend="pil")
        if hasattr(made, "do_image_splitting"):
            made.do_image_splitting = False  # a compiled graph has one number of tiles
        return made

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers.

        Raises:
            ModelError: the folder holds none, or it cannot be built.
        """
        if not self.has_text:
            raise ModelError(str(self.folder), "has no tokenizer", expected=f"one of {', '.join(VOCABULARIES)}")
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        has_complete = (self.folder / "tokenizer.json").is_file()
        try:
            tokenizer = self._built("tokenizer", AutoTokenizer)
        except ModelError:
            # Some classes want sentencepiece, or a class name that the folder does not state; the file says it all.
            if not has_complete:
                raise
            tokenizer = self._built("tokenizer", PreTrainedTokenizerFast)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        return tokenizer

    @cached_property
    def processor(self) -> Any | None:
        """The processor that puts images into texts, made of the image processor and the tokenizer alone; None where
        the folder names no such class.

        Why not as transformers loads it: many have a part for videos, which needs torchvision.

        Raises:
            ModelError: it cannot be built.
        """
        files = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
        stated = [read_json(self.folder / name) for name in files]
        named = next((found["processor_class"] for found in stated if found.get("processor_class")), None)
        if named is None or not self.has_images:
            return None
        import transformers

        wanted = getattr(transformers, str(named), None)
        if wanted is None:
            raise ModelError(str(self.folder), f"names the processor {named!r}, which transformers does not know")
        lone = type(wanted.__name__, (wanted,), {"check_argument_for_proper_class": lambda self, *_: None})
        names = wanted.get_attributes()
        parts = {**dict.fromkeys(names), "image_processor": self._image_processor, "tokenizer": self.tokenizer}
        taken = set(inspect.signature(wanted.__init__).parameters) - {*names, "chat_template"}
        try:
            made = lone(**parts, **{key: value for key, value in stated[0].items() if key in taken})
        except Exception as problem:
            raise self._not_built("processor", problem) from problem
        return made if getattr(made, "image_token", None) else None

    def _built(self, what: str, maker: Any, **options: str) -> Any:
        try:
            return maker.from_pretrained(str(self.folder), local_files_only=True, **options)
        except Exception as problem:
            raise self._not_built(what, problem) from problem

    def _not_built(self, what: str, problem: Exception) -> ModelError:
        reason = str(problem).strip().splitlines() or [type(problem).__name__]
        return ModelError(str(self.folder), f"its {what} cannot be built ({reason[0][:200]})")


def open_picture(image: Image.Image | str | Path, name: str = "image") -> Image.Image:
    """The picture in RGB, upright, its first frame, transparency on white.

    Raises:
        TaskError: the file is missing or does not decode; the message names it.
    """
    place = str(image) if isinstance(image, str | Path) else str(getattr(image, "filename", "") or name)
    try:
        opened = image if isinstance(image, Image.Image) else Image.open(image)
        if getattr(opened, "is_animated", False):
            opened.seek(0)
        opened.load()
        return _rgb(ImageOps.exif_transpose(opened))
    except UNREADABLE as problem:
        is_gone = isinstance(problem, FileNotFoundError)
        found = "does not exist" if is_gone else f"does not decode as an image ({_reason(problem)})"
        raise TaskError(place, found, expected="an image file") from problem


def _reason(problem: BaseException) -> str:
    text = str(problem)
    return "no known image format" if text.startswith("cannot identify") else text or type(problem).__name__


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith(("I", "F")):
        return _eight_bits(picture).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        coloured = picture.convert("RGBA")
        ground = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, coloured).convert("RGB")
    return picture.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Sixteen bits a pixel lose their lower byte (PIL would cut them off at 255); floats from 0 to 1 are scaled."""
    values = np.asarray(picture, dtype=np.float64)
    top = float(values.max(initial=0.0)) if values.size else 0.0
    if not math.isfinite(top):
        raise ValueError("pixels that are no numbers")
    if picture.mode.startswith("I;16") or top > 255:
        values = values / 257
    elif picture.mode == "F" and top <= 1:
        values = values * 255
    return Image.fromarray(np.clip(values.round(), 0, 255).astype(np.uint8))


def _edge_of_patches(unit: int, pixels: Mapping[str, int]) -> int:
    """The edge of a square picture of whole merged patches, near the usual one and within the processor's bounds."""
    least, most = pixels.get("shortest_edge", 0), pixels.get("longest_edge", USUAL_EDGE**2)
    edge = max(unit, min(USUAL_EDGE, math.isqrt(most)) // unit * unit)
    while edge * edge < least:
        edge += unit
    return edge


def _sizes(size: Any) -> dict[str, int]:
    """A processor's size as plain numbers; older configurations state one number, newer ones a record."""
    if isinstance(size, int):
        return {"height": size, "width": size}
    stated = size if isinstance(size, Mapping) else vars(size)
    return {str(key): int(value) for key, value in stated.items() if value is not None}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no such file.

    Raises:
        ModelError: it is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ModelError(str(path), f"cannot be read as JSON ({problem})") from problem
    if not isinstance(content, dict):
        raise ModelError(str(path), "holds no JSON object")
    return content
