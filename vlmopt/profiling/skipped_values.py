"""Features or outputs of a component without each of some sets of branches, on a sample of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from vlmopt.core.program import Program
from vlmopt.core.progress import Progress
from vlmopt.core.workload import Feed, Workload
from vlmopt.graph.branches import find_branches
from vlmopt.graph.replay import Replay, Skips
from vlmopt.profiling.estimator import Checkpoint, refuse_not_finite
from vlmopt.profiling.part import feeds_of_rows, rows_of
from vlmopt.profiling.passes import PassCounter


@dataclass(frozen=True)
class SkippedValues:
    """`whole` and one value a subset, [n, ...] each, and the cost of both in full passes of one sample."""

    whole: Tensor
    without: tuple[Tensor, ...]
    forward_passes: float


def skipped_values(
    program: Program,
    name: str,
    workload: Workload,
    target: fx.Node,
    subsets: Sequence[Skips],
    *,
    rows: Tensor,
    progress: Progress,
    checkpoint: Checkpoint,
    what: str,
) -> SkippedValues:
    """The target's value for these rows of a component, with nothing skipped and with every subset skipped.

    Raises:
        ProfileError: a value is no finite number; names the batch and the branches skipped.
    """
    component = program.components[name]
    replay = Replay(component, find_branches(component.graph), target)
    wanted = [frozenset[str](), *subsets]
    parts: list[Tensor] = []
    size = rows_of(workload.feeds[name][0]) if len(rows) else 1
    batches = feeds_of_rows(workload.feeds[name], rows)
    for i, feed in enumerate(progress.track(batches, f"{what} {name}", total=-(-len(rows) // size))):
        found = checkpoint(f"{name}-{i:05d}", partial(_stacked, replay, feed, wanted))["values"]
        for skipped, value in zip(wanted, found, strict=True):
            refuse_not_finite(value, place=f"{name}, batch {i}", skipped=skipped)
        parts.append(found)
    values = torch.cat(parts, dim=1)
    passes = len(rows) * PassCounter(program, workload.feeds).replay(replay, wanted)
    return SkippedValues(values[0], tuple(values[1:]), passes)


def _stacked(replay: Replay, feed: Feed, subsets: Sequence[Skips]) -> dict[str, Tensor]:
    return {"values": torch.stack(replay.variants(feed, subsets))}
