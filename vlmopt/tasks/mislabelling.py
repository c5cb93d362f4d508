"""Wrong labels on purpose, to see how much a result depends on the right ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def chosen_items(n_items: int, share: float, *, seed: int) -> Tensor:
    """This share of the items, rounded up, in random order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(n_items, generator=generator)[: math.ceil(share * n_items)]


def mislabelled(targets: Tensor, n_labels: int, share: float, *, seed: int) -> Tensor:
    """Classes [n] of which a share is another class, each of the others as likely; with one class nothing changes."""
    result = targets.clone()
    if n_labels > 1:
        items = chosen_items(len(targets), share, seed=seed)
        steps = torch.randint(1, n_labels, (len(items),), generator=torch.Generator().manual_seed(seed + 1))
        result[items] = (targets[items] + steps) % n_labels
    return result
