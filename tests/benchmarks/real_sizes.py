"""Families at the size at which they are used: published configurations written out, with random weights.

No weights are read, so nothing here answers anything; what is measured is whether capture and files stay exact, and
what they cost, where tiles, windows and vocabularies have their real size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    BartConfig,
    BlipConfig,
    BlipForConditionalGeneration,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2VisionConfig,
    GitConfig,
    GitForCausalLM,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

QWEN2_05B: dict[str, Any] = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-6,
}  # fmt: skip


@dataclass(frozen=True)
class RealSize:
    """A published model; `image` is (height, width) where its configuration leaves it open.

    `published` are its parameters in millions, as its page or paper states them. Pages count what the weights' file
    holds, so a head that is the embedding is in some of them twice: `counted_twice` of them.
    """

    build: Callable[[], PreTrainedModel]
    published: int
    image: tuple[int, int] | None = None
    counted_twice: int = 0


def _smolvlm_256m() -> PreTrainedModel:
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    text = {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49280, "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "rms_norm_eps": 1e-5, "pad_token_id": 2,
    }  # fmt: skip
    vision |= {"image_size": 512, "patch_size": 16}
    more = {"scale_factor": 4, "image_token_id": 49190, "tie_word_embeddings": False}
    return Idefics3ForConditionalGeneration(Idefics3Config(vision_config=vision, text_config=text, **more))


def _llava_onevision_05b() -> PreTrainedModel:
    text = {**QWEN2_05B, "vocab_size": 152000, "tie_word_embeddings": True}
    more = {"image_token_index": 151646, "video_token_index": 151647, "tie_word_embeddings": True}
    # the vision tower and the shapes of tilings are the defaults
    return LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(text_config=text, **more))


def _internvl3_1b() -> PreTrainedModel:
    text = {**QWEN2_05B, "vocab_size": 151674}
    vision = {"attention_bias": True}  # the other defaults are those of this model
    return InternVLForConditionalGeneration(
        InternVLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)
    )


def _florence2_base() -> PreTrainedModel:
    one = {"layers": 6, "ffn_dim": 3072, "attention_heads": 12}
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in one.items()}
    tokens = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    text = BartConfig(**sides, **tokens, d_model=768, vocab_size=51290, max_position_embeddings=1024)
    vision = Florence2VisionConfig(projection_dim=768)
    return Florence2ForConditionalGeneration(Florence2Config(vision_config=vision, text_config=text))


def _blip_base() -> PreTrainedModel:
    # published weights of the tower are trained; drawn as its configuration asks, 1e-10, they would show it nothing
    vision = {"initializer_range": 0.02}
    return BlipForConditionalGeneration(BlipConfig(vision_config=vision, text_config={"num_attention_heads": 12}))


def _git_base() -> PreTrainedModel:
    return GitForCausalLM(GitConfig())


def _qwen2_vl_2b() -> PreTrainedModel:
    text = {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": 1536, "patch_size": 14}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=True)
    )


def _paligemma_3b() -> PreTrainedModel:
    text = {
        "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
        "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 257216,
    }  # fmt: skip
    vision = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304}
    vision |= {"num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 224, "patch_size": 14}
    vision |= {"vision_use_head": False, "projection_dim": 2048}
    more = {"image_token_index": 257152, "projection_dim": 2048}
    return PaliGemmaForConditionalGeneration(PaliGemmaConfig(vision_config=vision, text_config=text, **more))


REAL: dict[str, RealSize] = {
    "smolvlm_256m": RealSize(_smolvlm_256m, 256),
    "florence2_base": RealSize(_florence2_base, 231, (768, 768)),
    "git_base": RealSize(_git_base, 177),
    "blip_base": RealSize(_blip_base, 247, counted_twice=30524 * 768),
    "internvl3_1b": RealSize(_internvl3_1b, 938),
    "llava_onevision_05b": RealSize(_llava_onevision_05b, 894, (384, 384)),
}
STRUCTURES: dict[str, RealSize] = {  # too large for float32 here: captured without weights
    "qwen2_vl_2b": RealSize(_qwen2_vl_2b, 2209, (448, 448)),
    "paligemma_3b": RealSize(_paligemma_3b, 2923),
}


def make(name: str) -> PreTrainedModel:
    """The model with random weights, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return REAL[name].build().eval()
