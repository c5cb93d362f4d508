"""Sample inputs for capture, made from the model's configuration by optimum's generators."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from optimum.utils import NormalizedTextConfig, NormalizedVisionConfig
from optimum.utils.input_generators import DummyTextInputGenerator, DummyVisionInputGenerator

from vlmopt.core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TYPICAL_TEXT = 16  # tokens of a caption or a question
BATCHES = (2, 3)  # two sizes, neither of them 1, which torch.export would take for a constant


class _Text(NormalizedTextConfig):  # type: ignore[misc]
    """Reads `vocab_size` only: the one thing that the generator of token ids needs."""


class _Vision(NormalizedVisionConfig):  # type: ignore[misc]
    IMAGE_SIZE, NUM_CHANNELS = "image_size", "num_channels"


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    return getattr(config, "text_config", None) or config


def vision_config(config: PretrainedConfig) -> PretrainedConfig:
    return getattr(config, "vision_config", None) or config


def image_size(config: PretrainedConfig, place: str) -> tuple[int, int]:
    """(height, width) that the configuration gives.

    Raises:
        ModelError: it gives none.
    """
    size: Any = getattr(vision_config(config), "image_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    raise ModelError(place, "no image_size for the vision part", remedy="add a preprocessor_config.json with a size")


def longest_text(config: PretrainedConfig) -> int:
    return int(getattr(text_config(config), "max_position_embeddings", 512) or 512)


def sample_inputs(
    config: PretrainedConfig, names: tuple[str, ...], *, batch: int, text: int, image: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """Random inputs of these names; the seed is fixed, so a capture is repeatable."""
    made: dict[str, torch.Tensor] = {}
    with torch.random.fork_rng():
        torch.manual_seed(batch * 1000 + text)
        for name in names:
            made[name] = _sample(config, name, batch=batch, text=text, image=image)
    return made


def _sample(config: PretrainedConfig, name: str, *, batch: int, text: int, image: tuple[int, int]) -> torch.Tensor:
    if name == "pixel_values":
        channels = int(getattr(vision_config(config), "num_channels", 3))
        # the size comes from the processor where there is one: many models take other sizes than config.json names
        normalized = _Vision(SimpleNamespace(image_size=image, num_channels=channels))
        vision = DummyVisionInputGenerator("feature-extraction", normalized, batch_size=batch)
        return _tensor(vision.generate("pixel_values", framework="pt"))
    generator = DummyTextInputGenerator(
        "feature-extraction", _Text(text_config(config)), batch_size=batch, sequence_length=text
    )
    if name == "attention_mask":
        mask = torch.ones(batch, text, dtype=torch.int64)
        mask[1::2, text - text // 4 :] = 0  # every other text is padded, so that comparing with eager sees the mask
        return mask
    return _tensor(generator.generate(name, framework="pt"))


def _tensor(value: object) -> torch.Tensor:
    assert isinstance(value, torch.Tensor)
    return value
