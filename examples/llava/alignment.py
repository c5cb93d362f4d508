"""Where training begins: features are whitened, and the projector learns which words an image is about before the
language model runs at all.

A step through the language model costs half a second here and a step of this stage a fraction, so what can be learnt
without it is learnt first: the mean of an image's projected features is to point at the mean embedding of the answer's
tokens, among all answers of its task (cross-entropy of cosines). The size of a projected feature is held at that of an
embedding.

Features of the backbone have a variance that spans orders of magnitude, so they are whitened for training; that is
linear, and is folded into the first layer of the projector when the tensors are written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lessons import Course, Lesson, batches
from torch import Tensor, nn

RIDGE = 0.1  # of the mean eigenvalue, so that directions of no variance are not blown up
STEPS, BATCH, LEARNING_RATE = 300, 96, 1e-3
FIRST_SCALE = 14.0  # 1 / 0.07, CLIP's
SIZE_WEIGHT = 0.1


@dataclass(frozen=True)
class Whitening:
    """`(x - mean) @ matrix` has nearly unit covariance. Shapes: mean [D], matrix [D, D], symmetric."""

    mean: Tensor
    matrix: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Whitening:
        """Of features [I, N, D]."""
        flat = features.flatten(0, 1).float()
        mean = flat.mean(0)
        centered = flat - mean
        values, vectors = torch.linalg.eigh((centered.T @ centered / len(flat)).double())
        values = values.clamp(min=0)
        root = vectors * (values + RIDGE * values.mean()).rsqrt() @ vectors.T
        return cls(mean, root.float())

    def __call__(self, features: Tensor) -> Tensor:
        return (features.float() - self.mean) @ self.matrix

    def folded(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of the layer that does with plain features what the given one does with whitened ones."""
        plain = weight @ self.matrix
        return plain, bias - plain @ self.mean

    def to(self, device: torch.device) -> Whitening:
        return Whitening(self.mean.to(device), self.matrix.to(device))


def align(projector: Any, embedding: Tensor, course: Course, whitening: Whitening, *, seed: int, steps: int) -> float:
    """Train the projector on whitened features; returns the share of right answers in the last tenth of the steps.

    `embedding` [V, D] is that of the language model.
    """
    texts = {name: _Answers.of(lessons, embedding) for name, lessons in course.lessons.items()}
    size = embedding.float().square().mean().sqrt()
    _scale_output(projector, course, whitening, size)
    scale = nn.Parameter(torch.tensor(FIRST_SCALE, device=embedding.device).log())
    optimizer = torch.optim.AdamW([*projector.parameters(), scale], lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    n_right = n_seen = 0
    for step, batch in zip(range(steps), batches(course, size=BATCH, seed=seed), strict=False):
        projected = _projected(projector, course, whitening, batch)
        pooled = F.normalize(projected.mean(1), dim=-1) * scale.exp()
        losses = SIZE_WEIGHT * (projected.square().mean(-1).sqrt() / size - 1).square().mean()
        for name in {lesson.task for lesson in batch}:
            rows = [row for row, lesson in enumerate(batch) if lesson.task == name]
            wanted = torch.tensor([texts[name].places[batch[row].answer] for row in rows], device=pooled.device)
            scores = pooled[rows] @ texts[name].vectors.T
            losses = losses + F.cross_entropy(scores, wanted, reduction="sum") / len(batch)
            if step >= 0.9 * steps:
                n_right, n_seen = n_right + int((scores.argmax(1) == wanted).sum()), n_seen + len(rows)
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
        schedule.step()
    return n_right / max(n_seen, 1)


@dataclass(frozen=True)
class _Answers:
    """The different answers of one task and the directions of their words, [A, D]."""

    places: dict[tuple[int, ...], int]
    vectors: Tensor

    @classmethod
    def of(cls, lessons: list[Lesson], embedding: Tensor) -> _Answers:
        different = list(dict.fromkeys(lesson.answer for lesson in lessons))
        center = embedding.float().mean(0)
        # the last token only ends the answer
        means = torch.stack([embedding[list(answer[:-1])].float().mean(0) for answer in different])
        return cls({answer: place for place, answer in enumerate(different)}, F.normalize(means - center, dim=-1))


def _projected(projector: Any, course: Course, whitening: Whitening, batch: list[Lesson]) -> Tensor:
    features = course.features[[lesson.image for lesson in batch]]
    return projector(whitening(features.to(whitening.mean.device)))


@torch.no_grad()
def _scale_output(projector: Any, course: Course, whitening: Whitening, size: Tensor) -> None:
    """Make projected features as large as embeddings from the start."""
    some = projector(whitening(course.features[:64].to(whitening.mean.device)))
    projector.linear_2.weight *= size / some.square().mean().sqrt()
