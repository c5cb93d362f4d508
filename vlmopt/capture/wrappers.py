"""Modules that give each component one plain signature: tensors in, a tuple of tensors out.

The model lies under `model`, a prefix that raising cuts off again, so every tensor keeps its original name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vlmopt.core.errors import CaptureError

PREFIX = "model."


class Wrapper(nn.Module):
    """A part of the model with the names of its inputs and outputs, in order."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of `forward` from one value for every input, in the order of the inputs."""
        return dict(values)


class ImageEncoder(Wrapper):
    """`pixel_values` [B, 3, H, W] -> `image_embeds` [B, D], not normalised."""

    inputs = ("pixel_values",)
    outputs = ("image_embeds",)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        return (_pooled(self.model.get_image_features(pixel_values=pixel_values)),)


class TextEncoder(Wrapper):
    """`input_ids`, `attention_mask` [B, N] -> `text_embeds` [B, D], not normalised."""

    inputs = ("input_ids", "attention_mask")
    outputs = ("text_embeds",)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        features = self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
        return (_pooled(features),)


class Fused(Wrapper):
    """`pixel_values` [B, 3, H, W], `input_ids`, `attention_mask` [B, N] -> the model's first scores."""

    inputs = ("pixel_values", "input_ids", "attention_mask")

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__(model)
        self.outputs = (output,)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        result = self.model(pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask)
        value = result[self.outputs[0]]
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{type(self.model).__name__} returns no tensor under {self.outputs[0]!r}")
        return (value,)


def image_method(model: Any) -> Any:
    """The model's method from pixels to features, which some have one level down; None where there is none."""
    places: tuple[Any, ...] = (model, getattr(model, "model", None))
    return next((place.get_image_features for place in places if hasattr(place, "get_image_features")), None)


class VisionEncoder(Wrapper):
    """`pixel_values` [N, 3, H, W] -> `image_features` [N, T, D], as the decoder reads them."""

    inputs = ("pixel_values",)
    outputs = ("image_features",)
    beside: ClassVar[frozenset[str]] = frozenset()  # what it gives the model's method beside the pixels

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        with _WholeBatch():
            features = _pooled(image_method(self.model)(**self.images(pixel_values)))
        (whole,) = features if isinstance(features, list | tuple) else (features,)
        return (whole,)

    def images(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """What the model's own method takes for these images."""
        return {"pixel_values": pixel_values}


class _WholeBatch(TorchFunctionMode):
    """Splitting a batch of features into a list, one image each, gives a list of the whole batch instead: a list has a
    length, and the batch would be fixed to it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.unbind and tuple(args[1:]) in ((), (0,)) and not kwargs:
            return (args[0],)
        if func is torch.Tensor.__len__:
            return 1  # what `list` asks before it splits
        return func(*args, **(kwargs or {}))


class TokenEmbedding(Wrapper):
    """`input_ids` [B, S] -> `inputs_embeds` [B, S, D], zeros beside them where images have `n_deep` more features.

    With `has_places` tokens may lie below zero: those stand for features of images, and what they give is not read.
    """

    inputs = ("input_ids",)
    outputs = ("inputs_embeds",)

    def __init__(self, model: nn.Module, n_deep: int, *, has_places: bool = False) -> None:
        super().__init__(model)
        self.n_deep = n_deep
        self.has_places = has_places

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        words = input_ids.clamp(min=0) if self.has_places else input_ids
        embeds = self.model.get_input_embeddings()(words)
        return (nn.functional.pad(embeds, (0, self.n_deep * embeds.shape[-1])) if self.n_deep else embeds,)


def _pooled(features: Any) -> Any:
    """The projected features: `pooler_output`, or what a method of older releases of transformers returns.

    Raises:
        CaptureError: they are not projected yet.
    """
    if not isinstance(features, Mapping):
        return features
    if features.get("pooler_output") is None:
        raise CaptureError(
            "features of images",
            f"come as {', '.join(features)}: the model projects them for its decoder later, where no part shows it",
            expected="a method get_image_features with pooler_output, the features as the decoder reads them",
            remedy="a rewrite can project them there (see vlmopt/capture/README.md); until then take another model",
        )
    return features["pooler_output"]
