"""The loss of tuning, against sums by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tests.profiling.workloads import Classification
from vlmopt.tuning.objective import Teacher, objective

OUTPUT = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
TEACHER_OUTPUT = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
FEATURES, TEACHER_FEATURES = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [3.0, 3.0]])
WORKLOAD = Classification(torch.zeros(2, 8), torch.tensor([0, 1]), ("a", "b"))


def loss(*, distillation: float, are_logits: bool = True, features: float = 0.0) -> float:
    teacher = Teacher({"model": TEACHER_OUTPUT}, {"model": TEACHER_FEATURES}, are_logits)
    outputs, own = {"model": OUTPUT}, {"model": FEATURES}
    found = objective(WORKLOAD, outputs, own, teacher, distillation=distillation, feature_distillation=features)
    assert found.dtype == torch.float64
    return float(found)


def cross_entropy() -> float:
    return (math.log(1 + math.exp(-2.0)) + math.log(1 + math.exp(-1.0))) / 2


def divergence(temperature: float) -> float:
    total = 0.0
    for found, wanted in zip(OUTPUT.tolist(), TEACHER_OUTPUT.tolist(), strict=True):
        p, q = (
            [math.exp(v / temperature) / sum(math.exp(w / temperature) for w in row) for v in row]
            for row in (wanted, found)
        )
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / 2 * temperature**2


def test_without_distillation_it_is_the_loss_of_the_task() -> None:
    assert loss(distillation=0.0) == pytest.approx(cross_entropy(), abs=1e-12)


def test_distillation_alone_needs_no_labels() -> None:
    assert loss(distillation=1.0) == pytest.approx(divergence(2.0), abs=1e-12)


def test_features_are_compared_by_their_angle_where_they_count() -> None:
    angle = (1.0 + 0.0) / 2  # one pair of features is at a right angle, the other parallel
    assert loss(distillation=0.0, features=3.0) == pytest.approx(cross_entropy() + 3 * angle, abs=1e-12)


def test_embeddings_are_compared_by_their_angle() -> None:
    assert loss(distillation=1.0, are_logits=False) == pytest.approx(0.0, abs=1e-12)
    assert loss(distillation=1.0, are_logits=False, features=1.0) == pytest.approx(0.5, abs=1e-12)


def test_the_two_are_mixed_by_their_share() -> None:
    mixed = 0.75 * cross_entropy() + 0.25 * divergence(2.0) + 0.5
    assert loss(distillation=0.25, features=1.0) == pytest.approx(mixed, abs=1e-12)


def test_the_rows_of_a_batch_are_taken_from_every_component() -> None:
    teacher = Teacher({"model": TEACHER_OUTPUT}, {"model": TEACHER_FEATURES}, are_logits=True)
    part = teacher.of_rows({"model": [1, 0, 1]})
    assert torch.equal(part.outputs["model"], TEACHER_OUTPUT[[1, 0, 1]])
    assert torch.equal(part.features["model"], TEACHER_FEATURES[[1, 0, 1]])
