"""The LLaVA-style model of the example: the ViT-S/14 backbone, a projector of two layers, and the language model.

An image of 84 px is 36 image tokens. At 112 px it would be 64, which makes a prompt about 1.6 times as long and
training as much slower; the drawings are 84 px anyway. Features come from the last layer but one, without the class
token, as in LLaVA.
"""

from __future__ import annotations

from pathlib import Path

import neighbours  # noqa: F401  (makes `towers` importable)
import torch
import towers
from transformers import (
    AutoTokenizer,
    BitImageProcessorPil,
    Dinov2Model,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

IMAGE_TOKEN = "<image>"
FEATURE_LAYER = -2
# SmolLM2's template, without the system message that it would write by itself (20 tokens that say nothing about an
# image), and with a place for images
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '" + IMAGE_TOKEN + "' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SEED = 0


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the language model with the image's token added."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def assemble(
    backbone: Dinov2Model, language: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> LlavaForConditionalGeneration:
    """Both towers with an untrained projector between them; the embedding grows by as many rows as tokens were added.

    A new row is the mean of the others. Its logit is then the mean of theirs, and so never the largest: the token of an
    image is never written.
    """
    n_old = language.get_input_embeddings().num_embeddings
    if len(tokenizer) > n_old:
        language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        rows = language.get_input_embeddings().weight.data
        rows[n_old:] = rows[:n_old].mean(0)
    side = towers.IMAGE_SIZE // backbone.config.patch_size
    config = LlavaConfig(
        vision_config=backbone.config,
        text_config=language.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=side * side,
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    torch.manual_seed(_SEED)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(backbone.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.generation_config = language.generation_config
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def processor(tokenizer: PreTrainedTokenizerBase, *, patch_size: int) -> LlavaProcessor:
    """Resize to 84 px, mean and deviation of the backbone; by PIL, so that nothing needs torchvision."""
    size = {"height": towers.IMAGE_SIZE, "width": towers.IMAGE_SIZE}
    images = BitImageProcessorPil(
        size=size,
        crop_size=size,
        do_center_crop=False,
        image_mean=towers.IMAGENET_MEAN,
        image_std=towers.IMAGENET_STD,
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" leaves out again
        chat_template=CHAT_TEMPLATE,
    )
