"""Questions about images answered in words by a generative artifact, as texts in and texts out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from vlmopt.core.errors import ArtifactError
from vlmopt.core.manifest import GenerationEntry
from vlmopt.preprocess import Preprocessor
from vlmopt.prompting import Prompter
from vlmopt.runtime.generation import Decoding, Graphs, Prompt, Timing
from vlmopt.runtime.sampling import Sampling

Picture = Image.Image | str | Path
_UNFINISHED = "\ufffd"  # what a tokenizer decodes a part of a character to


@dataclass(frozen=True)
class Answer:
    """What was written behind one prompt; the tokens include the one that ended it. `timing` is that of the batch, its
    first token with the preprocessing of prompts and images."""

    text: str
    token_ids: tuple[int, ...]
    n_prompt_tokens: int
    timing: Timing


@dataclass(frozen=True)
class Request:
    """A prompt with its images, and how it is to be answered."""

    prompt: str
    images: Sequence[Picture] = ()
    system: str | None = None


@dataclass
class Answering:
    """One batch of requests being answered. Iterating gives, step by step, the new text of every answer; `answers` are
    those so far.

    Raises:
        ArtifactError: a prompt is empty or too long.
        TaskError: an image does not decode, or a prompt has places for another number of images.
    """

    graphs: Graphs
    generation: GenerationEntry
    preprocessor: Preprocessor
    requests: Sequence[Request]
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        self._start = time.perf_counter()
        entry = self.generation
        self._prompter = Prompter.of(self.preprocessor, entry)
        self._prompts = [self._prompt(request) for request in self.requests]
        self._tokens: list[list[int]] = [[] for _ in self.requests]
        self._decoding = Decoding(
            self.graphs,
            entry,
            self._prompts,
            stop_tokens=frozenset(self._prompter.end_tokens),
            sampling=self._sampling(),
            max_new_tokens=self.max_new_tokens,
        )
        self._preparing_s = time.perf_counter() - self._start

    def __iter__(self) -> Iterator[list[str]]:
        shown = [""] * len(self.requests)
        for chosen in self._decoding:
            for tokens, token in zip(self._tokens, chosen.tolist(), strict=True):
                if token >= 0:
                    tokens.append(token)
            texts = [self._prompter.decode(tokens) for tokens in self._tokens]
            whole = [text.removesuffix(_UNFINISHED) for text in texts]
            yield [text[len(old) :] for text, old in zip(whole, shown, strict=True)]
            shown = whole

    def answers(self) -> list[Answer]:
        timing = self._decoding.timing
        timing = replace(timing, first_token_s=timing.first_token_s + self._preparing_s)
        return [
            Answer(self._prompter.decode(tokens), tuple(tokens), len(prompt.token_ids), timing)
            for tokens, prompt in zip(self._tokens, self._prompts, strict=True)
        ]

    def _sampling(self) -> Sampling:
        if self.sampling.repetition_penalty is not None:
            return self.sampling
        return replace(self.sampling, repetition_penalty=self._prompter.repetition_penalty)

    def _prompt(self, request: Request) -> Prompt:
        if not request.prompt.strip() and not self.generation.writes_unasked:
            raise ArtifactError("the prompt", "is empty", expected="a question or an instruction")
        images = list(request.images)
        ids = tuple(self._prompter.encode(request.prompt, len(images), system=request.system))
        return Prompt(ids, self.preprocessor.images(images) if images else None)


def answered(answering: Answering, on_text: Callable[[int, str], None] | None = None) -> list[Answer]:
    """All answers, to the end; `on_text` is given every piece of text as it comes, with the number of its request."""
    for pieces in answering:
        for number, piece in enumerate(pieces):
            if piece and on_text is not None:
                on_text(number, piece)
    return answering.answers()
