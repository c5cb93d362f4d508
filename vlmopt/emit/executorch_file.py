"""A component as an ExecuTorch file, its products for XNNPACK: what phones and boards run without Python."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from vlmopt.core.errors import EmitError
from vlmopt.core.formats import BATCH_AXES, NO_BATCH
from vlmopt.core.program import Component, Dim, TensorSpec
from vlmopt.emit.executorch_quantized import with_kernels
from vlmopt.emit.exported import export_component
from vlmopt.emit.written import EmittedFile, appearing

_BATCHES = ("batch", "images")


def emit_executorch(component: Component, dims: Mapping[str, Dim], path: Path) -> EmittedFile:
    """Writes the component as `path` (`.pte`) with the method `forward` of its inputs in order, at batch 1.

    ExecuTorch plans its memory for the largest sizes a program takes, so a batch would cost its maximum at every call;
    other named dimensions stay free up to theirs. `batch_axes` tells who has more samples where to take them apart.

    Raises:
        EmitError: ExecuTorch refuses the graph.
        VlmoptError: the file cannot be written.
    """
    exported = export_component(with_kernels(_of_one_sample(component)), dims)
    axes = [_batch_axis(spec) for spec in (*component.inputs, *component.outputs)]
    with _quiet():
        try:
            program = _lowered(exported, {BATCH_AXES: axes})
        except Exception as problem:
            reason = " ".join(str(problem).split())[:300]
            raise EmitError(
                component.name, f"ExecuTorch refuses it ({reason})", remedy="leave executorch out of --emit"
            ) from problem
    with appearing(path) as temporary, temporary.open("wb") as stream:
        program.write_to_file(stream)
    return EmittedFile(path)


def _lowered(exported: ExportedProgram, constants: dict[str, Any]) -> Any:
    """With what transformers mends for ExecuTorch in graphs of its models, which ours come from."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from transformers.exporters import exporter_executorch  # registers the patches that are applied
    from transformers.exporters.utils import apply_fx_node_fixes, apply_fx_program_fixes, apply_patches

    with apply_patches("executorch"), apply_patches("executorch.xnnpack"):
        apply_fx_program_fixes("executorch", exported)
        apply_fx_node_fixes("executorch", exported.graph_module)
        edge = to_edge_transform_and_lower(
            exported,
            partitioner=[XnnpackPartitioner()],
            compile_config=exporter_executorch._get_edge_compile_config("xnnpack"),
            constant_methods=constants,
        )
        return edge.to_executorch()


def _of_one_sample(component: Component) -> Component:
    def fixed(spec: TensorSpec) -> TensorSpec:
        return replace(spec, shape=tuple(1 if size in _BATCHES else size for size in spec.shape))

    return replace(component, inputs=tuple(map(fixed, component.inputs)), outputs=tuple(map(fixed, component.outputs)))


def _batch_axis(spec: TensorSpec) -> int:
    return next((axis for axis, size in enumerate(spec.shape) if size in _BATCHES), NO_BATCH)


@contextmanager
def _quiet() -> Iterator[None]:
    """Its libraries warn of each other's deprecations, and torchao of kernels for other machines."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
