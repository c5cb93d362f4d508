"""Statistics of nodes on task data, as passes ask for them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.passes.test_low_rank import batch, blocks
from vlmopt.core.contract import StatRequest
from vlmopt.core.progress import Silent
from vlmopt.profiling.node_statistics import node_statistics


class _Workload:
    """Feeds of a component, an item a row."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.n_items = x, len(x)
        self.feeds = {"model": [{"x": x}]}

    def part(self, items: Sequence[int]) -> _Workload:
        return _Workload(self.x[list(items)])


def test_statistics_of_nodes_are_those_of_their_rows() -> None:
    program, x = blocks(), batch()
    graph = program.components["model"].graph
    node = next(n for n in graph.graph.nodes if n.op == "placeholder")
    wanted = [StatRequest("model", node.name, name) for name in ("mean", "absmax", "second_moment", "rows")]
    found = node_statistics(program, wanted, _Workload(x), Silent())  # type: ignore[arg-type]
    rows = x.reshape(-1, 8)
    assert torch.allclose(found[wanted[0]], rows.mean(0))
    assert torch.equal(found[wanted[1]], rows.abs().amax(0))
    assert torch.allclose(found[wanted[2]], rows.T @ rows / len(rows))
    drawn, known = found[wanted[3]], {tuple(row) for row in rows.float().tolist()}
    assert drawn.shape == rows.shape
    assert {tuple(row) for row in drawn.tolist()} == known


def test_each_row_of_a_value_has_its_own_variance_over_items() -> None:
    x = batch() * torch.tensor([0.0, 1.0, 3.0])[None, :, None]
    node = next(n for n in blocks().components["model"].graph.graph.nodes if n.op == "placeholder")
    wanted = StatRequest("model", node.name, "row_variance")
    found = node_statistics(blocks(), [wanted], _Workload(x), Silent())  # type: ignore[arg-type]
    assert torch.allclose(found[wanted], x.double().var(0, unbiased=False).mean(-1))
    assert found[wanted].argsort().tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (StatRequest("model", "nowhere", "mean"), "model/nowhere is no node"),
        (StatRequest("elsewhere", "x", "mean"), "elsewhere/x is no node"),
        (
            StatRequest("model", "x", "median"),
            "the statistic 'median'; expected mean, absmax, second_moment, rows, ",
        ),
    ],
)
def test_a_statistic_that_is_not_there_is_refused(request_: StatRequest, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        node_statistics(blocks(), [request_], _Workload(batch()), Silent())  # type: ignore[arg-type]


def test_only_tokens_of_the_prompt_count() -> None:
    workload = _Workload(batch())
    mask, labels = torch.tensor([[0, 1, 1]]), torch.tensor([[-100, -100, 5]])
    workload.part = lambda items: _Text(workload.x[list(items)], mask, labels)  # type: ignore[method-assign, assignment]
    program = blocks()
    node = next(n for n in program.components["model"].graph.graph.nodes if n.op == "placeholder")
    wanted = StatRequest("model", node.name, "mean")
    found = node_statistics(program, [wanted], workload, Silent())  # type: ignore[arg-type]
    assert torch.allclose(found[wanted], batch()[:, 1].mean(0))


class _Text(_Workload):
    def __init__(self, x: Tensor, mask: Tensor, labels: Tensor) -> None:
        super().__init__(x)
        self.feeds = {"model": [{"x": x, "attention_mask": mask, "labels": labels}]}
