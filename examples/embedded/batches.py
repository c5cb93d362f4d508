"""Turns freshly drawn scenes into training batches.

Why chunks: a chunk is made whole from its name (seed, stream and number), so a killed run continues with the very
scenes it would have seen, and no scene has to be stored.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from network import PATCH
from questions import ANSWERS, KINDS, Picker, Question
from scenes import COLOURS, SHAPES, Scene, make_scene, owner_map
from torch import Tensor
from transformers import PreTrainedTokenizerBase

QUESTIONS_PER_SCENE = {"colour": 1, "shape": 1, "count": 1, "relation": 2}
"""Relations are the hardest kind and get the most questions."""


@dataclass(frozen=True)
class Batch:
    """Rows of questions.

    Shapes: ids, mask (B, Nt); pixels (B, 3, 64, 64) in -1..1; kinds, labels (B,); the rest (B, 64), one value a patch.
    """

    ids: Tensor
    mask: Tensor
    pixels: Tensor
    kinds: Tensor
    labels: Tensor
    shapes: Tensor
    colours: Tensor
    first: Tensor
    second: Tensor


def make_chunk(
    name: str, tokenizer: PreTrainedTokenizerBase, *, n_rows: int, has_one_kind_per_scene: bool = False
) -> Batch:
    """Exactly `n_rows` questions of all kinds about new scenes; the same `name` gives the same rows.

    With `has_one_kind_per_scene` each scene gets the questions of one kind only: more scenes for as many rows.
    """
    rng = random.Random(name)
    picker = Picker(rng)
    scenes: list[Scene] = []
    rows: list[tuple[int, Question]] = []
    while len(rows) < n_rows:
        scene = make_scene(rng)
        for kind in [KINDS[len(scenes) % len(KINDS)]] if has_one_kind_per_scene else KINDS:
            rows.extend((len(scenes), question) for question in picker.pick(scene, kind, QUESTIONS_PER_SCENE[kind]))
        scenes.append(scene)
    rng.shuffle(rows)
    return _pack(scenes, rows[:n_rows], tokenizer)


def split(chunk: Batch, n_rows: int) -> Iterator[Batch]:
    """Cut the chunk into pieces of `n_rows`."""
    for start in range(0, len(chunk.labels), n_rows):
        yield Batch(*(getattr(chunk, field.name)[start : start + n_rows] for field in fields(Batch)))


def _pack(scenes: list[Scene], rows: list[tuple[int, Question]], tokenizer: PreTrainedTokenizerBase) -> Batch:
    where = torch.tensor([index for index, _ in rows])
    questions = [question for _, question in rows]
    text = tokenizer([question.text for question in questions], padding=True, return_tensors="pt")
    pixels = torch.from_numpy(np.stack([scene.pixels for scene in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1
    owners = [owner_map(scene, PATCH).flatten() for scene in scenes]
    return Batch(
        ids=text["input_ids"],
        mask=text["attention_mask"],
        pixels=pixels[where],
        kinds=torch.tensor([KINDS.index(question.kind) for question in questions]),
        labels=torch.tensor([ANSWERS.index(question.answer) for question in questions]),
        shapes=_classes(owners, scenes, "shape", SHAPES)[where],
        colours=_classes(owners, scenes, "colour", tuple(COLOURS))[where],
        first=torch.tensor(np.stack([np.isin(owners[i], q.first) for i, q in rows]), dtype=torch.float32),
        second=torch.tensor(np.stack([np.isin(owners[i], q.second) for i, q in rows]), dtype=torch.float32),
    )


def _classes(owners: list[np.ndarray], scenes: list[Scene], field: str, names: tuple[str, ...]) -> Tensor:
    """Per scene and patch 1 + the index of the owner's shape or colour, 0 where the patch is bare."""
    rows = []
    for owner, scene in zip(owners, scenes, strict=True):
        lookup = np.array([*(1 + names.index(getattr(thing, field)) for thing in scene.things), 0])
        rows.append(lookup[owner])
    return torch.from_numpy(np.stack(rows))
