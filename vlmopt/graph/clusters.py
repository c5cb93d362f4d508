"""Means whose items come in groups (drawings of one concept, questions about one scene)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def clustered(values: Tensor, groups: Sequence[str]) -> tuple[float, float]:
    """Mean of values [n] and its standard error; items of one group count as one observation.

    Source: the linearised variance of a ratio of cluster totals.
    """
    mean = float(values.mean())
    names = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    if len(names) < 2:
        return mean, float("nan")
    totals = torch.zeros(len(names), dtype=torch.float64)
    totals.index_add_(0, torch.tensor([names[group] for group in groups]), values.double() - mean)
    count = len(names)
    return mean, float(((totals**2).sum() * count / (count - 1)).sqrt() / len(values))
