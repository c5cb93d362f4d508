"""A toy dual encoder as components, captured here so that these tests need no other room."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from vlmopt.core.program import Assembly, Component, Dim, ModelSource, Program, Similarity, TensorSpec
from vlmopt.graph.raising import raise_program

DIMS = {"batch": Dim("batch", 1, 64, 1), "text": Dim("text", 2, 16, 6)}
WIDTH, EOS = 8, 49


class ImagePart(nn.Module):
    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=pixel_values).pooler_output


class TextPart(nn.Module):
    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found = self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
        return found.pooler_output


def image_input(batch: int, *, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def text_inputs(batch: int, length: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids that end in the end token, and a mask that hides the last tokens of the first text behind it."""
    ids = torch.randint(1, EOS, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    ids[:, -1] = EOS
    if length > 3:
        ids[0, -2:], mask[0, -1] = EOS, 0
    return ids, mask


@cache
def clip(activation: str = "quick_gelu") -> CLIPModel:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={
            **sizes,
            "vocab_size": 50,
            "max_position_embeddings": 16,
            "eos_token_id": EOS,
            "hidden_act": activation,
        },
        vision_config={**sizes, "image_size": 16, "patch_size": 8, "hidden_act": activation},
        projection_dim=WIDTH,
    )
    return CLIPModel(config).eval()


@cache
def image_component(activation: str = "quick_gelu") -> Component:
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(ImagePart(clip(activation)), (image_input(2),), dynamic_shapes=({0: batch},))
    return Component(
        "image_encoder",
        raise_program(exported, prefix="model."),
        (TensorSpec("pixel_values", ("batch", 3, 16, 16), "float32"),),
        (TensorSpec("image_embeds", ("batch", WIDTH), "float32"),),
    )


@cache
def text_component(activation: str = "quick_gelu") -> Component:
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("text", min=2, max=16)}
    exported = torch.export.export(TextPart(clip(activation)), text_inputs(2, 6), dynamic_shapes=(sizes, sizes))
    return Component(
        "text_encoder",
        raise_program(exported, prefix="model."),
        tuple(TensorSpec(name, ("batch", "text"), "int64") for name in ("input_ids", "attention_mask")),
        (TensorSpec("text_embeds", ("batch", WIDTH), "float32"),),
    )


def dual_program() -> Program:
    parts = (image_component(), text_component())
    source = ModelSource("toy", "clip", "CLIPModel", "0" * 64)
    return Program(Assembly.DUAL, {part.name: part for part in parts}, DIMS, source, similarity=Similarity(4.0))


def cases(component: Component) -> list[tuple[Tensor, ...]]:
    """Inputs at two shapes, neither of which is the one that was captured."""
    if component.name == "image_encoder":
        return [(image_input(1, seed=1),), (image_input(5, seed=2),)]
    return [text_inputs(1, 9, seed=1), text_inputs(4, 3, seed=2)]


def wanted(component: Component, inputs: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return component.graph(*inputs)[0]
