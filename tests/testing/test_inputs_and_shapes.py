"""Inputs are valid tokens and masks; stale shapes are found, frozen dimensions included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vlmopt.core.program import Assembly, Dim, Program
from vlmopt.graph.example import ResidualBlocks, component_of, program_from, program_of
from vlmopt.graph.modules import output_values
from vlmopt.testing.inputs import feeds_of, make_feeds, sizes_of
from vlmopt.testing.shapes import stale_metadata


class _Reader(nn.Module):
    """Tokens through an embedding, positions through an index, a mask that leaves entries out."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.places = nn.Parameter(torch.ones(3, 4))

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        hidden = self.words(tokens.view(tokens.shape[0], -1)) + self.places[positions]
        return hidden.masked_fill(mask[:, :, None] == 0, 0.0)


@pytest.fixture(scope="module")
def reader() -> Program:
    tokens, positions, mask = (torch.zeros(2, 3, dtype=torch.int64) for _ in range(3))
    return program_from({"model": component_of(_Reader(), tokens, positions, mask)}, Assembly.FUSED)


def test_tokens_positions_and_masks_are_valid(reader: Program) -> None:
    for kind, feeds in make_feeds(reader, seed=0).items():
        feed = feeds["model"]
        assert int(feed["tokens"].max()) <= 4
        assert int(feed["positions"].max()) <= 2
        assert set(feed["mask"].unique().tolist()) <= {0, 1}
        assert bool(feed["mask"][:, 0].all()), kind
    large = feeds_of((reader,), kind="large", seed=0)["model"]
    assert (int(large["tokens"].min()), int(large["positions"].min())) == (4, 2)
    drawn = feeds_of((reader,), kind="random", seed=0, batch=50)["model"]
    assert (int(drawn["tokens"].max()), int(drawn["positions"].max())) == (4, 2)
    assert drawn["mask"].unique().tolist() == [0, 1]


def test_sizes_stay_within_the_bounds_of_their_dimensions() -> None:
    dims = {"batch": Dim("batch", 1, 3, 1), "text": Dim("text", 2, 8, 8)}
    assert sizes_of(dims, batch=5, more=2) == {"batch": 3, "text": 8}
    assert sizes_of(dims, batch=2, more=-7) == {"batch": 2, "text": 2}


def program() -> Program:
    return program_of(ResidualBlocks(), torch.ones(2, 8))


def test_what_was_captured_is_fresh(reader: Program) -> None:
    for made in (program(), reader):
        assert stale_metadata(made.components["model"], made.dims) == ""


def test_missing_and_other_shapes_are_found() -> None:
    made = program()
    node = output_values(made.components["model"].graph)[0]
    value = node.meta.pop("val")
    assert stale_metadata(made.components["model"], made.dims) == "node head has no shape metadata"
    node.meta["val"] = value.to(torch.float64)
    assert "node head says float64" in stale_metadata(made.components["model"], made.dims)


def test_a_dimension_that_was_frozen_at_the_sample_is_found() -> None:
    made = program()
    node = output_values(made.components["model"].graph)[0]
    node.meta["val"] = torch.empty(2, 3, device="meta")
    assert "node head says float32[2, 3], and computes float32[s" in stale_metadata(made.components["model"], made.dims)


def test_shapes_that_do_not_fit_are_found() -> None:
    made = program()
    graph = made.components["model"].graph
    graph.get_submodule("head").weight = nn.Parameter(torch.ones(3, 9))
    assert "node head cannot be given a shape" in stale_metadata(made.components["model"], made.dims)
