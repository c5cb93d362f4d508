"""What the folder of a toy that writes text holds beside the model: tokenizer, chat template, image processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import toys

WITHOUT_TEMPLATE = ("git", "blip_caption", "blip_vqa", "florence2")
TEMPLATE = (
    "{% for message in messages %}USER {% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}{% endfor %}BOT "
)


def write_prompt_files(family: str, folder: Path) -> None:
    """A tokenizer of whole words that knows the image's placeholder, a chat template, and an image processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [
        *toys.SPECIAL,
        *toys.COLOURS,
        "none",
        "a",
        "photo",
        "of",
        "square",
        "what",
        "colour",
        "is",
        "it",
        "?",
        "USER",
        "BOT",
    ]
    words += [f"w{i}" for i in range(len(words), toys.IMAGE_TOKEN)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    if family not in WITHOUT_TEMPLATE:
        made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    _image_processor(family).save_pretrained(folder)


def _image_processor(family: str) -> Any:
    """As the family has it: one size, patches of any number, or tiles."""
    from transformers import CLIPImageProcessorPil, Idefics3ImageProcessorPil, Qwen2VLImageProcessorPil

    if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        pixels = {"shortest_edge": 64, "longest_edge": 300}
        return Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=pixels)
    if family in ("smolvlm", "idefics3"):
        return Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    size = {"height": 32, "width": 32}
    return CLIPImageProcessorPil(size=size, crop_size=size)
