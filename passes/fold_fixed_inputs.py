"""Evaluates a text encoder whose inputs the task fixes, and turns the comparison with it into one linear map.

Before: `logits = s * normalize(image(pixels)) @ normalize(text(prompts)).T + b`;
after: `logits = linear(normalize(image(pixels)))`
with weight `s * normalize(mean over prompts of normalize(text(prompt)))` and bias `b`; the text encoder is gone.
Identity: the same function; the sums are taken in another order.

Cases:
1. A dual program whose task fixes the prompts folds.
2. Without fixed inputs nothing is a candidate but every encoder is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Refusal, Site
from vlmopt.core.cost import Cost
from vlmopt.core.facts import CAPTURED, INPUTS_FOLDED, Fact
from vlmopt.core.program import Assembly, Component, Program, Similarity, TensorSpec
from vlmopt.graph.build import insert_call, insert_linear
from vlmopt.graph.costing import component_cost
from vlmopt.graph.example import component_of, program_from
from vlmopt.graph.head import fitted_linear
from vlmopt.graph.modules import output_node, output_values
from vlmopt.graph.replay import run_component
from vlmopt.graph.similarity import class_embeddings

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldFixedInputs(Pass):
    """Evaluates components whose inputs the task fixes; their weights leave the artifact."""

    name: ClassVar[str] = "fold-fixed-inputs"
    promise: ClassVar[Promise] = Promise.CLOSE
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED})
    produces: ClassVar[frozenset[Fact]] = frozenset({INPUTS_FOLDED})
    changes_signature: ClassVar[bool] = True

    def plan(self, program: Program, context: Context) -> Plan:
        sites: list[Site] = []
        refusals: list[Refusal] = []
        for name, component in program.components.items():
            fixed = program.fixed_inputs.get(name, {})
            missing = [spec.name for spec in component.inputs if spec.name not in fixed]
            if program.assembly is not Assembly.DUAL or program.similarity is None:
                refusals.append(Refusal(name, name, "no comparison of two encoders to fold into"))
            elif missing:
                refusals.append(Refusal(name, name, f"the task does not fix {', '.join(missing)}"))
            else:
                n = len(program.labels)
                cost = component_cost(component, program.dims) - _comparison_cost(component, n, program.similarity)
                sites.append(Site(name, name, (name,), cost, f"evaluated for {n} classes"))
        return Plan(tuple(sites), tuple(refusals))

    def apply(self, program: Program, site: Site, context: Context) -> None:
        similarity = program.similarity
        assert similarity is not None
        fixed = program.fixed_inputs[site.component]
        embeddings = run_component(program.components[site.component], [fixed])
        classes = class_embeddings(embeddings, len(program.labels))
        (other,) = (name for name in program.components if name != site.component)
        _append_comparison(program, other, classes, similarity)
        del program.components[site.component]
        program.heads.pop(site.component, None)
        program.fixed_inputs = {}
        program.similarity = None
        program.assembly = Assembly.FUSED

    @classmethod
    def cases(cls) -> Iterable[Case]:
        yield Case("fixed prompts", lambda: _dual({"text_encoder": {"x": torch.eye(3, 4)}}), 1, ("does not fix x",))
        yield Case("free prompts", lambda: _dual({}), 0, ("does not fix x",))


def _comparison_cost(component: Component, n_classes: int, similarity: Similarity) -> Cost:
    """Norm, division and linear map that take the encoder's place."""
    width = int(component.outputs[0].shape[-1])
    item = getattr(torch, component.outputs[0].dtype).itemsize
    parameters = width * n_classes + (n_classes if similarity.bias else 0)
    return Cost(parameters, parameters * item, width * n_classes, item * (1 + width + n_classes))


def _append_comparison(program: Program, name: str, classes: Tensor, similarity: Similarity) -> None:
    """Puts `linear(normalize(embedding))` behind the component's output; classes [L, D] are normalised."""
    component = program.components[name]
    graph = component.graph
    embedding, output = output_values(graph)[0], output_node(graph)
    weight = similarity.scale * classes.double()
    bias = torch.full((len(classes),), similarity.bias)
    linear = fitted_linear(weight, bias if similarity.bias else None, like=next(graph.parameters(), classes))
    with graph.graph.inserting_before(output):
        norm = insert_call(graph, aten.linalg_vector_norm.default, (embedding, 2.0, [-1], True))
        unit = insert_call(graph, aten.div.Tensor, (embedding, norm))
        logits = insert_linear(graph, "class_similarity", linear, unit)
    output.args = ((logits, *output_values(graph)[1:]),)
    spec = TensorSpec("logits", (*component.outputs[0].shape[:-1], len(classes)), component.outputs[0].dtype)
    program.components[name] = replace(component, outputs=(spec, *component.outputs[1:]))
    program.heads[name] = str(logits.target)


class _Encoder(torch.nn.Module):
    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.projection = torch.nn.Linear(width, 5, bias=False)
        self.projection.weight = torch.nn.Parameter(torch.randn(5, width, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(torch.relu(x))  # type: ignore[no-any-return]


def _dual(fixed: dict[str, dict[str, Tensor]]) -> Program:
    image = component_of(_Encoder(6, 0), torch.ones(2, 6), name="image_encoder", output="image_embeds")
    text = component_of(_Encoder(4, 1), torch.ones(2, 4), name="text_encoder", output="text_embeds")
    program = program_from({"image_encoder": image, "text_encoder": text}, Assembly.DUAL)
    return replace(program, similarity=Similarity(10.0, -1.0), fixed_inputs=fixed, labels=("a", "b", "c"))
