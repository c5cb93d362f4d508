"""A program of many sums, a run around it, and passes that break one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from vlmopt.core.contract import Pass
from vlmopt.core.ledger import Ledger
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.graph.example import program_of
from vlmopt.preprocess import Preprocessor
from vlmopt.recipe.schema import PassStep, Recipe
from vlmopt.registry import make_pass
from vlmopt.rundir import RunDirectory
from vlmopt.workflow.opening import OpenedModel
from vlmopt.workflow.run_state import RunState

FAULTY = Path(__file__).parent / "faulty"


class Sums(nn.Module):
    """x + 1/2 + 1/2 ... : [B, 4] -> [B, 4]."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.scale = nn.Parameter(torch.full((4,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        for _ in range(self.n):
            x = x + 0.5
        return x


def sums(n: int) -> Program:
    return program_of(Sums(n), torch.ones(2, 4))


def recipe_of(*steps: dict[str, object], name: str = "replace-addition") -> Recipe:
    """A recipe of so many steps of one pass with these options."""
    passes = tuple(PassStep(name=name, options=options) for options in steps)
    return Recipe(model="sums", passes=passes, pass_dirs=(str(FAULTY),))


def passes_of(recipe: Recipe) -> list[Pass]:
    return [make_pass(step.name, step.options, [FAULTY]) for step in recipe.passes]


@contextmanager
def run_of(program: Program, recipe: Recipe, folder: Path, processor: Preprocessor | None = None) -> Iterator[RunState]:
    """A run without a task on a program that is there already."""
    with RunDirectory(folder / "run", key="k") as run:
        opened = OpenedModel(program, processor, folder)  # type: ignore[arg-type]
        state = RunState(recipe, run, opened, None, Ledger(), Silent())
        state.original = program
        yield state


def numbers(found: Sequence[dict[str, object]]) -> list[object]:
    return [site["number"] for site in found]
