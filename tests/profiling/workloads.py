"""A classification workload over plain tensors, and a model in which it is known which branch is needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.core.workload import Feed, Outputs
from vlmopt.graph.example import program_of
from vlmopt.graph.head import head_features
from vlmopt.graph.refit import HeadFit, install_head
from vlmopt.graph.replay import run_component
from vlmopt.tasks.mislabelling import mislabelled
from vlmopt.tuning.closed_form import recover_heads

T = TypeVar("T")
WIDTH, CLASSES = 8, 2


@dataclass(eq=False)
class Classification:
    """Rows `x` [n, WIDTH] with classes [n] for the component `model`."""

    x: Tensor
    targets: Tensor
    group_names: Sequence[str]
    n_classes: int = CLASSES
    batch: int = 16
    fingerprint: str = "0" * 64

    @property
    def n_items(self) -> int:
        return len(self.x)

    @property
    def feeds(self) -> Mapping[str, Sequence[Feed]]:
        return {"model": [{"x": part} for part in self.x.split(self.batch)]}

    @property
    def item_groups(self) -> Sequence[str]:
        return self.group_names

    def losses(self, outputs: Outputs) -> Tensor:
        return F.cross_entropy(outputs["model"].double(), self.targets, reduction="none")

    def item_scores(self, outputs: Outputs) -> Tensor:
        return (outputs["model"].argmax(-1) == self.targets).double()

    def head_targets(self, component: str, reference: Outputs) -> Tensor | None:
        return F.one_hot(self.targets, self.n_classes).double()

    def groups(self, component: str) -> Sequence[str]:
        return self.group_names

    def rows(self, component: str, items: Sequence[int]) -> Sequence[int]:
        return items

    def part(self, items: Sequence[int]) -> Classification:
        names = [self.group_names[item] for item in items]
        return replace(self, x=self.x[list(items)], targets=self.targets[list(items)], group_names=names)

    def with_wrong_labels(self, share: float, *, seed: int) -> Classification:
        return replace(self, targets=mislabelled(self.targets, self.n_classes, share, seed=seed))


class Planted(nn.Module):
    """Blocks 0 and 2 write noise-like features, block 1 writes |x0|, block 3 writes nothing; the head is all zeros.

    Shapes: [B, WIDTH] -> [B, n_classes].
    """

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(WIDTH, 4), "down": nn.Linear(4, WIDTH)}) for _ in range(4)
        )
        self.head = nn.Linear(WIDTH, n_classes)
        for parameter in self.parameters():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        needed, useless = self.layers[1], self.layers[3]
        for layer in (needed, useless, self.head):
            for parameter in layer.parameters():
                parameter.data.zero_()
        needed["up"].weight.data[0, 0], needed["up"].weight.data[1, 0] = 1.0, -1.0
        needed["down"].weight.data[7, :2] = 5.0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["down"](torch.relu(layer["up"](x)))
        return self.head(x)  # type: ignore[no-any-return]


def planted_program(n_classes: int = CLASSES) -> Program:
    return program_of(Planted(n_classes), torch.ones(2, WIDTH))


def planted_workload(*, n: int = 96, per_group: int = 2, seed: int = 1) -> Classification:
    """Is |x0| above its median? Only block 1 makes that a linear question."""
    x = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed))
    targets = (x[:, 0].abs() > x[:, 0].abs().median()).long()
    return Classification(x, targets, [f"g{i // per_group}" for i in range(n)])


def with_head(program: Program, workload: Classification) -> Program:
    """The program with its head fitted on the workload."""
    return recover_heads(program, workload, {}, components=frozenset({"model"}), progress=Silent(), seed=0)


def with_memorised_head(program: Program, workload: Classification) -> Program:
    """The program with the head that least squares gives without any restraint, on few rows: it knows them by heart."""
    component = program.components["model"]
    features = run_component(component, workload.feeds["model"], head_features(component, program.heads["model"]))
    x = torch.cat([features.double(), torch.ones(len(features), 1)], dim=1)
    targets = F.one_hot(workload.targets, workload.n_classes).double()
    solution = torch.linalg.lstsq(x, targets).solution.T
    fit = HeadFit(solution[:, :-1], solution[:, -1], x @ solution.T, 0.0)
    part, path = install_head(component, program.heads["model"], fit)
    return replace(program, components={"model": part}, heads={"model": path}, fitted_heads=frozenset({"model"}))


def relabelled(workload: Classification, n_classes: int, *, seed: int) -> Classification:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, n_classes, (workload.n_items,), generator=generator)
    return replace(workload, targets=targets, n_classes=n_classes)


class StoppedError(Exception):
    """What `StopsAfter` raises."""


@dataclass
class StopsAfter:
    """Progress that stops the work when so many items were handed out, as Ctrl-C would."""

    n_items: int

    def stage(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def track(self, items: Iterable[T], what: str, *, total: int | None = None) -> Iterator[T]:
        for item in items:
            if self.n_items == 0:
                raise StoppedError(what)
            self.n_items -= 1
            yield item

    def message(self, text: str) -> None:
        return None
