"""Where adapters may go: at a value of the stream, beside a branch, or inside the FFN behind a skipped attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from vlmopt.graph.branches import Branch, BranchKind, find_branches
from vlmopt.graph.marks import Mark
from vlmopt.graph.regions import entry_linears


@dataclass(frozen=True)
class AdapterPlace:
    """Where an adapter goes: `total + A(value)`, read by `readers`.

    Args:
        to: the sum that the adapter joins, behind `value` in the graph; by default `value` itself.
        readers: by default all that read the sum.
    """

    value: fx.Node
    to: fx.Node | None = None
    readers: tuple[fx.Node, ...] | None = None

    @property
    def total(self) -> fx.Node:
        return self.value if self.to is None else self.to


def stream_place(value: fx.Node) -> AdapterPlace | str:
    """The place `x + A(x)` at a value of the stream, or why there is none."""
    return why_no_adapter(value) or AdapterPlace(value)


def branch_place(branch: Branch) -> AdapterPlace | str:
    """The place `x + f(x) + A(x)` beside a branch, in front of the norm of a post-norm one, or why there is none."""
    total = branch.exit.all_input_nodes[0] if branch.is_post_norm else branch.exit
    return why_no_adapter(branch.stream) or AdapterPlace(branch.stream, to=total)


def ffn_place(module: fx.GraphModule, stream: fx.Node, mark: Mark) -> AdapterPlace | str:
    """The place in front of the first linear maps of the FFN behind a skipped attention, or why there is none."""
    if mark.kind != BranchKind.ATTENTION.value:
        return f"is a skipped {mark.kind}, and only the place of attention has an FFN behind it"
    for branch in find_branches(module):
        if branch.stream is stream and branch.kind is BranchKind.FFN and branch.layer_name == mark.layer:
            entries = entry_linears(module, branch)
            values = list(dict.fromkeys(operand for entry in entries for operand in entry.all_input_nodes))
            if len(values) != 1:
                return "its FFN does not begin with linear maps of one value"
            return why_no_adapter(values[0]) or AdapterPlace(values[0], readers=entries)
    return "no FFN of its layer begins where the attention was"


def why_no_adapter(value: fx.Node) -> str:
    """Why a value cannot have an adapter; empty where it can."""
    found = value.meta.get("val")
    if not isinstance(found, Tensor) or not found.is_floating_point():
        return "it is no tensor of real numbers"
    if found.dim() not in (2, 3):
        return f"it has {found.dim()} axes, and an adapter maps the last of [B, D] or [B, N, D]"
    width: object = found.shape[-1]  # torch types sizes as plain numbers
    if not isinstance(width, int):
        return "its width varies from call to call"
    return ""
