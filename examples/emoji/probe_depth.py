"""How deep the backbone has to be for each question: a linear head in closed form after 2, 4, ... 12 layers.

A prediction for what a compiler should find: the drawing style is legible early and blurs later, the meaning needs the
upper layers. Fitted on the profile split, scored on validation; the test split is not read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from concepts import Row
from features import DEPTHS, Features
from fetch import cache_root
from make_tasks import read_rows
from torch import Tensor

RIDGE = 1e-2  # of standardised features; 1e-4 to 1e-1 differ by at most three points
QUESTIONS = {"style": "style", "meaning": "group"}


def ridge(features: Tensor, targets: Tensor, *, n_classes: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of the least-squares classifier onto one-hot targets, on standardised features."""
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    standard = (features - mean) / deviation
    wanted = F.one_hot(targets, n_classes).to(features.dtype)
    share = wanted.mean(0)
    moment = standard.T @ standard / len(features)
    moment += RIDGE * torch.eye(len(moment), dtype=features.dtype)
    weight = torch.linalg.solve(moment, standard.T @ (wanted - share) / len(features)) / deviation[:, None]
    return weight, share - mean @ weight


def accuracy(features: Tensor, rows: Sequence[Row], column: str) -> float:
    """Percent of validation items that the head fitted on profile items gets right."""
    labels = sorted({row[column] for row in rows})
    targets = torch.tensor([labels.index(row[column]) for row in rows])
    profile, validation = (_mask(rows, split) for split in ("profile", "validation"))
    weight, bias = ridge(features[profile], targets[profile], n_classes=len(labels))
    found = (features[validation] @ weight + bias).argmax(1)
    return 100 * (found == targets[validation]).double().mean().item()


def _mask(rows: Sequence[Row], split: str) -> Tensor:
    return torch.tensor([row["split_concept"] == split for row in rows])


def main() -> int:
    images = Path(cache_root() / "emoji" / "images")
    rows = read_rows(images)
    by_depth = Features(images, rows).by_depth().double()
    print("layers  " + "  ".join(f"{question:>7}" for question in QUESTIONS))
    for index, depth in enumerate(DEPTHS):
        scores = [accuracy(by_depth[:, index], rows, column) for column in QUESTIONS.values()]
        print(f"{depth:>6}  " + "  ".join(f"{score:7.1f}" for score in scores))
    return 0


if __name__ == "__main__":
    sys.exit(main())
