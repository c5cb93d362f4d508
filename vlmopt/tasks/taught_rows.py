"""Prompts with the answers that are taught, as the rows that a model reads in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vlmopt.core.errors import TaskError
from vlmopt.core.program import Program, TensorSpec
from vlmopt.core.workload import Feed
from vlmopt.tasks.feeding import IMAGE_INPUTS, Feeder, text_lengths
from vlmopt.tasks.images import ImageSource
from vlmopt.tasks.splits import Sample

NO_LABEL = -100


@dataclass(frozen=True)
class Prompt:
    """What a model reads before it writes: token ids with every image in its places, and the images in order."""

    token_ids: tuple[int, ...]
    images: tuple[ImageSource, ...]


@dataclass(frozen=True, eq=False)
class TaughtRows:
    """Prompts with their answers, padded on the left to one length for the whole split."""

    program: Program
    prompts: Sequence[Prompt]
    answers: Sequence[Sequence[int]]
    feeder: Feeder
    pad: int

    @cached_property
    def length(self) -> int:
        return max(self._lengths)

    @property
    def _lengths(self) -> list[int]:
        return [len(prompt.token_ids) + len(own) for prompt, own in zip(self.prompts, self.answers, strict=True)]

    @cached_property
    def _inputs(self) -> Mapping[str, TensorSpec]:
        return {spec.name: spec for part in self.program.components.values() for spec in part.inputs}

    def check(self, samples: Sequence[Sample]) -> None:
        """Makes sure that the model can read every row.

        Raises:
            TaskError: one is too long.
        """
        reader = next(part for part in self.program.components.values() if _reads_tokens(part.inputs))
        _, longest = text_lengths(self.program, reader)
        for sample, length in zip(samples, self._lengths, strict=True):
            if length > longest:
                found = f"prompt and answer have {length} tokens"
                raise TaskError(sample.origin, found, expected=f"at most {longest}, which is what the model reads")

    def feed(self, rows: Sequence[int]) -> Feed:
        """The inputs of these rows: tokens, mask and labels [B, S], images [B, C, H, W]."""
        shape = (len(rows), self.length)
        ids, mask, labels = (np.full(shape, value, np.int64) for value in (self.pad, 0, NO_LABEL))
        for place, row in enumerate(rows):
            prompt, answer = self.prompts[row].token_ids, self.answers[row]
            n = len(prompt) + len(answer)
            ids[place, -n:], mask[place, -n:], labels[place, -len(answer) :] = [*prompt, *answer], 1, answer
        texts = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: torch.from_numpy(array) for name, array in texts.items()} | self._images(rows)

    def _images(self, rows: Sequence[int]) -> dict[str, Tensor]:
        arrays = self.feeder.pixels([image for row in rows for image in self.prompts[row].images])
        made = {}
        for name in sorted(IMAGE_INPUTS & arrays.keys() & self._inputs.keys()):
            spec, array = self._inputs[name], arrays[name]
            if array.ndim == len(spec.shape) + 1:  # tiles of an image, or its patches, have an axis of their own
                self._refuse_tiles(array.shape)
                array = array.reshape(-1, *array.shape[2:])
            made[name] = torch.from_numpy(np.ascontiguousarray(array)).to(getattr(torch, spec.dtype))
        return made

    def _refuse_tiles(self, shape: Sequence[int]) -> None:
        if len(shape) == 5 and shape[1] != 1:  # [B, tiles, C, H, W]
            remedy = "switch the splitting of images off in preprocessor_config.json"
            place = str(self.feeder.preprocessor.folder)
            raise TaskError(place, f"cuts an image into {shape[1]}", expected="one picture an image", remedy=remedy)


def _reads_tokens(inputs: Sequence[TensorSpec]) -> bool:
    return any(spec.name == "input_ids" for spec in inputs)
