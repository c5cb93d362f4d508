"""What is taught: the profile split of every task as prompts, answers and cached features of the images.

Prompts and answers come from vlmopt itself (`load_task`, `Prompter`), so training asks exactly as evaluation does, and
cannot see another split: `Task.samples("profile")` is all that is read here.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
from assembly import FEATURE_LAYER
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from vlmopt.preprocess import Preprocessor
from vlmopt.prompting import Prompter
from vlmopt.tasks.dataset import Task, load_task

SHARES = {"what": 0.4, "style": 0.35, "vegetarian": 0.25}  # of the lessons; there are eleven times fewer foods
_ENCODED_AT_ONCE = 32


@dataclass(frozen=True)
class Lesson:
    """One question with its answer, as token ids; `image` is a row of the features."""

    task: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    image: int


@dataclass(frozen=True)
class Course:
    """All lessons by task, and what they show. Shapes: features [I, N, D], float16."""

    lessons: dict[str, list[Lesson]]
    features: Tensor
    fingerprint: str


def load_course(model: Any, folder: Path, tasks: Sequence[Path], features: Path) -> Course:
    """The lessons of the profile splits of the task folders.

    `model` is the LLaVA model whose tower sees the images, `folder` its processor; what the tower sees is kept in
    `features`.
    """
    preprocessor = Preprocessor.load(folder)
    config = model.config
    prompter = Prompter(preprocessor, config.image_token_id, config.image_seq_length)
    loaded = {path.name: load_task(path) for path in tasks}
    samples = {name: task.samples("profile") for name, task in loaded.items()}
    places: dict[Path, int] = {}  # two tasks ask about one image by different ways to its file
    for sample in (sample for some in samples.values() for sample in some):
        places.setdefault(sample.image.path.resolve(), len(places))
    prompts = {
        text: tuple(prompter.encode(text, 1)) for text in {sample.text for some in samples.values() for sample in some}
    }
    lessons = {
        name: [
            Lesson(
                name,
                prompts[sample.text],
                tuple(prompter.encode_answer(sample.label)),
                places[sample.image.path.resolve()],
            )
            for sample in some
        ]
        for name, some in samples.items()
    }
    fingerprint = _digest([task.fingerprint for task in loaded.values()])
    key = _digest([fingerprint, *(hash_ for task in loaded.values() for hash_ in _profile_hashes(task))])
    file = features / f"features-{key[:12]}.safetensors"
    seen = _cached(file, lambda: encode(model, preprocessor, list(places)))
    return Course(lessons, seen, fingerprint)


def _profile_hashes(task: Task) -> list[str]:
    hashes = task.image_hashes()
    return [hashes[sample.image.name] for sample in task.samples("profile")]


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _cached(file: Path, compute: Callable[[], Tensor]) -> Tensor:
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        save_file({"features": compute().half().contiguous()}, partial)
        partial.rename(file)
    return load_file(file)["features"]


@torch.inference_mode()
def encode(model: Any, preprocessor: Preprocessor, images: Sequence[Path]) -> Tensor:
    """What the projector reads of every image, [I, N, D]: a layer of the tower without the class token."""
    tower: nn.Module = model.model.vision_tower
    device = next(tower.parameters()).device
    found = []
    for start in tqdm(range(0, len(images), _ENCODED_AT_ONCE), desc="features", delay=2, disable=None):
        pixels = preprocessor.images(images[start : start + _ENCODED_AT_ONCE])["pixel_values"]
        hidden = tower(torch.from_numpy(pixels).to(device), output_hidden_states=True).hidden_states
        found.append(hidden[FEATURE_LAYER][:, 1:].cpu())
    return torch.cat(found).clone()


def batches(course: Course, *, size: int, seed: int, first: int = 0) -> Iterator[list[Lesson]]:
    """Batches without end from number `first` on; what is in a batch depends on its number and the seed alone, which is
    what lets training go on where it stopped.

    Every batch takes from each task its share, the tasks' lessons in an order that is drawn anew for each pass. Rows of
    all tasks are of nearly one length (51 to 60 tokens, most of them the image's), so mixing costs little padding.
    """
    for number in count(first):
        batch: list[Lesson] = []
        for name, n in _counts(size).items():
            lessons = course.lessons[name]
            places = range(number * n, (number + 1) * n)
            batch += [
                lessons[_order(len(lessons), place // len(lessons), seed)[place % len(lessons)]] for place in places
            ]
        yield batch


def _counts(size: int) -> dict[str, int]:
    """How many lessons of a batch each task gets; rounding is made up for by the first."""
    counts = {name: round(share * size) for name, share in SHARES.items()}
    first = next(iter(counts))
    counts[first] += size - sum(counts.values())
    return counts


@cache
def _order(n: int, turn: int, seed: int) -> list[int]:
    return random.Random(f"{seed}/{n}/{turn}").sample(range(n), n)
