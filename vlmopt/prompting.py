"""Prompts with images as token ids, the way the model's own processor makes them, and answers as ids and back.

The tokenizer and the processor are those of transformers and are built on first use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError
from PIL import Image

from vlmopt.core.errors import ModelError, TaskError
from vlmopt.core.manifest import GenerationEntry
from vlmopt.core.program import Generation
from vlmopt.preprocess import Preprocessor, read_json

TEMPLATE_FAILURES = (TemplateError, TypeError, ValueError, AttributeError, LookupError)
_SPACE_OF_SENTENCEPIECE = "▁"
_PROBE = "x"  # an answer to find the end of in a rendered conversation


@dataclass(frozen=True, eq=False)
class Prompter:
    """Turns prompts and answers of one model into token ids.

    `image_token` is the id that stands for one feature of an image, `image_tokens` how many features an image has.
    Where it is below zero no word does: a prompt has one image, and its features, if the decoder reads them there, lie
    in front of the text. `start_tokens` begin a text in place of what the tokenizer puts around it; `stop_tokens`, if
    any, end an answer in place of those that the folder states. `processor_tokens`, if any, are the places that the
    model's own processor makes of an image that has fewer features left.
    """

    preprocessor: Preprocessor
    image_token: int
    image_tokens: int
    start_tokens: tuple[int, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    processor_tokens: int = 0

    @classmethod
    def of(cls, preprocessor: Preprocessor, generation: Generation | GenerationEntry) -> Prompter:
        """As the parts of a model are joined. An encoder reads a text as its tokenizer has it."""
        start = () if generation.reads_across else generation.start_tokens
        found = (generation.image_token, generation.image_tokens, start, generation.stop_tokens)
        return cls(preprocessor, *found, generation.processor_tokens)

    def encode(self, prompt: str, n_images: int, *, system: str | None = None) -> list[int]:
        """The ids behind which the model writes its answer, every image in the places of its features.

        With a chat template it is one message of the user. Otherwise the images come first, then the text, with the
        special tokens that the tokenizer puts around a text. A prompt that holds placeholders itself says with them
        where its images belong.

        Raises:
            TaskError: the prompt holds placeholders, but not one for every image.
            ModelError: the template or the processor fails, or makes of an image another number of features.
        """
        if self.image_token < 0:
            return self._beside_image(prompt if system is None else f"{system}\n{prompt}", n_images)
        n_places = prompt.count(self.placeholder)
        if n_places not in (0, n_images):
            found = f"holds {n_places} {self.placeholder} for {n_images} images"
            raise TaskError(f"prompt {prompt[:60]!r}", found, expected="one for every image, or none at all")
        if self._template is None:
            text = prompt if n_places else self.placeholder * n_images + prompt
            before = "" if system is None else f"{system}\n"
            ids = self._placed(before + text, before + prompt, n_images)
        else:
            text = self._rendered(prompt, 0 if n_places else n_images, system)
            start = self.preprocessor.tokenizer.bos_token
            ids = self._ids(text, n_images, has_special=not start or not text.startswith(start))
        if not self._has_places(ids, n_images):
            found = f"its processor makes {ids.count(self.image_token)} tokens of {n_images} images"
            raise ModelError(self._place, found, expected=f"{self.image_tokens} for each, as the model has features")
        return ids

    def _placed(self, text: str, bare: str, n_images: int) -> list[int]:
        """The ids of a text with its placeholders; `bare` is without those that were added for the images.

        A processor may put images and special tokens there by itself (that of Florence-2), and then takes no others.
        """
        ids: list[int] = []
        problem: ModelError | None = None
        try:
            ids = self._ids(text, n_images, has_special=True)
        except ModelError as error:
            problem = error
        if self._processor is None or text == bare or self._has_places(ids, n_images):
            if problem is not None:
                raise problem
            return ids
        try:
            own = self._processed(bare, n_images)
        except ModelError:  # then the first way tells what is wrong
            own = []
        if self._has_places(own, n_images):
            return own
        if problem is not None:
            raise problem
        return ids

    def _beside_image(self, text: str, n_images: int) -> list[int]:
        """A text and one image, for which no word stands."""
        if n_images != 1:
            expected = "one: the model reads a single image beside a text"
            raise TaskError(f"prompt {text[:60]!r}", f"comes with {n_images} images", expected=expected)
        ids = self._ids_of_text(text, has_special=not self.start_tokens)
        return [*[self.image_token] * self.image_tokens, *self.start_tokens, *ids]

    def encode_answer(self, text: str) -> list[int]:
        """The ids of an answer behind a prompt, the one that ends it last.

        Behind a chat template it begins without a space, behind plain text with one.

        Raises:
            ModelError: the model names no token that ends an answer.
        """
        ids = self._plain_ids(text)
        begins_word = ids and str(self._token(ids[0])).startswith(_SPACE_OF_SENTENCEPIECE)  # it adds the space itself
        if self._template is None and not begins_word:
            ids = self._plain_ids(f" {text}")
        return [*ids, self._end_token]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids up to the first that ends an answer, or that is padding below zero."""
        ends = frozenset(self.end_tokens)
        kept = list(takewhile(lambda token: token >= 0 and token not in ends, map(int, ids)))
        return str(self.preprocessor.tokenizer.decode(kept, skip_special_tokens=True)).strip()

    @cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """The ids that end an answer, as the model's generation configuration or its configuration states them, else
        the tokenizer's."""
        if self.stop_tokens:
            return self.stop_tokens
        configuration = self.preprocessor.configuration
        stated = (
            self._generation_configuration.get("eos_token_id"),
            configuration.get("eos_token_id"),
            (configuration.get("text_config") or {}).get("eos_token_id"),
            self.preprocessor.tokenizer.eos_token_id,
        )
        first = next((found for found in stated if found is not None), None)
        if first is None:
            expected = "eos_token_id in generation_config.json or config.json"
            raise ModelError(self._place, "names no token that ends an answer", expected=expected)
        return tuple(map(int, first)) if isinstance(first, list) else (int(first),)

    @property
    def repetition_penalty(self) -> float:
        """By how much the logits of tokens that were read shrink, as the generation configuration states it."""
        return float(self._generation_configuration.get("repetition_penalty") or 1.0)

    @cached_property
    def _generation_configuration(self) -> Mapping[str, Any]:
        return read_json(self.preprocessor.folder / "generation_config.json")

    @cached_property
    def pad_token(self) -> int:
        """An id to fill rows with; it stands for no image."""
        found = self.preprocessor.tokenizer.pad_token_id
        usable = (found, *self.end_tokens)
        return next(int(token) for token in usable if token is not None and token != self.image_token)

    @cached_property
    def placeholder(self) -> str:
        """The text that stands for an image in a prompt.

        Raises:
            ModelError: the tokenizer does not know the token.
        """
        if self._processor is not None:
            return str(self._processor.image_token)
        found = self._token(self.image_token)
        if not found or found == self.preprocessor.tokenizer.unk_token:
            raise ModelError(self._place, f"its tokenizer has no token {self.image_token}, which stands for images")
        return str(found)

    def processor_places(self) -> int | None:
        """The places that the folder's processor makes of one image; None where it names none, or it fails."""
        if self._processor is None or self.image_token < 0:
            return None
        try:
            made = replace(self, processor_tokens=0)._ids(self.placeholder, 1, has_special=False)
        except ModelError:
            return None
        return made.count(self.image_token)

    @property
    def _place(self) -> str:
        return str(self.preprocessor.folder)

    @property
    def _processor(self) -> Any | None:
        return self.preprocessor.processor

    def _token(self, token: int) -> str | None:
        found: str | None = self.preprocessor.tokenizer.convert_ids_to_tokens(token)
        return found

    @cached_property
    def _template(self) -> str | None:
        """The chat template; one of an own file counts before the tokenizer's."""
        stated = read_json(self.preprocessor.folder / "chat_template.json").get("chat_template")
        if isinstance(stated, str) and not (self.preprocessor.folder / "chat_template.jinja").is_file():
            return stated
        if self.preprocessor.tokenizer.chat_template is None:
            return None
        try:
            return str(self.preprocessor.tokenizer.get_chat_template())
        except ValueError as problem:
            found = f"has several chat templates and no default ({problem})"
            raise ModelError(self._place, found, expected="one called default") from problem

    def _rendered(self, prompt: str, n_images: int, system: str | None) -> str:
        """The conversation up to where the answer begins.

        Templates of language models take a plain text for a message, those of models with images a list of entries;
        which one this is shows in what comes out.

        Raises:
            ModelError: neither way gives every image and the text.
        """
        texts = [{"type": "text", "text": prompt}] if prompt else []
        mixed = self._apply([*[{"type": "image"}] * n_images, *texts], system and [{"type": "text", "text": system}])
        n_places = n_images + prompt.count(self.placeholder)
        if self._is_whole(mixed, prompt, n_places):
            return mixed
        plain = self._apply(self.placeholder * n_images + prompt, system)
        if self._is_whole(plain, prompt, n_places):
            return plain
        raise ModelError(
            self._place,
            f"its chat template makes no prompt of a message with {n_images} images and a text",
            expected=f"a template that writes {self.placeholder} for an image",
        )

    def _is_whole(self, rendered: str, prompt: str, n_places: int) -> bool:
        # a template that cannot read a list may print it, hence the look at what a list's entries are called
        is_printed = "'type':" in rendered and "'type':" not in prompt
        return rendered.count(self.placeholder) == n_places and prompt.strip() in rendered and not is_printed

    def _apply(self, content: object, system: object = None, *, answer: object = None) -> str:
        """The rendered conversation; nothing where the template refuses such content."""
        messages = [{"role": "user", "content": content}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        try:
            made = self.preprocessor.tokenizer.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, add_generation_prompt=answer is None
            )
        except TEMPLATE_FAILURES:  # it is asked again with plain texts, and refused after that
            return ""
        return str(made)

    def _ids(self, text: str, n_images: int, *, has_special: bool) -> list[int]:
        if self._processor is None:
            made = self._ids_of_text(text, has_special=has_special)
            return [token for own in made for token in [own] * (self.image_tokens if own == self.image_token else 1)]
        return self._processed(text, n_images, add_special_tokens=has_special)

    def _has_places(self, ids: Sequence[int], n_images: int) -> bool:
        return ids.count(self.image_token) == n_images * self.image_tokens

    def _processed(self, text: str, n_images: int, **settings: bool) -> list[int]:
        """What the processor makes of a text with images, all of which come out in one size."""
        assert self._processor is not None
        size = self.preprocessor.image_size or (1, 1)
        images = [Image.new("RGB", size[::-1]) for _ in range(n_images)]
        try:
            made = self._processor(images=images or None, text=[text], **settings)["input_ids"]
        except Exception as problem:
            found = f"its processor fails on a prompt of {n_images} images ({problem})"
            raise ModelError(self._place, found) from problem
        return self._thinned([int(token) for token in made[0]], n_images)

    def _thinned(self, ids: list[int], n_images: int) -> list[int]:
        """The ids with as many places as an image has features, where the processor makes those of the original."""
        n_made, seen, kept = self.processor_tokens, 0, list[int]()
        if not n_made or ids.count(self.image_token) != n_images * n_made:
            return ids
        for token in ids:
            if token != self.image_token or seen % n_made < self.image_tokens:
                kept.append(token)
            seen += token == self.image_token
        return kept

    def _plain_ids(self, text: str) -> list[int]:
        return self._ids_of_text(text, has_special=False)

    def _ids_of_text(self, text: str, *, has_special: bool) -> list[int]:
        return [int(token) for token in self.preprocessor.tokenizer(text, add_special_tokens=has_special)["input_ids"]]

    @cached_property
    def _end_token(self) -> int:
        """The end that an answer is taught with: the one the chat template writes, else the tokenizer's own."""
        own = self.preprocessor.tokenizer.eos_token_id
        usual = int(own) if own in self.end_tokens else self.end_tokens[0]
        if self._template is None:
            return usual
        for content, answer in (([{"type": "text", "text": _PROBE}],) * 2, (_PROBE, _PROBE)):
            _, found, tail = self._apply(content, answer=answer).rpartition(_PROBE)
            behind = self._plain_ids(tail) if found else []
            if ends := [token for token in behind if token in self.end_tokens]:
                return ends[0]
        return usual
