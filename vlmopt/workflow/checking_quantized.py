"""Gates of quantized graphs: each layer alone against its simulation, and how far the whole may be off.

Compared as a whole, a quantized graph departs from its program by far more than a rounding: a value that lies between
two levels falls to one in the program and to the other in the runtime, and all layers behind hand that on, as they do
with the roundings themselves. So the whole is held to a share of what those change. Layer by layer, on equal inputs,
both must agree nearly to the bit: a lowering that is wrong, or integer products that saturate on this processor, are
found there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from vlmopt.core.program import Component
from vlmopt.emit import emit_onnx
from vlmopt.graph.excerpt import input_values, side_by_side
from vlmopt.graph.quantized import quantized_nodes, with_exact_inputs
from vlmopt.graph.replay import run_outputs
from vlmopt.verify.parity import Gate, Recorded, check_file, worst_difference
from vlmopt.verify.tolerances import ARTIFACT, QUANTIZED_LAYER, QUANTIZED_NOISE


def quantized_tolerance(component: Component, cases: Sequence[Recorded]) -> float | None:
    """How far its ONNX file may be off; None where it has no quantized layers, and its type says it.

    Args:
        cases: inputs, and what the component gives for them.
    """
    if not quantized_nodes(component.graph):
        return None
    exact = with_exact_inputs(component)
    noise = max(worst_difference(run_outputs(exact, feed), wanted) for feed, wanted in cases)
    return max(ARTIFACT[component.outputs[0].dtype], QUANTIZED_NOISE * noise)


def check_quantized_layers(component: Component, cases: Sequence[Recorded], *, opset: int) -> list[Gate]:
    """One gate for all quantized layers of the component that ONNX Runtime runs; none where it has none."""
    nodes = quantized_nodes(component.graph)
    if not nodes:
        return []
    dtype, read = component.outputs[0].dtype, [node.all_input_nodes[0].name for node in nodes]
    title = f"{len(nodes)} quantized layers of {component.name} compute what the program simulates"
    limit, worst = max(QUANTIZED_LAYER, ARTIFACT[dtype]), 0.0
    with TemporaryDirectory() as folder:
        for feed, _ in cases:
            values = input_values(component, feed, read)
            layers = side_by_side(component, nodes, values)
            path = emit_onnx(layers, {}, Path(folder) / "layers.onnx", opset=opset).path
            given = {spec.name: values[spec.name] for spec in layers.inputs}
            recorded = [(given, run_outputs(layers, given))]
            worst = max(worst, check_file(title, path, "onnx", recorded, dtype=dtype, limit=limit).found)
    return [Gate(title, worst <= limit, worst, limit)]
