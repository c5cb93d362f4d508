"""What is written of a program is read back node for node, or refused."""

from __future__ import annotations

import json
import operator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from tests.emit.toy import cases, dual_program
from vlmopt.core.errors import VlmoptError
from vlmopt.core.program import Program
from vlmopt.graph.costing import program_cost
from vlmopt.graph.example import ResidualBlocks, program_of
from vlmopt.graph.notation import read_value, target_from, target_word, write_value
from vlmopt.graph.stored import read_program, write_program
from vlmopt.graph.text import component_text


def again(program: Program, folder: Path) -> Program:
    write_program(program, folder, name="p")
    return read_program(folder, name="p")


def names(program: Program) -> list[str]:
    return [node.name for part in program.components.values() for node in part.graph.graph.nodes]


def test_a_program_is_read_back_node_for_node_and_computes_the_same(tmp_path: Path) -> None:
    program = dual_program()
    fixed = {"text_encoder": {"input_ids": torch.arange(6).reshape(2, 3)}}
    program = replace(program, fixed_inputs=fixed, labels=("a", "b"), fitted_heads=frozenset({"image_encoder"}))
    found = again(program, tmp_path)
    assert names(found) == names(program)
    assert program_cost(found) == program_cost(program)
    for name, part in program.components.items():
        other = found.components[name]
        assert component_text(other) == component_text(part)
        assert (other.inputs, other.outputs) == (part.inputs, part.outputs)
        for inputs in cases(part):
            assert torch.equal(other.graph(*inputs)[0], part.graph(*inputs)[0])
    for field in ("assembly", "dims", "source", "similarity", "heads", "fitted_heads", "labels"):
        assert getattr(found, field) == getattr(program, field)
    assert torch.equal(found.fixed_inputs["text_encoder"]["input_ids"], fixed["text_encoder"]["input_ids"])


class Tied(nn.Module):
    """One weight read by an embedding, by a product and as a stored tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids)) + self.embedding.weight.sum()


def test_a_shared_tensor_stays_shared(tmp_path: Path) -> None:
    program = program_of(Tied(), torch.ones(2, 3, dtype=torch.int64))
    found = again(program, tmp_path)
    graph = found.components["model"].graph
    assert len({id(tensor) for tensor in graph.parameters()}) == 1
    assert program_cost(found).parameters == program_cost(program).parameters == 24
    assert component_text(found.components["model"]) == component_text(program.components["model"])


def test_makers_of_nodes_are_kept(tmp_path: Path) -> None:
    program = program_of(ResidualBlocks(), torch.ones(2, 8))
    node = next(iter(program.components["model"].graph.graph.nodes))
    node.meta["made_by"] = (3, "fold-constants")
    found = next(iter(again(program, tmp_path).components["model"].graph.graph.nodes))
    assert found.meta["made_by"] == (3, "fold-constants")


VALUES = [
    None, True, 3, 2.5, float("inf"), "text", [1, [2, 3]], (1, (2,)), slice(None, 3, None), ..., torch.float16,
    torch.device("cpu"), torch.contiguous_format, torch.strided,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_arguments_survive_json(value: object) -> None:
    found = read_value(json.loads(json.dumps(write_value(value, "here"))), {})
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "target", [torch.ops.aten.add.Tensor, torch.ops.aten.relu.default, operator.getitem, operator.mul, torch.sym_max]
)
def test_functions_are_found_again_by_their_words(target: object) -> None:
    node = fx.Graph().call_function(target)  # type: ignore[arg-type]
    assert target_from({"op": "call_function", "target": target_word(node, "here")}) is target


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_what_has_no_notation_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(VlmoptError, match="here: has an argument of type set"):
        write_value({1}, "here")
    with pytest.raises(VlmoptError, match=r"here: calls .*\.test_stored\.again, which cannot be written down"):
        target_word(fx.Graph().call_function(again), "here")
    program = program_of(ResidualBlocks(), torch.ones(2, 8))
    graph = program.components["model"].graph
    node = next(node for node in graph.graph.nodes if node.op == "call_module")
    graph.add_module("odd", Unknown())
    node.target = "odd"
    with pytest.raises(VlmoptError, match=f"model/{node.name}: calls a module of class Unknown"):
        write_program(program, tmp_path, name="p")


def test_a_graph_that_cannot_run_is_refused_with_its_node(tmp_path: Path) -> None:
    program = program_of(ResidualBlocks(), torch.ones(2, 8))
    write_program(program, tmp_path, name="p")
    text = tmp_path / "p.json"
    text.write_text(
        text.read_text()
        .replace('"in_features": 8', '"in_features": 5')
        .replace('"shape": [\n      "batch",\n      8', '"shape": [\n      "batch",\n      9')
    )
    with pytest.raises(VlmoptError, match="has no shape"):
        read_program(tmp_path, name="p")
