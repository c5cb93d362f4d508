"""Toy models of every supported family, with random weights, and a folder of one with its processor and a task."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from tests import toys_across

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 24,
    "projection_dim": 16,
    "bos_token_id": 62,
    "eos_token_id": 3,  # [SEP] of the tokenizer below: CLIP reads the text's embedding there
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 16,
}
IMAGE_TOKEN = 61
DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220)}


def clip() -> torch.nn.Module:
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))


def siglip() -> torch.nn.Module:
    from transformers import SiglipConfig, SiglipModel

    text = {**TEXT, "projection_size": 32}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))


def dual_encoder() -> torch.nn.Module:
    from transformers import BertConfig, Dinov2Config, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        Dinov2Config(**{**VISION, "image_size": 56}), BertConfig(**TEXT), projection_dim=16
    )
    return VisionTextDualEncoderModel(config)


def vilt() -> torch.nn.Module:
    from transformers import ViltConfig, ViltForQuestionAnswering

    answers = dict(enumerate([*COLOURS, "none"]))
    config = {**VISION, "vocab_size": 64, "max_position_embeddings": 24, "id2label": answers}
    return ViltForQuestionAnswering(ViltConfig(**config))


def blip_matching() -> torch.nn.Module:
    from transformers import BlipConfig, BlipForImageTextRetrieval

    text = {**TEXT, "encoder_hidden_size": 32}
    return BlipForImageTextRetrieval(
        BlipConfig(text_config=text, vision_config=VISION, projection_dim=16, image_text_hidden_size=16)
    )


def blip() -> torch.nn.Module:
    from transformers import BlipConfig, BlipModel

    return BlipModel(
        BlipConfig(text_config={**TEXT, "encoder_hidden_size": 32}, vision_config=VISION, projection_dim=16)
    )


def llava_llama() -> torch.nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(**DECODER)
    vision = CLIPVisionConfig(**VISION)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    return LlavaForConditionalGeneration(config)


def llava_qwen2() -> torch.nn.Module:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

    vision, text = SiglipVisionConfig(**VISION), Qwen2Config(**DECODER)
    features = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, **features)
    return LlavaForConditionalGeneration(config)


def llava_tied() -> torch.nn.Module:
    """As in the example: a DINO tower, and a decoder whose output layer is its embedding."""
    from transformers import Dinov2Config, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision, text = Dinov2Config(**{**VISION, "image_size": 56}), LlamaConfig(**DECODER, tie_word_embeddings=True)
    more = {"vision_feature_layer": -1, "tie_word_embeddings": True}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, **more)
    return LlavaForConditionalGeneration(config)


def deepseek_vl() -> torch.nn.Module:
    from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration, LlamaConfig, SiglipVisionConfig

    vision, text = SiglipVisionConfig(**{**VISION, "vision_use_head": False}), LlamaConfig(**DECODER)
    config = DeepseekVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    return DeepseekVLForConditionalGeneration(config)


def internvl() -> torch.nn.Module:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    vision = InternVLVisionConfig(**{**VISION, "image_size": [32, 32], "patch_size": [8, 8]})
    text = Qwen2Config(**DECODER)
    return InternVLForConditionalGeneration(
        InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, image_seq_length=4)
    )


def paligemma() -> torch.nn.Module:
    from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

    vision = SiglipVisionConfig(**{**VISION, "projection_dim": 32, "vision_use_head": False})
    text = GemmaConfig(**DECODER, head_dim=8)
    more = {"projection_dim": 32, "image_token_id": IMAGE_TOKEN}
    return PaliGemmaForConditionalGeneration(PaliGemmaConfig(vision_config=vision, text_config=text, **more))


def paligemma2() -> torch.nn.Module:
    """With Gemma 2: windows in every other layer, and logits that are capped."""
    from transformers import Gemma2Config, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

    vision = SiglipVisionConfig(**{**VISION, "projection_dim": 32, "vision_use_head": False})
    text = Gemma2Config(**DECODER, head_dim=8, sliding_window=6, final_logit_softcapping=3.0, query_pre_attn_scalar=8)
    more = {"projection_dim": 32, "image_token_id": IMAGE_TOKEN}
    return PaliGemmaForConditionalGeneration(PaliGemmaConfig(vision_config=vision, text_config=text, **more))


def gemma3() -> torch.nn.Module:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    vision = SiglipVisionConfig(**{**VISION, "vision_use_head": False})
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = Gemma3TextConfig(**DECODER, head_dim=8, sliding_window=6, layer_types=kinds, query_pre_attn_scalar=8)
    more = {"image_token_id": IMAGE_TOKEN, "mm_tokens_per_image": 4}
    return Gemma3ForConditionalGeneration(Gemma3Config(vision_config=vision, text_config=text, **more))


QWEN_VISION: dict[str, Any] = {"depth": 4, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2}
QWEN_ROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1000.0}
QWEN_TOKENS: dict[str, Any] = {"image_token_id": IMAGE_TOKEN, "video_token_id": 60, "vision_start_token_id": 59}


def qwen2_vl() -> torch.nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {**QWEN_VISION, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    text = {**DECODER, "rope_parameters": QWEN_ROPE}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(vision_config=vision, text_config=text, **QWEN_TOKENS))


def qwen2_5_vl() -> torch.nn.Module:
    """Windows of two by two merged patches, in every layer but one; those at the right are half as wide."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    widths = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64}
    vision = {**QWEN_VISION, **widths, "window_size": 16, "fullatt_block_indexes": [1]}
    text = {**DECODER, "rope_parameters": QWEN_ROPE}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, text_config=text, **QWEN_TOKENS))


def qwen3_vl() -> torch.nn.Module:
    """Features of two layers of the tower are added behind two layers of the decoder."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    widths = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_position_embeddings": 16}
    vision = {**QWEN_VISION, **widths, "deepstack_visual_indexes": [0, 2]}
    text = {**DECODER, "head_dim": 8, "rope_parameters": {**QWEN_ROPE, "mrope_interleaved": True}}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=vision, text_config=text, **QWEN_TOKENS))


def smolvlm() -> torch.nn.Module:
    from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration

    text = LlamaConfig(**DECODER)
    vision = {key: value for key, value in VISION.items() if key != "projection_dim"}
    return SmolVLMForConditionalGeneration(
        SmolVLMConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, scale_factor=2)
    )


def idefics3() -> torch.nn.Module:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig

    text = LlamaConfig(**DECODER)
    vision = {key: value for key, value in VISION.items() if key != "projection_dim"}
    return Idefics3ForConditionalGeneration(
        Idefics3Config(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, scale_factor=2)
    )


LLAVA_TILES: dict[str, Any] = {"image_grid_pinpoints": [[32, 32], [32, 64], [64, 64]], "image_token_id": IMAGE_TOKEN}


def llava_next() -> torch.nn.Module:
    """An image that is twice as wide as a tile: the whole, two tiles, and strips of padding that are cut off."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    vision, text = CLIPVisionConfig(**VISION), LlamaConfig(**DECODER)
    return LlavaNextForConditionalGeneration(LlavaNextConfig(vision_config=vision, text_config=text, **LLAVA_TILES))


def llava_onevision() -> torch.nn.Module:
    """Four tiles, more than the one that the aspect ratio allows for, so that they are made smaller."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    vision, text = SiglipVisionConfig(**{**VISION, "vision_use_head": False}), Qwen2Config(**DECODER)
    more = {"vision_aspect_ratio": "anyres_max_1", "vision_feature_select_strategy": "full", **LLAVA_TILES}
    return LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(vision_config=vision, text_config=text, **more))


def blip2() -> torch.nn.Module:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig

    former = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text = OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=64, word_embed_proj_dim=32,
        max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=VISION,
        qformer_config={**former, "encoder_hidden_size": 32, "vocab_size": 64},
        text_config=text,
        num_query_tokens=4,
        image_token_index=IMAGE_TOKEN,
    )
    return Blip2ForConditionalGeneration(config)


GENERATIVE: dict[str, Callable[[], torch.nn.Module]] = {
    "llava_llama": llava_llama,
    "llava_qwen2": llava_qwen2,
    "llava_tied": llava_tied,
    "internvl": internvl,
    "deepseek_vl": deepseek_vl,
    "paligemma": paligemma,
    "paligemma2": paligemma2,
    "gemma3": gemma3,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "blip2": blip2,
    "smolvlm": smolvlm,
    "idefics3": idefics3,
    "git": toys_across.git,
    "blip_caption": toys_across.blip_caption,
    "blip_vqa": toys_across.blip_vqa,
    "florence2": toys_across.florence2,
}
IMAGE_SIZES: dict[str, tuple[int, int]] = {  # height and width, where the configuration does not decide
    "florence2": (32, 32),
    "llava_next": (26, 64),
    "llava_onevision": (64, 60),
    "qwen2_vl": (16, 24),
    "qwen2_5_vl": (16, 24),
    "qwen3_vl": (16, 24),
}
FAMILIES: dict[str, Callable[[], torch.nn.Module]] = {
    "clip": clip,
    "siglip": siglip,
    "dual_encoder": dual_encoder,
    "vilt": vilt,
    "blip_matching": blip_matching,
    "blip": blip,
}


def make(family: str, *, seed: int = 0) -> torch.nn.Module:
    """A toy of this family in evaluation mode."""
    return with_random_weights((FAMILIES | GENERATIVE)[family], seed=seed)


def with_random_weights(build: Callable[[], torch.nn.Module], *, seed: int = 0) -> torch.nn.Module:
    """What is built, in evaluation mode, its random weights scaled up so that branches do something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0.0, 0.15)
            elif "bias" in name:
                parameter.data.normal_(0.0, 0.05)
    return model.eval()


def write_model(family: str, folder: Path, *, seed: int = 0) -> Path:
    """A Hugging Face folder of a toy: configuration, safetensors, tokenizer and image processor."""
    from transformers import BertTokenizer, CLIPImageProcessorPil, ViltImageProcessorPil

    model = make(family, seed=seed)
    model.save_pretrained(folder)
    if family in GENERATIVE:
        from tests.toy_prompts import write_prompt_files

        write_prompt_files(family, folder)
        return folder
    words = [*SPECIAL, *COLOURS, "none", "a", "photo", "of", "square", "what", "colour", "is", "it", "?"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    if family == "vilt":
        processor = ViltImageProcessorPil(size={"shortest_edge": 32}, size_divisor=8, do_resize=True)
    else:
        processor = CLIPImageProcessorPil(size=size, crop_size=size)
    processor.save_pretrained(folder)
    return folder


def write_task(folder: Path, kind: str, *, n: int = 60, name: str = "colour", seed: int = 0, **fields: Any) -> Path:
    """A task about the colour of a square; `n` images a split, four of each colour and split alike in nothing else."""
    images = folder / "images"
    images.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(3 * n):
        colour = list(COLOURS)[i % 3]
        pixels = generator.integers(90, 160, (32, 32, 3), dtype=np.uint8)
        x, y = generator.integers(0, 12, 2)
        pixels[y : y + 20, x : x + 20] = COLOURS[colour]
        Image.fromarray(pixels).save(images / f"{i:04d}.png")
        split = ("profile", "validation", "test")[i // n]
        row = {"file_name": f"images/{i:04d}.png", "colour": colour, "text": f"a {colour} square", "split": split}
        rows.append({**row, "question": "what colour is it ?"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    roles = {
        "image-classification": {"label": "colour"},
        "zero-shot-image-classification": {"label": "colour"},
        "image-text-retrieval": {"text": "text"},
        "visual-question-answering": {"question": "question", "answer": "colour"},
        "image-text-to-text": {"question": "question", "answer": "colour"},
        "image-captioning": {"text": "text"},
    }[kind]
    columns = {"image": "file_name", "split": "split", **roles}
    specification = {"kind": kind, "name": name, "columns": columns, **fields}
    (folder / "task.yaml").write_text(yaml.safe_dump(specification, sort_keys=False))
    return folder
