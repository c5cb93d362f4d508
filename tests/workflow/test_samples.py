"""Drawn inputs: what a graph reads from tables lies within them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vlmopt.graph.example import program_of
from vlmopt.workflow.samples import random_feed


class Words(nn.Module):
    """A table of few words."""

    def __init__(self, n_words: int) -> None:
        super().__init__()
        self.words = nn.Embedding(n_words, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.relu(self.words(ids))


@pytest.mark.parametrize("n_words", [1, 2, 12, 400])
def test_words_are_those_of_the_vocabulary(n_words: int) -> None:
    program = program_of(Words(n_words), torch.zeros(2, 3, dtype=torch.int64))
    (component,) = program.components.values()
    ids = random_feed(component, program, seed=0)["ids"]
    assert int(ids.max()) < min(n_words, 50)
    assert n_words == 1 or int(ids.min()) > 0  # 0 is padding in most models
