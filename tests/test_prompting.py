"""Prompts against the processors of transformers: the same ids, images where they belong, answers and their end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from vlmopt.core.errors import ModelError, TaskError
from vlmopt.core.program import NO_WORD, Generation
from vlmopt.preprocess import Preprocessor
from vlmopt.prompting import Prompter

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "<turn>"]
WORDS = [*SPECIAL, "USER", ":", "ASSISTANT", "SYSTEM", "what", "colour", "is", "it", "?", "red", "green", "a", "square"]
IMAGE, END, TURN = (SPECIAL.index(token) for token in ("<image>", "</s>", "<turn>"))
N_FEATURES = 16  # 32 x 32 pixels in patches of 8
SIDE = 32
MIXED = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}<turn>{% endif %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def word_tokenizer(extra: list[str] | None = None) -> PreTrainedTokenizerFast:
    """A token a word, and the start of a text in front."""
    special = [*SPECIAL, *(extra or [])]
    words = [*WORDS, *(extra or [])]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    named = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, additional_special_tokens=special[4:], **named)


def image_processor() -> CLIPImageProcessorPil:
    size = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessorPil(size=size, crop_size=size)


def llava_folder(folder: Path, *, template: str | None = None, ends: Any = None) -> Path:
    """A folder as LLaVA's are: processor, tokenizer, configuration; no weights."""
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(image_processor(), word_tokenizer(), chat_template=template, **options).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": {"eos_token_id": END}}))
    if ends is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


def plain_folder(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, template: str | None = None) -> Path:
    """A folder that names no processor."""
    made = tokenizer or word_tokenizer()
    made.chat_template = template
    made.save_pretrained(folder)
    image_processor().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "toy"}))
    return folder


def prompter(folder: Path, *, n: int = N_FEATURES) -> Prompter:
    return Prompter(Preprocessor.load(folder), IMAGE, n)


def pictures(n: int) -> list[Image.Image]:
    return [Image.new("RGB", (50, 20), "red") for _ in range(n)]


@pytest.mark.parametrize("text", ["<image> what colour is it ?", "what <image> colour is <image> red <image>", "what"])
def test_a_prompt_has_the_ids_that_the_processor_of_llava_gives(tmp_path: Path, text: str) -> None:
    folder, n = llava_folder(tmp_path), text.count("<image>")
    processor = LlavaProcessor.from_pretrained(folder)
    wanted = processor(text=[text], images=pictures(n) or None)["input_ids"][0]
    assert prompter(folder).encode(text, n) == wanted
    assert wanted.count(IMAGE) == n * N_FEATURES
    assert wanted[0] == SPECIAL.index("<s>")


@pytest.mark.parametrize("text", ["<image> what colour is it ?", "what <image> colour is <image> red <image>", "what"])
def test_a_folder_that_names_no_processor_gives_the_same_ids(tmp_path: Path, text: str) -> None:
    with_processor, without = llava_folder(tmp_path / "llava"), plain_folder(tmp_path / "plain")
    n = text.count("<image>")
    assert prompter(without).encode(text, n) == prompter(with_processor).encode(text, n)


@pytest.mark.parametrize("folder_of", [llava_folder, plain_folder])
def test_images_come_first_where_the_prompt_does_not_say(tmp_path: Path, folder_of: Any) -> None:
    made = prompter(folder_of(tmp_path))
    assert made.encode("what colour", 2) == made.encode("<image><image> what colour", 2)
    assert made.encode("colour is it ?", 1, system="what") == made.encode("what\n<image>colour is it ?", 1)


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
@pytest.mark.parametrize("n", [1, 2])
def test_a_chat_template_gives_what_the_processor_gives_wherever_it_lies(tmp_path: Path, place: str, n: int) -> None:
    folder = llava_folder(tmp_path / "m")
    if place == "tokenizer_config.json":
        stated = json.loads((folder / place).read_text())
        (folder / place).write_text(json.dumps({**stated, "chat_template": MIXED}))
    else:
        (folder / place).write_text(MIXED if place.endswith("jinja") else json.dumps({"chat_template": MIXED}))
    entries = [{"type": "image", "image": picture} for picture in pictures(n)]
    message = {"role": "user", "content": [*entries, {"type": "text", "text": "what colour is it ?"}]}
    processor = LlavaProcessor.from_pretrained(llava_folder(tmp_path / "whole", template=MIXED))
    wanted = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=True, return_dict=True)
    assert prompter(folder).encode("what colour is it ?", n) == wanted["input_ids"][0]
    system = [{"role": "system", "content": [{"type": "text", "text": "a red square"}]}, message]
    wanted = processor.apply_chat_template(system, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert prompter(folder).encode("what colour is it ?", n, system="a red square") == wanted["input_ids"][0]


def test_placeholders_in_a_prompt_stay_where_they_are_behind_a_chat_template(tmp_path: Path) -> None:
    made = prompter(llava_folder(tmp_path, template=MIXED))
    tokenizer = word_tokenizer()
    words = tokenizer("USER: what <image> colour ASSISTANT:", add_special_tokens=True)["input_ids"]
    at = words.index(IMAGE)
    assert made.encode("what <image> colour", 1) == [*words[:at], *[IMAGE] * N_FEATURES, *words[at + 1 :]]


def test_a_template_for_plain_texts_gets_the_images_in_front_of_the_text(tmp_path: Path) -> None:
    made = prompter(plain_folder(tmp_path, template=PLAIN))
    ids = word_tokenizer()("<s>USER: <image><image>what ASSISTANT:", add_special_tokens=False)["input_ids"]
    wanted = [token for own in ids for token in [own] * (N_FEATURES if own == IMAGE else 1)]
    assert made.encode("what", 2) == wanted
    assert wanted.count(SPECIAL.index("<s>")) == 1  # the template writes it, so the tokenizer must not


def test_another_number_of_placeholders_or_features_is_refused_with_both_numbers(tmp_path: Path) -> None:
    made = prompter(llava_folder(tmp_path / "a"))
    with pytest.raises(TaskError, match="holds 2 <image> for 1 images; expected one for every image, or none at all"):
        made.encode("<image> what <image>", 1)
    with pytest.raises(ModelError, match="makes 16 tokens of 1 images; expected 9 for each"):
        prompter(made.preprocessor.folder, n=9).encode("what", 1)


@pytest.mark.parametrize("template", ["{{ messages[0]['content'][0]['nothing']['here'] }}", "a {{ bos_token }}"])
def test_a_template_that_loses_the_image_is_refused(tmp_path: Path, template: str) -> None:
    with pytest.raises(ModelError, match="chat template makes no prompt of a message with 1 images and a text"):
        prompter(llava_folder(tmp_path, template=template)).encode("what", 1)


def test_a_tokenizer_without_the_token_of_images_is_refused(tmp_path: Path) -> None:
    made = Prompter(Preprocessor.load(plain_folder(tmp_path)), 900, N_FEATURES)
    with pytest.raises(ModelError, match="its tokenizer has no token 900, which stands for images"):
        made.encode("what", 1)


def test_an_answer_ends_with_the_token_that_the_model_ends_with(tmp_path: Path) -> None:
    made = prompter(llava_folder(tmp_path / "a"))
    red = WORDS.index("red")
    assert made.end_tokens == (END,)
    assert made.encode_answer("red") == [red, END]
    assert made.decode([red, END, red]) == made.decode([red, -1, -1]) == "red"
    assert made.decode([WORDS.index("a"), red, WORDS.index("square")]) == "a red square"
    assert made.decode([]) == made.decode([END]) == ""
    several = prompter(llava_folder(tmp_path / "b", template=MIXED, ends=[END, TURN]))
    assert several.end_tokens == (END, TURN)
    assert several.encode_answer("red") == [red, TURN]  # as the template ends what the assistant says
    assert several.decode([red, TURN, red]) == "red"
    assert prompter(llava_folder(tmp_path / "c", ends=[TURN, END])).encode_answer("red") == [red, END]


def test_a_model_without_an_end_of_answers_is_refused(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="names no token that ends an answer; expected eos_token_id"):
        prompter(plain_folder(tmp_path, tokenizer)).encode_answer("red")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, with a token for a space and a word together: what stands before a word shows in its ids."""
    marks = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *marks])}
    vocabulary["Ġr"] = len(vocabulary)
    made = Tokenizer(models.BPE(vocabulary, [("Ġ", "r")]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    named = {"pad_token": "<pad>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, additional_special_tokens=SPECIAL[4:], **named)


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Every word begins with its space, the first as well."""
    words = [*SPECIAL, "▁", "▁red", "red"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    named = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, additional_special_tokens=SPECIAL[4:], **named)


def test_an_answer_begins_with_a_space_behind_plain_text_and_without_one_behind_a_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    plain = prompter(plain_folder(tmp_path / "a", tokenizer))
    chat = prompter(plain_folder(tmp_path / "b", byte_tokenizer(), template=PLAIN))
    assert tokenizer.convert_ids_to_tokens(plain.encode_answer("red")) == ["Ġr", "e", "d", "</s>"]
    assert tokenizer.convert_ids_to_tokens(chat.encode_answer("red")) == ["r", "e", "d", "</s>"]
    assert plain.decode(plain.encode_answer("red")) == "red"
    pieces = sentencepiece_tokenizer()
    spaced = prompter(plain_folder(tmp_path / "c", pieces))
    assert pieces.convert_ids_to_tokens(spaced.encode_answer("red")) == ["▁red", "</s>"]


def test_a_processor_that_frames_images_is_followed(tmp_path: Path) -> None:
    """InternVL writes a start and an end around the features; expanding the placeholder alone would lose them."""
    marks = ["<IMG_CONTEXT>", "<img>", "</img>", "<video>"]
    tokenizer = word_tokenizer(marks)
    names = ["context_image_token", "start_image_token", "end_image_token", "video_token"]
    tokenizer._set_model_specific_special_tokens(dict(zip(names, marks, strict=True)))
    folder = plain_folder(tmp_path, tokenizer)
    settings = {"image_processor_type": "GotOcr2ImageProcessor", "size": {"height": SIDE, "width": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "crop_to_patches": False}))
    stated = {"processor_class": "InternVLProcessor", "image_seq_length": 4}
    (folder / "processor_config.json").write_text(json.dumps(stated))
    context, start, end, _ = tokenizer.convert_tokens_to_ids(marks)
    ids = Prompter(Preprocessor.load(folder), context, 4).encode("what", 1)
    assert ids == [SPECIAL.index("<s>"), start, *[context] * 4, end, WORDS.index("what")]


def test_a_processor_that_cannot_be_built_is_refused(tmp_path: Path) -> None:
    folder = llava_folder(tmp_path)
    stated = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({**stated, "processor_class": "NoProcessor"}))
    with pytest.raises(ModelError, match="names the processor 'NoProcessor', which transformers does not know"):
        prompter(folder).encode("what", 1)


def test_an_artifact_carries_what_prompts_need(tmp_path: Path) -> None:
    folder = llava_folder(tmp_path, template=MIXED, ends=END)
    names = {path.name for path in Preprocessor.load(folder).files}
    assert {"chat_template.jinja", "generation_config.json", "processor_config.json", "tokenizer.json"} <= names


def florence_folder(folder: Path) -> Path:
    """A processor that puts image and special tokens around a text by itself, and spells tasks out."""
    words = ["[PAD]", "[UNK]", "<s>", "</s>", "<image>", "what", "colour", "What", "does", "the", "image", "describe?"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "bos_token": "<s>", "eos_token": "</s>"}
    more = {"extra_special_tokens": {"image_token": "<image>"}}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **more).save_pretrained(folder)
    processor = {"image_processor_type": "CLIPImageProcessor", "processor_class": "Florence2Processor"}
    sizes = {"size": {"height": 8, "width": 8}, "crop_size": {"height": 8, "width": 8}, "image_seq_length": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps({**processor, **sizes}))
    (folder / "config.json").write_text("{}")
    return folder


def test_a_processor_that_places_images_by_itself_is_left_to_it(tmp_path: Path) -> None:
    made = Prompter(Preprocessor.load(florence_folder(tmp_path)), 4, 2)
    assert made.encode("what colour", 1) == [4, 4, 2, 5, 6, 3]
    assert made.encode("<CAPTION>", 1) == [4, 4, 2, 7, 8, 9, 10, 11, 3]


def test_where_no_word_stands_for_an_image_it_comes_first_and_alone(tmp_path: Path) -> None:
    preprocessor = Preprocessor.load(florence_folder(tmp_path))
    front = Generation(NO_WORD, 3, stop_tokens=(6,), start_tokens=(2,))
    across = replace(front, image_tokens=0, cross_source="vision_encoder")
    read = replace(across, cross_source="encoder_model")
    assert Prompter.of(preprocessor, front).encode("what colour", 1) == [-1, -1, -1, 2, 5, 6]
    assert Prompter.of(preprocessor, across).encode("", 1) == [2]
    assert Prompter.of(preprocessor, read).encode("what", 1) == preprocessor.tokenizer("what")["input_ids"]
    assert Prompter.of(preprocessor, front).encode_answer("what") == [5, 6]
    for n_images in (0, 2):
        with pytest.raises(TaskError, match=f"comes with {n_images} images; expected one: the model reads a single"):
            Prompter.of(preprocessor, front).encode("what", n_images)


def test_where_an_image_has_fewer_features_left_it_has_as_many_places(tmp_path: Path) -> None:
    folder = llava_folder(tmp_path)
    left = replace(prompter(folder, n=5), processor_tokens=N_FEATURES)
    text = "what <image> colour is <image> red"
    whole, found = prompter(folder).encode(text, 2), left.encode(text, 2)
    assert found.count(IMAGE) == 2 * 5
    assert [token for token in found if token != IMAGE] == [token for token in whole if token != IMAGE]
    assert "".join("i" if token == IMAGE else "." for token in found) == "..iiiii..iiiii."
    assert left.encode("what", 0) == prompter(folder).encode("what", 0)
    assert (left.processor_places(), prompter(folder).processor_places()) == (N_FEATURES, N_FEATURES)
    with pytest.raises(ModelError, match=r"its processor makes 16 tokens of 1 images; expected 5 for each"):
        prompter(folder, n=5).encode(text.replace("<image> red", "red"), 1)


def test_a_processor_that_was_told_is_not_corrected(tmp_path: Path) -> None:
    folder = llava_folder(tmp_path)
    file = folder / "processor_config.json"
    stated = json.loads(file.read_text())
    file.write_text(json.dumps({**stated, "num_additional_image_tokens": 1 + 5 - N_FEATURES}))
    left = replace(prompter(folder, n=5), processor_tokens=N_FEATURES)
    assert left.processor_places() == 5
    assert left.encode("<image> what", 1).count(IMAGE) == 5


def test_of_a_folder_without_a_processor_no_places_are_known(tmp_path: Path) -> None:
    made = replace(prompter(plain_folder(tmp_path), n=5), processor_tokens=N_FEATURES)
    assert made.encode("<image> what", 1).count(IMAGE) == 5
    assert made.processor_places() is None
