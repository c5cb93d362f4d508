"""Writes the graphs of a program in the formats that runtimes read, and the manifest that tells what they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from vlmopt.core.errors import EmitError
from vlmopt.core.formats import SUFFIXES
from vlmopt.core.program import Assembly, Component, Dim, Program
from vlmopt.core.progress import Progress
from vlmopt.emit.executorch_file import emit_executorch
from vlmopt.emit.genai_graphs import runs_in_genai, write_genai_graphs
from vlmopt.emit.manifest import build_manifest, write_manifest
from vlmopt.emit.onnx_file import DEFAULT_OPSET, EXTERNAL_FROM_BYTES, SharedWeights, emit_onnx
from vlmopt.emit.openvino_file import emit_openvino
from vlmopt.emit.pt2_file import emit_pt2
from vlmopt.emit.tied_tables import shared_tensors, with_shared_tables
from vlmopt.emit.torchscript_file import emit_torchscript
from vlmopt.emit.written import EmittedFile
from vlmopt.graph.assembled import DECODER, EMBEDDING
from vlmopt.graph.modules import clone_graph
from vlmopt.graph.replay import device_of

__all__ = [
    "DEFAULT_OPSET",
    "EXTERNAL_FROM_BYTES",
    "EmittedFile",
    "build_manifest",
    "emit_executorch",
    "emit_onnx",
    "emit_openvino",
    "emit_program",
    "emit_pt2",
    "emit_torchscript",
    "write_manifest",
]

ONNX_FOLDER = "onnx"


def emit_program(
    program: Program,
    formats: Sequence[str],
    folder: Path,
    *,
    progress: Progress,
    opset: int = DEFAULT_OPSET,
    external_from_bytes: int = EXTERNAL_FROM_BYTES,
    replaceable: Collection[str] = (),
) -> dict[str, dict[str, str]]:
    """Writes every component in every format at the top of `folder`; returns component -> format -> file.

    The ONNX graphs of a generative program go to `onnx/`, where transformers.js looks for them, and a weight that two
    of them read (a tied embedding) is written once. One that onnxruntime-genai runs has that runtime's graphs there as
    well, which no component names.

    Args:
        replaceable: weights, as `COMPONENT/PATH`, that a runtime may put others in the place of: in ONNX files they
            keep path and layout, and lie outside of the graph file.

    Raises:
        EmitError: an unknown format, or a graph that one of them cannot hold.
        VlmoptError: the disk is full or the folder cannot be written.
    """
    unknown = [name for name in formats if name not in SUFFIXES]
    if unknown:
        raise EmitError("emit", f"unknown format {unknown[0]!r}", expected=f"one of {', '.join(SUFFIXES)}")
    program = with_shared_tables(program)
    shared = SharedWeights(_shared_addresses(program), replaceable=_addresses(program, replaceable))
    is_for_genai = "onnx" in formats and runs_in_genai(program)
    apart = (EMBEDDING, DECODER) if is_for_genai else ()  # their weights, for genai's graphs read the same files
    writers: dict[str, Callable[[Component, Mapping[str, Dim], Path], EmittedFile]] = {
        "onnx": lambda component, dims, path: emit_onnx(
            component,
            dims,
            path,
            opset=opset,
            external_from_bytes=0 if component.name in apart else external_from_bytes,
            shared=shared,
        ),
        "torchscript": lambda component, dims, path: emit_torchscript(component, path),
        "pt2": emit_pt2,
        "openvino": partial(emit_openvino, opset=opset),
        "executorch": emit_executorch,
    }
    names: dict[str, dict[str, str]] = {name: {} for name in program.components}
    jobs = [(_on_cpu(component), kind) for component in program.components.values() for kind in formats]
    for component, kind in progress.track(jobs, "writing graphs", total=len(jobs)):
        is_apart = program.assembly is Assembly.GENERATIVE and kind == "onnx"
        path = (folder / ONNX_FOLDER if is_apart else folder) / (component.name + SUFFIXES[kind])
        path.parent.mkdir(exist_ok=True)
        written = writers[kind](component, program.dims, path).path
        names[component.name][kind] = written.relative_to(folder).as_posix()
    if is_for_genai:
        write_genai_graphs(program, folder / ONNX_FOLDER)
    return names


def _shared_addresses(program: Program) -> frozenset[int]:
    """Where the weights lie that two components or more read."""
    counts = Counter[int]()
    for component in program.components.values():
        weights = [*component.graph.parameters(), *shared_tensors(component)]
        counts.update({weight.data_ptr() for weight in weights if weight.numel()})
    return frozenset(address for address, n in counts.items() if n > 1)


def _addresses(program: Program, wanted: Collection[str]) -> frozenset[int]:
    """Where these weights lie."""
    found = set[int]()
    for name, component in program.components.items():
        for path, weight in component.graph.named_parameters(remove_duplicate=False):
            if f"{name}/{path}" in wanted:
                found.add(weight.data_ptr())
    return frozenset(found)


def _on_cpu(component: Component) -> Component:
    """The component with its weights where files are read: one on an accelerator is copied."""
    if device_of(component.graph).type == "cpu":
        return component
    return replace(component, graph=clone_graph(component.graph).cpu())
