"""An honest pass and its case, from which the bad ones differ in one thing each."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, fx, nn

from vlmopt.core.contract import Case, Plan, Refusal, Site
from vlmopt.core.cost import Cost
from vlmopt.core.program import Program
from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.costing import nodes_cost
from vlmopt.graph.example import program_of

NOT_ONE = "the factor is not one"


class Scaled(nn.Module):
    """A Linear and an activation, multiplied by factors one after another."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.factors = factors
        self.linear = nn.Linear(4, 4)
        self.linear.weight = nn.Parameter(torch.linspace(-1, 1, 16).reshape(4, 4))
        self.linear.bias = nn.Parameter(torch.linspace(-1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.linear(x))
        for factor in self.factors:
            x = x * factor
        return x + 1.0


def scaled(*factors: float) -> Program:
    """A program of that model, in torch's default dtype; made once, since no check may change it."""
    return in_dtype(torch.get_default_dtype(), *factors)


@cache
def in_dtype(dtype: torch.dtype, *factors: float) -> Program:
    return program_of(Scaled(*factors).to(dtype), torch.ones(2, 4, dtype=dtype))


def cases() -> tuple[Case, ...]:
    return (Case("by one", lambda: scaled(1.0), n_sites=1),)


def scalings(program: Program) -> list[tuple[str, fx.Node]]:
    """All multiplications with a number, with their components."""
    return [
        (name, node)
        for name, part in program.components.items()
        for node in part.graph.graph.nodes
        if node.target is torch.ops.aten.mul.Tensor and isinstance(node.args[1], float)
    ]


def plan(program: Program, *, is_free: bool = False) -> Plan:
    """Multiplications by one are sites, the others refusals; with `is_free` nothing is said to be saved."""
    sites = [
        Site(
            f"{name}/{node.name}",
            name,
            (node.name,),
            Cost() if is_free else nodes_cost(program.components[name], [node], program.dims),
        )
        for name, node in scalings(program)
        if node.args[1] == 1.0
    ]
    others = [(name, node) for name, node in scalings(program) if node.args[1] != 1.0]
    return Plan(tuple(sites), tuple(Refusal(f"{name}/{node.name}", name, NOT_ONE) for name, node in others))


def node_of(program: Program, site: Site) -> fx.Node:
    """The multiplication that a site is about."""
    graph = program.components[site.component].graph.graph
    return next(node for node in graph.nodes if node.name in site.target)


def apply(program: Program, site: Site) -> None:
    """Takes the multiplication out."""
    node = node_of(program, site)
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    node.replace_all_uses_with(operand)
    drop_dead_nodes(program.components[site.component].graph)


def put(program: Program, site: Site, target: object, *more: object) -> fx.Node:
    """Puts another operation on the same operand in the place of the multiplication."""
    from vlmopt.graph.build import insert_call

    graph, node = program.components[site.component].graph, node_of(program, site)
    with graph.graph.inserting_before(node):
        made = insert_call(graph, target, (node.args[0], *more))  # type: ignore[arg-type]
    node.replace_all_uses_with(made)
    drop_dead_nodes(graph)
    return made
