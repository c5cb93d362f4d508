"""Passes that break one rule each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.program import Program, TensorSpec
from vlmopt.graph.modules import output_node, output_values, placeholders, set_at

Action = Callable[[Program], None]


@dataclass(frozen=True)
class DoAnything(Pass):
    """Does `on_plan` while it plans and `on_apply` for every one of its sites."""

    on_apply: Action = lambda program: None
    on_plan: Action = lambda program: None
    sites: tuple[str, ...] = ("model/site",)
    is_chosen: bool = True

    name: ClassVar[str] = "do-anything"
    promise: ClassVar[Promise] = Promise.LOSSY

    def plan(self, program: Program, context: Context) -> Plan:
        self.on_plan(program)
        return Plan(tuple(Site(name, "model", (name,)) for name in self.sites), is_chosen=self.is_chosen)

    def apply(self, program: Program, site: Site, context: Context) -> None:
        self.on_apply(program)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return ()


class DeclaresSignature(DoAnything):
    changes_signature: ClassVar[bool] = True


def double_output(program: Program) -> None:
    """An honest edit: multiplies the output by two."""
    graph = program.components["model"].graph
    (value,) = output_values(graph)
    with graph.graph.inserting_before(output_node(graph)):
        made = graph.graph.call_function(torch.ops.aten.mul.Tensor, (value, 2.0))
    made.meta = dict(value.meta)
    output_node(graph).args = ((made,),)


def write_in_place(program: Program) -> None:
    with torch.no_grad():
        program.components["model"].graph.get_parameter("head.weight").mul_(1.5)


def write_behind_autograd(program: Program) -> None:
    program.components["model"].graph.get_parameter("layers.0.up.weight").data[0, 0] += 1.0


def reorder_rows_of_weight(program: Program) -> None:
    """Leaves every number there, in another row."""
    weight = program.components["model"].graph.get_parameter("layers.0.up.weight")
    weight.data = weight.data.flip(0)


def forget_metadata(program: Program) -> None:
    double_output(program)
    output_values(program.components["model"].graph)[0].meta.clear()


def return_input(program: Program) -> None:
    graph = program.components["model"].graph
    output_node(graph).args = ((*output_values(graph), placeholders(graph)[0]),)
    add_output_spec(program, program.components["model"].inputs[0].shape)


def return_twice(program: Program) -> None:
    graph = program.components["model"].graph
    output_node(graph).args = (output_values(graph) * 2,)
    add_output_spec(program, program.components["model"].outputs[0].shape)


def add_output_spec(program: Program, shape: tuple[int | str, ...]) -> None:
    part = program.components["model"]
    program.components["model"] = replace(part, outputs=(*part.outputs, TensorSpec("extra", shape, "float32")))


def return_twice_in_silence(program: Program) -> None:
    graph = program.components["model"].graph
    output_node(graph).args = (output_values(graph) * 2,)


def rename_output(program: Program) -> None:
    part = program.components["model"]
    program.components["model"] = replace(part, outputs=(replace(part.outputs[0], name="scores"),))
    double_output(program)


def add_component(program: Program) -> None:
    program.components["copy"] = replace(program.components["model"], name="copy")


def rename_input(program: Program) -> None:
    graph = program.components["model"].graph
    placeholders(graph)[0].target = "renamed"


def claim_other_shape(program: Program) -> None:
    part = program.components["model"]
    program.components["model"] = replace(part, outputs=(replace(part.outputs[0], shape=("batch", 99)),))
    double_output(program)


def claim_other_dtype(program: Program) -> None:
    part = program.components["model"]
    program.components["model"] = replace(part, outputs=(replace(part.outputs[0], dtype="float16"),))
    double_output(program)


def break_graph(program: Program) -> None:
    graph = program.components["model"].graph
    node = next(node for node in graph.graph.nodes if node.op == "call_module")
    node.target = "nowhere.at.all"


def fail(program: Program) -> None:
    raise ZeroDivisionError("division by zero")


def replace_weight_of_leaf(program: Program) -> None:
    """Gives a leaf module, which the program before shares, another weight."""
    head = program.components["model"].graph.get_submodule("head")
    head.weight = torch.nn.Parameter(torch.zeros_like(head.weight))


def change_setting_of_leaf(program: Program) -> None:
    program.components["model"].graph.get_submodule("norm").eps = 0.5


def replace_leaf(program: Program) -> None:
    """An honest edit that the text of the graph does not show: another module under the same name."""
    graph = program.components["model"].graph
    old = graph.get_submodule("head")
    new = torch.nn.Linear(old.in_features, old.out_features)
    new.weight = torch.nn.Parameter(torch.zeros_like(old.weight))
    set_at(graph, "head", new)


def change_labels(program: Program) -> None:
    program.labels = ("cat", "dog", "neither")
    double_output(program)


def change_dims(program: Program) -> None:
    program.dims["batch"] = replace(program.dims["batch"], maximum=2)  # type: ignore[index]


def take_component_away(program: Program) -> None:
    program.components["model"] = None  # type: ignore[assignment]


def rename_component(program: Program) -> None:
    program.components["model"] = replace(program.components["model"], name="other")


def return_no_tuple(program: Program) -> None:
    graph = program.components["model"].graph
    output_node(graph).args = output_values(graph)


def forget_head(program: Program) -> None:
    """Puts the head under another name and leaves the entry of `heads` behind."""
    graph = program.components["model"].graph
    set_at(graph, "other", graph.get_submodule("head"))
    node = next(node for node in graph.graph.nodes if node.target == "head")
    node.target = "other"


@dataclass(frozen=True)
class PlanAnything(DoAnything):
    """Returns from `plan` what it was given."""

    plans: object = None

    def plan(self, program: Program, context: Context) -> Plan:
        return self.plans  # type: ignore[return-value]
