"""Statistics of single values: those of the numbers themselves, without padding and without answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from vlmopt.core.contract import StatRequest
from vlmopt.core.errors import ProfileError
from vlmopt.core.progress import Silent
from vlmopt.core.workload import Feed
from vlmopt.graph.example import program_of
from vlmopt.profiling.node_statistics import collect_statistics


class Doubled(nn.Module):
    def forward(self, x: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        return torch.relu(x * 2.0) + attention_mask.sum() + labels.sum()


@dataclass(frozen=True)
class Fed:
    """As much of a workload as statistics read."""

    feeds: Mapping[str, Sequence[Feed]]


def test_statistics_are_those_of_the_tokens_of_prompts() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, 100.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    labels = torch.tensor([[-100, -100, 7], [-100, -100, -100]])
    program = program_of(Doubled(), x, mask, labels)
    node = next(n.name for n in program.components["model"].graph.graph.nodes if n.target is torch.ops.aten.mul.Tensor)
    names = [spec.name for spec in program.components["model"].inputs]
    feeds = [dict(zip(names, (x[i : i + 1], mask[i : i + 1], labels[i : i + 1]), strict=True)) for i in range(2)]
    assert names == ["x", "attention_mask", "labels"]
    requests = [StatRequest("model", node, what) for what in ("mean", "absmax", "second_moment")]
    found = collect_statistics(program, requests, Fed({"model": feeds}), progress=Silent())  # type: ignore[arg-type]
    counted = [2.0, -4.0, 8.0, 10.0]
    assert [found[one] for one in requests] == [sum(counted) / 4, 10.0, sum(value**2 for value in counted) / 4]
    for wrong, message in (
        (StatRequest("model", node, "median"), "median"),
        (StatRequest("model", "nil", "mean"), "nil"),
    ):
        with pytest.raises(ProfileError, match=message):
            collect_statistics(program, [StatRequest("model", *wrong)], Fed({"model": feeds}), progress=Silent())  # type: ignore[arg-type]
