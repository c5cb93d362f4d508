"""Models whose decoder attends across to an image, or to a prompt that an encoder has read: how each is called.

What capture needs of such a model is an `Across`; nothing behind capture knows which model it was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache

from vlmopt.capture.wrappers import image_method
from vlmopt.core.errors import CaptureError
from vlmopt.core.program import NO_WORD


class Across(ABC):
    """A decoder with cross attention to features of an image; see `Reading` for one that attends to a prompt."""

    reads: tuple[str, ...] = ()

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def image_token(self) -> int:
        """The token that stands for a feature in a prompt."""
        return NO_WORD

    @property
    def width(self) -> int:
        """Of the embedding of the decoder's tokens."""
        return int(self.embedding().weight.shape[1])

    def embedding(self) -> Any:
        """Of the decoder's tokens."""
        return self.model.get_input_embeddings()

    def asked(self, input_ids: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        """What the model's own `generate` takes for one prompt without padding, [1, S]."""
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixel_values}

    @abstractmethod
    def start_tokens(self) -> tuple[int, ...]:
        """What the decoder's text begins with."""

    @abstractmethod
    def stop_tokens(self) -> tuple[int, ...]:
        """What ends an answer, any of them."""

    @abstractmethod
    def features(self, pixel_values: Tensor) -> Tensor:
        """Features of images, [N, T, D]."""

    @abstractmethod
    def decoded(
        self,
        embeds: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: EncoderDecoderCache,
        states: Tensor,
        states_mask: Tensor | None,
    ) -> Tensor:
        """Logits [B, S, V]; the cache grows, and keeps the keys and values of the states."""


class Reading(Across):
    """A decoder with cross attention to a prompt; its encoder takes the inputs that `reads` names."""

    @abstractmethod
    def encoded(self, **feed: Tensor) -> Tensor:
        """The states of the prompt, [B, E, D]."""


class BlipCaption(Across):
    """BLIP for captions: the decoder reads a prompt, and attends to the image."""

    def start_tokens(self) -> tuple[int, ...]:
        return (_token(self.model, "bos_token_id"),)

    def stop_tokens(self) -> tuple[int, ...]:
        return (_token(self.model, "sep_token_id"),)

    def embedding(self) -> Any:
        return self.model.text_decoder.get_input_embeddings()

    def features(self, pixel_values: Tensor) -> Tensor:
        found: Tensor = self.model.vision_model(pixel_values=pixel_values).last_hidden_state
        return found

    def decoded(
        self,
        embeds: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: EncoderDecoderCache,
        states: Tensor,
        states_mask: Tensor | None,
    ) -> Tensor:
        with _masked_across(self.model.text_decoder.bert.encoder.layer):
            found = self.model.text_decoder(
                inputs_embeds=embeds.clone(),  # the model adds positions in place
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                encoder_hidden_states=states,
                encoder_attention_mask=states_mask,
            )
        logits: Tensor = found.logits
        return logits

    def asked(self, input_ids: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        # the model takes the last token off, which its tokenizer puts at the end of a text
        ended = torch.cat([input_ids, input_ids.new_full((1, 1), self.stop_tokens()[0])], 1)
        return super().asked(ended, pixel_values)


class BlipAnswer(BlipCaption, Reading):
    """BLIP for questions: an encoder reads the question beside the image, and the decoder attends to what it found."""

    reads = ("input_ids", "attention_mask", "image_features")

    def encoded(self, **feed: Tensor) -> Tensor:
        found: Tensor = self.model.text_encoder(
            input_ids=feed["input_ids"],
            attention_mask=feed["attention_mask"],
            encoder_hidden_states=feed["image_features"],
        ).last_hidden_state
        return found

    def asked(self, input_ids: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        return Across.asked(self, input_ids, pixel_values)


class EncoderDecoder(Reading):
    """An encoder of embedded prompts with images in them, and a decoder that counts places by itself (BART)."""

    reads = ("inputs_embeds", "attention_mask")

    @property
    def image_token(self) -> int:
        return _token(self.model, "image_token_id", is_text=False)

    def start_tokens(self) -> tuple[int, ...]:
        own = getattr(self.model, "generation_config", None)
        forced = getattr(own, "forced_bos_token_id", None)
        start = _token(self.model, "decoder_start_token_id")
        return (start,) if forced is None else (start, int(forced))

    def stop_tokens(self) -> tuple[int, ...]:
        return (_token(self.model, "eos_token_id"),)

    def features(self, pixel_values: Tensor) -> Tensor:
        found = image_method(self.model)(pixel_values=pixel_values)
        features: Tensor = found["pooler_output"]
        return features

    def encoded(self, **feed: Tensor) -> Tensor:
        found: Tensor = self.model.get_encoder()(**feed).last_hidden_state
        return found

    def decoded(
        self,
        embeds: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: EncoderDecoderCache,
        states: Tensor,
        states_mask: Tensor | None,
    ) -> Tensor:
        decoder = self.model.model.language_model.decoder
        with _placed_at(decoder.embed_positions, positions):
            found = decoder(
                inputs_embeds=embeds,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                encoder_hidden_states=states,
                encoder_attention_mask=states_mask,
            )
        logits: Tensor = self.model.get_output_embeddings()(found.last_hidden_state)
        return logits


def across_of(model: nn.Module) -> Across | None:
    """How to call the parts of a model whose decoder attends across; None for any other.

    Told apart by the parts that a model has.
    """
    if not getattr(model, "can_generate", bool)():
        return None
    if all(hasattr(model, name) for name in ("vision_model", "text_decoder")):
        return BlipAnswer(model) if hasattr(model, "text_encoder") else BlipCaption(model)
    inner = getattr(getattr(model, "model", None), "language_model", None)
    places = getattr(getattr(inner, "decoder", None), "embed_positions", None)
    if image_method(model) is not None and hasattr(inner, "encoder") and hasattr(places, "offset"):
        return EncoderDecoder(model)
    return None


def _token(model: Any, name: str, *, is_text: bool = True) -> int:
    """A token that the configuration names.

    Raises:
        CaptureError: it does not.
    """
    found = getattr(model.config.text_config if is_text else model.config, name, None)
    if isinstance(found, int):
        return found
    place = f"{type(model).__name__}, {'text_config.' * is_text}{name} of config.json"
    raise CaptureError(place, f"is {found!r}", expected="the id of a token", remedy="state it there")


@contextmanager
def _masked_across(layers: Iterable[Any]) -> Iterator[None]:
    """Cross attentions that read the mask which they are given. BLIP's own hand it to nobody, so that beside a longer
    question a shorter one would be answered by its padding too.
    """

    def masked(block: Any) -> Callable[..., tuple[Tensor, Tensor]]:
        def forward(hidden: Tensor, attention_mask: Tensor | None = None, **given: Any) -> tuple[Tensor, Tensor]:
            found, scores = block.self(hidden, encoder_attention_mask=attention_mask, **given)
            return block.output(found, hidden), scores

        return forward

    blocks = [layer.crossattention for layer in layers]
    for block in blocks:
        block.forward = masked(block)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@contextmanager
def _placed_at(table: Any, positions: Tensor) -> Iterator[None]:
    """A table of places that is looked up where it is told to: its own count takes padding on the left for text."""

    def forward(*_: object, **__: object) -> Tensor:
        return nn.functional.embedding(positions + table.offset, table.weight)

    table.forward = forward
    try:
        yield
    finally:
        del table.forward
