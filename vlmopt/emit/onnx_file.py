"""A component as an ONNX file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx
import onnx_ir as ir
import torch

from vlmopt.core.errors import EmitError
from vlmopt.core.program import Component, Dim, TensorSpec
from vlmopt.emit import onnx_bytes
from vlmopt.emit.exported import export_component
from vlmopt.emit.onnx_choices import branch_choices
from vlmopt.emit.onnx_direct import direct_program, translated
from vlmopt.emit.onnx_graph import tidy
from vlmopt.emit.onnx_quantized import with_calls, with_unsigned_weights
from vlmopt.emit.onnx_translation import TRANSLATIONS, as_lowered
from vlmopt.emit.written import EmittedFile, appearing

DEFAULT_OPSET = 20
MINIMUM_OPSET, MAXIMUM_OPSET = 18, 26  # torch translates to 18 and above; ONNX Runtime 1.31 loads up to 26
EXTERNAL_FROM_BYTES = 1_500_000_000  # a protobuf message ends at 2 GB


@dataclass
class SharedWeights:
    """Weights that several graphs of one folder read, by address, and where those lie that were written.

    `replaceable` are those that must lie in a data file, however small, as ONNX Runtime puts others in their place only
    where they do.
    """

    addresses: frozenset[int] = frozenset()
    places: dict[int, onnx_bytes.Place] = field(default_factory=dict)
    replaceable: frozenset[int] = frozenset()

    @property
    def kept(self) -> frozenset[int]:
        """Those that stay as they are, in name and layout."""
        return self.addresses | self.replaceable

    def apart(self, weights: Sequence[ir.Value]) -> frozenset[int]:
        """The replaceable ones among these."""
        return self.replaceable & {where for value in weights if (where := onnx_bytes.address(value)) is not None}

    def is_first(self, weights: Sequence[ir.Value]) -> bool:
        """Whether one of these weights is shared and not yet written."""
        return any(onnx_bytes.address(value) in self.addresses - self.places.keys() for value in weights)


def emit_onnx(
    component: Component,
    dims: Mapping[str, Dim],
    path: Path,
    *,
    opset: int = DEFAULT_OPSET,
    external_from_bytes: int = EXTERNAL_FROM_BYTES,
    shared: SharedWeights | None = None,
) -> EmittedFile:
    """Writes the component as `path`, its weights once, named as its specs name them, its named dimensions dynamic.

    Weights of `external_from_bytes` or more go to `PATH_data` beside it, and so do those of the first graph that holds
    weights shared with others, which then read them there.

    Raises:
        EmitError: torch cannot express the graph in this opset, or a dimension was fixed on the way.
        VlmoptError: the file cannot be written.
    """
    if not MINIMUM_OPSET <= opset <= MAXIMUM_OPSET:
        raise EmitError("opset", str(opset), expected=f"{MINIMUM_OPSET} to {MAXIMUM_OPSET}")
    with _quiet():
        model = _translated(with_unsigned_weights(component), dims, opset)
        others = shared or SharedWeights()
        tidy(model, component.inputs, component.outputs, others.kept, replaceable=others.replaceable)
        branch_choices(model)
    _require_dims(component.name, model.graph.inputs, component.inputs)
    model.ir_version = _ir_version(opset)
    model.graph.name = component.name
    message, weights = onnx_bytes.detach_weights(model)
    try:
        onnx_bytes.check_structure(message, weights)
    except onnx.checker.ValidationError as problem:
        raise EmitError(component.name, f"the ONNX checker refuses the graph ({problem})") from problem
    is_external = onnx_bytes.weight_bytes(weights) >= external_from_bytes
    return _write(message, weights, path, is_external=is_external, shared=others)


def _ir_version(opset: int) -> int:
    """The oldest that knows the opset; onnx 1.23 writes 14 by default, and ONNX Runtime 1.31 stops at 13."""
    return int(onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)]))


def _translated(component: Component, dims: Mapping[str, Dim], opset: int) -> ir.Model:
    direct = direct_program(component, dims)
    exported = as_lowered(_exported(component, dims)) if direct is None else direct
    translate = translated if direct is not None else _translated_by_torch
    try:
        with torch.no_grad():
            return translate(component, exported, opset)
    except torch.onnx.OnnxExporterError as problem:
        reason = " ".join(str(problem.__cause__ or problem).split())[:300]
        raise EmitError(
            component.name, f"cannot be translated to ONNX opset {opset} ({reason})", remedy="try --opset 20 or above"
        ) from problem


def _exported(component: Component, dims: Mapping[str, Dim]) -> torch.export.ExportedProgram:
    return export_component(replace(component, graph=with_calls(component)), dims)


def _translated_by_torch(component: Component, exported: torch.export.ExportedProgram, opset: int) -> ir.Model:
    program = torch.onnx.export(
        exported,
        (),
        dynamo=True,
        opset_version=opset,
        input_names=[spec.name_in_files for spec in component.inputs],
        output_names=[spec.name_in_files for spec in component.outputs],
        custom_translation_table=TRANSLATIONS,
        optimize=False,
        verbose=False,
    )
    assert program is not None
    return program.model


def _require_dims(place: str, values: Sequence[ir.Value], specs: Sequence[TensorSpec]) -> None:
    for value, spec in zip(values, specs, strict=True):
        found = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape or ())
        wanted = spec.shape_in_files
        if found != wanted:
            raise EmitError(f"{place}: input {spec.name}", f"became {found} in ONNX", expected=str(wanted))


def _write(
    message: onnx.ModelProto, weights: Sequence[ir.Value], path: Path, *, is_external: bool, shared: SharedWeights
) -> EmittedFile:
    companions: tuple[Path, ...] = ()
    with ExitStack() as stack:
        temporary = stack.enter_context(appearing(path))
        apart = shared.apart(weights)
        if is_external or apart or shared.is_first(weights):
            data = path.with_name(path.name + "_data")
            companions = (data,)
            temporary_data = stack.enter_context(
                appearing(data)
            )  # takes its name first: a graph without data is broken
            written = onnx_bytes.write_with_data_file(
                message, weights, temporary, temporary_data, data.name, shared.places, apart
            )
            # only what the program holds: memory of this graph's own constants is soon another graph's
            shared.places |= {where: place for where, place in written.items() if where in shared.addresses}
        else:
            onnx_bytes.write_single_file(message, weights, temporary, shared.places)
    return EmittedFile(path, companions)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs that torchvision is absent and what it leaves unfolded, and warns of its own use of torch."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
