"""Builds the embedded model and its processor, and the parts that only training uses.

The model is a plain `ViltForQuestionAnswering`: anybody loads it with `from_pretrained`. Training adds two things and
saves neither:

- `fast_path()`: transformers' ViLT picks patches by index lists and multiplies attention step by step. With full pixel
  masks this is the identity up to the order of the patches, so training runs an equivalent static form.
- `Hints`: small linear heads on inner layers that say what each patch shows and which things the question is about. A
  fused transformer of this size finds that out from answers alone only after millions of questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from questions import ANSWERS, vocabulary
from scenes import COLOURS, IMAGE_SIZE, SHAPES
from torch import Tensor, nn
from transformers import BertTokenizerFast, ViltConfig, ViltForQuestionAnswering, ViltProcessor
from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil
from transformers.models.vilt.modeling_vilt import ViltEmbeddings, ViltSelfAttention

PATCH = 8
MOST_TOKENS = 16
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LAYER_OF_LOOKS, LAYER_OF_FIRST, LAYER_OF_SECOND = 3, 4, 6
"""Layers after which a patch knows its own shape and colour, and the things the question names and asks for."""


def build_model(seed: int) -> ViltForQuestionAnswering:
    """An untrained model: 8 layers, width 128, 4 heads, 64 visual tokens and at most 16 text tokens."""
    torch.manual_seed(seed)
    config = ViltConfig(
        vocab_size=len(SPECIAL_TOKENS) + len(vocabulary()),
        max_position_embeddings=MOST_TOKENS,
        type_vocab_size=1,
        hidden_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        intermediate_size=384,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        initializer_range=0.04,
        layer_norm_eps=1e-6,
        pad_token_id=0,
        id2label=dict(enumerate(ANSWERS)),
        label2id={answer: index for index, answer in enumerate(ANSWERS)},
    )
    model = ViltForQuestionAnswering(config)
    with torch.no_grad():
        positions = model.vilt.embeddings.position_embeddings
        positions[0, 1:] = 0.3 * _waves(IMAGE_SIZE // PATCH, config.hidden_size)
    return model


def _waves(n_side: int, width: int) -> Tensor:
    """Sines and cosines of row and column: ViLT starts these at zero, and places are then learned last."""
    place = torch.arange(n_side) / n_side
    angles = place[:, None] * torch.pi * torch.arange(1, width // 4 + 1) / 4
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = line[:, None].expand(-1, n_side, -1)
    columns = line[None, :].expand(n_side, -1, -1)
    return torch.cat([rows, columns], dim=-1).reshape(n_side * n_side, width)


def build_processor() -> ViltProcessor:
    """The processor of the model: exactly the words of the questions, and 64 x 64 images kept as they are."""
    words = [*SPECIAL_TOKENS, *vocabulary()]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = BertTokenizerFast(vocab=vocab, do_lower_case=True, model_max_length=MOST_TOKENS)
    images = ViltImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, size_divisor=PATCH)
    return ViltProcessor(image_processor=images, tokenizer=tokenizer)


@contextmanager
def fast_path() -> Iterator[None]:
    """Within it, ViLT's image embedding and attention run in a static form, equal for full pixel masks."""
    with (
        mock.patch.object(ViltEmbeddings, "visual_embed", _static_visual_embed),
        mock.patch.object(ViltSelfAttention, "forward", _joined_attention),
    ):
        yield


def _static_visual_embed(
    self: ViltEmbeddings, pixel_values: Tensor, pixel_mask: Tensor, max_image_length: int = -1
) -> tuple[Tensor, Tensor, None]:
    patches = self.patch_embeddings(pixel_values).flatten(2).transpose(1, 2)
    tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.position_embeddings
    return tokens, torch.ones(tokens.shape[:2], dtype=torch.long), None


def _joined_attention(
    self: ViltSelfAttention, hidden: Tensor, attention_mask: Tensor | None = None, *_: object
) -> tuple[Tensor]:
    """One product for query, key and value; plain batched products are faster here than the fused CPU kernel."""
    batch, n_tokens, _ = hidden.shape
    n_heads, head_width = self.num_attention_heads, self.attention_head_size
    scale = head_width**-0.5
    weight = torch.cat([self.query.weight * scale, self.key.weight, self.value.weight])
    bias = torch.cat([self.query.bias * scale, self.key.bias, self.value.bias])
    joined = nn.functional.linear(hidden, weight, bias).view(batch, n_tokens, 3, n_heads, head_width)
    query, key, value = joined.permute(2, 0, 3, 1, 4).reshape(3, batch * n_heads, n_tokens, head_width).unbind(0)
    scores = torch.bmm(query, key.transpose(1, 2)).view(batch, n_heads, n_tokens, n_tokens)
    if attention_mask is not None:
        scores = scores + attention_mask.to(scores.dtype)
    shares = torch._softmax(scores, -1, False).view(batch * n_heads, n_tokens, n_tokens)
    mixed = torch.bmm(shares, value).view(batch, n_heads, n_tokens, head_width)
    return (mixed.transpose(1, 2).reshape(batch, n_tokens, -1),)


def first_layers(model: ViltForQuestionAnswering, ids: Tensor, mask: Tensor, pixels: Tensor) -> tuple[Tensor, ...]:
    """Hidden states up to `LAYER_OF_FIRST`, within `fast_path()`: half the work of a whole pass."""
    hidden, whole_mask = model.vilt.embeddings(ids, mask, None, pixels, None, None, None)
    bias = torch.zeros(whole_mask.shape).masked_fill(whole_mask == 0, torch.finfo(torch.float32).min)[:, None, None]
    layers = [hidden]
    for layer in model.vilt.encoder.layer[:LAYER_OF_FIRST]:
        layers.append(layer(layers[-1], bias)[0])
    return tuple(layers)


class Hints(nn.Module):
    """Losses on inner layers; thrown away after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.looks = _head(width, len(SHAPES) + len(COLOURS) + 2)
        self.first = _head(width, 1)
        self.second = _head(width, 1)

    def forward(
        self, layers: tuple[Tensor, ...], shapes: Tensor, colours: Tensor, first: Tensor, second: Tensor
    ) -> Tensor:
        """The summed hint loss, without the part for `second` if `layers` stop before its layer.

        Bare patches are most of an image and easy, so they count less.

        Shapes: layers (B, N, D) each, the last 64 tokens being the patches; the rest (B, 64). `shapes` and `colours`
        hold classes, 0 where the patch is bare; `first` and `second` hold 0 or 1.
        """
        n_patches = shapes.shape[1]
        looks = self.looks(layers[LAYER_OF_LOOKS][:, -n_patches:]).float().flatten(0, 1)
        shape_scores, colour_scores = looks.split([len(SHAPES) + 1, len(COLOURS) + 1], dim=-1)
        first_scores = self.first(layers[LAYER_OF_FIRST][:, -n_patches:]).float().squeeze(-1)
        loss = (
            nn.functional.cross_entropy(shape_scores, shapes.flatten(), weight=_bare_less(shape_scores))
            + nn.functional.cross_entropy(colour_scores, colours.flatten(), weight=_bare_less(colour_scores))
            + nn.functional.binary_cross_entropy_with_logits(first_scores, first, pos_weight=torch.tensor(3.0))
        )
        if len(layers) <= LAYER_OF_SECOND:
            return loss
        second_scores = self.second(layers[LAYER_OF_SECOND][:, -n_patches:]).float().squeeze(-1)
        return loss + nn.functional.binary_cross_entropy_with_logits(
            second_scores, second, pos_weight=torch.tensor(3.0)
        )


def _bare_less(scores: Tensor) -> Tensor:
    weight = torch.ones(scores.shape[-1])
    weight[0] = 0.15
    return weight


def _head(width: int, n_outputs: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, n_outputs))
