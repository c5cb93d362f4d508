"""Toys of further families that write text about images, most of them refused; `tests/toys.py` has the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests import toys
from tests.toys import DECODER, IMAGE_TOKEN, VISION

TOWER: dict[str, Any] = {key: value for key, value in VISION.items() if key != "projection_dim"}
FORMER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "encoder_hidden_size": 32,
    "vocab_size": 64,
}


def blip2_t5() -> torch.nn.Module:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, T5Config

    text = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=64)
    more = {"num_query_tokens": 4, "image_token_index": IMAGE_TOKEN}
    return Blip2ForConditionalGeneration(
        Blip2Config(vision_config=VISION, qformer_config=FORMER, text_config=text, **more)
    )


def instructblip() -> torch.nn.Module:
    from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration, LlamaConfig

    more = {"num_query_tokens": 4, "image_token_index": IMAGE_TOKEN}
    return InstructBlipForConditionalGeneration(
        InstructBlipConfig(vision_config=VISION, qformer_config=FORMER, text_config=LlamaConfig(**DECODER), **more)
    )


def pix2struct() -> torch.nn.Module:
    from transformers import Pix2StructConfig, Pix2StructForConditionalGeneration

    text = {"hidden_size": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    vision = {"hidden_size": 32, "patch_embed_hidden_size": 48, "d_kv": 8, "d_ff": 64}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    return Pix2StructForConditionalGeneration(Pix2StructConfig(text_config=text, vision_config=vision))


def idefics() -> torch.nn.Module:
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    vision = {"embed_dim": 32, "image_size": 32, "patch_size": 8, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "intermediate_size": 64}
    text = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
    return IdeficsForVisionText2Text(IdeficsConfig(**text, vision_config=vision, use_resampler=False))


def idefics2() -> torch.nn.Module:
    from transformers import Idefics2Config, Idefics2ForConditionalGeneration, MistralConfig

    perceiver = {"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 4}
    perceiver |= {"resampler_head_dim": 8, "num_key_value_heads": 2}
    parts = {"vision_config": TOWER, "text_config": MistralConfig(**DECODER), "perceiver_config": perceiver}
    return Idefics2ForConditionalGeneration(Idefics2Config(**parts, image_token_id=IMAGE_TOKEN))


def mllama() -> torch.nn.Module:
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1}
    vision |= {"attention_heads": 4, "vision_output_dim": 64, "intermediate_layers_indices": [0]}
    vision |= {"image_size": 32, "patch_size": 8, "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]}
    rope = {"rope_type": "default", "rope_theta": 1000.0}
    text = {**DECODER, "cross_attention_layers": [1], "rope_parameters": rope}
    return MllamaForConditionalGeneration(
        MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    )


def ovis2() -> torch.nn.Module:
    from transformers import Ovis2Config, Ovis2ForConditionalGeneration, Qwen2Config

    vision = {**TOWER, "vocab_size": 64, "hidden_stride": 2}
    parts = {"vision_config": vision, "text_config": Qwen2Config(**DECODER), "image_token_id": IMAGE_TOKEN}
    more = {"visual_indicator_token_ids": [50, 51, 52, 53, 54], "vocab_size": 64, "hidden_size": 32}
    return Ovis2ForConditionalGeneration(Ovis2Config(**parts, **more))


def janus() -> torch.nn.Module:
    from transformers import JanusConfig, JanusForConditionalGeneration, LlamaConfig

    vision = {**TOWER, "projection_dim": 32, "mlp_ratio": 2}
    drawing = {"embed_dim": 8, "num_embeddings": 16, "base_channels": 32, "latent_channels": 8, "z_channels": 8}
    drawing |= {"channel_multiplier": [1, 1], "num_res_blocks": 1, "projection_dim": 32, "image_token_embed_dim": 32}
    parts = {"vision_config": vision, "vq_config": drawing, "text_config": LlamaConfig(**DECODER)}
    return JanusForConditionalGeneration(JanusConfig(**parts, image_token_id=IMAGE_TOKEN))


def aya_vision() -> torch.nn.Module:
    from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration, Cohere2Config, SiglipVisionConfig

    vision = SiglipVisionConfig(**{**TOWER, "vision_use_head": False})
    more = {"image_token_index": IMAGE_TOKEN, "adapter_layer_norm_eps": 1e-6, "vision_feature_layer": -1}
    return AyaVisionForConditionalGeneration(
        AyaVisionConfig(vision_config=vision, text_config=Cohere2Config(**DECODER), **more)
    )


def vipllava() -> torch.nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig, VipLlavaForConditionalGeneration

    vision, text = CLIPVisionConfig(**VISION), LlamaConfig(**DECODER)
    more = {"image_token_index": IMAGE_TOKEN, "vision_feature_layers": [-1, -2]}
    return VipLlavaForConditionalGeneration(VipLlavaConfig(vision_config=vision, text_config=text, **more))


def mistral3() -> torch.nn.Module:
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        MistralConfig,
        PixtralVisionConfig,
    )

    vision = PixtralVisionConfig(**{**TOWER, "head_dim": 8})
    more = {"image_token_id": IMAGE_TOKEN, "spatial_merge_size": 2}
    return Mistral3ForConditionalGeneration(
        Mistral3Config(vision_config=vision, text_config=MistralConfig(**DECODER), **more)
    )


def got_ocr2() -> torch.nn.Module:
    from transformers import GotOcr2Config, GotOcr2ForConditionalGeneration, Qwen2Config

    vision = {"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 64, "patch_size": 4, "mlp_dim": 64, "window_size": 4, "global_attn_indexes": [1]}
    return GotOcr2ForConditionalGeneration(
        GotOcr2Config(vision_config=vision, text_config=Qwen2Config(**DECODER), image_token_id=IMAGE_TOKEN)
    )


def kosmos2() -> torch.nn.Module:
    from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration

    text = {"vocab_size": 64, "embed_dim": 32, "layers": 2, "ffn_dim": 64, "attention_heads": 4}
    text |= {"max_position_embeddings": 128, "dropout": 0.0, "pad_token_id": 0}
    return Kosmos2ForConditionalGeneration(Kosmos2Config(text_config=text, vision_config=VISION, latent_query_num=4))


def fuyu() -> torch.nn.Module:
    from transformers import FuyuConfig, FuyuForCausalLM, PersimmonConfig

    text = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
    sizes = {**text, "image_size": 32, "patch_size": 8, "num_channels": 3}
    return FuyuForCausalLM(FuyuConfig(**sizes, text_config=PersimmonConfig(**text), image_token_id=IMAGE_TOKEN))


def cohere2_vision() -> torch.nn.Module:
    from transformers import (
        Cohere2Config,
        Cohere2VisionConfig,
        Cohere2VisionForConditionalGeneration,
        SiglipVisionConfig,
    )

    vision = SiglipVisionConfig(**{**TOWER, "vision_use_head": False})
    more = {"image_token_id": IMAGE_TOKEN, "alignment_intermediate_size": 32}
    return Cohere2VisionForConditionalGeneration(
        Cohere2VisionConfig(vision_config=vision, text_config=Cohere2Config(**DECODER), **more)
    )


def llama4() -> torch.nn.Module:
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    vision = {**TOWER, "intermediate_size": 128, "vision_output_dim": 32, "projector_input_dim": 32}
    vision |= {"projector_output_dim": 32, "pixel_shuffle_ratio": 0.5}
    text = {**DECODER, "head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 2}
    return Llama4ForConditionalGeneration(
        Llama4Config(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    )


def lfm2_vl() -> torch.nn.Module:
    from transformers import Lfm2Config, Lfm2VlConfig, Lfm2VlForConditionalGeneration, Siglip2VisionConfig

    vision = {**TOWER, "num_patches": 16, "vision_use_head": False}
    vision.pop("image_size")
    kinds = ["conv", "full_attention", "conv"]
    text = Lfm2Config(**DECODER, layer_types=kinds, block_auto_adjust_ff_dim=False)
    more = {"image_token_id": IMAGE_TOKEN, "projector_hidden_size": 32, "downsample_factor": 2}
    return Lfm2VlForConditionalGeneration(
        Lfm2VlConfig(vision_config=Siglip2VisionConfig(**vision), text_config=text, **more)
    )


def glm4v() -> torch.nn.Module:
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration

    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "image_size": 32}
    vision |= {"out_hidden_size": 32, "intermediate_size": 64, "spatial_merge_size": 2}
    text = {**DECODER, "rope_parameters": {**toys.QWEN_ROPE, "partial_rotary_factor": 1.0}}
    tokens = {"image_token_id": IMAGE_TOKEN, "video_token_id": 60, "image_start_token_id": 59}
    return Glm4vForConditionalGeneration(Glm4vConfig(vision_config=vision, text_config=text, **tokens))


def video_llava() -> torch.nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

    vision, text = CLIPVisionConfig(**VISION), LlamaConfig(**DECODER)
    tokens = {"image_token_index": IMAGE_TOKEN, "video_token_index": 60}
    return VideoLlavaForConditionalGeneration(VideoLlavaConfig(vision_config=vision, text_config=text, **tokens))


def aria() -> torch.nn.Module:
    from transformers import AriaConfig, AriaForConditionalGeneration, AriaTextConfig

    text = AriaTextConfig(**DECODER, moe_num_experts=2, moe_topk=1, moe_num_shared_experts=1)
    vision = {**TOWER, "model_type": "idefics3_vision"}
    more = {"projector_patch_to_query_dict": {16: 4}, "image_token_index": IMAGE_TOKEN}
    return AriaForConditionalGeneration(AriaConfig(vision_config=vision, text_config=text, **more))


FURTHER: dict[str, Callable[[], torch.nn.Module]] = {
    "vipllava": vipllava,
    "video_llava": video_llava,
    "aya_vision": aya_vision,
    "cohere2_vision": cohere2_vision,
    "mistral3": mistral3,
    "got_ocr2": got_ocr2,
    "janus": janus,
    "lfm2_vl": lfm2_vl,
    "glm4v": glm4v,
    "llama4": llama4,
    "aria": aria,
    "fuyu": fuyu,
    "kosmos2": kosmos2,
    "ovis2": ovis2,
    "instructblip": instructblip,
    "blip2_t5": blip2_t5,
    "mllama": mllama,
    "idefics": idefics,
    "idefics2": idefics2,
    "pix2struct": pix2struct,
}
IMAGE_SIZES: dict[str, tuple[int, int]] = {  # height and width, where the configuration does not decide
    **toys.IMAGE_SIZES,
    "lfm2_vl": (32, 32),
    "glm4v": (16, 24),
    "pix2struct": (32, 32),
}
TRIED: tuple[str, ...] = (*toys.GENERATIVE, *FURTHER)


def make(family: str) -> torch.nn.Module:
    """A toy with random weights, in evaluation mode."""
    return toys.with_random_weights((toys.GENERATIVE | FURTHER)[family])
