"""Where two ways of computing one graph part: node by node, which is worst and where it begins.

An error is `parity.difference`: the largest absolute difference over the largest value of the node. A node's growth is
its error over the largest error among what it reads, so rounding that is only handed on does not count.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from vlmopt.core.errors import ArtifactError
from vlmopt.core.workload import Feed
from vlmopt.graph.text import operation_text
from vlmopt.verify.parity import difference

JUMP = 10.0  # a growth from which on it is the node itself that departs
_N_EPSILONS = 16  # errors below so many roundings are noise


@dataclass(frozen=True)
class NodeError:
    """How far one node departs. `module` is the part of the model it belongs to, where that is known."""

    name: str
    operation: str
    module: str
    error: float
    growth: float


@dataclass(frozen=True)
class Departure:
    """All nodes that both sides have, in graph order, and the first one that departs by itself."""

    nodes: tuple[NodeError, ...]
    first_jump: NodeError | None

    def worst(self, n: int) -> tuple[NodeError, ...]:
        """The n nodes with the largest errors, largest first; of equal ones the earlier."""
        return tuple(sorted(self.nodes, key=lambda node: -node.error)[:n])


def departure(graph: fx.GraphModule, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Departure:
    """Compares the values that both sides have of the graph's nodes.

    Args:
        found, wanted: value by name of the node; integers and truth values are not compared.
    """
    rows: list[NodeError] = []
    inherited: dict[fx.Node, float] = {}
    jump: NodeError | None = None
    for node in graph.graph.nodes:
        read = max((inherited[operand] for operand in node.all_input_nodes), default=0.0)
        inherited[node] = read
        value = wanted.get(node.name)
        if (
            node.op in ("placeholder", "output")
            or value is None
            or node.name not in found
            or not value.is_floating_point()
        ):
            continue
        noise = _N_EPSILONS * float(torch.finfo(value.dtype).eps)
        error = difference(found[node.name], value)
        inherited[node] = error
        row = NodeError(node.name, operation_text(graph, node), _module(node), error, error / max(read, noise))
        rows.append(row)
        if jump is None and row.growth >= JUMP:
            jump = row
    return Departure(tuple(rows), jump)


def _module(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    weights = [str(operand.target) for operand in node.all_input_nodes if operand.op == "get_attr"]
    if weights:
        return weights[0].rpartition(".")[0]
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


class _Recorder(fx.Interpreter):
    """Keeps the tensors that nodes compute."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op not in ("get_attr", "output"):
            self.values[n.name] = value.detach()
        return value


def graph_values(graph: fx.GraphModule, feed: Feed) -> dict[str, Tensor]:
    """The values of all nodes on one batch, whose tensors are in the order of the graph's inputs."""
    recorder = _Recorder(graph)
    with torch.no_grad():
        recorder.run(*feed.values())
    return recorder.values


def onnx_values(path: Path, feed: Feed, names: Iterable[str]) -> dict[str, Tensor]:
    """The values of an ONNX file's outputs, and of those of its values that have one of these names.

    Values that are looked at keep ONNX Runtime from fusing across them, so the last digits may differ from a plain run.

    Raises:
        ArtifactError: the file cannot be loaded.
    """
    import onnx
    import onnxruntime

    wanted = set(names)
    try:
        model = onnx.load(str(path), load_external_data=False)
        known = {value.name for value in model.graph.output}
        inner = [name for node in model.graph.node for name in node.output if name in wanted - known]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / path.name
            onnx.save(model, str(file))
            for data in path.parent.glob("*.onnx_data"):  # ONNX Runtime follows no link out of the folder
                shutil.copyfile(data, Path(folder) / data.name)
            session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ArtifactError(str(path), f"ONNX Runtime cannot load it ({reason})") from error
    inputs = {value.name for value in session.get_inputs()}
    arrays = {key: np.ascontiguousarray(value.numpy()) for key, value in feed.items() if key in inputs}
    outputs = [value.name for value in session.get_outputs()]
    found = zip(outputs, session.run(outputs, arrays), strict=True)
    return {name: torch.from_numpy(np.asarray(value)) for name, value in found}
