"""Models whose image lies in front of the text, with no token that stands for it (GIT)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from vlmopt.capture.wrappers import VisionEncoder
from vlmopt.core.errors import CaptureError

IMAGE = 1  # the type of a token that is a feature of an image; text is 0


def is_prefixed(model: nn.Module) -> bool:
    """It joins features of an image and an embedded text by itself, one behind the other."""
    inner = getattr(model, "git", None)
    return inner is not None and all(hasattr(inner, name) for name in ("image_encoder", "visual_projection"))


class PrefixTower(VisionEncoder):
    """`pixel_values` [N, 3, H, W] -> `image_features` [N, T, D], as they lie in front of the text."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        frames = getattr(self.model.config, "num_image_with_embedding", None)
        if frames is not None:
            raise CaptureError(
                f"{type(model).__name__}, num_image_with_embedding of config.json",
                f"is {frames}: the model reads the frames of a video, each with an embedding of its own",
                expected="null, a model of single images",
                remedy="take a checkpoint that was trained on images, such as one for captions",
            )

    @staticmethod
    def asked(input_ids: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        """What the model's own `generate` takes for one prompt without padding, [1, S]."""
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixel_values}

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        features = self.model.git.image_encoder(pixel_values).last_hidden_state
        return (self.model.git.visual_projection(features),)


def prefixed_step(
    model: Any, embeds: Tensor, mask: Tensor, positions: Tensor, types: Tensor, cache: DynamicCache
) -> Tensor:
    """Logits [B, S, V]; the cache grows.

    Text gets its position and a norm here, features of an image stay as they are. An image sees all of itself and
    nothing of the text, text what came before it: the model's own mask, for all tokens at once.
    """
    git, is_image = model.git, types == IMAGE
    text = git.embeddings(inputs_embeds=embeds.clone(), position_ids=positions.clamp(min=0))
    hidden = torch.where(is_image.unsqueeze(-1), embeds, text)
    n_past, n_new = mask.shape[1] - types.shape[1], types.shape[1]
    places = torch.arange(mask.shape[1], device=mask.device)
    sees = places[None, None, :] <= (torch.arange(n_new, device=mask.device) + n_past)[None, :, None]
    past = torch.zeros_like(mask[:, :n_past], dtype=torch.bool)
    sees = sees | (is_image[:, :, None] & torch.cat([past, is_image], 1)[:, None, :])
    sees = sees & mask.bool()[:, None, :]
    hiding = torch.where(sees, 0.0, torch.finfo(embeds.dtype).min).to(embeds.dtype)[:, None]
    found = git.encoder(hidden, attention_mask=hiding, past_key_values=cache, use_cache=True)
    logits: Tensor = model.output(found.last_hidden_state)
    return logits
