"""Keeps values of the uncut run of every batch, so that a cut is computed from its first skip on, call after call."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from vlmopt.graph.replay import Replay


class Prefixes:
    """Values of the uncut run for all batches of one workload, at as many places as the memory given allows.

    Args:
        n_batches: how many batches share `limit_bytes`.
    """

    def __init__(self, replay: Replay, n_batches: int, limit_bytes: float) -> None:
        self._boundaries = replay.boundaries()
        self._bytes_each = limit_bytes / max(1, n_batches)
        self._batches = [BatchPrefix(self) for _ in range(n_batches)]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, batch: int) -> BatchPrefix:
        return self._batches[batch]

    def wanted(self, values: Mapping[fx.Node, object]) -> dict[fx.Node, object]:
        """Of the values of one batch those that are kept: at every boundary, every second, every third, ..."""
        for stride in range(1, len(self._boundaries) + 1):
            # The last boundary is always among them: most cuts begin late, and the uncut run itself ends there.
            nodes = frozenset[fx.Node]().union(*self._boundaries[::-1][::stride])
            kept = {node: values[node] for node in nodes if node in values}
            if _bytes(kept) <= self._bytes_each:
                return kept
        return {}


class BatchPrefix:
    """What is kept of one batch."""

    def __init__(self, owner: Prefixes) -> None:
        self._owner = owner
        self.values: Mapping[fx.Node, object] = {}

    def keep(self, values: Mapping[fx.Node, object]) -> None:
        """Takes what memory allows, once."""
        if not self.values:
            self.values = self._owner.wanted(values)


def _bytes(values: Mapping[fx.Node, object]) -> int:
    """Memory of the tensors; views of one storage count once."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in values.values()
        if isinstance(value, torch.Tensor)
    }
    return sum(storages.values())
