"""Toys that take an image in front of their text, or attend to it across."""

from __future__ import annotations

from typing import Any

import torch


def _writer() -> dict[str, Any]:
    """A decoder of the kind of BERT, which has as many keys as heads."""
    from tests import toys

    own = {key: value for key, value in toys.DECODER.items() if key != "num_key_value_heads"}
    return {**own, "bos_token_id": 2, "eos_token_id": 3}


def git() -> torch.nn.Module:
    from transformers import GitConfig, GitForCausalLM

    from tests import toys

    return GitForCausalLM(GitConfig(vision_config=toys.VISION, **_writer()))


def blip_caption() -> torch.nn.Module:
    from transformers import BlipConfig, BlipForConditionalGeneration

    from tests import toys

    text = {**_writer(), "encoder_hidden_size": 32, "sep_token_id": 3}
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=toys.VISION, projection_dim=16))


def blip_vqa() -> torch.nn.Module:
    from transformers import BlipConfig, BlipForQuestionAnswering

    from tests import toys

    text = {**_writer(), "encoder_hidden_size": 32, "sep_token_id": 3}
    return BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=toys.VISION, projection_dim=16))


def florence2() -> torch.nn.Module:
    from transformers import BartConfig, Florence2Config, Florence2ForConditionalGeneration, Florence2VisionConfig

    from tests import toys

    widths = {"embed_dim": (8, 16, 32, 32), "num_heads": (2, 2, 2, 2), "num_groups": (2, 2, 2, 2)}
    vision = Florence2VisionConfig(**widths, depths=(1, 1, 1, 1), window_size=2, projection_dim=32)
    one = {"layers": 3, "ffn_dim": 64, "attention_heads": 4}
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in one.items()}
    tokens: dict[str, Any] = {"bos_token_id": 2, "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 3}
    tokens["forced_eos_token_id"] = None
    text = BartConfig(**sides, **tokens, d_model=32, vocab_size=64, max_position_embeddings=128)
    return Florence2ForConditionalGeneration(
        Florence2Config(vision_config=vision, text_config=text, image_token_id=toys.IMAGE_TOKEN)
    )
